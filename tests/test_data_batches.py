from __future__ import annotations

import copy
import pickle

import datasets
import numpy as np
import pytest
import tiny_datasets as tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import DetrImageProcessor, RTDetrImageProcessor

from hf_detrkd.data import Augmentation, DetectionCollator, DetectionDataset, load_detection_dataset
from hf_detrkd.data.collator import input_size, same_pixels

FIXED = {"size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return load_detection_dataset(tiny.write_coco(tmp_path_factory.mktemp("set") / "coco"))["train"]


def test_items_have_the_original_pixels_and_boxes(train):
    dataset = DetectionDataset(train)
    assert len(dataset) == 3 and dataset.class_names == tiny.NAMES
    assert dataset.id2label == {0: "cat", 1: "dog", 2: "bird"} and dataset.label2id == {"cat": 0, "dog": 1, "bird": 2}
    for index, (_, (width, height), objects) in enumerate(tiny.SPLITS["train"]):
        item = dataset[index]
        assert item["image"].shape == (3, height, width) and item["image"].dtype == torch.uint8
        expected = np.asarray(tiny.picture((width, height), index))
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), expected)
        target = item["target"]
        boxes = [[x, y, x + w, y + h] for (x, y, w, h), _, _ in objects]
        assert target["boxes"].tolist() == boxes and target["boxes"].shape == (len(objects), 4)
        assert target["labels"].tolist() == [category for _, category, _ in objects]
        assert target["iscrowd"].tolist() == [crowd for _, _, crowd in objects]
        assert target["area"].tolist() == [w * h / 2 for (_, _, w, h), _, _ in objects]
        assert target["image_id"].tolist() == [100 + 7 * index]
    assert torch.equal(dataset[-1]["image"], dataset[2]["image"])
    with pytest.raises(IndexError):
        dataset[3]


def equal_items(one, two) -> bool:
    same = torch.equal(one["image"], two["image"])
    return same and all(torch.equal(one["target"][key], two["target"][key]) for key in one["target"])


def test_items_depend_on_seed_epoch_and_index_alone(train):
    dataset = DetectionDataset(train, Augmentation(), seed=3)
    first = [dataset[index] for index in range(3)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert all(equal_items(dataset[index], first[index]) for index in (2, 0, 1))
    assert all(equal_items(dataset[-1 - index], first[2 - index]) for index in range(3))
    dataset.set_epoch(1)
    assert dataset.epoch == 1 and not equal_items(dataset[0], first[0])
    assert not equal_items(DetectionDataset(train, Augmentation(), seed=4)[0], first[0])
    dataset.set_epoch(0)
    assert equal_items(dataset[0], first[0])


def as_they_are(items):
    return items


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])  # spawn imports all anew
def test_persistent_workers_see_the_epoch(train, start):
    dataset, alone = (DetectionDataset(train, Augmentation(), seed=1) for _ in range(2))
    loader = DataLoader(
        dataset, 2, num_workers=2, persistent_workers=True, collate_fn=as_they_are, multiprocessing_context=start
    )
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        items = [item for batch in loader for item in batch]
        assert all(equal_items(item, alone[index]) for index, item in enumerate(items)), (start, epoch)


def test_a_copy_keeps_its_settings(train):
    dataset = DetectionDataset(train, Augmentation(), seed=1)
    dataset.set_epoch(5)
    for copied in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert copied.epoch == 5 and equal_items(copied[0], dataset[0])


def test_a_broken_image_is_named(tmp_path, train):
    broken = tmp_path / "broken.png"
    Image.new("RGB", (40, 30)).save(broken)
    row = train.cast_column("image", datasets.Image(decode=False))[0] | {"image": str(broken)}
    split = datasets.Dataset.from_list([row], features=train.features)
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"broken\.png can't be decoded .* take its row out"):
        DetectionDataset(split)[0]


def test_other_columns_are_refused():
    with pytest.raises(TypeError, match=r"the split has the columns .* read it with `load_detection_dataset`"):
        DetectionDataset(datasets.Dataset.from_dict({"image": ["a"]}))


# --- collator


