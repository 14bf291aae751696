"""CLoCKDistill: memory and target-aware queries by hand, and padding that changes nothing."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest
import reference_loops as loops
import torch
import zoo
from test_kd_detr import Scripted

from hf_detrkd import DistillationModel
from hf_detrkd.families import adapter_for
from hf_detrkd.losses.features import scale_masks, squared_sums
from hf_detrkd.methods import CLoCKDistill, CLoCKDistillConfig, build_methods, configure
from hf_detrkd.methods.clockdistill import MEMORY_TERMS, QUERY_TERMS
from hf_detrkd.sampling import TargetQueries, decode_targets

ALPHA, BETA = 5e-5, 1e-7
OFF = {"memory": dict.fromkeys(MEMORY_TERMS, 0), "queries": dict.fromkeys(QUERY_TERMS, 0)}
FAMILIES = [name for name in zoo.NAMES if name != "yolos"]
by_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def _model(name, seed, settings):
    return zoo.build(name, seed=seed, **dict(settings))


def model(name, seed=0, **settings):
    return copy.deepcopy(_model(name, seed, tuple(settings.items())))


def look(adapter, batch, grad=False):
    with torch.set_grad_enabled(grad):
        return adapter.forward({name: value for name, value in batch.items() if name != "labels"})[1]


def a_pair(student, teacher, settings=None, of_student=None, of_teacher=None):
    adapters = [
        adapter_for(model(student, 1, **(of_student or {}))),
        adapter_for(model(teacher, 2, **(of_teacher or {}))),
    ]
    return build_methods(["clockdistill"], settings, *adapters)[0], *adapters


def close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(value).item(), float(expected), rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- memory, by hand


def memory_sums(boxes, channels=1, inclusive=False, valid=None):
    """Of a 4 x 4 map on which teacher and student differ by 1 in every channel and cell."""
    mask = torch.ones(1, 4, 4, dtype=torch.bool) if valid is None else valid
    masks = scale_masks([torch.tensor(boxes).reshape(-1, 4)], mask, inclusive=inclusive)
    return masks, squared_sums(torch.zeros(1, channels, 4, 4), torch.ones(1, channels, 4, 4), masks, mask)


BOX = [0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("channels", "inclusive", "weights", "total"),
    [
        (1, False, (4 * [1 / 4], 12 * [1 / 12]), 5.01e-5),
        (3, False, (4 * [1 / 4], 12 * [1 / 12]), 1.503e-4),  # a mean over channels, as in the port, gives 5.01e-5
        (1, True, (9 * [1 / 9], 7 * [1 / 7]), 5.01e-5),
    ],
)
def test_one_box_by_hand(channels, inclusive, weights, total):
    masks, (foreground, background) = memory_sums([BOX], channels, inclusive)
    for mask, expected in zip(masks, weights, strict=True):
        torch.testing.assert_close(mask[mask > 0], torch.tensor(expected))
    close(foreground, channels)
    close(background, channels)
    close(ALPHA * foreground + BETA * background, total, 1e-9)


def test_overlapping_boxes_by_hand():
    """The cells of the first keep 1/4, six more cells of the second 1/8, six of the background 1/6."""
    (foreground, background), sums = memory_sums([BOX, [0.5, 0.5, 1.0, 0.5]])
    assert sorted(foreground[foreground > 0].tolist()) == [0.125] * 6 + [0.25] * 4
    torch.testing.assert_close(background[background > 0], torch.full((6,), 1 / 6))
    close(sums[0], 1.75)
    close(sums[1], 1.0)


def test_without_objects_and_without_background():
    _, (foreground, background) = memory_sums([])
    assert foreground == 0
    close(background, 1.0)
    _, (foreground, background) = memory_sums([[0.5, 0.5, 1.0, 1.0]])
    close(foreground, 1.0)
    assert background == 0


def test_padded_cells_are_no_background():
    """A row of padding weighs nothing and isn't counted; what it holds, NaN even, doesn't matter."""
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, :, 3] = False
    masks, sums = memory_sums([], valid=valid)
    torch.testing.assert_close(masks[1][masks[1] > 0], torch.full((12,), 1 / 12))
    close(sums[1], 1.0)
    student = torch.zeros(1, 1, 4, 4)
    student[..., 3] = torch.nan
    student.requires_grad_()
    loss = sum(squared_sums(student, torch.ones(1, 1, 4, 4), masks, valid))
    close(loss.detach(), 1.0)
    loss.backward()
    assert student.grad.isfinite().all()


def test_images_are_averaged():
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    boxes = [torch.tensor([BOX]), torch.zeros(0, 4)]
    masks = scale_masks(boxes, mask)
    foreground, background = squared_sums(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4), masks, mask)
    close(foreground, 0.5)
    close(background, 1.0)


@pytest.mark.parametrize("pair", [("rt_detr", "rt_detr"), ("deformable_detr", "rt_detr"), ("detr", "dab-detr")])
def test_levels_are_summed_each_with_its_masks(pair):
    """Also where widths differ, through one convolution."""
    batch = zoo.batch(targets=(1, 2))
    method, student, teacher = a_pair(*pair, {"weights": OFF["queries"]})
    mine, others = look(student, batch), look(teacher, batch)
    terms = method(mine, others, batch["labels"], None)
    expected = dict.fromkeys(MEMORY_TERMS, 0.0)
    pairs = method.maps(mine, others)
    assert len(pairs) == len(others.memory_shapes)
    for maps in pairs:
        squared = (maps.student - maps.teacher).square().sum(1)
        for name, mask in zip(MEMORY_TERMS, scale_masks([t["boxes"] for t in batch["labels"]], maps.mask), strict=True):
            expected[name] = expected[name] + (squared * mask).sum() / 2
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach() if isinstance(value, torch.Tensor) else value)
    assert all(terms[name] == 0 for name in QUERY_TERMS)
    assert method.queries is None


# ---------------------------------------------------------------------------------------------------- queries, by hand


def scripted(settings=None, *, teacher_logits=(2.0, -2.0), student_logits=(0.0, 0.0), **options):
    """One object in one image."""
    student = Scripted([list(student_logits)], [[0.6, 0.5, 0.4, 0.4]], **options)
    teacher = Scripted([list(teacher_logits)], [[0.5, 0.5, 0.4, 0.4]], **options)
    method = CLoCKDistill(
        configure(CLoCKDistillConfig, {"weights": OFF["memory"], **(settings or {})}), student, teacher
    )
    targets = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([BOX])}]
    return method, method(student.view(), teacher.view(), targets, None), (student, teacher)


@pytest.mark.parametrize(
    ("settings", "divergence", "total"),
    [
        ({}, 0.655627, 1.722510),
        ({"class_loss": "softmax"}, 0.603052, 1.676203),
        ({"class_loss": "softmax", "temperature": 10.0}, 1.960699, None),
    ],
)
def test_one_query_by_hand(settings, divergence, total):
    """w = .880797, L1 .1, GIoU .6. The totals are before the division by the sum of weights, here w itself."""
    weight = loops.sigmoid(2.0)
    close(weight, 0.880797)
    method, terms, _ = scripted(settings)
    close(terms["tcld_class"], divergence)
    close(terms["tcld_l1"], 0.1)
    close(terms["tcld_giou"], 0.4)
    if total:
        close(weight * sum(method.config.weights[name] * terms[name] for name in QUERY_TERMS), total)


def test_the_teacher_is_the_target_and_the_student_learns():
    """The first author's earlier code exchanges the two, so that the class term has no gradient."""
    _, terms, (student, teacher) = scripted()
    terms["tcld_class"].backward()
    assert student.prediction[0].grad.abs().min() > 0
    assert teacher.prediction[0].grad is None
    _, swapped, _ = scripted(teacher_logits=(0.0, 0.0), student_logits=(2.0, -2.0))
    assert abs(swapped["tcld_class"] - 0.655627) > 0.1


