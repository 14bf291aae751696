"""LD on D-FINE's edge distributions: the losses by hand, and that both models speak of the same boxes."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest
import reference_loops as loops
import torch
import zoo

from hf_detrkd import DistillationModel
from hf_detrkd.families import adapter_for
from hf_detrkd.losses.distributions import decoupled_edge_kl, edge_kl
from hf_detrkd.methods import LD, LDConfig, build_methods
from hf_detrkd.projectors import QueryProjector
from hf_detrkd.sampling import places_of

pytestmark = pytest.mark.skipif("d_fine" not in zoo.NAMES, reason="this transformers has no D-FINE")
NAMES = [name for name in ("d_fine", "deimv2") if name in zoo.NAMES]


@functools.cache
def _model(name, seed, settings):
    return zoo.build(name, seed=seed, **dict(settings))


def model(name="d_fine", seed=0, **settings):
    return copy.deepcopy(_model(name, seed, tuple(settings.items())))


def look(adapter, batch=None, grad=False):
    with torch.set_grad_enabled(grad):
        return adapter.forward({"pixel_values": (batch or zoo.batch())["pixel_values"]})[1]


def a_pair(settings=None, of_student=None, of_teacher=None, names=("d_fine", "d_fine")):
    student = adapter_for(model(names[0], 1, **(of_student or {})))
    teacher = adapter_for(model(names[1], 2, **(of_teacher or {})))
    return build_methods(["ld"], settings, student, teacher)[0], student, teacher


# ------------------------------------------------------------------------------------------------------ losses by hand


@pytest.mark.parametrize(
    ("temperature", "bins", "expected"),
    [(1.0, "sum", 0.393976), (1.0, "mean", 0.078795), (10.0, "sum", 0.4906), (10.0, "mean", 0.098120)],
)
def test_ld_by_hand(temperature, bins, expected):
    """Teacher (0, 0, 2, 2, 0), student 0, five bins. At T = 10 the KL itself is .004906; times T^2."""
    teacher = torch.tensor([0.0, 0, 2, 2, 0]).expand(1, 4, 5)
    value = edge_kl(torch.zeros(1, 4, 5), teacher, torch.ones(1), temperature=temperature, bins=bins)
    torch.testing.assert_close(value.item(), expected, rtol=0, atol=5e-5 if expected == 0.4906 else 1e-5)


def test_go_lsd_by_hand():
    """Two bins, teacher (5, 0), student (0, 0); an edge each: one matched of weight .8 and three others of .1."""
    teacher = torch.tensor([5.0, 0.0]).expand(4, 1, 2)
    weight, matched = torch.tensor([0.8, 0.1, 0.1, 0.1]), torch.tensor([True, False, False, False])
    student = torch.zeros(4, 1, 2, requires_grad=True)
    value = decoupled_edge_kl(student, teacher, weight, matched)
    torch.testing.assert_close(value.item(), 0.988006, rtol=0, atol=1e-5)
    torch.testing.assert_close(25 * 0.110944, 2.773602, rtol=0, atol=1e-4)
    for part, expected in ((slice(0, 1), 2.218881), (slice(1, 4), 0.277360)):
        only = decoupled_edge_kl(student[part], teacher[part], weight[part], matched[part])
        torch.testing.assert_close(only.item(), expected, rtol=0, atol=1e-5)
    value.backward()
    assert student.grad.any()
    assert decoupled_edge_kl(teacher, teacher, weight, matched) == 0


def test_go_lsd_with_all_factors_of_the_source():
    """8 / B under both roots cancels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, 7, generator=generator) for _ in range(2))
    weight, matched = torch.rand(2, 5, generator=generator), torch.rand(2, 5, generator=generator) > 0.6
    sums, counts = [0.0, 0.0], [0, 0]
    for image in range(2):
        for query in range(5):
            for edge in range(4):
                part = int(not matched[image, query])
                q, p = (loops.softmax([z / 5 for z in x[image, query, edge].tolist()]) for x in (student, teacher))
                sums[part] += weight[image, query].item() * 25 * loops.categorical_kl(p, q)
                counts[part] += 1
    roots = [math.sqrt(count * 8 / 2) for count in counts]
    expected = sum(root * total / count for root, total, count in zip(roots, sums, counts, strict=True)) / sum(roots)
    value = decoupled_edge_kl(student, teacher, weight, matched)
    torch.testing.assert_close(value.item(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bins", ["mean", "sum"])
def test_ld_by_the_slowest_obvious_python(bins):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 7, generator=generator) for _ in range(2))
    weight = torch.rand(2, 3, generator=generator)
    values, weights = [], []
    for image in range(2):
        for query in range(3):
            edges = zip(student[image, query].tolist(), teacher[image, query].tolist(), strict=True)
            kl = [
                4 * loops.categorical_kl(loops.softmax([z / 2 for z in t]), loops.softmax([z / 2 for z in s]))
                for s, t in edges
            ]
            values.append(sum(kl) / 4 / (7 if bins == "mean" else 1))
            weights.append(weight[image, query].item())
    value = edge_kl(student, teacher, weight, temperature=2.0, bins=bins)
    torch.testing.assert_close(value.item(), loops.weighted_mean(values, weights), rtol=1e-5, atol=1e-6)


