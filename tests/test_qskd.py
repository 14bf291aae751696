"""QSKD: its groups, masks and pairs worked by hand, and what it asks of the models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import reference_loops as loops
import torch
import zoo

from hf_detrkd import DistillationModel
from hf_detrkd.families import adapter_for
from hf_detrkd.losses.attention import attention_mask, attention_of
from hf_detrkd.losses.reduction import weighted_mean
from hf_detrkd.matching import HungarianMatcher, Match, ground_truth_matches
from hf_detrkd.methods import QSKD, QSKDConfig, build_methods, configure
from hf_detrkd.sampling import QueryGroups, group_queries, pair_by_key
from hf_detrkd.view import AttentionMaps

NO_PAIRS = Match(*(torch.zeros(1, 0, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float32)))


def cxcywh(*corners):
    x1, y1, x2, y2 = torch.tensor(corners, dtype=torch.float32).unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], -1)


def target(*boxes, label: int = 0):
    boxes = torch.stack(boxes) if boxes else torch.zeros(0, 4)
    return {"class_labels": torch.full((len(boxes),), label), "boxes": boxes}


def match_of(*pairs):
    """Of one image."""
    query, other = (torch.tensor([column], dtype=torch.int64) for column in zip(*pairs, strict=True))
    return Match(query, other, torch.ones(query.shape))


@pytest.fixture(scope="module")
def models():
    """A student and a teacher, which are only read."""
    return {name: zoo.build(name, seed=seed) for seed, name in enumerate(("detr", "deformable_detr", "rt_detr"))}


def build(student, teacher, **settings):
    adapters = adapter_for(student), adapter_for(teacher)
    (method,) = build_methods(["qskd"], settings, *adapters)
    return method, *adapters


def see(adapter, batch, attentions: bool = True):
    return adapter.forward({n: v for n, v in batch.items() if n != "labels"}, attentions=attentions)[1]


# ------------------------------------------------------------------------------------------------- query selection

GROUND_TRUTH = cxcywh(0, 0, 4, 4)
QUERIES = torch.stack([cxcywh(x, y, x + 4, y + 4) for x, y in ((0, 0), (2, 0), (4, 0), (6, 0), (3, 3))])


def test_groups_by_hand():
    """methods.md 7.6.1; the third query lies exactly on the threshold, which is strict."""
    groups = group_queries(QUERIES[None], match_of((0, 0)), [target(GROUND_TRUTH)])
    torch.testing.assert_close(groups.overlap[0], torch.tensor([1, 1 / 3, 0, -0.2, -0.335089]), atol=1e-5, rtol=0)
    assert groups.positive.tolist() == [[True, False, False, False, False]]
    assert groups.hard.tolist() == [[False, True, False, False, False]]
    assert groups.selected.tolist() == [[True, True, False, False, False]]


def test_threshold():
    def hard(threshold):
        return group_queries(QUERIES[None], match_of((0, 0)), [target(GROUND_TRUTH)], threshold).hard[0].tolist()

    assert hard(0.4) == [False] * 5
    assert hard(-0.25) == [False, True, True, True, False]


def test_the_positive_has_the_overlap_with_its_own_target():
    """Also where another target overlaps it more."""
    other = cxcywh(6, 0, 10, 4)
    groups = group_queries(QUERIES[None], match_of((1, 1)), [target(GROUND_TRUTH, other)])
    assert groups.target[0].tolist() == [0, 1, 1, 1, 0]
    torch.testing.assert_close(groups.overlap[0, 1], torch.tensor(0.0))
    assert groups.positive[0].tolist() == [False, True, False, False, False]
    assert groups.hard[0].tolist() == [True, False, True, True, False]


def test_hard_negatives_are_capped_per_target():
    """The highest overlaps stay; each target has its own count."""
    shifts = torch.tensor([3.0, 1.0, 2.0, 0.5, 2.5])
    near = torch.stack([cxcywh(x, 0, x + 4, 4) for x in shifts])
    boxes = torch.cat([near, near + torch.tensor([20.0, 0, 0, 0])])[None]
    targets = [target(GROUND_TRUTH, cxcywh(20, 0, 24, 4))]
    groups = group_queries(boxes, NO_PAIRS, targets, per_target=2)
    assert groups.hard[0].nonzero()[:, 0].tolist() == [1, 3, 6, 8]
    assert groups.rank[0].tolist() == [4, 1, 2, 0, 3] * 2
    everyone = group_queries(boxes, NO_PAIRS, targets, per_target=9)
    assert everyone.hard.all()


def test_images_without_targets_have_easy_negatives_only():
    boxes = QUERIES.expand(2, -1, -1)
    match = Match(*(torch.zeros(2, 1, dtype=torch.int64),) * 2, torch.tensor([[1.0], [0.0]]))
    groups = group_queries(boxes, match, [target(GROUND_TRUTH), target()])
    assert groups.selected[0].any() and not groups.selected[1].any()
    assert groups.overlap.isfinite().all()
    nothing = group_queries(boxes, match, [target(), target()], threshold=-1.0)
    assert not nothing.hard.any()


def test_groups_against_the_loop():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(3, 12, 4, generator=generator) * 0.5 + 0.1
    targets = [target(*(torch.rand(n, 4, generator=generator) * 0.5 + 0.1)) for n in (3, 0, 2)]
    assigned = [{0: 2, 5: 0, 7: 1}, {}, {1: 0, 2: 1}]
    index = torch.tensor([[0, 5, 7], [0, 0, 0], [1, 2, 0]])
    of_target = torch.tensor([[2, 0, 1], [0, 0, 0], [0, 1, 0]])
    weight = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 1, 0]])
    groups = group_queries(boxes, Match(index, of_target, weight), targets, 0.1, per_target=2)
    for image in range(3):
        positive, hard = loops.query_groups(
            boxes[image].tolist(), assigned[image], targets[image]["boxes"].tolist(), 0.1, per_target=2
        )
        assert {q for q, chosen in enumerate(groups.positive[image]) if chosen} == set(positive)
        assert {q for q, chosen in enumerate(groups.hard[image]) if chosen} == set(hard)
        for query, (which, overlap) in {**positive, **hard}.items():
            assert groups.target[image, query] == which
            assert groups.overlap[image, query].item() == pytest.approx(overlap, abs=1e-5)


# -------------------------------------------------------------------------------------------------------- the mask


def dense(*layers):
    """Maps of one head and one image."""
    return AttentionMaps("dense", tuple(torch.tensor(rows)[None, None] for rows in layers))


def test_mask_by_hand():
    """methods.md 7.6.2"""
    maps = dense([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    share = 1 + torch.tensor([[1.0, 1 / 3]])
    mass = attention_of(maps, 0, (), share / 2)
    torch.testing.assert_close(mass[0], torch.tensor([2 / 3, 2 / 3, 1 / 6, 1 / 6]))
    mask = attention_mask(maps, 0, (), share, None, 1e-6)
    torch.testing.assert_close(mask[0], torch.tensor([1, 1, 0.25, 0.25]))
    error = torch.tensor([1.0, 1, 2, 2]).square()
    assert weighted_mean(mask[0].square() * error, torch.ones(4)).item() == pytest.approx(0.625, abs=1e-5)

    second = dense([[0.8, 0.2], [0.4, 0.6]])
    share = torch.tensor([[2.0, 1.0]])
    torch.testing.assert_close(attention_of(second, 0, (), share / 2)[0], torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(attention_mask(second, 0, (), share, None, 1e-6)[0], torch.tensor([1.0, 0.5]))


def test_uniform_attention_is_the_plain_error():
    """methods.md 7.6.5: the relative floor keeps masks of large memories; TPRD's absolute one flattens them."""
    uniform = dense([[1 / 900] * 900] * 3)
    share = 1 + torch.tensor([[1.0, 0.2, 0.5]])
    torch.testing.assert_close(attention_mask(uniform, 0, (), share, None, 1e-6), torch.ones(1, 900))
    flat = attention_mask(uniform, 0, (), share, None, 0.01)
    torch.testing.assert_close(flat, torch.full((1, 900), 0.174), atol=5e-4, rtol=0)