def test_only_where_the_teacher_is_better():
    """The target is elsewhere: at (.25, .25), nearer to the teacher's box."""
    _, terms, _ = scripted({"better_boxes_only": True})
    close(terms["tcld_l1"], 0.1)
    student, teacher = Scripted([[0.0, 0.0]], [[0.3, 0.3, 0.4, 0.4]]), Scripted([[2.0, -2.0]], [[0.6, 0.6, 0.4, 0.4]])
    settings = configure(CLoCKDistillConfig, {"weights": OFF["memory"], "better_boxes_only": True})
    targets = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([BOX])}]
    terms = CLoCKDistill(settings, student, teacher)(student.view(), teacher.view(), targets, None)
    assert terms["tcld_l1"] == terms["tcld_giou"] == 0 < terms["tcld_class"]


def test_stages_have_their_own_confidence():
    """By the slowest obvious Python, with five objects in three images and fewer layers in the student."""
    batch = zoo.batch(3, targets=(3, 0, 2))
    method, student, teacher = a_pair("rt_detr", "conditional_detr", {"weights": OFF["memory"]}, {"decoder_layers": 2})
    mine, others = look(student, batch), look(teacher, batch)
    terms = method(mine, others, batch["labels"], None)
    assert method.teacher_layers == (1, 2)

    points = method.queries(mine, others, batch["labels"])
    (answer,), (reply,) = decode_targets(others, points.teacher, points), decode_targets(mine, points.student, points)
    expected = dict.fromkeys(QUERY_TERMS, 0.0)
    objects = [(image, j) for image, number in enumerate((3, 0, 2)) for j in range(number)]
    for s, t in enumerate((1, 2)):
        z, p = ([view.logits[k, i, j].tolist() for i, j in objects] for view, k in ((reply, s), (answer, t)))
        a, b = ([view.boxes[k, i, j].tolist() for i, j in objects] for view, k in ((reply, s), (answer, t)))
        weights = [max(map(loops.sigmoid, logits)) for logits in p]
        for name, value in zip(
            QUERY_TERMS,
            (loops.bernoulli_kl(z, p, weights), loops.l1(a, b, weights), loops.giou(a, b, weights)),
            strict=True,
        ):
            expected[name] += value
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].item(), value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- queries