def test_labels_are_the_losses(train):
    dataset = DetectionDataset(train)
    batch = DetectionCollator(RTDetrImageProcessor(**FIXED))([dataset[index] for index in range(3)])
    assert batch.keys() == {"pixel_values", "labels"} and batch["pixel_values"].shape == (3, 3, 32, 32)
    first, empty, crowded = batch["labels"]
    expected = torch.tensor([[14 / 40, 9 / 30, 20 / 40, 12 / 30], [25 / 40, 18 / 30, 30 / 40, 24 / 30]])
    torch.testing.assert_close(first["boxes"], expected)
    assert first["class_labels"].tolist() == [0, 2] and first["class_labels"].dtype == torch.int64
    assert first["area"].tolist() == [120, 360] and first["orig_size"].tolist() == [30, 40]
    assert first["image_id"].tolist() == [100] and first["crowd_boxes"].shape == (0, 4)
    assert empty["boxes"].shape == (0, 4) and empty["class_labels"].shape == (0,) and empty["area"].shape == (0,)
    assert crowded["class_labels"].tolist() == [1] and crowded["crowd_labels"].tolist() == [1]
    torch.testing.assert_close(crowded["crowd_boxes"], torch.tensor([[0.5, 0.5, 1.0, 1.0]]))
    assert crowded["crowd_area"].tolist() == [512] and crowded["area"].tolist() == [16]


def test_original_boxes_come_back_from_the_labels(train):
    dataset = DetectionDataset(train)
    for label, (_, _, objects) in zip(
        DetectionCollator(RTDetrImageProcessor(**FIXED))([dataset[index] for index in range(3)])["labels"],
        tiny.SPLITS["train"],
        strict=True,
    ):
        height, width = label["orig_size"].tolist()
        centre, size = (label["boxes"] * torch.tensor([width, height, width, height])).split(2, dim=1)
        kept = [box for box, _, crowd in objects if not crowd]
        expected = torch.tensor(kept, dtype=torch.float32).reshape(-1, 4)
        torch.testing.assert_close(torch.cat([centre - size / 2, size], 1), expected, rtol=0, atol=1e-5)


def test_padding_leaves_the_boxes_alone(train):
    dataset = DetectionDataset(train)
    items = [dataset[index] for index in range(3)]
    padded = DetectionCollator(DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}))(items)
    fixed = DetectionCollator(RTDetrImageProcessor(**FIXED))(items)
    assert padded["pixel_mask"].shape == padded["pixel_values"].shape[:1] + padded["pixel_values"].shape[2:]
    assert padded["pixel_mask"].sum() < padded["pixel_mask"].numel()
    for one, other in zip(padded["labels"], fixed["labels"], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_batch_is_a_batch_of_its_items(train):
    dataset, collator = DetectionDataset(train), DetectionCollator(RTDetrImageProcessor(**FIXED))
    together = collator([dataset[index] for index in range(3)])["pixel_values"]
    alone = torch.cat([collator([dataset[index]])["pixel_values"] for index in range(3)])
    torch.testing.assert_close(together, alone)


NORMALISED = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("teacher", "differs"),
    [
        (None, False),
        (RTDetrImageProcessor(**FIXED), False),
        (RTDetrImageProcessor(**FIXED, do_convert_annotations=False), False),
        (RTDetrImageProcessor(size={"height": 64, "width": 64}), True),
        (RTDetrImageProcessor(**FIXED, **NORMALISED), True),
        (RTDetrImageProcessor(**FIXED, resample=0), True),
        (DetrImageProcessor(**FIXED, do_normalize=False), True),  # the same pixels, but with a mask
    ],
)
def test_the_teacher_gets_pixels_of_its_own_only_where_they_differ(train, teacher, differs):
    dataset, student = DetectionDataset(train), RTDetrImageProcessor(**FIXED)
    collator = DetectionCollator(student, teacher)
    assert collator.teacher_pixels_differ == differs
    batch = collator([dataset[index] for index in range(3)])
    assert ("teacher_pixel_values" in batch) == differs
    if differs:
        own = DetectionCollator(teacher)([dataset[index] for index in range(3)])
        assert torch.equal(batch["teacher_pixel_values"], own["pixel_values"])
        assert ("teacher_pixel_mask" in batch) == ("pixel_mask" in own)


def test_input_size():
    small, large = RTDetrImageProcessor(**FIXED), RTDetrImageProcessor(size={"height": 64, "width": 48})
    assert (
        input_size(small) == (32, 32) and input_size(small, large) == (64, 48) and input_size(small, None) == (32, 32)
    )
    assert input_size(DetrImageProcessor()) is None and input_size(small, DetrImageProcessor()) is None
    assert input_size(RTDetrImageProcessor(do_resize=False)) is None


def test_same_pixels_is_symmetric():
    one, other = RTDetrImageProcessor(**FIXED), DetrImageProcessor()
    assert not same_pixels(one, other) and not same_pixels(other, one) and same_pixels(one, one)


def test_a_loader_with_workers_trains_in_order(train):
    dataset = DetectionDataset(train, Augmentation(size=(32, 32)), seed=2)
    collator = DetectionCollator(RTDetrImageProcessor(**FIXED))
    batches = [
        [batch["pixel_values"] for batch in DataLoader(dataset, 2, num_workers=workers, collate_fn=collator)]
        for workers in (0, 2)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*batches, strict=True))