def test_teacher_and_student_are_not_swapped():
    """The gradient goes to the student, and KL(teacher || student) is not KL(student || teacher)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (scale * torch.randn(1, 2, 4, 5, generator=generator) for scale in (1, 3))
    a.requires_grad_(), b.requires_grad_()
    for loss, extra in ((edge_kl, ()), (decoupled_edge_kl, (torch.tensor([[True, False]]),))):
        a.grad = b.grad = None
        loss(a, b, torch.ones(1, 2), *extra, temperature=1.0).backward()
        assert a.grad.any() and b.grad is None
        swapped = loss(b, a, torch.ones(1, 2), *extra, temperature=1.0)
        assert (swapped - loss(a, b, torch.ones(1, 2), *extra, temperature=1.0)).abs() > 1e-3


# ----------------------------------------------------------------------------------------------------------- the views


@pytest.mark.parametrize("name", NAMES)
def test_boxes_are_the_expectation_of_the_edges(name):
    """Of every layer, about one reference: the bins mean what D-FINE's weighting function says."""
    adapter = adapter_for(model(name))
    view = look(adapter)
    last, up, scale = adapter.edge_bins
    step = (up * scale + 1) ** (2 / (last - 2))
    half = [step**i - 1 for i in range(1, last // 2)]
    bins = torch.tensor([-2 * up * scale, *(-x for x in half[::-1]), 0.0, *half, 2 * up * scale])
    assert view.edges.shape == (zoo.LAYERS, 2, zoo.QUERIES, 4, last + 1)
    assert not view.edge_reference.requires_grad
    offset = (view.edges.softmax(-1) @ bins) / scale
    cx, cy, w, h = view.edge_reference.unbind(-1)
    left, top = cx - (0.5 + offset[..., 0]) * w, cy - (0.5 + offset[..., 1]) * h
    right, bottom = cx + (0.5 + offset[..., 2]) * w, cy + (0.5 + offset[..., 3]) * h
    boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=-1)
    torch.testing.assert_close(boxes, view.boxes, rtol=0, atol=1e-5)


def test_denoising_edges_are_not_in_the_view():
    adapter = adapter_for(model().train())
    view = adapter.forward(zoo.batch())[1]
    assert view.edges.shape[2] == zoo.QUERIES == view.edge_reference.shape[1]
    torch.testing.assert_close(view.replay(view.queries).edges, view.edges, rtol=0, atol=1e-4)


def test_families_without_distributions_have_none():
    adapter = adapter_for(zoo.build("rt_detr"))
    view = look(adapter)
    assert view.edges is None and view.edge_reference is None and adapter.edge_bins is None
    assert "edge_distributions" not in adapter.provides
    with pytest.raises(ValueError, match=r"have an `edge_reference`, but rt_detr predicts boxes without"):
        view.replay(replace(view.queries, edge_reference=view.boxes[-1]))


@pytest.mark.parametrize("name", NAMES)
def test_replayed_distributions_are_about_the_boxes_asked_for(name):
    """Beside groups that predict their own, and nothing is left in the model."""
    adapter = adapter_for(model(name))
    view = look(adapter)
    asked = view.boxes[-1].clamp(0.1, 0.9).roll(1, 1)
    elsewhere = replace(view.queries, edge_reference=asked)
    own, moved, again = view.replay(view.queries, elsewhere, view.queries)
    torch.testing.assert_close(moved.edge_reference, asked, rtol=0, atol=1e-5)
    for reply in (own, again, view.replay(view.queries)):
        torch.testing.assert_close(reply.edge_reference, view.edge_reference, rtol=0, atol=1e-5)
        torch.testing.assert_close(reply.edges, view.edges, rtol=0, atol=1e-4)
    assert (moved.edges - view.edges).abs().max() > 1e-3
    torch.testing.assert_close(moved.replay(moved.queries).edges, moved.edges, rtol=0, atol=1e-4)
    assert not adapter.decoder.pre_bbox_head._forward_hooks


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("names", [(a, b) for a in NAMES for b in NAMES])
def test_student_and_teacher_have_one_reference(names):
    """For any widths, depths and numbers of queries, which is what makes the bins comparable."""
    pair = {"of_student": {"decoder_layers": 2}, "of_teacher": {"num_queries": 9}, "names": names}
    method, student, teacher = a_pair(**pair)
    mine, others = look(student, grad=True), look(teacher)
    seen = []
    reply = student.replay
    student.replay = lambda *args, **kwargs: seen.append(reply(*args, **kwargs)) or seen[-1]
    value = method(mine, others, zoo.batch()["labels"], None)["ld"]
    ((answer,),) = seen
    assert answer.edges.shape[1:] == others.edges.shape[1:]
    torch.testing.assert_close(answer.edge_reference, others.edge_reference, rtol=0, atol=1e-5)
    scores = others.class_probs()[-1].amax(-1)
    expected = sum(edge_kl(layer, others.edges[-1], scores) for layer in answer.edges)
    torch.testing.assert_close(value, expected)
    value.backward()
    trained = {name for name, p in student.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("bbox_embed" in name for name in trained)
    assert any("decoder.layers.0" in name for name in trained)
    assert any("encoder" in name and "decoder" not in name for name in trained)
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())


@pytest.mark.parametrize("form", ["ld", "go_lsd"])
def test_identical_student_has_nothing_to_learn(form):
    teacher = adapter_for(model())
    student = adapter_for(copy.deepcopy(teacher.model))
    method = LD(LDConfig(form=form, layers="paired"), student, teacher)
    batch = zoo.batch()
    assert (
        method(look(student), look(teacher), batch["labels"], None)["ld"] < 1e-5
    )  # float32's rounding: 1.2e-6 on transformers 5.17
    final = LD(LDConfig(form=form), student, teacher)
    assert final(look(student), look(teacher), batch["labels"], None)["ld"] > 1e-3  # earlier layers learn from the last


def test_layers():
    assert a_pair({"layers": "paired"}, {"decoder_layers": 2})[0].teacher_layers == (1, 2)
    assert a_pair({"layers": "final"}, {"decoder_layers": 2})[0].teacher_layers == (2, 2)


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({"form": "go_lsd"}, (3, 0)),
        ({"form": "go_lsd"}, (0,)),
        ({"confidence": "student"}, (3, 2)),
        ({"content": "own"}, (0,)),
    ],
)
def test_settings(settings, targets):
    batch = zoo.batch(targets=targets)
    method, student, teacher = a_pair(settings)
    mine, others = look(student, batch, grad=True), look(teacher, batch)
    value = method(mine, others, batch["labels"], None)["ld"]
    default, _, _ = a_pair()
    assert value.isfinite() and value > 0
    assert value != default(mine, others, batch["labels"], None)["ld"]
    value.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.model.parameters())