def test_mask_leaves_out_discarded_queries_and_padding():
    maps = dense([[0.1, 0.7, 0.2], [0.0, 0.0, 1.0]])
    real = torch.tensor([[True, False, True]])
    mask = attention_mask(maps, 0, (), torch.tensor([[1.5, 0.0]]), real, 1e-6)
    torch.testing.assert_close(mask, torch.tensor([[0.5, 0.0, 1.0]]))
    assert torch.equal(attention_mask(maps, 0, (), torch.zeros(1, 2), real, 1e-6), torch.zeros(1, 3))


# ----------------------------------------------------------------------------------------------------------- pairs


def test_positives_are_paired_by_their_target():
    """methods.md 7.6.3"""
    teacher = group_queries(torch.rand(1, 8, 4), match_of((2, 1), (7, 0)), [target(GROUND_TRUTH, GROUND_TRUTH)])
    student = group_queries(torch.rand(1, 6, 4), match_of((1, 1), (5, 0)), [target(GROUND_TRUTH, GROUND_TRUTH)])
    match = pair_by_key((student.positive, student.target), (teacher.positive, teacher.target), 2)
    assert list(zip(match.student_index[0].tolist(), match.teacher_index[0].tolist(), strict=True)) == [(5, 7), (1, 2)]
    assert match.weight.tolist() == [[1.0, 1.0]]


