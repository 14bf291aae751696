"""predict: what it finds equals transformers' own, in images, folders, frames and videos."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from scenes import processor

from hf_detrkd.commands import predict


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = zoo.build("rt_detr")
    model.save_pretrained(folder)
    processor(model).save_pretrained(folder)
    return str(folder)


def picture(path, size=(50, 40), seed: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def run(checkpoint, place, output, *flags: str) -> dict:
    base = ["--model_name_or_path", checkpoint, "--input", str(place), "--output_dir", str(output), "--device", "cpu"]
    return predict.main([*base, *flags])


def test_folder_equals_transformers(tmp_path, checkpoint):
    """Three images of two sizes in batches of two; sub-folders keep their names; other files are passed over."""
    place = tmp_path / "in"
    picture(place / "b.png")
    picture(place / "sub" / "a.png", size=(30, 60), seed=1)
    picture(place / "b.jpg", seed=2)
    (place / "notes.txt").write_text("no image")
    output = tmp_path / "out"
    results = run(checkpoint, place, output, "--threshold", "0.3", "--batch_size", "2")
    assert json.loads((output / "predictions.json").read_text()) == results
    assert [image["file_name"] for image in results["images"]] == ["b.jpg", "b.png", "sub/a.png"]
    assert results["images"][2] == {"id": 2, "file_name": "sub/a.png", "width": 30, "height": 60}
    for drawn in ("b.jpg.png", "b.png", "sub/a.png"):
        assert (output / "drawn" / drawn).stat().st_size > 0

    model, tools = zoo.build("rt_detr"), processor(zoo.build("rt_detr"))
    with Image.open(place / "sub" / "a.png") as image:
        inputs = tools(images=[image], return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=inputs["pixel_values"])
    expected = tools.post_process_object_detection(outputs, threshold=0.3, target_sizes=[(60, 30)])[0]
    found = [one for one in results["annotations"] if one["image_id"] == 2]
    assert len(found) == len(expected["scores"]) > 0
    scores, order = expected["scores"].sort(descending=True)
    assert [one["score"] for one in found] == pytest.approx(scores.tolist(), abs=1e-4)
    for one, index in zip(found, order.tolist(), strict=True):
        x1, y1, x2, y2 = expected["boxes"][index].tolist()
        assert one["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.02)
        assert one["category_id"] == expected["labels"][index] and one["file_name"] == "sub/a.png"
        assert one["category_name"] == model.config.id2label[one["category_id"]]


def test_one_image_upright_without_drawing(tmp_path, checkpoint):
    path = tmp_path / "turned.jpg"
    image = Image.new("L", (50, 20), 90)  # grey, turned by its EXIF
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    results = run(checkpoint, path, tmp_path / "out", "--draw", "false")
    assert results["images"] == [{"id": 0, "file_name": "turned.jpg", "width": 20, "height": 50}]
    assert not (tmp_path / "out" / "drawn").exists()


def test_more_than_8_bits_are_refused(tmp_path, checkpoint, capsys):
    """As in training: as RGB they would be all white."""
    (tmp_path / "in").mkdir()
    Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save(tmp_path / "in" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits a channel \(I;16B?\).*Convert it to 8 bits"):
        run(checkpoint, tmp_path / "in" / "deep.png", tmp_path / "out")


@pytest.mark.parametrize(("rotation", "turns"), [(0, 0), (-90, -1), (90, 1), (180, 2)])
def test_frames_are_turned_upright(monkeypatch, rotation, turns):
    """PyAV gives them as they are stored, and beside them the angle, counterclockwise."""
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    frame = SimpleNamespace(to_ndarray=lambda format: stored, rotation=rotation)
    container = SimpleNamespace(decode=lambda video: [frame])
    av = SimpleNamespace(open=lambda place: nullcontext(container))
    monkeypatch.setitem(sys.modules, "av", av)
    (pixels,) = predict._frames_of_av(Path("clip.mp4"))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.rot90(stored, turns))


def test_video(tmp_path, monkeypatch, checkpoint):
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"")
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"is a video, which needs PyAV.*Or make a folder of frames: ffmpeg -i clip\.mp4"
    ):
        run(checkpoint, video, tmp_path / "out")
    frames = [torch.full((3, 20, 30), value, dtype=torch.uint8) for value in range(5)]
    monkeypatch.setattr(predict, "_frames_reader", lambda place: lambda place: iter(frames))
    results = run(checkpoint, video, tmp_path / "out", "--every", "2", "--draw", "false")
    names = [image["file_name"] for image in results["images"]]
    assert names == ["clip/frame_000000.png", "clip/frame_000002.png", "clip/frame_000004.png"]


@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")
def test_video_by_av(tmp_path):
    import av

    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    pictures = list(predict.read_pictures(tmp_path / "clip.mp4"))
    assert [tuple(one.pixels.shape) for one in pictures] == [(3, 48, 64)] * 3


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("broken.png", b"no image", [], "neither an image nor a video"),
        ("absent.png", None, [], "there is no such file or folder"),
        ("empty", None, [], "no image in the folder"),
        ("broken.png", b"", ["--threshold", "2"], "--threshold is 2.0; a score is between 0 and 1"),
        ("broken.png", b"", ["--batch_size", "0"], "--batch_size and --every must be 1 or more"),
    ],
)
def test_refused(tmp_path, checkpoint, name, content, flags, message):
    place = tmp_path / name
    if content is not None:
        place.write_bytes(content)
    elif name == "empty":
        place.mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(checkpoint, place, tmp_path / "out", *flags)


def test_one_bad_file_costs_only_itself(tmp_path, checkpoint, capsys):
    """What can't be read is named, and the exit code says that something is missing; the others are there."""
    place, output = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("a.png", "c.png"):
        picture(place / name)
    (place / "b.jpg").write_bytes(b"")
    whole = picture(place / "d.png").read_bytes()
    (place / "d.png").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # the second time the output folder has pictures
        with pytest.raises(SystemExit, match=r"2 files can't be read and were left out:\n.*b\.jpg.*\n.*d\.png"):
            run(checkpoint, place, output, "--batch_size", "2")
        results = json.loads((output / "predictions.json").read_text())
        assert [image["file_name"] for image in results["images"]] == ["a.png", "c.png"]


def test_hidden_files_and_its_own_pictures_are_no_input(tmp_path):
    place = tmp_path / "in"
    for name in ("a.png", "._a.png", ".cache/b.png", "drawn/a.png", "out/drawn/a.png"):
        picture(place / name)

    def names(output=None) -> list[str]:
        return [one.name for one in predict.read_pictures(place, leave_out=output)]

    assert names() == ["a.png", "drawn/a.png", "out/drawn/a.png"]
    assert names(place / "out") == ["a.png", "drawn/a.png"]
    assert names(place) == ["a.png", "out/drawn/a.png"]
    assert names(tmp_path) == names()  # around the input, not in it
    assert [one.name for one in predict.read_pictures(place / "drawn", leave_out=place)] == ["a.png"]


def test_flags_for_a_new_detector_are_refused(tmp_path, checkpoint):
    for flag in ("--config_name", "--backbone_weights"):
        with pytest.raises(ValueError, match=rf"{flag} .*trained detector"):
            run(checkpoint, tmp_path, tmp_path / "out", flag, "nowhere")
