from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from hf_detrkd.data import check_dataset, load_detection_dataset
from hf_detrkd.data.shapes import CLASS_NAMES, COLOURS, ShapesConfig, cache_folder, draw_scene, generate_shapes

SMALL = "shapes:train=6,validation=3,test=2,size=64"


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_shapes_load_like_any_set_and_pass_the_strict_checks(tmp_path):
    splits = load_detection_dataset(SMALL, cache_dir=tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 3, "test": 2}
    assert splits["train"].features["objects"]["category"].feature.names == list(CLASS_NAMES)
    assert splits["train"][0]["image"].size == (64, 64)
    _, report = check_dataset(splits, strict=True)
    assert report.findings == ()


def test_the_seed_makes_the_set(tmp_path):
    one, again = (generate_shapes(SMALL, tmp_path / name) for name in ("one", "again"))
    other = generate_shapes(f"{SMALL},seed=1", tmp_path / "one")
    assert digest(one) == digest(again) != digest(other) and one.name == again.name != other.name


def test_a_larger_set_begins_with_the_smaller_one(tmp_path):
    small, large = (generate_shapes(name, tmp_path) for name in (SMALL, SMALL.replace("train=6", "train=9")))
    for name in ("000000.png", "000005.png"):
        assert (small / "train" / name).read_bytes() == (large / "train" / name).read_bytes()


def test_splits_differ(tmp_path):
    folder = generate_shapes(SMALL, tmp_path)
    first = [(folder / split / "000000.png").read_bytes() for split in ("train", "validation", "test")]
    assert len(set(first)) == 3


def test_it_is_drawn_once(tmp_path, monkeypatch):
    folder = generate_shapes(SMALL, tmp_path)
    stamp = (folder / "train" / "000000.png").stat().st_mtime_ns
    assert generate_shapes(SMALL, tmp_path) == folder
    assert (folder / "train" / "000000.png").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # no drafts left
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path))
    assert generate_shapes(SMALL) == folder and cache_folder("x") == Path("x")
    monkeypatch.delenv("HF_DETRKD_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "hf_detrkd"


def test_one_that_comes_second_takes_the_first_ones(tmp_path, monkeypatch):
    """Two processes draw at once: the second finds the folder there when it wants to name its own."""
    folder = generate_shapes(SMALL, tmp_path)
    monkeypatch.setattr(Path, "is_dir", lambda self, seen=[]: bool(seen) or bool(seen.append(1)))
    assert generate_shapes(SMALL, tmp_path) == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_scenes_are_what_they_are_annotated_as():
    config = ShapesConfig(size=96)
    seen, covered = set(), 0
    for seed in range(60):
        picture, objects = draw_scene(config, np.random.default_rng(seed))
        assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
        boxes, areas = np.array(objects["bbox"]), np.array(objects["area"])
        assert config.min_objects <= len(boxes) <= config.max_objects and len({*map(len, objects.values())}) == 1
        assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 96).all() and (boxes[:, 2:] > 0).all()
        assert (areas > 0).all() and (areas <= boxes[:, 2] * boxes[:, 3] + 1e-6).all()
        seen |= set(objects["category"])
        starts, ends = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
        overlap = np.clip(np.minimum(ends, ends.swapaxes(0, 1)) - np.maximum(starts, starts.swapaxes(0, 1)), 0, None)
        covered += int((overlap.prod(2) > 0).sum() - len(boxes))
    assert seen == set(range(len(CLASS_NAMES))) and covered > 20  # every class, and shapes that hide one another


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapes:weight=heavy", r"sets 'weight', but shapes knows train, validation, test, size, seed"),
        ("shapes:size=big", r"sets size to 'big', but int is needed"),
        ("shapes:train=0", r"`train` is 0, but at least 1"),
        ("shapes:min_extent=0.9", r"min_extent <= max_extent"),
    ],
)
def test_wrong_settings_are_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(name, cache_dir=tmp_path)


def test_colour_tells_the_class_where_it_is_asked_for():
    def distances(colour: float) -> np.ndarray:
        """Of the colours at the objects' centres from those of their classes, over 40 scenes of one or two objects."""
        config = ShapesConfig(size=64, max_objects=2, min_extent=0.4, max_extent=0.5, colour=colour)
        found = []
        for index in range(40):
            pixels, objects = draw_scene(config, np.random.default_rng(index))
            for (x, y, w, h), category in zip(objects["bbox"], objects["category"], strict=True):
                patch = pixels[int(y) : int(y + h), int(x) : int(x + w)].reshape(-1, 3).astype(float)
                found.append(np.abs(patch - COLOURS[category]).mean(1).min())
        return np.array(found)

    assert np.median(distances(1.0)) < 0.6 * np.median(distances(0.0))
    with pytest.raises(ValueError, match="`colour` is 2"):
        ShapesConfig(colour=2)


def test_parse():
    assert ShapesConfig.parse("shapes") == ShapesConfig()
    assert ShapesConfig.parse("shapes: train=7, max_extent=0.5") == ShapesConfig(train=7, max_extent=0.5)
