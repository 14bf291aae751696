"""The detection loss under a given assignment, against transformers' own losses and the slowest obvious Python."""

from __future__ import annotations

import math

import pytest
import reference_loops as loops
import torch
from torch import distributed
from torch import multiprocessing as mp
from transformers import RTDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from hf_detrkd.losses.set_prediction import set_loss
from hf_detrkd.matching import GroundTruthMatcher, Match, matches

B, Q, K = 3, 6, 4
KINDS = ("sigmoid", "softmax")


def example(kind, targets=(3, 0, 2), queries=Q, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch = len(targets)
    logits = torch.randn(batch, queries, K + (kind == "softmax"), generator=generator) * 2
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.5 + 0.25
    labels = [
        {
            "class_labels": torch.randint(0, K, (number,), generator=generator),
            "boxes": torch.rand(number, 4, generator=generator) * 0.5 + 0.25,
        }
        for number in targets
    ]
    return logits.requires_grad_(), boxes.requires_grad_(), labels


def matched(kind, logits, boxes, targets) -> Match:
    return GroundTruthMatcher(classification=kind)([logits], [boxes], targets)[0]


def criterion(kind):
    if kind == "sigmoid":
        return DeformableDetrImageLoss(DeformableDetrHungarianMatcher(1, 5, 2), K, 0.25, ["labels", "boxes"])
    return ImageLoss(HungarianMatcher(1, 5, 2), K, 0.1, ["labels", "boxes"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [(3, 0, 2), (1,), (6, 2)])
def test_is_transformers_loss(kind, targets):
    logits, boxes, labels = example(kind, targets)
    expected = criterion(kind)({"logits": logits, "pred_boxes": boxes}, labels)
    found = set_loss(logits, boxes, kind, matched(kind, logits, boxes, labels), labels)
    for name, value in zip(("class", "l1", "giou"), ("loss_ce", "loss_bbox", "loss_giou"), strict=True):
        torch.testing.assert_close(found[name], expected[value], rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(sum(found.values()), (logits, boxes))
    wanted = torch.autograd.grad(sum(expected[k] for k in ("loss_ce", "loss_bbox", "loss_giou")), (logits, boxes))
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [(3, 0, 2), (1,), (6, 2)])
def test_varifocal_is_that_of_rt_detr(targets):
    logits, boxes, labels = example("sigmoid", targets)
    rt_detr = RTDetrLoss(RTDetrConfig(num_labels=K))
    expected = rt_detr({"logits": logits, "pred_boxes": boxes}, labels)
    (match,) = GroundTruthMatcher.like(rt_detr.matcher)([logits], [boxes], labels)
    found = set_loss(logits, boxes, "sigmoid", match, labels, quality=True)
    weights = {"class": ("loss_vfl", 1), "l1": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for name, (value, weight) in weights.items():
        torch.testing.assert_close(weight * found[name], expected[value], rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found["class"], (logits, boxes), allow_unused=True)
    (wanted,) = torch.autograd.grad(expected["loss_vfl"], logits)
    torch.testing.assert_close(gradients[0], wanted, rtol=1e-4, atol=1e-6)
    assert gradients[1] is None  # how well a box fits is told, not asked


@pytest.mark.parametrize(("kind", "quality"), [("sigmoid", False), ("sigmoid", True), ("softmax", False)])
def test_by_the_slowest_obvious_python(kind, quality):
    """With an assignment that no matcher would choose."""
    logits, boxes, labels = example(kind)
    match = matches(
        [[tuple(map(torch.tensor, p)) for p in (([4, 1, 0], [0, 1, 2]), ([], []), ([5, 2], [1, 0]))]], "cpu"
    )
    match = match[0]
    assert match.weight.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]
    found = set_loss(logits, boxes, kind, match, labels, quality=quality)
    pairs = [{4: 0, 1: 1, 0: 2}, {}, {5: 1, 2: 0}]
    expected = loops.set_loss(
        logits.tolist(),
        boxes.tolist(),
        kind,
        pairs,
        [{name: value.tolist() for name, value in image.items()} for image in labels],
        quality,
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name].item(), value, rtol=1e-5, atol=1e-6)


def test_by_hand():
    """One query, one class, logit 0: .25 * .5^2 * ln 2; and the other query, which has no target: .75 * .5^2 * ln 2."""
    targets = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2]])}]
    boxes = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.4, 0.4]]])
    match = Match(torch.tensor([[1]]), torch.tensor([[0]]), torch.ones(1, 1))
    found = set_loss(torch.zeros(1, 2, 1), boxes, "sigmoid", match, targets)
    assert found["class"].item() == pytest.approx(0.25 * math.log(2))
    assert found["l1"].item() == pytest.approx(0.2)
    assert found["giou"].item() == pytest.approx(0.5)
    found = set_loss(torch.zeros(1, 2, 2), boxes, "softmax", match, targets)
    assert found["class"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 2])
