"""D3ETR: its matching and attention worked by hand, and the auxiliary group."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reference_loops as loops
import torch
import zoo
from torch.nn.functional import grid_sample

from hf_detrkd import DistillationModel
from hf_detrkd.families import adapter_for
from hf_detrkd.losses.attention import (
    attention_map,
    attention_of,
    cross_attention_loss,
    on_memory_of,
    row_distance,
    self_attention_loss,
    splat,
    to_grid,
)
from hf_detrkd.losses.boxes import generalized_iou, giou, l1
from hf_detrkd.losses.logits import class_kl
from hf_detrkd.losses.set_prediction import set_loss
from hf_detrkd.matching import HungarianMatcher, Match, ground_truth_matches, identity_match
from hf_detrkd.methods import D3ETRConfig, build_methods, configure
from hf_detrkd.view import AttentionMaps

ATTENTION = [f"{matching}_{of}_attention" for matching in ("adaptive", "fixed") for of in ("self", "cross")]


def build(student, teacher, **settings):
    adapters = adapter_for(student), adapter_for(teacher)
    (method,) = build_methods(["d3etr"], settings, *adapters)
    return method, *adapters


def see(adapter, batch, attentions: bool = True):
    return adapter.forward({n: v for n, v in batch.items() if n != "labels"}, attentions=attentions)[1]


def only(*terms):
    return {"weights": {term: float(term in terms) for term in D3ETRConfig().weights}}


@pytest.fixture(scope="module")
def models():
    """Models that are only read."""
    names = ("detr", "deformable_detr", "rt_detr")
    return {name: zoo.build(name, seed=seed) for seed, name in enumerate(names)}


# ------------------------------------------------------------------------------------------------ by hand: matching

TEACHER = (
    [[0.9, 0.1], [0.2, 0.8], [0.1, 0.1]],
    [[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.5, 0.5, 1, 1]],
)
STUDENT = (
    [[0.3, 0.6], [0.2, 0.2], [0.7, 0.2]],
    [[0.75, 0.75, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.25, 0.25, 0.5, 0.5]],
)


def predictions(probabilities, boxes):
    """One layer, one image."""
    return SimpleNamespace(
        logits=torch.tensor(probabilities).logit()[None, None],
        boxes=torch.tensor(boxes, dtype=torch.float32)[None, None],
        classification="sigmoid",
    )


def test_cost_and_matching():
    """methods.md 5.6.1"""
    student, teacher = predictions(*STUDENT), predictions(*TEACHER)
    classes = HungarianMatcher(1, 0, 0)._cost(student, 0, teacher, 0)[0]
    torch.testing.assert_close(classes[0], torch.tensor([1.994987, 1.118053, 1.317149]), atol=1e-5, rtol=0)
    distance = HungarianMatcher(0, 1, 0)._cost(student, 0, teacher, 0)[0]
    torch.testing.assert_close(distance[0], torch.tensor([1.2, 0.2, 1.7]), atol=1e-5, rtol=0)
    overlap = generalized_iou(student.boxes[0, 0, :1], teacher.boxes[0, 0])
    torch.testing.assert_close(overlap, torch.tensor([-0.545706, 0.64, 0.16]), atol=1e-5, rtol=0)
    cost = HungarianMatcher()._cost(student, 0, teacher, 0)[0]
    expected = [[9.086400, 0.838053, 9.497149], [7.960001, 7.960001, 0.103546], [-1.196822, 8.366692, 8.481016]]
    torch.testing.assert_close(cost, torch.tensor(expected), atol=1e-5, rtol=0)
    (match,) = HungarianMatcher()(student, teacher)
    assert match.student_index.tolist() == [[0, 1, 2]] and match.teacher_index.tolist() == [[1, 2, 0]]
    assert cost[[0, 1, 2], [1, 2, 0]].sum().item() == pytest.approx(-0.255223, abs=1e-5)

    logits = match.student(student.logits[0]), match.teacher(teacher.logits[0])
    boxes = match.student(student.boxes[0]), match.teacher(teacher.boxes[0])
    divergence = class_kl(logits[0], "sigmoid", logits[1], "sigmoid", match.weight)
    assert divergence.item() == pytest.approx(0.114547, abs=1e-5)
    p = logits[1].sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1).mean()
    assert entropy.item() == pytest.approx(0.767046, abs=1e-5)
    values = divergence + entropy, l1(*boxes, match.weight), giou(*boxes, match.weight)
    assert [value.item() for value in values] == pytest.approx([0.881592, 0.133333, 0.183333], abs=1e-5)
    assert (values[0] + 5 * values[1] + 2 * values[2]).item() == pytest.approx(1.914926, abs=1e-5)


# ----------------------------------------------------------------------------------------------- by hand: attention

TEACHER_MAP = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.25, 0.25, 0.5]]
STUDENT_MAP = [[0.7, 0.1, 0.2], [0.25, 0.5, 0.25], [0.3, 0.1, 0.6]]
PERMUTED = Match(torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 0]]), torch.ones(1, 3))


def looking(rows):
    return SimpleNamespace(self_attentions=AttentionMaps("dense", (torch.tensor(rows)[None, None],)))


def test_both_axes_are_permuted():
    """methods.md 5.6.2"""
    student, teacher = looking(STUDENT_MAP), looking(TEACHER_MAP)
    for form in ("kl", "mse"):
        assert self_attention_loss(student, 0, teacher, 0, PERMUTED, form).item() == pytest.approx(0, abs=1e-7)
    unpermuted = self_attention_loss(student, 0, teacher, 0, identity_match(1, 3), "mse")
    assert unpermuted.item() == pytest.approx(0.017778, abs=1e-5)
    rows_only = row_distance(torch.tensor([STUDENT_MAP]), torch.tensor([TEACHER_MAP])[:, [1, 2, 0]])[0]
    assert (rows_only > 0.01).all()


def test_scalars():
    """methods.md 5.6.3"""
    student, teacher = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.75, 0.25]]])
    assert row_distance(student, teacher)[0].item() == pytest.approx(0.130812, abs=1e-5)
    assert row_distance(student, teacher, form="mse")[0].item() == pytest.approx(0.0625, abs=1e-5)


def test_splat_by_hand():
    """methods.md 5.6.7: a point between two cells, in pixel coordinates x W - 0.5 (TPRD leaves out the half pixel)."""

    def cells(x, y=0.5, shape=(1, 4)):
        return splat(torch.ones(1, 1, 1, 1), torch.tensor([[[[[x, y]]]]]), (1,), (shape,))[0, 0].tolist()

    assert cells(0.5) == [0, 0.5, 0.5, 0]
    assert cells(0.375) == [0, 1, 0, 0]  # the centre of the second cell
    assert cells(0.0) == [0.5, 0, 0, 0]  # half of it falls outside
    assert cells(1.5) == [0, 0, 0, 0]
    assert cells(0.25, 0.5, (2, 2)) == [0.5, 0, 0.5, 0]


LEVELS, SHAPES = (2, 1, 2), ((3, 5), (2, 2), (1, 3))


def sampled(queries: int = 3, images: int = 2, heads: int = 2, outside: float = 0.3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(images, queries, heads, sum(LEVELS), generator=generator).softmax(-1)
    locations = torch.rand(*weights.shape, 2, generator=generator) * (1 + 2 * outside) - outside
    return weights, locations


def test_splat_against_the_loop():
    weights, locations = sampled()
    maps = splat(weights, locations, LEVELS, SHAPES)
    for image in range(2):
        for query in range(3):
            expected = loops.splat(weights[image, query].tolist(), locations[image, query].tolist(), LEVELS, SHAPES)
            torch.testing.assert_close(maps[image, query], torch.tensor(expected), atol=1e-6, rtol=1e-5)
    share = torch.tensor([[0.0, 2.0, 1.0], [0.5, 0.0, 0.0]])
    attention = AttentionMaps("sampled", (weights,), (locations,), LEVELS)
    torch.testing.assert_close(attention_of(attention, 0, SHAPES, share), torch.einsum("bq,bqs->bs", share, maps))


def test_splat_is_the_adjoint_of_grid_sample():
    """A map times an image is what the head reads of the image: <splat(w), v> = sum_p w_p v(x_p)."""
    weights, locations = sampled(heads=1)
    maps = splat(weights, locations, LEVELS, SHAPES)
    image = torch.rand(maps.shape[-1], generator=torch.Generator().manual_seed(3))
    read, start, point = 0.0, 0, 0
    for points, (height, width) in zip(LEVELS, SHAPES, strict=True):
        level = image[start : start + height * width].view(1, 1, height, width).expand(2, -1, -1, -1)
        places = 2 * locations[..., point : point + points, :].flatten(1, 2) - 1
        values = grid_sample(level, places, align_corners=False)[:, 0].unflatten(1, (3, 1))
        read = read + (values * weights[..., point : point + points]).sum((2, 3))
        start, point = start + height * width, point + points
    torch.testing.assert_close(maps @ image, read)


def test_splat_has_gradient_to_weights_and_locations():
    weights, locations = (x.double().requires_grad_() for x in sampled(queries=1, images=1))
    image = torch.rand(22, dtype=torch.float64)
    (splat(weights, locations, LEVELS, SHAPES).double() @ image).sum().backward()
    step = 1e-3  # float32 inside
    for x in (weights, locations):
        flat = x.detach().flatten()
        for i in range(0, len(flat), 3):
            values = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[i] += sign * step
                arguments = [moved.view_as(x) if y is x else y.detach() for y in (weights, locations)]
                values.append((splat(*arguments, LEVELS, SHAPES).double() @ image).sum())
            slope = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(x.grad.flatten()[i], slope, atol=2e-3, rtol=2e-2)


def test_other_grids():
    """Levels go to the nearest grid with the attention they have; levels that get none are not compared."""
    rows = torch.zeros(1, 1, 16 + 4)
    rows[0, 0, 5], rows[0, 0, 16] = 0.75, 0.25

    def real(*shapes):
        return [torch.ones(1, *shape, dtype=torch.bool) for shape in shapes]

    same, columns = to_grid(rows, real((4, 4), (2, 2)), real((4, 4), (2, 2)))
    assert same is rows and columns is None
    one, columns = to_grid(rows, real((4, 4), (2, 2)), real((2, 2)))
    assert columns is None
    assert one.sum().item() == pytest.approx(1.0)
    assert one[0, 0, 0] == one.max() and one[0, 0, 0] > 0.6
    more, columns = to_grid(rows[..., :16], real((4, 4)), real((8, 8), (4, 4), (2, 2)))
    assert columns.tolist() == [False] * 64 + [True] * 16 + [False] * 4
    assert torch.equal(more[..., columns], rows[..., :16])
    assert not more[..., ~columns].any()


def test_rows_that_say_nothing_have_no_weight():
    """Attention that all lies in padding or outside of the map; nothing becomes infinite, nor its gradient."""
    student = torch.tensor([[[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    columns = torch.tensor([[[True, True, False]]])
    for form in ("kl", "mse"):
        values, usable = row_distance(student, teacher, columns, form=form)
        assert usable.tolist() == [[0, 1, 0]]
        assert values.isfinite().all()
        (gradient,) = torch.autograd.grad((values * usable).sum(), student)
        assert gradient.isfinite().all() and not gradient[..., 2].any()


def test_padding_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(2, 3, 4, generator=generator).softmax(-1) for _ in range(2))
    padded = [torch.cat([x, torch.rand(2, 3, 2, generator=generator)], -1) for x in (student, teacher)]
    columns = torch.tensor([True] * 4 + [False] * 2).expand(2, 1, 6)
    for form in ("kl", "mse"):
        plain, _ = row_distance(student, teacher, form=form)
        torch.testing.assert_close(row_distance(*padded, columns, form=form)[0], plain)


def test_floor_keeps_kl_a_divergence():
    """0 for equal rows, positive for all others, and a slope that cells without a point of the student don't blow up."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.rand(1, 50, 30, generator=generator) * (torch.rand(1, 50, 30, generator=generator) < 0.2)) + 1e-9
    values, usable = row_distance(rows, rows.flip(1), floor=1e-3)
    assert usable.all() and (values > 0).all()
    assert torch.equal(row_distance(rows, rows, floor=1e-3)[0], torch.zeros(1, 50))
    student = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    value, _ = row_distance(student, torch.tensor([[[0.0, 1.0]]]), floor=1e-3)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.abs().max() < 1100