OF_THE_IMAGE = [(n, "denoising") for n in ("detr", "table-transformer")]
OF_THE_IMAGE += [(n, c) for n in FAMILIES if n.startswith(("lw_", "rf_")) for c in ("denoising", "random")]


@pytest.mark.parametrize(
    ("name", "content"),
    [(n, c) for n in FAMILIES for c in ("denoising", "random") if (n, c) not in OF_THE_IMAGE],
)
def test_queries_are_the_same_in_every_image(name, content):
    """Of class and box alone; LW-DETR lends its content from proposals of the image, and DETR places from its boxes."""
    method, student, teacher = a_pair(name, name, {"content": content})
    batch = zoo.batch(targets=(2,))
    batch["labels"][1] = batch["labels"][0]
    points = method.queries(look(student, batch), look(teacher, batch), batch["labels"])
    assert points.real.all() and points.numbers == (2, 2)
    for queries in (points.student, points.teacher):
        for part in (queries.content, queries.position, queries.reference):
            if part is not None:
                torch.testing.assert_close(part[0], part[1])
                assert not part.requires_grad
        place = queries.reference if queries.reference is not None else queries.position
        assert (place[0, 0] - place[0, 1]).abs().max() > 1e-3
        if queries.reference is not None:
            size = queries.reference.shape[-1]
            torch.testing.assert_close(queries.reference[0], batch["labels"][0]["boxes"][:, :size])


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
def test_tables_are_frozen_and_not_the_students(name):
    student = adapter_for(model(name))
    before = set(student.model.state_dict())
    (method,) = build_methods(["clockdistill"], {"content": "random"}, student, adapter_for(model("detr", 3)))
    module = DistillationModel(student.model, student, [method])
    tables = dict(method.queries.named_buffers())
    assert tables.keys() == {"classes", "inner", "outer"}
    assert not any(table.requires_grad for table in tables.values())
    assert list(method.queries.parameters()) == []
    assert set(module.student.state_dict()) == before
    again = TargetQueries(student, adapter_for(model("detr", 3)), "random")
    assert all(torch.equal(tables[key], buffer) for key, buffer in again.named_buffers())


def test_content():
    """By default each model's own. The teacher's denoising embedding: the student's own, or through a linear map, or none
    where content is zeros."""
    batch = zoo.batch()
    labels = batch["labels"][0]["class_labels"]

    def contents(student, settings=None, of_teacher=None):
        settings = {"content": "denoising"} if settings is None else settings
        method, *adapters = a_pair(student, "rt_detr", settings, of_teacher=of_teacher)
        points = method.queries(*(look(adapter, batch) for adapter in adapters), batch["labels"])
        return method, *adapters, points.student.content[0], points.teacher.content[0]

    method, student, teacher, own, others = contents("rt_detr")
    torch.testing.assert_close(own, student.base.denoising_class_embed(labels))
    torch.testing.assert_close(others, teacher.base.denoising_class_embed(labels))
    assert list(method.queries.parameters()) == []

    method, student, teacher, own, others = contents("deformable_detr")
    assert own.shape[-1] == 64 and own.requires_grad
    torch.testing.assert_close(own[:, :16], others)  # the linear map starts as the identity
    assert {name for name, _ in method.queries.named_parameters()} == {"content.weight", "content.bias"}

    *_, own, _ = contents("conditional_detr")
    assert not own.any()
    for settings, of_teacher in (({}, {}), ({"content": "native"}, {}), (None, {"num_denoising": 0})):
        method, student, teacher, own, others = contents("rt_detr", settings, of_teacher)
        assert list(method.queries.parameters()) == []
        assert (own - student.base.denoising_class_embed(labels)).abs().max() > 1e-3
    _, _, _, own, others = contents("deformable_detr", {"content": "random"})
    torch.testing.assert_close(own[:, :16], others)


