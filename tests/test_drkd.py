"""DRKD: graph reasoning over pixels, relations between objects, and what keeps them from collapsing."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace

import pytest
import reference_loops as loops
import torch
import zoo

from hf_detrkd.families import adapter_for
from hf_detrkd.losses.relation import (
    instance_loss,
    object_features,
    padded_boxes,
    pixel_loss,
    query_of_target,
    related_pairs,
    relation,
    relation_loss,
    similarity,
    spread,
    standardised,
    target_states,
    with_mean_one,
)
from hf_detrkd.matching import Match, ground_truth_matches
from hf_detrkd.methods import configure
from hf_detrkd.methods.drkd import DRKD, DRKDConfig
from hf_detrkd.projectors import GloRe, ObjectRelation, PairedMaps, PairFilter, PixelRelation

TWO = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
SAME = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
THREE = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])


def close(value, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected), rtol=0, atol=tolerance)


def all_present(objects: torch.Tensor) -> torch.Tensor:
    return torch.ones(objects.shape[:2], dtype=torch.bool)


def psi(objects: torch.Tensor, weights: torch.Tensor | float = 1.0, dim: str = "rows") -> torch.Tensor:
    """g1 = g2 = identity, no scaling."""
    return relation(weights * (objects @ objects.mT), all_present(objects), dim)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------- by hand, objects


def test_relation_of_two_objects_by_hand():
    close(psi(TWO), [[[0.731059, 0.268941], [0.268941, 0.731059]]])
    close(psi(SAME), torch.full((1, 2, 2), 0.5))
    # The mean over objects; the sum over all pairs is .213552
    close(2 * relation_loss(psi(SAME), psi(TWO), all_present(TWO)), 0.213552)


def test_relation_of_three_objects_by_hand():
    rows = [[[0.422319, 0.155362, 0.422319], [0.155362, 0.422319, 0.422319], [0.211942, 0.211942, 0.576117]]]
    close(psi(THREE), rows)
    close(psi(THREE, dim="first"), torch.tensor(rows).mT)
    weights = torch.ones(3, 3)
    weights[0, 2] = weights[2, 0] = 0
    close(
        psi(THREE, weights),
        [[[0.576117, 0.211942, 0.211942], [0.155362, 0.422319, 0.422319], [0.090031, 0.244728, 0.665241]]],
        1e-4,
    )


def test_one_object_has_no_relation():
    one = torch.randn(2, 1, 4, requires_grad=True)
    present = all_present(one)
    value = relation_loss(relation(similarity(one, one, 4), present), torch.zeros(2, 1, 1), present)
    value.backward()
    assert value == 0
    assert one.grad.isfinite().all() and not one.grad.any()


def test_images_are_weighed_by_their_objects():
    """An image of one object counts for nothing, in the denominator neither; padding is no object."""
    generator = rng()
    s, t = torch.randn(2, 3, 4, 5, generator=generator)
    present = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] + [False] * 3])
    expected, number = 0.0, 0
    for image, objects in enumerate((4, 2)):
        of_student, of_teacher = (loops.object_relation(x[image, :objects].tolist(), scale=5) for x in (s, t))
        expected += sum(
            (a - b) ** 2
            for ours, theirs in zip(of_student, of_teacher, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        number += objects
    for dim in ("rows", "first"):
        value = relation_loss(*(relation(similarity(x, x, 5), present, dim) for x in (s, t)), present)
        close(value, expected / number)  # similarities are symmetric, so one form is the transpose of the other
    close(instance_loss(s, t, present), loops.instance_distance(s.tolist(), t.tolist(), present.tolist()))


@pytest.mark.parametrize("dim", ["rows", "first"])
def test_order_of_the_objects_changes_nothing(dim):
    s, t = torch.randn(2, 1, 5, 8, generator=rng())
    order = torch.tensor([3, 0, 4, 2, 1])
    values = [
        relation_loss(*(relation(similarity(x, x, 8), all_present(x), dim) for x in pair), all_present(s))
        for pair in ((s, t), (s[:, order], t[:, order]))
    ]
    close(*values, 1e-7)


def test_no_objects_at_all():
    nothing = torch.zeros(2, 0, 4, requires_grad=True)
    present = all_present(nothing)
    for dim in ("rows", "first"):
        value = relation_loss(*(relation(similarity(nothing, nothing, 4), present, dim),) * 2, present)
        assert value == 0 and value.requires_grad
    assert related_pairs(similarity(nothing, nothing, 4), present).shape == (2, 0, 0)
    assert PairFilter(4)(nothing, present).shape == (2, 0, 0)


# ----------------------------------------------------------------------------------------------- by hand, pixels


def hand_made() -> tuple[GloRe, torch.Tensor]:
    """X = (1, 2, 3, 4) in the first channel, P = [[1, 1, 0, 0], [0, 0, 1, 1]] in the next two, on a 2 x 2 map."""
    unit = GloRe(8)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
        unit.state.weight[0, 0] = 1
        unit.projection.weight[0, 1] = unit.projection.weight[1, 2] = 1
        unit.adjacency.weight.fill_(0.5)
        unit.update.weight.copy_(torch.eye(4))
        unit.expansion.weight[0, 0] = 1
        unit.scale.fill_(1)
    maps = torch.zeros(1, 8, 2, 2)
    maps[0, 0] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    maps[0, 1, 0] = maps[0, 2, 1] = 1
    return unit, maps


def test_graph_reasoning_by_hand():
    """V = (3, 7), (I - A) V = (-2, 2), F = (-2, -2, 2, 2); V over the four cells."""
    unit, maps = hand_made()
    result = unit(maps, torch.ones(1, 2, 2, dtype=torch.bool))
    close(4 * (result - maps)[0, 0], [[-2.0, -2.0], [2.0, 2.0]])
    assert torch.equal(result[0, 1:], maps[0, 1:])


@pytest.mark.parametrize("released", [False, True])
def test_graph_reasoning_against_loops(released):
    unit = GloRe(6, released)
    torch.nn.init.normal_(unit.scale, generator=rng())
    maps, mask = torch.randn(1, 6, 2, 3, generator=rng(1)), torch.tensor([[[True, True, False], [True, True, False]]])
    with torch.no_grad():
        state, projection = (layer(maps)[0, :, mask[0]].tolist() for layer in (unit.state, unit.projection))
        bias = unit.adjacency.bias.tolist() if released else None
        back = loops.graph_reasoning(
            state, projection, unit.adjacency.weight.tolist(), bias, unit.update.weight.tolist()
        )
        expected = maps.clone()
        expected[0, :, mask[0]] += (unit.scale[:, 0] * unit.expansion.weight[:, :, 0, 0]) @ torch.tensor(back)
        close(unit(maps, mask), expected)


def test_fresh_graph_is_the_identity():
    """And its scale has a gradient, so that it doesn't stay one."""
    t, s = torch.randn(2, 2, 8, 3, 4, generator=rng())
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    phi = PixelRelation([8], "shared")
    of_student, of_teacher = phi(0, PairedMaps(s, t, mask))
    assert torch.equal(of_student, s) and torch.equal(of_teacher, t)
    value = pixel_loss(of_student, of_teacher, mask)
    close(value, torch.nn.functional.mse_loss(s, t))
    value.backward()
    assert phi.of_student[0].scale.grad.any()