def test_targets_that_only_one_model_found_make_no_pair():
    part = torch.tensor([[True, True, False]])
    match = pair_by_key((part, torch.tensor([[0, 2, 1]])), (part, torch.tensor([[1, 2, 0]])), 3)
    assert match.weight.tolist() == [[0, 0, 1]]
    assert (match.student_index[0, 2], match.teacher_index[0, 2]) == (1, 1)


def test_hungarian_among_two_sets(models):
    """As the whole problem on the two sets alone, image by image; sets may differ in size and be empty."""
    student, teacher = models["detr"], models["rt_detr"]
    batch = zoo.batch(size=3)
    with torch.no_grad():
        views = see(adapter_for(student), batch), see(adapter_for(teacher), batch)
    of_student = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1]]).bool()
    of_teacher = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1], [1, 1, 1, 0, 1, 0]]).bool()
    matcher, layers = HungarianMatcher(), (0, 1, 2)
    found = matcher(*views, layers, [(of_student, of_teacher)] * 3)
    for layer, match in enumerate(found):
        cost = matcher._cost(views[0], layer, views[1], layer)
        for image in range(3):
            rows, columns = (side[image].nonzero()[:, 0].tolist() for side in (of_student, of_teacher))
            pairs = loops.cheapest_pairs(cost[image][rows][:, columns].tolist()) if rows else []
            real = match.weight[image] > 0
            chosen = zip(
                match.student_index[image][real].tolist(), match.teacher_index[image][real].tolist(), strict=True
            )
            assert set(chosen) == {(rows[r], columns[c]) for r, c in pairs}


def test_per_gt_pairs_by_target_and_rank(models):
    """The best of the student with the best of the teacher at the same target, and no further than the shorter list."""
    method, *_ = build(models["detr"], models["detr"], pairing="per_gt", hard_per_target=3)
    boxes = torch.rand(1, 6, 4)
    match = match_of((0, 0))
    shape = (1, 1, 6)

    def groups(hard, target, rank):
        zeros = torch.zeros(1, 6, dtype=torch.bool)
        hard, target, rank = (torch.tensor([x]) for x in (hard, target, rank))
        return QueryGroups(zeros, hard.bool(), boxes[..., 0], target, rank)

    own = groups([0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0])
    other = groups([0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0])
    method._groups = lambda view, targets: [own]
    method.teacher_layers = (0,)
    view = type("View", (), {"boxes": torch.zeros(*shape, 4)})
    (match,) = method._pairs(view, view, [other], [target(GROUND_TRUTH, GROUND_TRUTH)])
    real = match.weight[0] > 0
    pairs = set(zip(match.student_index[0][real].tolist(), match.teacher_index[0][real].tolist(), strict=True))
    assert pairs == {(3, 2), (2, 5)}


# ------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("settings", [{}, {"pairing": "per_gt"}, {"masks": "per_layer"}, {"projection": "always"}])
@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_terms_against_the_loops(models, name, settings):
    """One number at a time, from the views alone."""
    teacher = models[name]
    student = zoo.build(name, seed=7)
    method, *adapters = build(student, teacher, **settings)
    batch = zoo.batch(pad=True)
    with torch.no_grad():
        views = [see(adapter, batch) for adapter in adapters]
        terms = method(*views, batch["labels"], None)
        expected = loops.qskd(*views, ground_truth_matches, batch["labels"], **settings)
    assert terms.keys() == expected.keys()
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value, rel=1e-4, abs=1e-5), term


@pytest.mark.parametrize("targets", [(0,), (0, 2)])
def test_images_without_targets(models, targets):
    """Without any target all terms are exactly 0, with a graph."""
    method, student, teacher = build(copy.deepcopy(models["detr"]), models["deformable_detr"])
    batch = zoo.batch(targets=targets)
    with torch.no_grad():
        answers = see(teacher, batch)
    view = see(student, batch)
    terms = method(view, answers, batch["labels"], None)
    assert all(value.requires_grad for value in terms.values())
    assert all((value > 0) if any(targets) else (value == 0) for value in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.model.parameters())
    assert all(p.grad is not None for p in method.parameters())
    if not any(targets):
        assert not any(p.grad.any() for p in method.parameters())