def test_kl_direction():
    """The teacher's attention is the reference: what it doesn't attend to costs the student little."""
    student, teacher = torch.tensor([[[0.9, 0.1]]]), torch.tensor([[[0.5, 0.5]]])
    value = row_distance(student, teacher)[0].item()
    assert value == pytest.approx(0.5 * torch.tensor([0.5 / 0.9, 5.0]).log().sum().item(), abs=1e-5)
    assert row_distance(teacher, student)[0].item() != pytest.approx(value, abs=1e-2)


# ------------------------------------------------------------------------------------------------------- the method


def same_family(models, name):
    student = zoo.build(name, seed=7)
    return student, models[name]


@pytest.mark.parametrize("form", ["kl", "mse"])
@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_attention_terms_against_the_loops(models, name, form):
    method, student, teacher = build(*same_family(models, name), attention_loss=form)
    batch = zoo.batch(pad=True)
    with torch.no_grad():
        view, answers = see(student, batch), see(teacher, batch)
        terms = method(view, answers, batch["labels"], None)
        group = view.replay(method.queries(answers.queries, answers.boxes[-1], view))
        matches = method.matcher(view, answers)
    same = identity_match(*answers.boxes.shape[1:3])
    floor = 1e-3 if name == "deformable_detr" else 1e-8
    distance = loops.row_mse if form == "mse" else lambda s, t, f=1e-8: loops.row_kl(s, t, f)
    for matching, own, pairs_of_layer in (("adaptive", view, matches), ("fixed", group, [same] * 3)):
        if matching == "fixed" and name == "deformable_detr":
            continue  # its queries also have a centre, which the projector has from the answers
        inner = outer = 0.0
        for layer, match in enumerate(pairs_of_layer):
            found = {"self": [], "cross": []}
            for image in range(2):
                pairs = loops.real_pairs(match, image)
                a, b = (loops.attention_rows(v.self_attentions, layer, image, ()) for v in (own, answers))
                for s, t in pairs:
                    rows = [a[s][i] for i, _ in pairs], [b[t][j] for _, j in pairs]
                    found["self"].append(distance(*rows))
                a, b = (loops.attention_rows(v.cross_attentions, layer, image, v.memory_shapes) for v in (own, answers))
                real = view.memory_mask[image].nonzero()[:, 0].tolist()
                for s, t in pairs:
                    rows = [a[s][p] for p in real], [b[t][p] for p in real]
                    if min(map(sum, rows)) > 1e-3:
                        found["cross"].append(distance(*rows) if form == "mse" else loops.row_kl(*rows, floor))
            inner += sum(found["self"]) / len(found["self"])
            outer += sum(found["cross"]) / len(found["cross"])
        assert terms[f"{matching}_self_attention"].item() == pytest.approx(inner, rel=1e-3, abs=1e-6)
        assert terms[f"{matching}_cross_attention"].item() == pytest.approx(outer, rel=1e-3, abs=1e-6)


