from __future__ import annotations

import math

import pytest
import reference_loops as loops
import torch
from torch import distributed
from torch import multiprocessing as mp

from hf_detrkd.losses import bernoulli_kl, class_kl, giou, l1, softmax_kl, weighted_mean
from hf_detrkd.losses.boxes import iou, teacher_is_better
from hf_detrkd.losses.features import relative_error
from hf_detrkd.losses.logits import as_kind

B, M, K = 2, 5, 4


def softmax_form(student, teacher, weight):
    return class_kl(student, "sigmoid", teacher, "sigmoid", weight, form="softmax", temperature=2.0)


def sigmoid_from_softmax(student, teacher, weight):
    return class_kl(student[..., :-1], "sigmoid", teacher, "softmax", weight)


def softmax_from_sigmoid(student, teacher, weight):
    return class_kl(student, "softmax", teacher[..., :-1], "sigmoid", weight)


def mean_l1(student, teacher, weight):
    return l1(student, teacher, weight, coordinates="mean")


LOGIT_LOSSES = [softmax_kl, bernoulli_kl, softmax_form, sigmoid_from_softmax, softmax_from_sigmoid]
BOX_LOSSES = [l1, mean_l1, giou]
LOSSES = LOGIT_LOSSES + BOX_LOSSES
EXACT = [softmax_kl, bernoulli_kl, softmax_form, *BOX_LOSSES]
"""0 for an identical student."""


def example(loss, batch=B, seed=0):
    """Student, teacher and weight, with some weights 0."""
    generator = torch.Generator().manual_seed(seed)
    if loss in BOX_LOSSES:
        student, teacher = torch.rand(2, batch, M, 4, generator=generator) * 0.5 + 0.25
    else:
        student, teacher = torch.randn(2, batch, M, K, generator=generator) * 3
    weight = torch.rand(batch, M, generator=generator) * (torch.rand(batch, M, generator=generator) > 0.3)
    return student, teacher, weight


# --- every loss


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_selected_is_exactly_zero_with_a_graph(loss):
    student, teacher, weight = example(loss)
    student.requires_grad_()
    for kept in (slice(None), slice(0, 0)):
        value = loss(student[:, kept], teacher[:, kept], torch.zeros_like(weight[:, kept]))
        assert value.item() == 0
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", LOSSES)
def test_doubling_the_batch_changes_nothing(loss):
    student, teacher, weight = example(loss)
    twice = [torch.cat([x, x]) for x in (student, teacher, weight)]
    torch.testing.assert_close(loss(*twice), loss(student, teacher, weight))


@pytest.mark.parametrize("loss", LOSSES)
def test_scale_of_the_weights_changes_nothing(loss):
    student, teacher, weight = example(loss)
    torch.testing.assert_close(loss(student, teacher, 7 * weight), loss(student, teacher, weight))


@pytest.mark.parametrize("loss", LOSSES)
def test_what_has_no_weight_does_not_matter(loss):
    student, teacher, weight = example(loss)
    expected = loss(student, teacher, weight)
    unused = weight == 0
    assert unused.any()
    student[unused], teacher[unused] = 100.0, float("nan")
    assert torch.equal(loss(student, teacher, weight), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_gives_a_finite_float32(loss):
    student, teacher, weight = example(loss)
    value = loss(student.bfloat16(), teacher.bfloat16(), weight.bfloat16())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher, weight), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_extreme_logits_stay_finite(loss, size):
    student, _, weight = example(loss)
    student = (student * size).requires_grad_()
    value = loss(student, -student.detach(), weight)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_goes_to_the_student_alone(loss):
    student, teacher, weight = (x.requires_grad_() for x in example(loss))
    loss(student, teacher, weight).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("loss", EXACT)
def test_identical_student_is_exactly_zero(loss):
    student, _, weight = example(loss)
    student.requires_grad_()
    value = loss(student, student.detach(), weight)
    assert value.item() == 0


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_divergence_is_not_negative(loss):
    for seed in range(5):
        assert loss(*example(loss, seed=seed)) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_weight_is_broadcast(loss):
    student, teacher, _ = example(loss)
    weight = torch.rand(B, 1)
    torch.testing.assert_close(loss(student, teacher, weight), loss(student, teacher, weight.expand(B, M)))


# --- against the loops


