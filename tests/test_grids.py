"""The same cell is the same place of the image, whichever of the two models pads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from transformers import DetrImageProcessor, RTDetrImageProcessor

from hf_detrkd.data import DetectionCollator
from hf_detrkd.families import adapter_for
from hf_detrkd.grids import frames_differ, on_grid
from hf_detrkd.losses.attention import to_grid
from hf_detrkd.methods.proposals import on_grid_of
from hf_detrkd.projectors import MapProjector
from hf_detrkd.view import Proposals

PROCESSORS = {
    "detr": DetrImageProcessor(size={"shortest_edge": 320, "longest_edge": 640}),
    "deformable_detr": DetrImageProcessor(size={"shortest_edge": 320, "longest_edge": 640}),
    "rt_detr": RTDetrImageProcessor(size={"height": 320, "width": 320}),
}


@pytest.fixture(scope="module")
def views():
    """Of a landscape and a portrait image, which a DETR's processor pads and an RT-DETR's makes square."""

    def item(height, width):
        target = {
            "boxes": torch.tensor([[0.6 * width, 0.4 * height, 0.9 * width, 0.6 * height]]),
            "labels": torch.tensor([0]),
            "area": torch.ones(1),
            "iscrowd": torch.zeros(1),
            "image_id": torch.tensor([0]),
        }
        return {"image": torch.zeros(3, height, width, dtype=torch.uint8), "target": target}

    found = {}
    for name, processor in PROCESSORS.items():
        batch = DetectionCollator(processor)([item(240, 320), item(320, 240)])
        inputs = {key: batch[key] for key in ("pixel_values", "pixel_mask") if key in batch}
        with torch.no_grad():
            found[name] = adapter_for(zoo.build(name)).forward(inputs)[1]
    return found


def places(view, padding=True):
    """The view with a memory that says of every cell where in the image it is: x, y; and 7 in padding if there is to be any."""
    levels = []
    for mask in view.memory_masks():
        height, width = mask.shape[1:]
        rows, columns = mask.any(2).sum(1)[:, None, None], mask.any(1).sum(1)[:, None, None]
        x = (torch.arange(width) + 0.5)[None, None] / columns
        y = (torch.arange(height) + 0.5)[None, :, None] / rows
        where = torch.stack(torch.broadcast_tensors(x, y), -1)
        levels.append(torch.where(mask[..., None] | (not padding), where, 7.0).flatten(1, 2))
    return replace(view, memory=torch.cat(levels, 1))


PAIRS = [(one, other) for one in PROCESSORS for other in PROCESSORS if one != other]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_maps_are_compared_place_by_place(views, student, teacher):
    # Where both pad alike, whole grids are resized and the border's cells have something of the padding behind them
    differ = frames_differ(views[student], views[teacher])
    assert differ == ("rt_detr" in (student, teacher))
    own, other = places(views[student], differ), places(views[teacher], differ)
    adapter = type("TwoChannels", (), {"memory_width": 2})
    for pair in MapProjector(adapter, adapter)(own, other):
        assert pair.mask.flatten(1).any(1).all()
        apart = (pair.student - pair.teacher).abs().amax(1)[pair.mask]
        coarse = min(min(shape) for view in (own, other) for shape in view.memory_shapes)
        assert apart.max() < 1 / coarse, f"compared cells are {apart.max():.2f} of the image apart"


def test_every_real_cell_of_the_teacher_has_a_partner(views):
    """Masks laid over each other would leave out what only one of them shows."""
    own, other = views["rt_detr"], views["detr"]
    adapter = type("Same", (), {"memory_width": zoo.WIDTH})
    (pair,) = MapProjector(adapter, adapter)(own, other)
    assert torch.equal(pair.mask, other.memory_masks()[0])


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_attention_stays_on_its_object(views, student, teacher):
    """All attention on the middle of the image: its centre of mass is there on the other memory too."""
    own, other = places(views[student]), places(views[teacher])
    on_cells = (other.memory - 0.5).abs().amax(-1) < 0.25
    rows = on_cells[:, None].float() / on_cells.sum(-1)[:, None, None]
    moved, _ = to_grid(rows, other.memory_masks(), own.memory_masks(), frames_differ(own, other))
    assert torch.allclose(moved.sum(-1), torch.ones(2, 1), atol=1e-4)
    centre = moved @ torch.where(own.memory == 7.0, 0.0, own.memory)
    assert (centre - 0.5).abs().max() < 0.1


def test_proposals_stay_in_their_place(views):
    def tokens(view):
        valid = torch.cat([mask.flatten(1) for mask in view.memory_masks()], 1)
        where = places(view).memory
        boxes = torch.cat([where, torch.full_like(where, 0.1)], -1)
        return replace(view, proposals=Proposals(boxes[..., :1], boxes, valid))

    own, other = tokens(views["deformable_detr"]), tokens(views["rt_detr"])
    for student, teacher in ((own, other), (other, own)):
        _, boxes, valid = on_grid_of(student, teacher)
        both = valid & student.proposals.valid
        assert both.float().mean() > 0.5
        assert (boxes - student.proposals.boxes)[both].abs().max() < 0.26  # half a cell of the coarsest level, 2 x 2


def test_frames():
    """Padding alike, or none, is the same frame; a model that knows no padding sees the whole."""
    view = adapter_for(zoo.build("deformable_detr")).forward(zoo.batch(pad=True))[1]
    square = adapter_for(zoo.build("rt_detr")).forward({"pixel_values": torch.zeros(2, 3, 64, 64)})[1]
    whole = adapter_for(zoo.build("detr")).forward({"pixel_values": torch.zeros(2, 3, 64, 64)})[1]
    assert not frames_differ(view, view)
    assert not frames_differ(square, square) and not frames_differ(square, whole)
    assert frames_differ(square, view) and frames_differ(view, square)


def test_an_image_without_a_cell():
    """A tiny image beside a large one may have no cell of its own: finite, and the others are as they are alone."""
    maps = torch.rand(2, 1, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, :2] = True
    moved = on_grid(maps, mask, torch.ones(2, 6, 6, dtype=torch.bool), padded=True, mode="bilinear")
    alone = torch.nn.functional.interpolate(maps[:1, :, :2], size=(6, 6), mode="bilinear")
    torch.testing.assert_close(moved[:1], alone)
    moved.sum().backward()
    assert maps.grad.isfinite().all()
