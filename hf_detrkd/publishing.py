"""Pushing a student with its card, and the metric, to the Hugging Face Hub.

Everything is on disk before the first byte is sent, and a push that fails says what happened and which command sends the
same files again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from .config import DistillationConfig
from .reporting.card import write_card
from .reporting.writing import Reports

NOT_PUSHED = (
    "checkpoint-*",  # states of the optimiser, for a resume
    "twin/*",
    "predictions/*",  # of private pictures; report.html has predict write them there
    "onnx/*",
    "sheets/*",  # as large as the model, one for every few steps
    "distillation_state.pt",  # projectors and raw weights, for a resume
    "training_args.bin",  # a pickle, in which the Hub's token may be
    "log.txt",  # compare.py's, of a cell
    "lock",
    "recipe.yaml",
    "_*",
    "*.part",
)
"""Patterns of files in a run's folder that stay there."""
METRIC = Path(__file__).parent / "evaluation" / "coco_detection"


class PushError(RuntimeError):
    """Nothing was lost, but it is not on the Hub. The message says what to do."""


class OccupiedError(PushError):
    """The repository is there and holds something else."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    space_sdk: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "End of training",
    write: Callable[[str], Any] | None = None,
) -> CommitInfo:
    """Push what is in a run's folder, `NOT_PUSHED` excepted; the repository and its branch are made where they are missing.

    Called again after a failure it sends what the Hub doesn't have yet.

    Args:
        write: called with the repository's full id before anything is sent, to write what depends on it: the card.

    Raises:
        PushError: with the command that pushes the same files again.
    """
    try:
        repo_id = open_repository(
            repo_id, repo_type=repo_type, space_sdk=space_sdk, token=token, private=private, revision=revision
        )
        if write is not None:
            write(repo_id)
        return HfApi(token=token).upload_folder(
            folder_path=str(folder),
            repo_id=repo_id,
            repo_type=repo_type,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=list(NOT_PUSHED),
        )
    except Exception as error:  # whatever it was, the way to go on must be said
        reason = str(error) if isinstance(error, PushError) else explain(error, repo_id)
        if isinstance(error, OccupiedError):  # the command must not overwrite what is there
            repo_id += "-detector"
        raise PushError(
            f"{folder} is not on the Hub. {reason}\nAll its files are still in {folder}. This pushes them again:\n"
            f"    {upload_command(folder, repo_id, repo_type, revision)}"
        ) from error


def open_repository(
    repo_id: str,
    *,
    repo_type: str = "model",
    space_sdk: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Make a repository where it is missing, and return its full id: a name alone is in the user's own namespace.

    Args:
        revision: a branch, which is made where it is missing, as a copy of main.

    Raises:
        PushError: one of the two can't be made, or the repository is there already and holds something else.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, repo_type=repo_type, space_sdk=space_sdk, private=private, exist_ok=True)
        info = api.repo_info(url.repo_id, repo_type=repo_type)
    except Exception as error:
        raise PushError(explain(error, repo_id)) from error
    if repo_type == "model":
        if info.pipeline_tag not in (None, "object-detection") or info.library_name not in (None, "transformers"):
            raise OccupiedError(
                f"The repository {url.repo_id} exists and holds another kind of model (task {info.pipeline_tag}, library "
                f"{info.library_name}), which this push would overwrite. Choose another name with --hub_model_id, or "
                "delete that repository."
            )
    elif info.sdk not in (None, space_sdk):
        raise OccupiedError(
            f"The {repo_type} {url.repo_id} exists and runs on {info.sdk}, not {space_sdk}: it holds something else, which "
            "this push would overwrite. Choose another name, or delete it."
        )
    if revision is not None:
        try:
            _make_branch(api, url.repo_id, repo_type, revision)
        except Exception as error:
            raise PushError(explain(error, url.repo_id)) from error
    return url.repo_id


def _make_branch(api: HfApi, repo_id: str, repo_type: str, revision: str) -> None:
    try:
        api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)


def upload_command(folder: str | Path, repo_id: str, repo_type: str = "model", revision: str | None = None) -> str:
    """The shell command that pushes the same files."""
    words = ["hf", "upload", repo_id, str(folder), "."]
    words += [] if repo_type == "model" else ["--repo-type", repo_type]
    words += [] if revision is None else ["--revision", revision]
    return shlex.join([*words, *(word for pattern in NOT_PUSHED for word in ("--exclude", pattern))])


def explain(error: BaseException, repo_id: str) -> str:
    """What went wrong between us and the Hub, and what to do, in a sentence or two."""
    hub, chain = constants.ENDPOINT, [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so nothing is sent. Unset it."
        if isinstance(cause, LocalTokenNotFoundError):
            return f"There is no token for {hub}. Log in with `hf auth login`, or set HF_TOKEN."
        if isinstance(cause, HfHubHTTPError):
            return _explain_status(cause, hub, repo_id)
        if isinstance(cause, HTTPError):
            return f"The connection to {hub} failed ({type(cause).__name__}: {cause}). Is there a network?"
    return f"{type(error).__name__}: {error}."


def _explain_status(error: HfHubHTTPError, hub: str, repo_id: str) -> str:
    status = error.response.status_code
    said = error.server_message or error.response.reason_phrase
    if status == 401 and "authorization" not in error.response.request.headers:
        return f"There is no token for {hub}. Log in with `hf auth login`, or set HF_TOKEN."
    if status == 401:
        return (
            f"{hub} refuses the token (401: {said}). Log in with `hf auth login`, or pass a token that may write "
            "(HF_TOKEN or --hub_token)."
        )
    if status == 403:
        return (
            f"The token may not write to {repo_id} (403: {said}). Use a token with write access, or a name in your own "
            "namespace (--hub_model_id)."
        )
    return f"{hub} answered {status} ({said})."


def finish(
    reports: Reports, results: Mapping[str, Any], args: DistillationConfig, say: Callable[[str], None] = print
) -> None:
    """The end of a command: say what could not be written, and push where that is wanted.

    Raises:
        ReportError: a file could not be written; nothing is pushed.
        PushError: everything is on disk.
    """
    if "results.json" in reports.failed:
        say(f"results.json would have held:\n{json.dumps(results, default=str)}")
    reports.check(args.output_dir, upload_command(args.output_dir, repository_of(args), revision=args.hub_revision))
    if args.push_to_hub and args.process_index == 0:
        say(f"on the Hub: {publish(results, args)}")


def publish(results: Mapping[str, Any], args: DistillationConfig) -> str:
    """Push the folder of a finished run, with its card under the repository's name. Returns the page's address.

    Raises:
        PushError: everything is on disk.
    """
    commit = push_folder(
        args.output_dir,
        repository_of(args),
        token=args.hub_token,
        private=args.hub_private_repo,
        revision=args.hub_revision,
        write=partial(write_card, args.output_dir, results),
    )
    return commit.repo_url.url


def repository_of(args: DistillationConfig) -> str:
    """Where a run is pushed to: by default a repository named like its folder, as with Trainer."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def open_for(args: DistillationConfig, *, token: str | None = None, private: bool | None = None) -> str:
    """`open_repository` for a run, as its settings say; ``token`` and ``private`` go before them."""
    private = args.hub_private_repo if private is None else private
    return open_repository(
        repository_of(args), token=token or args.hub_token, private=private, revision=args.hub_revision
    )