@pytest.mark.parametrize("loss", [softmax_kl, bernoulli_kl])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_divergences_equal_the_loop(loss, temperature):
    student, teacher, weight = example(loss)
    lists = [student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), weight.flatten().tolist()]
    expected = getattr(loops, loss.__name__)(*lists, temperature)
    assert loss(student, teacher, weight, temperature=temperature).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_boxes_equal_the_loop():
    student, teacher, weight = example(l1)
    lists = [student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), weight.flatten().tolist()]
    assert l1(student, teacher, weight).item() == pytest.approx(loops.l1(*lists), abs=1e-6)
    assert mean_l1(student, teacher, weight).item() == pytest.approx(loops.l1(*lists, "mean"), abs=1e-6)
    assert giou(student, teacher, weight).item() == pytest.approx(loops.giou(*lists), abs=1e-6)


def test_sigmoid_student_of_a_softmax_teacher_equals_the_loop():
    student, teacher, weight = example(sigmoid_from_softmax)
    probs = [loops.softmax(logits)[:-1] for logits in teacher.flatten(0, 1).tolist()]
    as_logits = [[math.log(p / (1 - p)) for p in row] for row in probs]
    expected = loops.bernoulli_kl(student[..., :-1].flatten(0, 1).tolist(), as_logits, weight.flatten().tolist())
    assert sigmoid_from_softmax(student, teacher, weight).item() == pytest.approx(expected, rel=1e-4)


def test_softmax_student_of_a_sigmoid_teacher_equals_the_loop():
    student, teacher, weight = example(softmax_from_sigmoid)
    as_logits = []
    for logits in teacher[..., :-1].flatten(0, 1).tolist():
        probs = [loops.sigmoid(z) for z in logits]
        target = [max(probs) * p / sum(probs) for p in probs] + [1 - max(probs)]
        as_logits.append([math.log(p) for p in target])
    expected = loops.softmax_kl(student.flatten(0, 1).tolist(), as_logits, weight.flatten().tolist())
    assert softmax_from_sigmoid(student, teacher, weight).item() == pytest.approx(expected, rel=1e-4)


def test_one_certain_class_survives_both_conversions():
    sigmoid = torch.tensor([-20.0, 3.0, -20.0])
    softmax = as_kind(sigmoid, "sigmoid", "softmax")
    p = torch.sigmoid(torch.tensor(3.0)).item()
    torch.testing.assert_close(softmax.softmax(-1), torch.tensor([0, p, 0, 1 - p]), atol=1e-6, rtol=0)
    torch.testing.assert_close(as_kind(softmax, "softmax", "sigmoid").sigmoid()[1].item(), p, atol=1e-6, rtol=0)


# --- hand-computed


def test_kd_detr_numbers():
    """methods.md 4.6, cases 1 to 4, 6 and 7: two queries, two classes, T = 10."""
    teacher, student = torch.tensor([[2.0, 0], [-2, -3]]), torch.tensor([[0.0, 0], [-2, -3]])
    weight = teacher.sigmoid().amax(-1)
    assert weight.tolist() == pytest.approx([0.880797, 0.119203], abs=1e-5)
    one = torch.ones(1)
    assert softmax_kl(student[:1], teacher[:1], one, temperature=10).item() == pytest.approx(0.497511, abs=1e-5)
    assert softmax_kl(student[1:], teacher[1:], one, temperature=10).item() == 0
    assert softmax_kl(student, teacher, weight, temperature=10).item() == pytest.approx(0.438206, abs=1e-5)
    by_class_kl = class_kl(student, "sigmoid", teacher, "sigmoid", weight, temperature=10, form="softmax")
    assert by_class_kl.item() == pytest.approx(0.438206, abs=1e-5)
    assert bernoulli_kl(student[:1], teacher[:1], one).item() == pytest.approx(0.327813, abs=1e-5)
    teacher_boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 2)
    student_boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.5, 0.5, 0.4, 0.4]])
    assert l1(student_boxes[:1], teacher_boxes[:1], one).item() == pytest.approx(0.2, abs=1e-5)
    assert mean_l1(student_boxes, teacher_boxes, weight).item() == pytest.approx(0.044040, abs=1e-5)
    assert l1(student_boxes, teacher_boxes, weight).item() == pytest.approx(0.176159, abs=1e-5)
    assert giou(student_boxes, teacher_boxes, weight).item() == pytest.approx(0.440399, abs=1e-5)


def test_detrdistill_numbers():
    """methods.md 3.6, cases 2 and 3."""
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.6]])
    assert bernoulli_kl(probs.logit(), probs.logit(), torch.ones(2)).item() == 0
    # Binary cross-entropy 1.386294 of logits 0 less its floor, the teacher's entropy 0.911790
    found = bernoulli_kl(torch.zeros(2, 2), probs.logit(), torch.ones(2)).item()
    assert found == pytest.approx(1.386294 - 0.911790, abs=1e-5)
    teacher = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])
    student = teacher + torch.tensor([[0.05, 0, 0, 0], [-0.05, 0, 0, 0]])
    boxes = 5 * l1(student, teacher, torch.ones(2)) + 2 * giou(student, teacher, torch.ones(2))
    assert boxes.item() == pytest.approx(0.613636, abs=1e-5)


