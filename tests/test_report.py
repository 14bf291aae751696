"""The page of a run: what it says, that it stands alone, and that it follows a run that goes on."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
import scenes
import zoo
from PIL import Image

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.commands.arguments import DataArguments, ModelArguments, parse
from hf_detrkd.commands.evaluate import EvaluateArguments
from hf_detrkd.reporting import live, report
from hf_detrkd.reporting.live import WriteReport
from hf_detrkd.reporting.report import WHICH_DATA, commands, costs, duration, write_report
from hf_detrkd.reporting.run import read_run

NASTY = '<script>alert("&")</script>'


def metrics(ap: float) -> dict[str, float]:
    names = ("map", "map_50", "map_small", "map_large", "mar_100")
    classes = {f"map_{name}": ap / 2 for name in ("cat", NASTY)} | {f"mar_100_{name}": ap for name in ("cat", NASTY)}
    return dict.fromkeys(names, ap) | classes


def history(ap: float, distilled: bool) -> list[dict]:
    kd = {"detection_loss": 3.0, "kd_class": 0.5, "kd_idle": 0.0, "kd_scale": 1.0, "gradient_share_kd": 0.25}
    kd |= {"gradient_share_class": 0.25, "gradient_share_idle": 0.0}
    logs = []
    for step in (10, 20):
        logs.append(
            {"step": step, "loss": 60 / step, "learning_rate": 0.1, "grad_norm": 1.5, **(kd if distilled else {})}
        )
        evaluation = {f"eval_{name}": value for name, value in metrics(ap * step / 20).items()}
        logs.append({"step": step, "eval_loss": 4.0, **evaluation})
    return [{**log, "seconds": 12.5 * log["step"]} for log in logs]


def row(ap: float, **more) -> dict:
    return {"parameters": 2_000_000, "validation": metrics(ap), "test": metrics(ap), **more}


def save(folder: Path, *, unfinished: bool = False, twin: bool = True, test: bool = True, max_steps: int = 20) -> Path:
    """A run's folder as `distill` leaves it, or has it at its student's second evaluation."""
    student = row(0.3, method="logit_kd", model_type="rt_detr", steps=20, train_seconds=250.0)
    results = {
        "teacher": row(0.4, name_or_path="teachers/large", parameters=8_000_000),
        "student": student if test else None,
        "twin": row(0.2, method="none", steps=20) if twin and test else None,
        "data": {"images": {"train": 80, "validation": 10, "test": 12}, "test_split": "test"},
        "label_map": [["0 cat", "1 Cat", "same but for case, spaces or hyphens"], [f"1 {NASTY}", "-", "left out"]],
        "settings": {
            "DistillationConfig": {
                "method": ["logit_kd"],
                "learning_rate": 1e-4,
                "seed": 0,
                "hub_token": "<HUB_TOKEN>",
            },
            "DataArguments": {"dataset_name": "my data"},
        },
        "versions": {"torch": "2.9"},
    }
    folder.mkdir(parents=True)
    (folder / ("unfinished.json" if unfinished else "results.json")).write_text(json.dumps(results))
    for its, ap, distilled in ((folder, 0.3, True), (folder / "twin", 0.2, False)):
        if its == folder or twin:
            its.mkdir(exist_ok=True)
            state = {"global_step": 20, "max_steps": max_steps, "log_history": history(ap, distilled)}
            (its / "trainer_state.json").write_text(json.dumps(state))
    return folder


class Reader(HTMLParser):
    """What a browser would load or run, and the text one reads."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.addresses, self.words, self.charts = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        self.addresses += re.findall(r"url\((.*?)\)", " ".join(value or "" for value in values.values()))
        if tag == "svg":
            self.charts.append(values["aria-label"])

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.words.append(data)


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path):
    folder = save(tmp_path / "run")
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.part"))
    page = read(path)
    assert "Finished: 20 steps in 4 min." in page.text
    assert "distilled by logit_kd from teachers/large ( 8.00 M)".replace("( ", "(") in page.text
    assert "30.0 AP of the student +10.0 over its twin 50 % of the gap to the teacher closed 25 % of the" in page.text
    assert "student - twin +10.0 +10.0 - +10.0 - +10.0 +10.0" in page.text
    assert "size teacher twin student gain small (up to 32² pixels) 40.0 20.0 30.0 +10.0 large" in page.text
    assert f"class teacher twin student gain cat 20.0 10.0 15.0 +5.0 {NASTY} 20.0" in page.text
    assert "Always 0: idle" in page.text
    assert (
        "hf-detrkd evaluate --model_name_or_path" in page.text and "--dataset_name 'my data' --split test" in page.text
    )
    assert "hf upload USER/run" in page.text
    assert (
        "0 cat 1 Cat same but for case" in page.text
        and "torch 2.9" in page.text
        and "learning_rate 0.0001" in page.text
    )
    assert page.charts == [
        "AP on the validation split, by step",
        "AP on the validation split, by time",
        "Loss in training",
        "Loss on the validation split",
        "Share of the gradient norm (%)",
        "class",
        "Learning rate",
        "Scale of distillation",
        "Gradient norm",
    ]