def push_metric(repo_id: str, *, token: str | None = None, private: bool | None = None) -> CommitInfo:
    """Push the COCO metric as a Space, from where ``evaluate.load(repo_id)`` loads it.

    Raises:
        ValueError: the name is not the script's, which `evaluate` looks for.
        PushError: see `push_folder`.
    """
    if repo_id.count("/") != 1 or repo_id.split("/")[1] != METRIC.name:
        raise ValueError(
            f"`repo_id` is {repo_id!r}; it must be <user or organisation>/{METRIC.name}, because `evaluate` looks for a "
            "script named like the Space."
        )
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(METRIC, Path(place) / METRIC.name, ignore=shutil.ignore_patterns("__pycache__"))
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8")
        load = f'evaluate.load("{repo_id}")'
        text = text.replace('evaluate.load("hf_detrkd/evaluation/coco_detection")  # the path of this folder', load)
        card.write_text(text, encoding="utf-8")
        sdk = ModelCard(text, ignore_metadata_errors=True).data.get("sdk")
        # What a static Space shows
        page = (
            f"<!doctype html><title>COCO detection</title><h1>COCO detection</h1><p>A metric: <code>{load}</code></p>"
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
        return push_folder(
            folder,
            repo_id,
            repo_type="space",
            space_sdk=sdk,
            token=token,
            private=private,
            commit_message="COCO detection metric",
        )