@pytest.mark.parametrize("released", [False, True])
def test_padding_takes_no_part_in_the_graph(released):
    """More of it, or other values in it, change nothing."""
    unit = GloRe(8, released)
    torch.nn.init.normal_(unit.scale, generator=rng())
    maps = torch.randn(2, 8, 3, 4, generator=rng(1))
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    with torch.no_grad():
        expected = unit(maps, mask)
        for rows, columns in ((0, 2), (1, 0), (4, 3)):
            padding = (0, columns, 0, rows)
            larger = torch.nn.functional.pad(maps, padding, value=9.0)
            result = unit(larger, torch.nn.functional.pad(mask, padding, value=False))
            close(result[..., :3, :4], expected)
            other = pixel_loss(larger, torch.zeros_like(larger), torch.nn.functional.pad(mask, padding, value=False))
            close(other, maps.square().mean())


def test_spread():
    maps = torch.tensor([1.0, 3.0, 5.0, 100.0]).view(1, 1, 1, 4)
    close(spread(maps, torch.tensor([[[True, True, True, False]]])), 8 / 3)


# ----------------------------------------------------------------------------------------------- no collapse


def trained(module, loss, steps: int = 30):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


@pytest.mark.parametrize("filter", ["none", "teacher"])
def test_training_the_student_never_moves_the_teachers_relation(filter):
    s, t = torch.randn(2, 2, 4, 6, generator=rng())
    adapter, psi, present = torch.nn.Linear(6, 6), ObjectRelation(6, "student", filter, "rows", 1.0), all_present(t)
    _, before = psi(adapter(s), t, present)
    values = trained(adapter, lambda: relation_loss(*psi(adapter(s), t, present), present))
    _, after = psi(adapter(s), t, present)
    assert values[-1] < 0.5 * values[0]
    assert torch.equal(before, after)
    assert not list(psi.parameters())
    assert (before - 1 / 4).abs().max() > 0.01  # and it says something