def test_the_commands_measure_on_the_same_images(tmp_path):
    """`--split` takes a part, and the flags say which split that was."""
    folder = save(tmp_path / "run")
    assert {field.name: field.default for field in fields(DataArguments)}.items() >= {
        **WHICH_DATA,
        "dataset_name": "shapes",
    }.items()
    results = json.loads((folder / "results.json").read_text())
    flags = DataArguments(dataset_name="cells", bbox_format="xyxy", classes=["cat", "tram"], flip=0.0)
    flags.dataset_validation_split, flags.dataset_test_split = "train", "night"
    results["settings"]["DataArguments"], results["data"]["test_split"] = vars(flags), "night"
    (folder / "results.json").write_text(json.dumps(results))
    (words,) = [shlex.split(line) for title, line in commands(read_run(folder)) if title == "Measure it again"]
    assert words[:2] == ["hf-detrkd", "evaluate"]
    _, data, how = parse((ModelArguments, DataArguments, EvaluateArguments), words[2:], "")
    assert vars(data) == vars(flags) | {"flip": data.flip} and how.split == "test"


def test_it_stands_alone(tmp_path):
    """No script, nothing to load; names of classes are text."""
    folder = save(tmp_path / "run")
    Image.new("RGB", (40, 30)).save(folder / "sheet.png")
    text = write_report(folder).read_text(encoding="utf-8")
    page = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert page.addresses and all(address.startswith(("data:image/webp;base64,", "#")) for address in page.addresses)
    assert "@import" not in text and "default-src 'none'" in text
    used, ids = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)), re.findall(r' id="([^"]*)"', text)
    assert used <= set(ids)
    assert not re.findall("#0[123]0[123]0[0-9]", text)  # every stand-in became one of the page's colours


def test_curves_follow_the_page_s_colours(tmp_path):
    text = write_report(save(tmp_path / "run")).read_text(encoding="utf-8")
    chart = text[text.index('aria-label="AP on the validation split, by step"') :]
    chart = chart[: chart.index("</figure>")]
    assert all(f"stroke: var(--{name})" in chart for name in ("line-0", "line-1", "ink", "grid"))
    legend = Reader(chart[chart.index("<ul") :]).text
    assert legend == "student 30.0 twin 20.0 teacher 40.0"


def test_sheets_are_inlined_and_spread_over_the_run(tmp_path):
    folder = save(tmp_path / "run")
    (folder / "sheets").mkdir()
    for step in (2, 4, 6, 8, 10, 100):
        Image.new("RGB", (2000, 10)).save(folder / "sheets" / f"step_{step}.png")
    Image.new("RGB", (20, 10)).save(folder / "sheet.png")
    captions = re.findall(r"<summary>(.*?)</summary>", write_report(folder).read_text())[:-1]
    assert captions == ["At the end, test split", *(f"Step {step}, validation split" for step in (100, 8, 6, 2))]
    (folder / "results.json").rename(folder / "unfinished.json")
    captions = re.findall(r"<summary>(.*?)</summary>", write_report(folder).read_text())[:-1]
    assert captions == ["Step 100, validation split"]


def test_a_run_that_goes_on(tmp_path):
    folder = save(tmp_path / "run", unfinished=True, twin=False, test=False, max_steps=50)
    run = read_run(folder)
    assert not run.finished and run.training == "student" and run.methods == ["logit_kd"]
    text = write_report(folder).read_text()
    page = Reader(text)
    assert "In training: the student, at its evaluation after step 20 of 50, about 6 min left." in page.text
    assert '<meta http-equiv="refresh" content="30">' in text
    assert "on the validation split, so far" in page.text and "30.0 AP of the student" in page.text
    assert "python -m hf_detrkd.reporting.report" in page.text and "hf-detrkd predict" not in page.text


def test_a_twin_in_training(tmp_path):
    folder = save(tmp_path / "run", unfinished=True, max_steps=50)
    results = json.loads((folder / "unfinished.json").read_text())
    (folder / "unfinished.json").write_text(json.dumps(results | {"twin": None}))
    run = read_run(folder)
    assert run.training == "twin" and run.results["twin"]["validation"]["map"] == 0.2
    page = read(write_report(folder))
    assert "In training: the twin, at its evaluation after step 20 of 50" in page.text
    assert "over its twin" not in page.text  # whose test split isn't measured yet