def test_detr_is_asked_by_its_own_query_that_comes_to_lie_nearest():
    """A place that a DETR's decoder can't read would be answered with some other object."""
    method, student, teacher = a_pair("detr", "detr", of_student={"d_model": 32})
    batch = zoo.batch()
    mine, others = look(student, batch), look(teacher, batch)
    points = method.queries(mine, others, batch["labels"])
    for view, queries in ((mine, points.student), (others, points.teacher)):
        for image, target in enumerate(batch["labels"]):
            for k, (x, y, *_) in enumerate(target["boxes"].tolist()):
                found = [math.dist((x, y), box[:2]) for box in view.boxes[-1, image].tolist()]
                own = view.queries.position[image, found.index(min(found))]
                torch.testing.assert_close(queries.position[image, k], own)
    assert not dict(method.queries.named_buffers())


def test_random_positions_of_detr_have_the_teachers_scale():
    method, student, teacher = a_pair("detr", "detr", {"content": "random"}, of_student={"d_model": 32})
    batch = zoo.batch()
    mine, others = look(student, batch), look(teacher, batch)
    points = method.queries(mine, others, batch["labels"])
    position = points.student.position[points.real]
    torch.testing.assert_close(points.teacher.position, points.student.position[..., :16])
    own = others.queries.position
    assert (position.mean() - own.mean()).abs() < 0.1 * own.std()
    assert 0.7 < position.std() / own.std() < 1.3


# ------------------------------------------------------------------------------------------------------------- padding


