"""Pushing: the real `huggingface_hub` client against a Hub on loopback, and everything that goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zoo
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from safetensors import SafetensorError
from scenes import Scenes, processor
from test_card import results
from transformers import AutoModelForObjectDetection

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.commands import distill, push_metric, training
from hf_detrkd.commands.arguments import ModelArguments
from hf_detrkd.commands.records import origin, settings
from hf_detrkd.publishing import PushError, open_repository, push_folder, upload_command
from hf_detrkd.reporting.card import write_card
from hf_detrkd.reporting.writing import ReportError, saving_weights

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, which the client in this process talks to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which the server doesn't speak
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """The client waits up to 23 s between its attempts."""
    sleep = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: sleep(min(seconds, 0.01)))


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run, with files that look like a student's."""
    folder = tmp_path / "student"
    for name in (
        "twin/model.safetensors",
        "checkpoint-5/model.safetensors",
        "training_args.bin",
        "distillation_state.pt",
        "predictions/drawn/my_photo.jpg.png",  # where report.html has predict and export write
        "predictions/predictions.json",
        "onnx/model.onnx",
        "log.txt",  # compare.py's
        "lock",
        "recipe.yaml",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not to be pushed")
    (folder / "model.safetensors").write_bytes(os.urandom(4000))
    (folder / "sheet.png").write_bytes(os.urandom(300))
    (folder / "config.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps(results()))
    write_card(folder)
    return folder


def shell(command: str, hub: HubServer, **environment: str) -> str:
    """What a command prints whose Hub is ours."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **environment}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- a folder ---------------------------------------------------------------------------------------------------------


def test_pushed_is_the_student_and_nothing_else(hub, run):
    push_folder(run, "student", token=WRITE_TOKEN, write=lambda name: write_card(run, repo_id=name))
    pushed = hub.repositories["models", "anna/student"].files  # in the user's own namespace
    names = {".gitattributes", "README.md", "config.json", "model.safetensors", "results.json", "sheet.png"}
    assert pushed.keys() == names
    assert pushed["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert 'model="anna/student"' in pushed["README.md"].decode()
    sent = len(hub.uploads)
    push_folder(run, "anna/student", token=WRITE_TOKEN)  # is there already: nothing new
    assert len(hub.uploads) == sent


@pytest.mark.parametrize(
    "repo_id, token, reason",
    [
        ("anna/student", "hf_wrong", "refuses the token (401"),
        ("anna/student", None, "There is no token for"),
        ("anna/student", READ_TOKEN, "may not write to anna/student (403"),
        ("bob/student", WRITE_TOKEN, "may not write to bob/student (403"),
    ],
)
def test_refused(hub, run, repo_id, token, reason):
    with pytest.raises(PushError) as refused:
        push_folder(run, repo_id, token=token)
    assert reason in str(refused.value) and upload_command(run, repo_id) in str(refused.value)
    assert not hub.repositories


def test_no_network(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match=r"The connection to http://127\.0\.0\.1:9 failed \(ConnectError"):
        push_folder(run, "anna/student", token=WRITE_TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push_folder(run, "anna/student", token=WRITE_TOKEN)


def test_a_model_of_another_kind_is_not_overwritten(hub, run):
    chat = b"---\npipeline_tag: text-generation\nlibrary_name: transformers\n---\n"
    there = hub.add("anna/student", files={"README.md": chat})
    with pytest.raises(PushError, match=r"another kind of model \(task text-generation") as refused:
        push_folder(run, "anna/student", token=WRITE_TOKEN)
    assert upload_command(run, "anna/student-detector") in str(refused.value)  # not over what is there
    assert len(there.commits) == 1


def test_a_detector_that_is_there_gets_a_commit(hub, run):
    there = hub.add("anna/student", files={"README.md": b"---\npipeline_tag: object-detection\n---\n", "old.txt": b"x"})
    push_folder(run, "anna/student", token=WRITE_TOKEN)
    assert len(there.commits) == 2 and "old.txt" in there.files


def test_a_branch_is_made_where_it_is_missing(hub, run):
    there = hub.add("anna/student", files={"README.md": b"---\npipeline_tag: object-detection\n---\n"})
    for _ in range(2):
        push_folder(run, "anna/student", token=WRITE_TOKEN, revision="v2")
    assert "model.safetensors" in there.at("v2")[1] and len(there.commits) == 1  # nothing on main


def test_a_branch_that_cannot_be_made_stops_before_the_training(hub):
    hub.add("anna/student")
    assert open_repository("student", token=WRITE_TOKEN, revision="main") == "anna/student"
    with pytest.raises(PushError, match=r"answered 400 \(Invalid branch name: refs/pr/9"):
        open_repository("anna/student", token=WRITE_TOKEN, revision="refs/pr/9")
    assert not hub.repositories["models", "anna/student"].branches


def test_an_upload_that_breaks_off_is_taken_up_again(hub, run, impatient):
    hub.cut = 1
    push_folder(run, "anna/student", token=WRITE_TOKEN)
    assert len(hub.uploads) == 2


def test_the_command_of_a_failed_push_resumes_it(hub, run, impatient, monkeypatch):
    push_folder(run, "anna/other", token=WRITE_TOKEN)  # so one of the two large files is on the Hub
    (run / "model.safetensors").write_bytes(os.urandom(4000))
    hub.cut = -1
    with pytest.raises(PushError, match="The connection to") as failed:
        push_folder(run, "anna/student", token=WRITE_TOKEN)
    assert list(hub.repositories["models", "anna/student"].files) == [".gitattributes"]
    hub.cut, before = 0, len(hub.uploads)
    shell(str(failed.value).splitlines()[-1].strip(), hub, HF_TOKEN=WRITE_TOKEN)
    assert len(hub.uploads) == before + 1  # only what was missing
    pushed = hub.repositories["models", "anna/student"].files
    assert pushed["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert "checkpoint-5/model.safetensors" not in pushed and "twin/model.safetensors" not in pushed


# -- loading from there ------------------------------------------------------------------------------------------------

LOAD = """
import evaluate, sys, torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection
model = AutoModelForObjectDetection.from_pretrained("anna/student")
AutoImageProcessor.from_pretrained("anna/student")
metric = evaluate.load("anna/coco_detection")
box = {"boxes": [[10, 10, 50, 50]], "labels": [0]}
metric.add_batch(predictions=[box | {"scores": [0.9]}], references=[box])
assert "hf_detrkd" not in sys.modules
print(sum(p.double().abs().sum().item() for p in model.parameters()), metric.compute(class_names=["cat"])["map"])
"""


def test_student_and_metric_load_from_the_hub(hub, tmp_path):
    model = zoo.build("rt_detr")
    arguments = DistillationConfig(output_dir=str(tmp_path / "student"), method="none", use_cpu=True, ema_decay=0)
    trainer = DistillationTrainer(model, args=arguments, eval_dataset=Scenes(2), processing_class=processor())
    trainer.push_to_hub(token=WRITE_TOKEN, license="mit")
    card = ModelCard(hub.repositories["models", "anna/student"].files["README.md"].decode())
    assert card.data.license == "mit" and 'model="anna/student"' in card.text
    assert push_metric.main(["anna/coco_detection", "--token", WRITE_TOKEN]).startswith(hub.url)
    space = hub.repositories["spaces", "anna/coco_detection"]
    assert space.sdk == "static" and 'evaluate.load("anna/coco_detection")' in space.files["README.md"].decode()
    caches = {"HF_HOME": str(tmp_path / "cache"), "HF_UPDATE_DOWNLOAD_COUNTS": "0", "OMP_NUM_THREADS": "1"}
    total, ap = shell(f"cd {tmp_path} && {sys.executable} -c '{LOAD}'", hub, **caches).split()[-2:]
    assert float(total) == pytest.approx(sum(p.double().abs().sum().item() for p in model.parameters()))
    assert float(ap) == 1


def test_metric_needs_the_name_of_its_script(hub):
    with pytest.raises(ValueError, match="must be <user or organisation>/coco_detection"):
        push_metric.main(["anna/coco"])
    hub.add("anna/coco_detection", "spaces", sdk="gradio")
    with pytest.raises(PushError, match="runs on gradio"):
        push_metric.main(["anna/coco_detection", "--token", WRITE_TOKEN])


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def distilling(tmp_path, monkeypatch):
    """A function that distils for a step into the folder ``run`` and pushes."""
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "shapes"))
    places = [tmp_path / "start", tmp_path / "big"]
    for place in places:
        model = zoo.build("rt_detr", classes=len(NAMES))
        model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
        model.save_pretrained(place)
        processor().save_pretrained(place)
    flags = ["--model_name_or_path", str(places[0]), "--teacher_model_name_or_path", str(places[1])]
    flags += ["--method", "logit_kd", "--max_steps", "1", "--save_strategy", "no"]
    flags += ["--logging_steps", "1", "--sheet_images", "0"]
    flags += ["--dataset_name", f"shapes:train=2,validation=2,test=2,size={zoo.SIZE}", "--use_cpu", "true"]
    flags += ["--report_to", "none", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")]
    flags += ["--push_to_hub", "true", "--hub_token", WRITE_TOKEN, "--gradient_share_steps", "0"]

    def run(*more: str) -> dict:
        return distill.main([*flags, *more])

    return run


def check_student(folder: Path) -> None:
    assert AutoModelForObjectDetection.from_pretrained(folder).config.id2label == dict(enumerate(NAMES))


def test_distill_pushes(hub, distilling, tmp_path, capsys, monkeypatch):
    train = distill.train

    def train_with_a_branch(*args):
        assert list(hub.repositories["models", "anna/run"].branches) == ["v2"]  # tried before the training
        return train(*args)

    monkeypatch.setattr(distill, "train", train_with_a_branch)
    results = distilling("--hub_revision", "v2")
    pushed = hub.repositories["models", "anna/run"].at("v2")[1]
    assert json.loads(pushed["results.json"])["student"]["test"]["map"] == results["student"]["test"]["map"]
    card = ModelCard(pushed["README.md"].decode())
    data = card.data
    assert "| FLOPs (G) " in card.text and "| latency (ms) " in card.text and "measured in turn" in card.text
    assert results["student"]["flops"] == results["teacher"]["flops"] > 0  # the same model twice
    assert {its.metric_type: its.metric_value for its in data.eval_results} == {
        name: results["student"]["test"][name] for name in ("map", "map_50", "map_75")
    }
    assert f"on the Hub: {hub.url}/anna/run" in capsys.readouterr().out
    assert WRITE_TOKEN.encode() not in b"".join(pushed.values())


def test_a_wrong_token_stops_before_the_training(hub, distilling, tmp_path):
    with pytest.raises(PushError, match="401"):
        distilling("--hub_token", "hf_wrong")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def no_network(hub: HubServer, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def no_token(hub: HubServer, monkeypatch) -> None:
    hub.tokens.clear()


def no_upload(hub: HubServer, monkeypatch) -> None:
    hub.cut = -1


def other_model(hub: HubServer, monkeypatch) -> None:
    hub.add("anna/run", files={"README.md": b"---\npipeline_tag: text-generation\n---\n"})


@pytest.mark.parametrize(
    "breaks, reason, name",
    [
        (no_network, "ConnectError", "anna/run"),
        (no_token, "refuses the token (401", "anna/run"),
        (no_upload, "The connection to", "anna/run"),
        (other_model, "another kind of model", "anna/run-detector"),
    ],
)
def test_a_push_that_fails_at_the_end_loses_nothing(
    hub, distilling, tmp_path, impatient, monkeypatch, breaks, reason, name
):
    """All is well when the training starts; the command in the message pushes once all is well again."""
    train, tokens = distill.train, dict(hub.tokens)

    def train_and_break(*args):
        trained = train(*args)
        breaks(hub, monkeypatch)
        return trained

    monkeypatch.setattr(distill, "train", train_and_break)
    with pytest.raises(PushError) as failed:
        distilling()
    folder, message = tmp_path / "run", str(failed.value)
    assert reason in message and f"All its files are still in {folder}" in message
    check_student(folder)
    names = ("results.json", "README.md", "test_results.json")  # no curves: one step logs nothing to plot
    assert [name for name in names if not (folder / name).is_file()] == []
    hub.cut = 0
    hub.tokens.update(tokens)
    shell(message.splitlines()[-1].strip(), hub, HF_TOKEN=WRITE_TOKEN)
    pushed = hub.repositories["models", name].files
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    done = shutil.which("mount") and subprocess.run(mount, capture_output=True, text=True)
    if not done or done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'there is no `mount`'}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """Writes a file until there is no byte left."""
    path = place / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def test_a_disk_that_really_is_full_at_the_end(hub, distilling, disk, monkeypatch):
    save = DistillationTrainer.save_model

    def saving(self, *args, **kwargs):
        save(self, *args, **kwargs)
        fill(disk)

    monkeypatch.setattr(DistillationTrainer, "save_model", saving)
    with pytest.raises(ReportError) as failed:
        distilling("--output_dir", str(disk / "run"))
    message = str(failed.value)
    for name in ("results.json", "report.html", "README.md", "trainer_state.json", "all_results.json"):
        assert f"{name}: [Errno 28] No space left on device" in message
    check_student(disk / "run")
    shell(message.splitlines()[-1].strip(), hub, HF_TOKEN=WRITE_TOKEN)  # uploading needs no room here
    pushed = hub.repositories["models", "anna/run"].files
    assert pushed["model.safetensors"] == (disk / "run" / "model.safetensors").read_bytes()
    assert not [name for name in pushed if name.endswith(".part")]


def test_a_disk_that_really_is_full_while_the_student_is_saved(hub, distilling, disk, monkeypatch):
    save = DistillationTrainer.save_model

    def saving(self, output_dir=None, **kwargs):
        filler = fill(disk) if output_dir is None else None  # not for the checkpoints
        save(self, output_dir, **kwargs)
        assert filler is None

    monkeypatch.setattr(DistillationTrainer, "save_model", saving)
    flags = ["--output_dir", str(disk / "run"), "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--save_total_limit", "1"]
    with pytest.raises(ReportError, match=r"The disk is full .*checkpoint-2, which from_pretrained loads") as failed:
        distilling(*flags)
    assert "--resume_from_checkpoint true" in str(failed.value)
    check_student(disk / "run" / "checkpoint-2")
    monkeypatch.setattr(DistillationTrainer, "save_model", save)
    (disk / "filler").unlink()
    distilling(*flags, "--resume_from_checkpoint", "true")
    check_student(disk / "run")
    assert "anna/run" in {name for _, name in hub.repositories}


def test_a_disk_that_is_full_at_the_end(hub, distilling, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_json", "plot_curves", "write_card", "write_state"):
        monkeypatch.setattr(training, name, full)
    monkeypatch.setattr(DistillationTrainer, "save_metrics", full)
    with pytest.raises(ReportError) as failed:
        distilling()
    text = str(failed.value)
    for name in ("results.json", "curves.png", "README.md", "trainer_state.json", "test_results.json"):
        assert f"{name}: [Errno 28] No space left on device" in text
    assert "hf upload anna/run" in text and str(tmp_path / "run") in text
    printed = capsys.readouterr().out
    assert "AP75" in printed and '"mar_100"' in printed  # the table, and what results.json would have held
    check_student(tmp_path / "run")


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),
    ],
)
def test_a_disk_that_is_full_while_weights_are_written(error):
    with pytest.raises(ReportError, match="checkpoint-7"), saving_weights("out", lambda: "out/checkpoint-7"):
        raise error
    with pytest.raises(ReportError, match="no complete checkpoint"), saving_weights("out", lambda: None):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="out of memory"), saving_weights("out", lambda: None):
        raise RuntimeError("CUDA out of memory")


def test_tokens_are_not_recorded():
    flags = settings(ModelArguments(token="hf_secret"), DistillationConfig("o", use_cpu=True, hub_token="hf_secret"))
    assert "hf_secret" not in json.dumps(flags, default=str)


def test_a_local_folder_has_no_revision(tmp_path):
    assert origin(str(tmp_path), None, None) == {"name_or_path": str(tmp_path), "revision": None}
    cached = tmp_path / "models--org--big" / "snapshots" / ("c" * 40)
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    (cached.parent.parent / "refs").mkdir()
    (cached.parent.parent / "refs" / "main").write_text("c" * 40)
    assert origin("org/big", None, str(tmp_path))["revision"] == "c" * 40