def test_each_mask_uses_the_selections_of_its_own_layer(models):
    """TPRD's list of selections starts with the last layer, its attention maps with the first."""
    method, student, teacher = build(models["detr"], models["rt_detr"], masks="per_layer")
    batch = zoo.batch()
    with torch.no_grad():
        view, answers = see(student, batch), see(teacher, batch)
        whole = method._feature(view, answers, method._groups(answers, batch["labels"]))
        layers = []
        for layer in range(3):
            method.teacher_layers = (0,)
            maps = answers.cross_attentions
            only = replace(
                answers,
                logits=answers.logits[[layer]],
                boxes=answers.boxes[[layer]],
                cross_attentions=replace(
                    maps, weights=maps.weights[layer : layer + 1], locations=maps.locations[layer : layer + 1]
                ),
            )
            layers.append(method._feature(view, only, method._groups(only, batch["labels"])))
    torch.testing.assert_close(whole, sum(layers))
    assert len({round(value.item(), 6) for value in layers}) == 3


def test_only_the_teacher_pays_for_attention(models):
    """The student's decoder keeps its own attention implementation, and without the feature term no one pays."""
    method, student, teacher = build(models["detr"], models["rt_detr"])
    assert method.attentions == {"teacher"}
    batch = zoo.batch()
    with torch.no_grad():
        answers = see(teacher, batch)
        method(see(student, batch, attentions=False), answers, batch["labels"], None)
        with pytest.raises(ValueError, match=r"holds no attention maps.*attentions=True"):
            method(see(student, batch), see(teacher, batch, attentions=False), batch["labels"], None)
    module = DistillationModel(student.model, student, [method]).train()
    asked = []
    forward = student.forward
    student.forward = lambda inputs, attentions=False: (asked.append(attentions), forward(inputs, attentions))[1]
    module(**batch, teacher_view=answers)
    assert asked == [False]

    method, student, teacher = build(models["detr"], models["rt_detr"], weights={"feature": 0.0})
    assert not method.attentions and not list(method.parameters())
    with torch.no_grad():
        terms = method(
            see(student, batch, attentions=False), see(teacher, batch, attentions=False), batch["labels"], None
        )
    assert terms["feature"] == 0 and terms["l1"] > 0


def test_features_alone_match_nothing(models, monkeypatch):
    settings = {"weights": {"class": 0.0, "l1": 0.0, "giou": 0.0}}
    method, student, teacher = build(models["detr"], models["rt_detr"], **settings)
    monkeypatch.setattr(HungarianMatcher, "__call__", None)
    batch = zoo.batch()
    with torch.no_grad():
        terms = method(see(student, batch), see(teacher, batch), batch["labels"], None)
    assert terms["feature"] > 0 and terms["l1"] == 0


def test_order_of_queries_is_of_no_matter(models):
    method, student, teacher = build(models["detr"], models["rt_detr"])
    batch = zoo.batch()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    with torch.no_grad():
        view, answers = see(student, batch), see(teacher, batch)
        terms = method(view, answers, batch["labels"], None)
        maps = answers.cross_attentions
        maps = replace(
            maps, weights=tuple(w[:, order] for w in maps.weights), locations=tuple(x[:, order] for x in maps.locations)
        )
        permuted = replace(
            answers, logits=answers.logits[:, :, order], boxes=answers.boxes[:, :, order], cross_attentions=maps
        )
        again = method(view, permuted, batch["labels"], None)
    for name in terms:
        torch.testing.assert_close(again[name], terms[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairing": "global"}, r"`pairing` of QSKDConfig is 'global'; allowed are 'set', 'per_gt'"),
        ({"masks": "all"}, r"`masks` of QSKDConfig is 'all'"),
        ({"hard_threshold": 1.0}, r"`hard_threshold` is 1.0; a GIoU lies between -1 and 1"),
        ({"hard_per_target": 0}, r"`hard_per_target` is 0; it must be 1 or more"),
        ({"mask_floor": 0.0}, r"`mask_floor` is 0.0; it must lie between 0 and 1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configure(QSKDConfig, settings)


def test_what_is_refused_at_construction(models):
    weights = dict.fromkeys(QSKDConfig().weights, 0.0)
    with pytest.raises(ValueError, match="all `weights` of qskd are 0"):
        build(models["detr"], models["detr"], weights=weights)
    teacher = adapter_for(models["detr"])

    class Blind(type(teacher)):
        provides = frozenset({"replay"})

    blind = Blind(models["detr"])
    with pytest.raises(ValueError, match="needs the teacher's cross-attention for its feature term, which `detr`"):
        QSKD(QSKDConfig(), teacher, blind)
    QSKD(configure(QSKDConfig, {"weights": {"feature": 0.0}}), teacher, blind)