def test_before_the_first_evaluation(tmp_path):
    folder = save(tmp_path / "run", unfinished=True, twin=False, test=False)
    (folder / "trainer_state.json").unlink()
    page = read(write_report(folder))
    assert "before its first evaluation" in page.text and "teacher 40.0" in page.text


def test_a_teacher_s_own_run(tmp_path):
    """`finetune` calls its detector the model."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    model = row(0.4, method="none", model_type="detr", steps=5)
    (folder / "results.json").write_text(json.dumps({"model": model, "settings": {"FinetuneConfig": {"seed": 1}}}))
    page = read(write_report(folder))
    assert "A detr detector of 2.00 M parameters, trained without a teacher" in page.text
    assert "40.0 AP of the model" in page.text and "Distillation" not in page.text and "seed 1" in page.text


def test_only_a_checkpoint_is_left(tmp_path):
    """A run of DistillationTrainer that was killed: the newest state counts."""
    for step in (9, 10):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        logs = [{"step": step, "eval_map": step / 100}]
        state = {"global_step": step, "max_steps": 20, "log_history": logs}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert "10.0 AP of the student" in read(write_report(tmp_path / "run")).text


def test_the_command_and_what_is_no_run(tmp_path, capsys):
    folder = save(tmp_path / "run")
    path = report.main([str(folder), "--output", str(tmp_path / "elsewhere" / "page.html")])
    assert path.is_file() and capsys.readouterr().out.strip() == str(path)
    with pytest.raises(
        ValueError, match=r"is not the folder of a run: it has no results.json, no unfinished.json and no"
    ):
        report.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("seconds", "said"), [(12.4, "12 s"), (89, "89 s"), (91, "2 min"), (5000, "83 min"), (9000, "2.5 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def trainer(folder: Path, *more) -> DistillationTrainer:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    args = DistillationConfig(
        output_dir=str(folder), method="none", max_steps=4, eval_strategy="steps", eval_steps=2, seed=0, **quiet
    )
    student = zoo.build("rt_detr")
    data = {"train_dataset": scenes.Scenes(4), "eval_dataset": scenes.Scenes(2, seed=1)}
    return DistillationTrainer(student, None, args, processing_class=scenes.processor(), callbacks=list(more), **data)


def test_it_is_written_at_every_evaluation_of_a_training(tmp_path, monkeypatch):
    steps = []
    original = live.write_report

    def spy(folder):
        steps.append(json.loads((tmp_path / "trainer_state.json").read_text())["global_step"])
        return original(folder)

    monkeypatch.setattr(live, "write_report", spy)
    run = trainer(tmp_path, WriteReport())
    run.train()
    run.evaluate()  # of a finished training: no news about it
    assert steps == [2, 4]
    page = read(tmp_path / "report.html")
    assert "AP on the validation split, by time" in page.charts
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_stops_no_training(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    warnings = []
    monkeypatch.setattr(live, "write_report", full)
    monkeypatch.setattr(live.logger, "warning", warnings.append)
    run = trainer(tmp_path, WriteReport())
    run.train()
    assert run.state.global_step == 4 and "could not be written: [Errno 28]" in warnings[0]


def test_what_is_no_sheet_is_left_out(tmp_path):
    """A disk that was full, or somebody's own picture: a report doesn't fail for it, nor the training that writes one."""
    folder = save(tmp_path / "run")
    (folder / "sheets").mkdir()
    for name in ("step_2", "step_4", "step_best"):
        Image.new("RGB", (20, 10)).save(folder / "sheets" / f"{name}.png")
    whole = (folder / "sheets" / "step_2.png").read_bytes()
    (folder / "sheets" / "step_4.png").write_bytes(whole[:40])
    (folder / "sheet.png").write_bytes(b"")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-best" / "trainer_state.json").write_text("{}")
    captions = re.findall(r"<summary>(.*?)</summary>", write_report(folder).read_text())[:-1]
    assert captions == ["Step 2, validation split"]


def test_an_earlier_run_s_twin_is_not_this_one_s(tmp_path):
    folder = save(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"twin": None}))
    assert set(read_run(folder).states) == {"student"}
    assert "No twin was trained" in read(write_report(folder)).text


def test_what_a_run_that_was_resumed_cost_is_not_known():
    """Its training time is that of the last session alone."""
    rows = {"student": {"train_seconds": 4.2, "resumed_from": "checkpoint-900"}, "twin": {"train_seconds": 3600.0}}
    assert ["training time", "-", "60 min"] in costs(rows)