@pytest.mark.parametrize("learned", [False, True])
def test_every_filter_has_mean_one_and_padding_none(learned):
    t = torch.nn.functional.layer_norm(torch.randn(3, 5, 6, generator=rng()), (6,))
    present = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5])
    module = PairFilter(6)
    w = module(t, present) if learned else related_pairs(similarity(t, t, 6), present)
    for image, objects in enumerate((5, 2)):
        close(w[image, :objects, :objects].mean(), 1.0)
        assert not w[image, objects:].any() and not w[image, :, objects:].any()
        if not learned:
            close(w[image, :objects, :objects], loops.related_pairs(t[image, :objects].tolist(), scale=6))
    assert not w[2].any() and w.isfinite().all()


def test_a_learned_filter_cannot_vanish():
    t, present = torch.randn(2, 4, 6, generator=rng()), all_present(torch.zeros(2, 4, 6))
    module = PairFilter(6)
    trained(module, lambda: (module(t, present) ** 2).sum())
    close(module(t, present).mean((1, 2)), torch.ones(2))
    hopeless = with_mean_one(torch.zeros(1, 2, 2), all_present(torch.zeros(1, 2, 1)))
    assert hopeless.isfinite().all()


def test_the_filter_is_the_mlp_of_both_objects():
    t = torch.randn(1, 3, 6, generator=rng())
    module = PairFilter(6)
    weights = torch.cat([module.first.weight, module.second.weight], dim=1)
    raw = torch.tensor(
        [
            [torch.sigmoid(module.last((weights @ torch.cat([a, b]) + module.first.bias).relu())).item() for b in t[0]]
            for a in t[0]
        ]
    )
    close(module(t, all_present(t))[0], raw / raw.mean())


def test_no_gradient_on_the_teachers_side():
    """Neither the teacher's maps nor phi and the filter through the teacher's output."""
    generator = rng()
    s, t = (torch.randn(1, 8, 2, 3, generator=generator, requires_grad=True) for _ in range(2))
    for form in ("shared", "frozen"):
        phi = PixelRelation([8], form)
        with torch.no_grad():
            phi.of_student[0].scale.fill_(0.5)
        of_student, of_teacher = phi(0, PairedMaps(s, t.detach(), torch.ones(1, 2, 3, dtype=torch.bool)))
        assert of_student.requires_grad and not of_teacher.requires_grad
    objects = torch.randn(2, 1, 4, 6, generator=generator, requires_grad=True)
    psi = ObjectRelation(6, "student", "learned", "rows", 1.0)
    of_student, of_teacher = psi(objects[0], objects[1], all_present(objects[0]))
    assert not of_teacher.requires_grad
    relation_loss(of_student, of_teacher, all_present(objects[0])).backward()
    assert objects.grad[0].any() and not objects.grad[1].any()
    assert all(parameter.grad is not None for parameter in psi.parameters())