def test_d3etr_numbers():
    """methods.md 5.6, cases 1 and 3: the three pairs of the matching."""
    teacher = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.1]])[[1, 2, 0]].logit()
    student = torch.tensor([[0.3, 0.6], [0.2, 0.2], [0.7, 0.2]]).logit()
    teacher_boxes = torch.tensor([[0.75, 0.75, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.5]])
    student_boxes = torch.tensor([[0.75, 0.75, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.25, 0.25, 0.5, 0.5]])
    weight = torch.ones(3)
    assert bernoulli_kl(student, teacher, weight).item() == pytest.approx(0.114547, abs=1e-5)
    assert l1(student_boxes, teacher_boxes, weight).item() == pytest.approx(0.133333, abs=1e-5)
    assert giou(student_boxes, teacher_boxes, weight).item() == pytest.approx(0.183333, abs=1e-5)
    row_t, row_s = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert softmax_kl(row_s, row_t, torch.ones(1)).item() == pytest.approx(0.130812, abs=1e-5)


def test_generalized_iou_of_degenerate_boxes_is_finite():
    boxes = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0.2, 0.2], [0.5, 0.5, -0.1, 0.2]]).requires_grad_()
    value = giou(boxes, torch.tensor([[0.5, 0.5, 0, 0]]).expand(3, 4), torch.ones(3))
    value.backward()
    assert value.isfinite()
    assert boxes.grad.isfinite().all()


# --- one mean over several processes


def maps_of(values):
    """(B, 1, 2, 2) maps of a student and a teacher from (B, 4) values."""
    maps = values.view(-1, 1, 2, 2)
    return maps, 2 * maps.square()


def gradients_of_one_process(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for values, weight in torch.load(f"{folder}/batches.pt"):
        theta = torch.ones((), requires_grad=True)
        loss = weighted_mean(theta * values[rank], weight[rank])
        loss.backward()
        relative = relative_error(*maps_of(values[rank]), weight[rank].view(-1, 2, 2))
        results.append((loss.detach(), theta.grad, relative))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_are_one_big_batch(tmp_path):
    """The mean of the processes' gradients, which DDP takes, is the gradient of one process with the whole batch."""
    torch.manual_seed(0)
    values, unequal = torch.randn(2, 3, 4), torch.rand(2, 3, 4)
    unequal[0, 1:] = 0
    one_empty, all_empty = unequal.clone(), torch.zeros_like(unequal)
    one_empty[0] = 0
    batches = [(values, weight) for weight in (unequal, one_empty, all_empty)]
    torch.save(batches, tmp_path / "batches.pt")
    mp.spawn(gradients_of_one_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (values, weight), (loss_0, gradient_0, relative_0), (loss_1, gradient_1, relative_1) in zip(
        batches, first, second, strict=True
    ):
        theta = torch.ones((), requires_grad=True)
        whole = weighted_mean(theta * values, weight)
        whole.backward()
        torch.testing.assert_close((loss_0 + loss_1) / 2, whole.detach())
        torch.testing.assert_close((gradient_0 + gradient_1) / 2, theta.grad)
        relative = relative_error(*maps_of(values.flatten(0, 1)), weight.flatten(0, 1).view(-1, 2, 2))
        torch.testing.assert_close((relative_0 + relative_1) / 2, relative)


def test_where_the_teacher_is_better():
    """methods.md 9.6: IoU .7 of the teacher against .5 counts, .45 against .5 doesn't."""

    def overlapping(share: float) -> list[float]:  # inside the target, so the IoU is the share
        return [0.5, 0.5, 0.4, 0.4 * share]

    targets = [{"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]])}, {"boxes": torch.zeros(0, 4)}]
    teacher = torch.tensor([[overlapping(0.7), overlapping(0.45)]] * 2)
    student = torch.tensor([[overlapping(0.5), overlapping(0.5)]] * 2, requires_grad=True)
    better = teacher_is_better(student, teacher, targets)
    assert better.tolist() == [[True, False], [False, False]]
    (l1(student, teacher, better) + giou(student, teacher, better)).backward()
    assert student.grad[0, 0].any()
    assert not student.grad[0, 1].any()
    assert not student.grad[1].any()
    torch.testing.assert_close(iou(teacher[0], targets[0]["boxes"][:1]), torch.tensor([0.7, 0.45]))