def test_cross_attention_is_matched(models):
    """TPRD compares sums over all queries, which no matching can change."""
    _, student, teacher = build(*same_family(models, "deformable_detr"))
    batch = zoo.batch()
    with torch.no_grad():
        view, answers = see(student, batch), see(teacher, batch)
        looks_at = on_memory_of(view, answers, 0)
        match = identity_match(2, zoo.QUERIES)
        rolled = replace(match, teacher_index=match.teacher_index.roll(1, 1))
        assert cross_attention_loss(answers, 0, *on_memory_of(answers, answers, 0), match) < 1e-6
        assert cross_attention_loss(answers, 0, *on_memory_of(answers, answers, 0), rolled) > 1e-2
        assert cross_attention_loss(view, 0, *looks_at, match) != cross_attention_loss(view, 0, *looks_at, rolled)


@pytest.mark.parametrize(
    ("student", "teacher"), [("detr", "rt_detr"), ("rt_detr", "detr"), ("rt_detr", "deformable_detr")]
)
def test_kinds_and_memories_of_attention_mix(models, student, teacher):
    """Dense beside sampled, one level beside three or four, one head count beside another."""
    settings = {} if student == "detr" else {"decoder_attention_heads": 4}
    method, own, other = build(zoo.build(student, seed=5, **settings), models[teacher])
    batch = zoo.batch()
    view = see(own, batch)
    with torch.no_grad():
        answers = see(other, batch)
    rows, columns = on_memory_of(view, answers, 0)
    assert rows.shape[-1] == view.memory.shape[1]
    if teacher == "detr":
        assert columns.sum() == sum(h * w for h, w in view.memory_shapes if (h, w) == answers.memory_shapes[0])
    terms = method(view, answers, batch["labels"], None)
    for name in ATTENTION:
        gradients = torch.autograd.grad(
            terms[name], list(own.decoder.parameters()), retain_graph=True, allow_unused=True
        )
        assert any(g is not None and g.any() for g in gradients), name
        assert all(g is None or g.isfinite().all() for g in gradients), name


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr", "dab-detr", "rt_detr", "d_fine"])
def test_group_and_own_queries_do_not_interact(name):
    """methods.md 5.6.4: with and without the other group in the call, and beside the model's own pass."""
    adapter = adapter_for(zoo.build(name))
    with torch.no_grad():
        view = see(adapter, zoo.batch())
        other = replace(view.queries, content=view.queries.content + 1)
        alone = view.replay(other)
        own, beside = view.replay(view.queries, other)
    for a, b in ((own, view), (beside, alone)):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-5, rtol=1e-5)
        for layer in range(3):
            rows = [attention_map(v.self_attentions, layer) for v in (a, b)]
            torch.testing.assert_close(*rows, atol=1e-6, rtol=1e-5)


