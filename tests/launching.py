"""Starting scripts on several processes, as users do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(processes: int, script: Path, *arguments: str) -> list[str]:
    """The command; what accelerate launch calls."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*command, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), str(script), *arguments]


def finish(*commands: list[str], timeout: float = 240) -> list[str]:
    """Runs commands side by side to their ends, which have to be good; what each of them printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent)]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, env=environment, start_new_session=True, **pipes) for command in commands]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.terminate()  # torchrun then ends its processes, which are in sessions of their own
        for process in started:
            process.wait(timeout=30)
        raise
    failed = [text[-3000:] for process, text in zip(started, printed, strict=True) if process.returncode]
    assert not failed, "\n\n".join(failed)  # of several the one that failed first may be any
    return printed