def test_the_literal_reading_collapses():
    """Why it warns: trained on both sides, the relation falls to nothing, and both psi to uniform."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 4, 6, generator=rng())
    psi, present = ObjectRelation(6, "both", "none", "rows", 1.0), all_present(t)
    _, before = psi(s, t, present)
    values = trained(psi, lambda: relation_loss(*psi(s, t, present), present), steps=100)
    _, after = psi(s, t, present)
    assert values[-1] < 0.05 * values[0]
    assert (after - 1 / 4).abs().mean() < 0.5 * (before - 1 / 4).abs().mean()


def test_a_graph_that_shrinks_its_input_is_reported():
    maps = torch.randn(1, 8, 4, 4, generator=rng())
    pair = PairedMaps(maps, maps, torch.ones(1, 4, 4, dtype=torch.bool))
    phi = PixelRelation([8], "shared")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phi(0, pair)
    phi.of_student[0].forward = lambda maps, mask: 0.05 * maps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phi(0, pair)  # not every call is watched
    phi.calls = phi.watch_every
    with pytest.warns(UserWarning, match="phi has lost more than 99% of the variance"):
        phi(0, pair)


def test_temperature():
    """Divides the cosines. At 1 / sqrt(d) of RoIs, an object's likeness to itself drowns all others."""
    objects, present = torch.randn(1, 4, 49 * 256, generator=rng()), torch.ones(1, 4, dtype=torch.bool)
    cosine = torch.nn.functional.cosine_similarity(
        *(x - x.mean(-1, keepdim=True) for x in (objects[0, 0], objects[0, 1])), 0
    )
    close(similarity(*(standardised(objects),) * 2, 49 * 256)[0, 0, 1], cosine)
    for temperature in (1.0, 0.25):
        psi, _ = ObjectRelation(49 * 256, "student", "none", "rows", temperature)(objects, objects, present)
        close(psi[0, 0, 1] / psi[0, 0, 0], ((cosine - 1) / temperature).exp())
    psi, _ = ObjectRelation(49 * 256, "student", "none", "rows", (49 * 256) ** -0.5)(objects, objects, present)
    close(psi, torch.eye(4)[None])


def test_standardised():
    x = 0.03 * torch.randn(2, 3, 64, generator=rng()) + 5
    close(standardised(x).mean(-1), torch.zeros(2, 3), 1e-4)
    close(standardised(x).std(-1, correction=0), torch.ones(2, 3), 1e-3)


# ----------------------------------------------------------------------------------------------- objects of maps