def test_no_targets(kind, padding):
    logits, boxes, labels = example(kind, (0, 0))
    empty = torch.zeros(2, padding, dtype=torch.int64)
    found = set_loss(logits, boxes, kind, Match(empty, empty, torch.zeros(2, padding)), labels)
    assert found["class"] > 0
    assert found["l1"] == found["giou"] == 0
    sum(found.values()).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
    assert boxes.grad is not None
    assert not boxes.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_padding_change_nothing(kind):
    logits, boxes, labels = example(kind)
    match = matched(kind, logits, boxes, labels)
    found = set_loss(logits, boxes, kind, match, labels)
    doubled = Match(*(torch.cat([x, x]) for x in (match.student_index, match.teacher_index, match.weight)))
    twice = set_loss(torch.cat([logits] * 2), torch.cat([boxes] * 2), kind, doubled, labels * 2)
    padded = Match(
        *(torch.nn.functional.pad(x, (2, 1)) for x in (match.student_index, match.teacher_index, match.weight))
    )
    for other in (twice, set_loss(logits, boxes, kind, padded, labels)):
        for name, value in found.items():
            torch.testing.assert_close(other[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_more_targets_than_queries(kind):
    """Divided by the targets, paired or not, as transformers does."""
    logits, boxes, labels = example(kind, (5, 1), queries=3)
    expected = criterion(kind)({"logits": logits, "pred_boxes": boxes}, labels)
    found = set_loss(logits, boxes, kind, matched(kind, logits, boxes, labels), labels)
    torch.testing.assert_close(found["l1"], expected["loss_bbox"])


def test_extreme_logits_are_finite():
    logits, boxes, labels = example("sigmoid")
    match = matched("sigmoid", logits, boxes, labels)
    extreme = (logits.detach() * 1e4).requires_grad_()
    found = set_loss(extreme, boxes, "sigmoid", match, labels)
    found["class"].backward()
    assert found["class"].isfinite()
    assert extreme.grad.isfinite().all()


def _of_process(rank, path, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for kind in KINDS:
        logits, boxes, labels = example(kind, (3, 0, 2, 1))
        own = slice(2 * rank, 2 * rank + 2)
        logits, boxes, labels = logits[own], boxes[own], labels[own]
        found = set_loss(logits, boxes, kind, matched(kind, logits, boxes, labels), labels)
        results[KINDS.index(kind), rank] = torch.stack([value.detach() for value in found.values()])
    distributed.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    results = torch.zeros(2, 2, 3).share_memory_()
    mp.spawn(_of_process, (tmp_path / "store", results), nprocs=2)
    for index, kind in enumerate(KINDS):
        logits, boxes, labels = example(kind, (3, 0, 2, 1))
        whole = set_loss(logits, boxes, kind, matched(kind, logits, boxes, labels), labels)
        torch.testing.assert_close(results[index].mean(0), torch.stack(list(whole.values())))