def test_go_lsd_weighs_matched_queries_by_their_overlap():
    """The queries that the teacher assigns, in any layer, and the student's box there."""
    batch = zoo.batch()
    method, student, teacher = a_pair({"form": "go_lsd", "content": "own", "temperature": 5.0})
    mine, others = look(student, batch), look(teacher, batch)
    value = method(mine, others, batch["labels"], None)["ld"]

    from hf_detrkd.matching import ground_truth_matches

    queries = QueryProjector(student, teacher, False)(others.queries, places_of(others), mine)
    reply = mine.replay(replace(queries, edge_reference=others.edge_reference))
    assigned = {}
    for match in ground_truth_matches(others, batch["labels"]):
        for image in range(2):
            for q, t, w in zip(
                *(x[image].tolist() for x in (match.student_index, match.teacher_index, match.weight)), strict=True
            ):
                if w:
                    assigned[image, q] = batch["labels"][image]["boxes"][t].tolist()
    total = 0.0
    for layer in range(zoo.LAYERS):
        weight = others.class_probs()[-1].amax(-1).clone()
        matched = torch.zeros(2, zoo.QUERIES, dtype=torch.bool)
        for (image, q), place in assigned.items():
            (al, at, ar, ab), (bl, bt, br, bb) = (
                loops.corners(b) for b in (reply.boxes[layer, image, q].tolist(), place)
            )
            shared = max(0, min(ar, br) - max(al, bl)) * max(0, min(ab, bb) - max(at, bt))
            area = max(0, ar - al) * max(0, ab - at) + (br - bl) * (bb - bt)
            weight[image, q], matched[image, q] = shared / (area - shared), True
        total += decoupled_edge_kl(reply.edges[layer], others.edges[-1], weight, matched, temperature=5.0)
    torch.testing.assert_close(value, total, rtol=1e-4, atol=1e-5)


