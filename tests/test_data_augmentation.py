from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_detrkd.data import Augmentation
from hf_detrkd.data.augmentation import FILL, horizontal_flip

OFF = {"flip": 0.0, "scale": (1.0, 1.0), "crop": 0.0, "photometric": 0.0}


def target_with(boxes, labels=None, iscrowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    return {
        "boxes": boxes,
        "labels": torch.arange(count) if labels is None else torch.tensor(labels),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(count, dtype=torch.int64) if iscrowd is None else torch.tensor(iscrowd),
        "image_id": torch.tensor([7]),
    }


@st.composite
def scenes(draw):
    """A random image, objects of which no two share a label or an area, settings and a seed."""
    height, width = draw(st.integers(8, 60)), draw(st.integers(8, 60))
    count = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * [width, height]
    boxes = corners.reshape(count, 4).tolist()
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    scale = sorted(draw(st.tuples(st.floats(0.4, 2.5), st.floats(0.4, 2.5))))
    augmentation = Augmentation(
        flip=draw(st.sampled_from([0.0, 0.5, 1.0])),
        scale=tuple(scale),
        crop=draw(st.sampled_from([0.0, 0.5, 1.0])),
        crop_size=(0.3, 1.0),
        photometric=draw(st.sampled_from([0.0, 0.5])),
        size=draw(st.sampled_from([None, (24, 32)])),
        min_visible=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )
    iscrowd = rng.integers(0, 2, count).tolist()
    return image, target_with(boxes, iscrowd=iscrowd), augmentation, draw(st.integers(0, 2**32))


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_everything_stays_in_step(scene):
    image, target, augmentation, seed = scene
    before = {key: value.clone() for key, value in target.items()}
    pixels = image.clone()
    seen, new = augmentation(image, target, np.random.default_rng(seed))

    assert torch.equal(image, pixels) and all(torch.equal(target[key], before[key]) for key in before)  # untouched
    assert seen.dtype == torch.uint8 and seen.shape[0] == 3 and new.keys() == target.keys()
    assert torch.equal(new["image_id"], target["image_id"])
    assert {len(new[key]) for key in ("boxes", "labels", "area", "iscrowd")} == {len(new["boxes"])}
    height, width = seen.shape[-2:]
    if augmentation.size is not None:
        assert (height, width) == augmentation.size
    x0, y0, x1, y1 = new["boxes"].unbind(1)
    assert (x0 >= -1e-4).all() and (y0 >= -1e-4).all() and (x1 <= width + 1e-4).all() and (y1 <= height + 1e-4).all()
    assert ((x1 - x0) >= augmentation.min_size).all() and ((y1 - y0) >= augmentation.min_size).all()
    assert new["labels"].tolist() == sorted(new["labels"].tolist())  # in their order, none twice
    assert torch.equal(new["iscrowd"], target["iscrowd"][new["labels"]])  # a label is the object's number here
    # an area that was the box's is the new box's
    torch.testing.assert_close(new["area"], (x1 - x0) * (y1 - y0), rtol=1e-3, atol=1e-2)


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_the_same_seed_gives_the_same_view(scene):
    image, target, augmentation, seed = scene
    one, two = (augmentation(image, target, np.random.default_rng(seed)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and all(torch.equal(one[1][key], two[1][key]) for key in target)


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_two_flips_are_none(scene):
    image, target, _, _ = scene
    once = horizontal_flip(image, target)
    twice = horizontal_flip(*once)
    assert torch.equal(twice[0], image) and torch.equal(once[0], image.flip(-1))
    torch.testing.assert_close(twice[1]["boxes"], target["boxes"], rtol=0, atol=1e-5)
    assert torch.equal(once[1]["labels"], target["labels"])


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_boxes_stay_on_their_pixels(scene):
    """Objects painted in colours of their own are found again where their boxes say."""
    image, _, augmentation, seed = scene
    height, width = image.shape[-2:]
    box = [width // 4, height // 4, width // 4 + max(2, width // 3), height // 4 + max(2, height // 3)]
    painted = torch.zeros_like(image)
    painted[:, box[1] : box[3], box[0] : box[2]] = 255
    plain = Augmentation(
        **{**OFF, "flip": augmentation.flip, "scale": augmentation.scale, "crop": augmentation.crop}, min_visible=0.0
    )
    seen, target = plain(painted, target_with([box]), np.random.default_rng(seed))
    where = torch.nonzero((seen == 255).all(0))
    if len(target["boxes"]):
        (y0, x0), (y1, x1) = where.min(0).values.tolist(), (where.max(0).values + 1).tolist()
        assert target["boxes"].tolist() == [[x0, y0, x1, y1]]
    else:
        assert len(where) == 0


def test_off_changes_nothing():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    target = target_with([[0, 0, 30, 20], [3, 4, 5, 6.5]])
    seen, new = Augmentation(**OFF)(image, target, np.random.default_rng(0))
    assert torch.equal(seen, image) and all(torch.equal(new[key], target[key]) for key in target)


def test_a_zoomed_out_image_lies_in_the_mean_colour():
    image = torch.zeros(3, 10, 20, dtype=torch.uint8)
    seen, target = Augmentation(**{**OFF, "scale": (0.5, 0.5)})(
        image, target_with([[2, 3, 12, 8]]), np.random.default_rng(1)
    )
    assert seen.shape == (3, 20, 40)
    around = seen[:, (seen != 0).all(0)]
    assert around.shape[1] == 20 * 40 - 10 * 20 and torch.equal(around[:, 0], torch.tensor(FILL).to(torch.uint8))
    assert (target["boxes"][0, 2:] - target["boxes"][0, :2]).tolist() == [10, 5]


def test_objects_that_hardly_show_are_dropped_with_all_they_have():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = [[0, 0, 100, 100], [0, 0, 2, 2], [40, 40, 60, 60], [98, 98, 100, 100]]
    augmentation = Augmentation(**{**OFF, "scale": (2.0, 2.0)}, min_visible=0.5)
    dropped = set()
    for seed in range(20):
        _, target = augmentation(image, target_with(boxes, labels=[5, 6, 7, 8]), np.random.default_rng(seed))
        assert 5 not in target["labels"]  # a quarter of it shows
        assert not {6, 8} <= set(target["labels"].tolist())  # opposite corners
        dropped |= {5, 6, 7, 8} - set(target["labels"].tolist())
    assert dropped == {5, 6, 7, 8}


def test_crowds_are_cropped_like_objects():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    target = target_with([[0, 0, 100, 100]], iscrowd=[1])
    _, new = Augmentation(**{**OFF, "scale": (2.0, 2.0)})(image, target, np.random.default_rng(0))
    assert (
        new["boxes"].tolist() == [[0, 0, 50, 50]] and new["iscrowd"].tolist() == [1] and new["area"].tolist() == [2500]
    )


def test_areas_of_segments_keep_their_share():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    target = target_with([[10, 10, 30, 30]]) | {"area": torch.tensor([100.0])}
    _, new = Augmentation(**OFF, size=(80, 20))(image, target, np.random.default_rng(0))
    assert new["boxes"].tolist() == [[5, 20, 15, 60]] and new["area"].tolist() == [100.0]


def test_colours_change_and_boxes_do_not():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    target = target_with([[3, 4, 25, 16]])
    seen, new = Augmentation(**{**OFF, "photometric": 1.0})(image, target, np.random.default_rng(0))
    assert not torch.equal(seen, image) and torch.equal(new["boxes"], target["boxes"])


def test_probabilities_are_kept():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    augmentation = Augmentation(**{**OFF, "flip": 0.3})
    flipped = sum(
        augmentation(image, target_with([[0, 0, 2, 2]]), np.random.default_rng(seed))[1]["boxes"][0, 0].item() == 6
        for seed in range(400)
    )
    assert 90 <= flipped <= 150  # 120 +- 3.3 standard deviations


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flip": 1.5}, r"`flip` is 1\.5, but a share between 0 and 1"),
        ({"min_visible": -0.1}, r"`min_visible` is -0\.1"),
        ({"scale": (0.0, 1.0)}, r"`scale` is \(0\.0, 1\.0\), but a range with 0 < low"),
        ({"scale": (2.0, 1.0)}, r"`scale` is \(2\.0, 1\.0\)"),
        ({"crop_size": (0.5, 1.5)}, r"`crop_size` is \(0\.5, 1\.5\).*<= 1\.0"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**setting)