def ramp(height: int, width: int) -> torch.Tensor:
    """(1, 2, h, w): the x and the y of every cell's centre in cells."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([columns, rows])[None]


def test_objects_are_read_where_they_are():
    """Bilinear reading of a ramp gives the places themselves: the centres of the 7 x 7 parts of the box."""
    box = torch.tensor([0.5, 0.4, 0.5, 0.3])
    mask = torch.ones(1, 20, 12, dtype=torch.bool)
    read = object_features([ramp(20, 12)], [mask], box.view(1, 1, 4)).view(2, 7, 7)
    parts = (torch.arange(7) + 0.5) / 7
    close(read[0], ((0.25 + 0.5 * parts) * 12).expand(7, 7), 1e-4)
    close(read[1], ((0.25 + 0.3 * parts) * 20)[:, None].expand(7, 7), 1e-4)


def test_the_level_that_fits_the_box():
    """14 cells and more on the coarse level: there; else on the fine one."""
    maps = [torch.full((2, 1, 64, 64), 1.0), torch.full((2, 1, 32, 32), 2.0), torch.full((2, 1, 16, 16), 3.0)]
    masks = [torch.ones(2, size, size, dtype=torch.bool) for size in (64, 32, 16)]
    boxes = torch.tensor([[0.5, 0.5, w, h] for w, h in ((0.1, 0.1), (0.5, 0.5), (0.2, 0.99), (0.95, 0.95))])
    read = object_features(maps, masks, boxes.expand(2, -1, -1)).mean(-1)
    close(read, torch.tensor([1.0, 2.0, 2.0, 3.0]).expand(2, -1))


@pytest.mark.parametrize(
    "box", [[0.5, 0.5, 1.0, 1.0], [0.8, 0.8, 0.4, 0.4], [0.95, 0.9, 0.02, 0.1], [0.2, 0.3, 0.1, 0.2]]
)
def test_padding_is_not_read(box):
    """An object at the border of the image is the same with and without padding beyond it."""
    maps = torch.randn(2, 3, 5, 6, generator=rng())
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    boxes = torch.tensor(box).expand(2, 1, 4)
    expected = object_features([maps], [mask], boxes)
    larger = torch.nn.functional.pad(maps, (0, 3, 0, 2), value=50.0)
    larger_mask = torch.nn.functional.pad(mask, (0, 3, 0, 2), value=False)
    close(object_features([larger], [larger_mask], boxes), expected)


def test_boxes_are_padded_and_capped():
    targets = [{"boxes": torch.rand(n, 4, generator=rng(n))} for n in (3, 0, 120)]
    boxes, present = padded_boxes(targets, 100)
    assert boxes.shape == (3, 100, 4)
    assert present.sum(1).tolist() == [3, 0, 100]
    assert torch.equal(boxes[2], targets[2]["boxes"][:100])
    assert padded_boxes(targets[1:2], 100)[0].shape == (1, 0, 4)


# ----------------------------------------------------------------------------------------------- objects of queries


def test_query_of_every_target():
    """Target order, whatever the order of the queries; targets without a query are told."""
    match = Match(
        torch.tensor([[1, 4, 5], [2, 0, 0]]),
        torch.tensor([[2, 0, 1], [1, 0, 0]]),
        torch.tensor([[1.0, 1, 1], [1, 0, 0]]),
    )
    query, given = query_of_target(match, 3)
    assert query.tolist() == [[4, 5, 1], [0, 2, 0]]
    assert given.tolist() == [[True] * 3, [False, True, False]]
    assert query_of_target(match, 2)[0].tolist() == [[4, 5], [0, 2]]  # capped


@functools.cache
def views(student: str = "detr", teacher: str = "detr", objects: tuple[int, ...] = (3, 2)):
    """Adapters, views and targets of two random models, which no test changes."""
    adapters = adapter_for(zoo.build(student, seed=1)), adapter_for(zoo.build(teacher, seed=2))
    batch = zoo.batch(targets=objects)
    with torch.no_grad():
        seen = [adapter.forward({"pixel_values": batch["pixel_values"]})[1] for adapter in adapters]
    return adapters, seen, batch["labels"]


@pytest.mark.parametrize("name", ["detr", "dab-detr", "rt_detr"])
def test_states_of_the_assigned_queries(name):
    _, (view, _), targets = views(name)
    states, given = target_states(view, targets, 100)
    match = ground_truth_matches(view, targets)[-1]
    assert states.shape == (2, 3, view.hidden_states.shape[-1])
    assert given.tolist() == [[True] * 3, [True, True, False]]
    for image in range(2):
        for query, target, weight in zip(
            match.student_index[image], match.teacher_index[image], match.weight[image], strict=True
        ):
            if weight:
                assert torch.equal(states[image, target], view.hidden_states[-1, image, query])


# ----------------------------------------------------------------------------------------------- the method


def drkd(settings: dict, adapters):
    return DRKD(configure(DRKDConfig, settings), *adapters)


def values(method, seen, targets) -> dict[str, float]:
    with torch.no_grad():
        return {name: value.item() for name, value in method(*seen, targets, rng()).items()}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("instances", ["roi", "query"])
def test_terms_are_what_they_are_said_to_be(instances, normalize):
    """Against loops, on a pair of one level: a fresh phi and a fresh f are the identity."""
    adapters, seen, targets = views()
    terms = values(drkd({"instances": instances, "normalize": normalize}, adapters), seen, targets)
    prepared = standardised if normalize else torch.clone
    s, t = (prepared(view.memory).mT.unflatten(-1, view.memory_shapes[0]) for view in seen)
    assert terms["pixel"] == pytest.approx(torch.nn.functional.mse_loss(s, t).item(), rel=1e-5)
    if instances == "roi":
        boxes, present = padded_boxes(targets, 100)
        objects = [object_features([x], seen[0].memory_masks(), boxes) for x in (s, t)]
    else:
        states, present = zip(*(target_states(view, targets, 100) for view in seen), strict=True)
        objects, present = [prepared(x) for x in states], present[0]
    expected = loops.instance_distance(*(x.tolist() for x in objects), present.tolist())
    assert terms["instance"] == pytest.approx(expected, rel=1e-4)
    total, number = 0.0, 0
    for image, count in enumerate((3, 2)):
        standard = [standardised(x[image, :count]) for x in objects]
        psis = [torch.tensor(loops.object_relation(x.tolist(), scale=0.125 * x.shape[-1])) for x in standard]
        total, number = total + (psis[0] - psis[1]).square().sum().item(), number + count
    assert terms["relation"] == pytest.approx(total / number, rel=1e-3)


ALL_SETTINGS = [
    {"feature": "backbone"},
    {"relation": "frozen"},
    {"relation": "separate"},
    {"graph": "released"},
    {"instances": "query"},
    {"filter": "teacher"},
    {"filter": "learned"},
    {"filter": "learned", "instances": "query", "dim": "first"},
    {"embedding": "both"},
    {"embedding": "both", "instances": "query", "filter": "teacher"},
    {"temperature": 0.2, "normalize": False},
]
PAIRS = [("deformable_detr", "d_fine"), ("lw_detr", "conditional_detr")]


@pytest.mark.filterwarnings("ignore:drkd trains modules")
@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_setting_trains(settings):
    """Finite, and a gradient for every parameter once the scale of phi has left 0; the terms fall."""
    for student, teacher in PAIRS:
        adapters, seen, targets = views(student, teacher)
        torch.manual_seed(0)
        method = drkd(settings, adapters)
        if method.config.relation != "frozen":
            for name, parameter in method.named_parameters():
                if name.endswith("scale"):
                    torch.nn.init.normal_(parameter, std=0.1)
        first = method(*seen, targets, rng())
        assert all(value > 0 and value.isfinite() for value in first.values())
        sum(first.values()).backward()
        learned = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
        assert learned
        assert not [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            loss = sum(method(*seen, targets, rng()).values())
            loss.backward()
            optimizer.step()
        assert loss < sum(first.values())


@pytest.mark.filterwarnings("ignore:drkd trains modules")
@pytest.mark.parametrize(
    "settings", [{}, *ALL_SETTINGS], ids=lambda settings: "-".join(map(str, settings.values())) or "default"
)
@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_an_identical_student_has_nothing_to_learn(name, settings):
    if settings.get("embedding") == "both" or settings.get("relation") == "separate":
        pytest.skip("two modules of their own make two sides of their own")
    teacher = zoo.build(name)
    adapters = adapter_for(copy.deepcopy(teacher)), adapter_for(teacher)
    batch = zoo.batch()
    with torch.no_grad():
        seen = [adapter.forward({"pixel_values": batch["pixel_values"]})[1] for adapter in adapters]
    terms = values(drkd(settings, adapters), seen, batch["labels"])
    assert all(abs(value) < 1e-9 for value in terms.values())


@pytest.mark.parametrize("instances", ["roi", "query"])
def test_targets_of_an_image(instances):
    """Their order changes nothing. One object has an instance and no relation; without objects there is neither."""
    adapters, seen, targets = views(objects=(4, 3))
    method = drkd({"instances": instances, "filter": "teacher"}, adapters)
    whole = values(method, seen, targets)
    turned = [{name: value.flip(0) for name, value in image.items()} for image in targets]
    assert values(method, seen, turned) == pytest.approx(whole, rel=1e-4)

    single = values(method, seen, [{name: value[:1] for name, value in image.items()} for image in targets])
    assert single["relation"] == 0 and single["instance"] > 0
    terms = method(*seen, [{name: value[:0] for name, value in image.items()} for image in targets], rng())
    assert terms["relation"] == 0 and terms["instance"] == 0
    assert terms["pixel"].item() == pytest.approx(whole["pixel"])
    assert terms["instance"].requires_grad

    mixed = values(method, seen, [targets[0], {name: value[:0] for name, value in targets[1].items()}])
    alone = [replace(view, **of_image(view, 0)) for view in seen]
    assert values(method, alone, targets[:1]) == pytest.approx({**mixed, "pixel": mixed["pixel"]}, rel=0.5)
    for name in ("relation", "instance"):
        assert values(method, alone, targets[:1])[name] == pytest.approx(mixed[name], rel=1e-4)


def of_image(view, image: int) -> dict:
    part = slice(image, image + 1)
    layered = {name: getattr(view, name)[:, part] for name in ("logits", "boxes", "hidden_states")}
    mask = None if view.memory_mask is None else view.memory_mask[part]
    return {
        **layered,
        "memory": view.memory[part],
        "memory_mask": mask,
        "features": tuple(x[part] for x in view.features),
    }


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
@pytest.mark.parametrize("feature", ["memory", "backbone"])
def test_padding_changes_nothing(name, feature):
    """Both models' maps are other under the padding; every term stays."""
    batch = zoo.batch(pad=True)
    adapters = adapter_for(zoo.build(name, seed=1)), adapter_for(zoo.build(name, seed=2))
    with torch.no_grad():
        seen = [adapter.forward({k: v for k, v in batch.items() if k != "labels"})[1] for adapter in adapters]
    method = drkd({"feature": feature, "filter": "teacher"}, adapters)
    with torch.no_grad():
        for unit in method.phi.of_student:
            unit.scale.normal_(generator=rng())

    def other(view):
        padded = ~view.memory_mask[..., None]
        assert padded.any()
        features = []
        for x in view.features:
            real = torch.nn.functional.interpolate(view.memory_masks()[0][:, None].float(), x.shape[-2:])
            features.append(torch.where(real > 0, x, 7.0))
        return replace(view, memory=torch.where(padded, 7.0, view.memory), features=tuple(features))

    assert values(method, map(other, seen), batch["labels"]) == pytest.approx(
        values(method, seen, batch["labels"]), rel=1e-4
    )