def test_batch_size_and_order_of_queries_are_no_factor():
    batch = zoo.batch()
    doubled = {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1), "labels": batch["labels"] * 2}
    for settings in ({}, {"form": "go_lsd"}):
        method, student, teacher = a_pair(settings)
        with torch.no_grad():
            once, twice = (
                method(look(student, b), look(teacher, b), b["labels"], None)["ld"] for b in (batch, doubled)
            )
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


def test_half_precision_and_autocast():
    method, student, teacher = a_pair()
    batch = zoo.batch()
    with torch.autocast("cpu", torch.bfloat16):
        value = method(look(student, batch, grad=True), look(teacher, batch), batch["labels"], None)["ld"]
    assert value.dtype == torch.float32 and value.isfinite()
    value.backward()


def test_ten_steps_lower_it():
    _, student, teacher = a_pair()
    methods = build_methods(["ld"], None, student, teacher)
    module = DistillationModel(student.model, student, methods, detection_weight=0.0).train()
    batch = zoo.batch()
    view = look(teacher, batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    losses = []
    for _ in range(10):
        output = module(**batch, teacher_view=view)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.terms["ld"].item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "message"),
    [
        ("rt_detr", "d_fine", None, r"distributions of box edges, but the student, rt_detr, predicts boxes as four"),
        ("d_fine", "detr", None, r"but the teacher, detr, predicts boxes as four.*Take D-FINE or DEIMv2"),
        ("d_fine", "d_fine", {"weights": {"ld": 0}}, "all `weights` of ld are 0"),
        ("d_fine", "d_fine", {"form": "focal"}, "`form` of LDConfig is 'focal'; allowed are 'ld', 'go_lsd'"),
        ("d_fine", "d_fine", {"temperature": 0.0}, "`temperature` is 0.0; it must be above 0"),
    ],
)
def test_refusals(student, teacher, settings, message):
    adapters = adapter_for(zoo.build(student)), adapter_for(zoo.build(teacher))
    with pytest.raises(ValueError, match=message):
        build_methods(["ld"], settings, *adapters)


@pytest.mark.parametrize("setting", [{"max_num_bins": 16}, {"up": 0.25}, {"reg_scale": 8.0}])
def test_other_bins_are_refused(setting):
    """D-FINE-X has reg_scale 8, the smaller ones 4."""
    with pytest.raises(ValueError, match=r"bins of the student are \(.*\) and those of the teacher \(32, 0.5, 4.0\)"):
        a_pair(of_student=setting)