def test_the_group_leaves_the_students_own_answers_alone(models):
    batch = zoo.batch()
    results = []
    for settings in ({}, only("adaptive_class", "adaptive_self_attention")):
        method, student, teacher = build(*same_family(models, "detr"), **settings)
        with torch.no_grad():
            results.append(method(see(student, batch), see(teacher, batch), batch["labels"], None))
    for name in ("adaptive_class", "adaptive_self_attention"):
        assert torch.equal(results[0][name], results[1][name])
    assert results[1]["fixed_class"] == results[1]["group_class"] == results[1]["adaptive_cross_attention"] == 0


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr", "rt_detr"])
def test_identical_student(name):
    """methods.md 5.6.5: 0 in every matched term; the adaptive matching is the identity, or the shuffle of the queries."""
    teacher = zoo.build(name, seed=3)
    method, student, adapter = build(copy.deepcopy(teacher), teacher)
    batch = zoo.batch()
    with torch.no_grad():
        view, answers = see(student, batch), see(adapter, batch)
        terms = method(view, answers, batch["labels"], None)
        assert all(abs(value) < 3e-4 for term, value in terms.items() if not term.startswith("group"))
        for match in method.matcher(view, answers):
            assert torch.equal(match.student_index, match.teacher_index)
    if name != "detr":
        return
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        table = student.base.query_position_embeddings.weight
        table.copy_(table[order])
        view = see(student, batch)
        for match in method.matcher(view, answers):
            assert torch.equal(match.teacher_index, order[match.student_index])
        terms = method(view, answers, batch["labels"], None)
        assert all(abs(value) < 3e-4 for term, value in terms.items() if not term.startswith("group"))


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_gradients_of_the_group_alone(models, name):
    """methods.md 5.6.6: the student's decoder learns from the group; teacher and both query tables get nothing."""
    fixed = [f"fixed_{term}" for term in ("class", "l1", "giou", "self_attention", "cross_attention")]
    student, teacher = same_family(models, name)
    teacher = copy.deepcopy(teacher)
    method, own, other = build(student, teacher, **only(*fixed))
    batch = zoo.batch()
    with torch.no_grad():
        answers = see(other, batch)
    terms = method(see(own, batch), answers, batch["labels"], None)
    assert all(terms[term] > 0 for term in fixed)
    sum(terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert answers.queries.content.grad is None
    assert student.model.query_position_embeddings.weight.grad is None
    assert all(p.grad is not None and p.grad.any() for p in own.decoder.layers[1].parameters())


def test_teachers_assignment_of_the_group(models):
    """The group answers for the targets that the teacher's same queries answer for, whatever the student would do."""
    group = ("group_class", "group_l1", "group_giou")
    method, student, teacher = build(*same_family(models, "detr"), **only(*group))
    assert not method.attentions
    batch = zoo.batch()
    with torch.no_grad():
        view, answers = see(student, batch), see(teacher, batch)
        terms = method(view, answers, batch["labels"], None)
        reply = view.replay(method.queries(answers.queries, answers.boxes[-1], view))
        matches = {
            "teacher": ground_truth_matches(answers, batch["labels"]),
            "own": ground_truth_matches(reply, batch["labels"]),
        }
        sums = {
            whose: sum(
                set_loss(reply.logits[k], reply.boxes[k], "softmax", match, batch["labels"])["l1"]
                for k, match in enumerate(of_layer)
            )
            for whose, of_layer in matches.items()
        }
    torch.testing.assert_close(terms["group_l1"], sums["teacher"])
    assert sums["own"] < sums["teacher"]


@pytest.mark.parametrize(  # every kind of query
    "name",
    ["detr", "conditional_detr", "deformable_detr", "deformable_detr_two_stage", "dab-detr", "rt_detr", "lw_detr"],
)
def test_control_has_no_teacher(name):
    """The same whatever the teacher says; its queries are learned, and all that the group can teach is taught."""
    student = zoo.build(name, seed=1)
    batch = zoo.batch()
    module_terms = []
    for seed in (2, 3):
        torch.manual_seed(0)
        method, own, teacher = build(student, zoo.build(name, seed=seed), control=True)
        with torch.no_grad():
            answers = see(teacher, batch, attentions=False)
        assert not method.attentions
        terms = method(see(own, batch, attentions=False), answers, batch["labels"], None)
        module_terms.append(terms)
        assert {term for term, value in terms.items() if value != 0} == {"group_class", "group_l1", "group_giou"}
    assert module_terms[0] == module_terms[1]
    sum(module_terms[1].values()).backward()
    assert list(method.parameters())
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_maps_are_there_under_any_attention(name, implementation):
    """With SDPA transformers gives empty tuples, over which a loss would silently be 0."""
    teacher = zoo.build(name, seed=2, attn_implementation=implementation)
    method, student, adapter = build(zoo.build(name, seed=1, attn_implementation=implementation), teacher)
    assert student.decoder.config._attn_implementation == (implementation or "sdpa")
    assert method.attentions == {"student", "teacher"}
    module = DistillationModel(student.model, student, [method]).train()
    batch = zoo.batch()
    with torch.no_grad():
        answers = see(adapter, batch)
    output = module(**batch, teacher_view=answers)
    assert all(output.terms[name] > 0 for name in ATTENTION)
    with torch.no_grad(), pytest.raises(ValueError, match=r"holds no attention maps.*attentions=True"):
        method(see(student, batch, attentions=False), answers, batch["labels"], None)


def test_without_attention_no_one_pays_for_maps(models):
    weights = dict.fromkeys(ATTENTION, 0.0)
    method, student, teacher = build(*same_family(models, "detr"), weights=weights)
    assert not method.attentions
    batch = zoo.batch()
    with torch.no_grad():
        terms = method(see(student, batch, False), see(teacher, batch, False), batch["labels"], None)
    assert all((value == 0) == (name in ATTENTION) for name, value in terms.items())


def test_numbers_of_queries_differ(models):
    """Rectangular: the smaller number of pairs, and sub-blocks of self-attention are normalised again."""
    for number in (4, 9):
        method, student, teacher = build(zoo.build("detr", seed=5, num_queries=number), models["detr"])
        batch = zoo.batch()
        with torch.no_grad():
            view, answers = see(student, batch), see(teacher, batch)
            match = method.matcher(view, answers)[0]
            assert match.student_index.shape[1] == min(number, zoo.QUERIES)
            terms = method(view, answers, batch["labels"], None)
            assert all(value.isfinite() and value > 0 for value in terms.values())
            rows = attention_map(view.self_attentions, 0)
            block = match.student(match.student(rows).mT).mT
            _, usable = row_distance(block, block)
            assert usable.all()


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_loss": "cosine"}, r"`attention_loss` of D3ETRConfig is 'cosine'; allowed are 'kl', 'mse'"),
        ({"content": "none"}, r"`content` of D3ETRConfig is 'none'"),
        ({"sampled_floor": 0.0}, r"`sampled_floor` is 0.0; it must lie between 0 and 1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(D3ETRConfig, settings)


def test_what_is_refused_at_construction(models):
    for settings, message in (
        (only(), "all `weights` of d3etr are 0"),
        ({**only("adaptive_class"), "control": True}, "all `weights` of d3etr's group are 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(models["detr"], models["detr"], **settings)
    teacher = adapter_for(models["detr"])

    def with_only(*provides):
        return type("Limited", (type(teacher),), {"provides": frozenset(provides)})(models["detr"])

    def construct(student, **settings):
        return build_methods(["d3etr"], settings, student, teacher)

    limited = with_only("self_attentions", "cross_attentions")
    with pytest.raises(
        ValueError, match=r"the terms fixed_class, .*group_giou of method `d3etr` need replay, which `detr`"
    ):
        construct(limited)
    adaptive = [name for name in D3ETRConfig().weights if name.startswith("adaptive")]
    construct(limited, **only(*adaptive))
    blind = with_only("replay")
    with pytest.raises(ValueError, match=r"the terms adaptive_self_attention, fixed_self_attention .* need self_att"):
        construct(blind)
    with pytest.raises(ValueError, match=r"the terms adaptive_cross_attention of .* need cross_attentions or sampled"):
        construct(blind, **only("adaptive_cross_attention"))
    construct(blind, weights=dict.fromkeys(ATTENTION, 0.0))