def test_a_term_without_weight_owns_nothing():
    adapters, seen, targets = views("deformable_detr", "rt_detr")

    def parameters(settings) -> set[str]:
        method = drkd(settings, adapters)
        terms = method(*seen, targets, rng())
        assert {name for name, value in terms.items() if value > 0} == {
            k for k, v in method.config.weights.items() if v
        }
        return {name.split(".")[0] for name, _ in method.named_parameters()}

    only = {name: {n: float(n == name) for n in ("pixel", "relation", "instance")} for name in DRKDConfig().weights}
    assert parameters({"weights": only["pixel"]}) == {"f", "phi"}
    assert parameters({"weights": only["instance"]}) == {"f"}
    assert parameters({"weights": only["instance"], "instances": "query"}) == {"f_query"}
    assert parameters({"weights": only["relation"], "filter": "learned"}) == {"f", "psi"}
    assert parameters({"weights": only["relation"], "feature": "backbone"}) == {"f"}
    one_level = drkd({"weights": only["relation"], "feature": "backbone"}, adapters)
    assert len(one_level.f.levels) == 1
    assert len(drkd({"feature": "backbone"}, adapters).f.levels) == 3


def test_what_is_refused_and_what_warns():
    adapters, _, _ = views()
    with pytest.raises(ValueError, match=r"all `weights` of drkd are 0.*method none"):
        drkd({"weights": {"pixel": 0, "relation": 0, "instance": 0}}, adapters)
    for settings, message in (
        ({"feature": "neck"}, r"`feature` of DRKDConfig is 'neck'; allowed are 'memory', 'backbone'"),
        ({"relation": "ours"}, r"`relation` of DRKDConfig is 'ours'; allowed are 'shared', 'separate', 'frozen'"),
        ({"instances": "boxes"}, r"allowed are 'roi', 'query'"),
        ({"filter": "mlp"}, r"allowed are 'none', 'teacher', 'learned'"),
        ({"dim": "columns"}, r"allowed are 'rows', 'first'"),
    ):
        with pytest.raises(ValueError, match=message):
            drkd(settings, adapters)
    with pytest.raises(ValueError, match=r"`temperature` of drkd is 0\.0; it must be above 0"):
        drkd({"temperature": 0.0}, adapters)
    for settings in ({"relation": "separate"}, {"embedding": "both"}):
        with pytest.warns(UserWarning, match="can fall because both sides shrink.*Watch AP"):
            drkd(settings, adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drkd({}, adapters)
        drkd({"relation": "separate", "weights": {"pixel": 0}}, adapters)  # no phi, nothing to warn of


def test_the_teacher_is_left_alone():
    """Under its own graph, nothing of the terms reaches it."""
    adapters, seen, targets = views("rt_detr", "rt_detr")
    teacher = replace(
        seen[1],
        memory=seen[1].memory.clone().requires_grad_(),
        hidden_states=seen[1].hidden_states.clone().requires_grad_(),
    )
    for instances in ("roi", "query"):
        for filter in ("teacher", "learned"):
            sum(
                drkd({"instances": instances, "filter": filter}, adapters)(seen[0], teacher, targets, rng()).values()
            ).backward()
    assert teacher.memory.grad is None and teacher.hidden_states.grad is None


def test_autocast():
    adapters, seen, targets = views("rt_detr", "detr")
    for settings in ({}, {"instances": "query", "filter": "learned"}):
        method = drkd(settings, adapters)
        with torch.autocast("cpu", torch.bfloat16):
            terms = method(*seen, targets, rng())
        assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
        exact = method(*seen, targets, rng())
        for name, value in terms.items():
            assert value.item() == pytest.approx(exact[name].item(), rel=0.1)