@by_family
def test_padding_changes_nothing(name):
    """An image answers alike alone and beside images with more objects, in values and in gradients."""
    batch = zoo.batch(4, targets=(2, 5, 0, 2))
    adapter = adapter_for(model(name))
    queries = TargetQueries(adapter, adapter)
    view = look(adapter, batch)
    points = queries(view, view, batch["labels"])
    assert len(points.student) == 5
    (answer,) = decode_targets(view, points.student, points)
    assert answer.logits.isfinite().all() and answer.boxes.isfinite().all()
    for image, number in enumerate((2, 5, 0, 2)):
        few = points.student.select(torch.arange(max(number, 1)).expand(4, -1))
        alone = view.replay(few)
        for part in ("logits", "boxes", "hidden_states"):
            a, b = (getattr(v, part)[:, image, :number] for v in (answer, alone))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    # and what padding holds is of no influence
    noise = replace(points.student, content=torch.where(points.real[..., None], points.student.content, 3.0))
    (other,) = decode_targets(view, noise, points)
    torch.testing.assert_close(other.boxes[:, points.real], answer.boxes[:, points.real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["detr", "dab-detr", "rt_detr", "deformable_detr"])
def test_masked_queries_are_not_seen(name):
    """Of a replay in general: the mask may hide any query, in any of several groups."""
    adapter = adapter_for(model(name))
    view = look(adapter, zoo.batch(labels=False))
    mask = torch.tensor([[True, False, True, True, False, True], [True] * 6])
    few = view.queries.select(torch.tensor([[0, 2, 3, 5]]).expand(2, -1))
    alone, whole = view.replay(few), view.replay(view.queries)
    for groups in ((0,), (1, 0), (0, 1)):
        queries = [view.queries if group else replace(view.queries, mask=mask) for group in groups]
        replies = view.replay(*queries)
        masked = (replies if len(groups) > 1 else (replies,))[groups.index(0)]
        torch.testing.assert_close(masked.logits[:, 0, mask[0]], alone.logits[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(masked.logits[:, 1], whole.logits[:, 1], rtol=1e-5, atol=1e-5)
        assert (masked.logits[:, 0] - whole.logits[:, 0]).abs().max() > 1e-4
    if len(groups) > 1:
        torch.testing.assert_close(replies[1].logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_decoders_that_take_no_mask_say_so():
    view = look(adapter_for(model("lw_detr")), zoo.batch(labels=False))
    assert "query_mask" not in view.adapter.provides
    with pytest.raises(
        ValueError, match=r"have a `mask`, which the self-attention of this lw_detr decoder doesn't take"
    ):
        view.replay(view.queries.all_real())


@pytest.mark.parametrize("name", ["detr", "rt_detr", "lw_detr"])
def test_groups_are_isolated(name):
    """Three copies without noise answer as one does."""
    batch = zoo.batch()
    one, student, teacher = a_pair(name, name)
    (three,) = build_methods(["clockdistill"], {"groups": 3}, student, teacher)
    views = look(student, batch), look(teacher, batch)
    expected = one(*views, batch["labels"], None)
    for term, value in three(*views, batch["labels"], None).items():
        torch.testing.assert_close(value, expected[term], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
def test_identical_student_and_gradients(name):
    """Both parts 0; a moved student's gradient reaches its encoder and decoder and none of the teacher."""
    batch = zoo.batch()
    teacher = adapter_for(model(name))
    student = adapter_for(copy.deepcopy(teacher.model))
    (method,) = build_methods(["clockdistill"], {"weights": OFF["memory"]}, student, teacher)
    (whole,) = build_methods(["clockdistill"], None, student, teacher)
    others = look(teacher, batch)
    assert all(value.abs() < 1e-5 for value in whole(look(student, batch), others, batch["labels"], None).values())
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.1)
    sum(method(look(student, batch, grad=True), others, batch["labels"], None).values()).backward()
    reached = {n for n, p in student.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("decoder.layers.0" in n for n in reached)
    assert any("encoder" in n and "decoder" not in n and "backbone" not in n for n in reached)
    assert all(p.grad is None for p in teacher.model.parameters())


def test_no_targets_is_exactly_zero_with_a_graph():
    batch = zoo.batch(targets=(0,))
    method, student, teacher = a_pair("rt_detr", "detr")
    terms = method(look(student, batch, grad=True), look(teacher, batch), batch["labels"], None)
    assert all(terms[name] == 0 and terms[name].requires_grad for name in ("lcmd_foreground", *QUERY_TERMS))
    assert terms["lcmd_background"] > 0
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.model.parameters())


def test_ten_steps_lower_the_terms():
    student, teacher = adapter_for(model("rt_detr", 1)), adapter_for(model("rt_detr", 2))
    methods = build_methods(["clockdistill"], None, student, teacher)
    module = DistillationModel(student.model, student, methods, detection_weight=0.0).train()
    batch = zoo.batch()
    view = look(teacher, batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        output = module(**batch, teacher_view=view)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_default_weights_are_documented_ones():
    weights = CLoCKDistillConfig().weights
    assert [weights[name] for name in MEMORY_TERMS] == [ALPHA, BETA]
    assert [weights[name] for name in QUERY_TERMS] == [1, 5, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": OFF["memory"] | OFF["queries"]}, "all `weights` of clockdistill are 0.*Use method none"),
        ({"content": "zeros"}, "`content` of CLoCKDistillConfig is 'zeros'; allowed are 'native'"),
        ({"groups": 0}, "`groups` is 0; it must be 1 or more"),
        ({"temperature": 0.0}, "`temperature` of clockdistill is 0.0; it must be above 0"),
    ],
)
def test_refusals(settings, message):
    adapter = adapter_for(model("detr"))
    with pytest.raises(ValueError, match=message):
        build_methods(["clockdistill"], settings, adapter, adapter)


@pytest.mark.skipif("yolos" not in zoo.NAMES, reason="no yolos")
def test_models_that_cannot_decode_again_learn_the_memory():
    adapters = adapter_for(model("yolos")), adapter_for(model("detr"))
    for pair, role in ((adapters, "student"), (adapters[::-1], "teacher")):
        message = (
            f"asks a {role} about every object by decoding again, which `yolos` can't. Set the weights of tcld_class"
        )
        with pytest.raises(ValueError, match=message):
            build_methods(["clockdistill"], None, *pair)
        (method,) = build_methods(["clockdistill"], {"weights": OFF["queries"]}, *pair)
        batch = zoo.batch()
        terms = method(*(look(adapter, batch) for adapter in pair), batch["labels"], None)
        assert terms["lcmd_foreground"] > 0
