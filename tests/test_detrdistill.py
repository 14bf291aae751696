"""DETRDistill: its equations worked by hand, and the defects of its released code."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reference_loops as loops
import torch
import zoo

from hf_detrkd import DistillationModel
from hf_detrkd.families import adapter_for
from hf_detrkd.losses.features import box_quality, target_aware_mask
from hf_detrkd.losses.set_prediction import set_loss
from hf_detrkd.matching import HungarianMatcher, Match, ground_truth_matches
from hf_detrkd.methods import build_methods, configure
from hf_detrkd.methods.detrdistill import DETRDistill, DETRDistillConfig
from hf_detrkd.view import DetrView, Queries

A, B = [0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]
PROBS = [[0.9, 0.1], [0.2, 0.6]]
ENTROPY = 0.911790
"""Mean over the two queries of the summed binary entropies of `PROBS`: the floor of the released class loss."""
TARGETS = [{"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([A, B])}]
LOGITS = {"feature": 0.0, "assign_class": 0.0, "assign_l1": 0.0, "assign_giou": 0.0}
FEATURE = {"logits_class": 0.0, "logits_l1": 0.0, "logits_giou": 0.0, **LOGITS, "feature": 1.0}
ASSIGN = {**FEATURE, "feature": 0.0, "assign_class": 2.0, "assign_l1": 5.0, "assign_giou": 2.0}


def logit(probs) -> torch.Tensor:
    return torch.tensor(probs).logit()


def close(value: torch.Tensor, expected) -> None:
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


class Scripted:
    """An adapter of one model whose predictions, states and maps are given; a replay answers with ``reply``."""

    provides = frozenset({"replay", "queries_from_boxes", "reference"})
    classification = "sigmoid"
    matching_costs = {"class_cost": 2.0, "l1_cost": 5.0, "giou_cost": 2.0}
    width = memory_width = 2
    feature_channels = (2,)
    num_classes = 2

    def __init__(self, logits, boxes, *, layers=1, states=None, maps=None, reply=None):
        self.logits = torch.as_tensor(logits).expand(layers, 1, -1, -1)
        self.boxes = torch.tensor(boxes).expand(layers, 1, -1, -1)
        number = self.boxes.shape[2]
        states = torch.ones(number, 2) if states is None else torch.tensor(states)
        self.states = states.expand(layers, 1, -1, -1)
        self.maps = torch.zeros(1, 2) if maps is None else torch.tensor(maps)
        self.reply = reply
        self.num_layers = layers
        self.model = SimpleNamespace(config=SimpleNamespace(model_type="scripted"))

    def view(self, queries=None) -> DetrView:
        number = self.boxes.shape[2]
        return DetrView(
            logits=self.logits,
            boxes=self.boxes,
            hidden_states=self.states,
            classification=self.classification,
            queries=queries or Queries(torch.zeros(1, number, 2), None, torch.full((1, number, 4), 0.5)),
            memory=self.maps[None],
            memory_shapes=((1, len(self.maps)),),
            memory_mask=None,
            features=(),
            adapter=self,
        )

    def replay(self, view, groups, detach_memory=False):
        logits, boxes = self.reply
        return tuple(replace(self.view(group), logits=logits, boxes=boxes) for group in groups)

    def queries_from_boxes(self, view, boxes, labels=None):
        return Queries(boxes.new_zeros(*boxes.shape[:2], 2), None, boxes)


def terms_of(student, teacher, settings=None, targets=TARGETS):
    method = DETRDistill(configure(DETRDistillConfig, settings), student, teacher)
    return method(student.view(), teacher.view(), targets, torch.Generator())


def logits_terms(student, teacher, matching="all", targets=TARGETS):
    return terms_of(student, teacher, {"matching": matching, "weights": LOGITS}, targets)


# ------------------------------------------------------------------------------------------- logits, by hand


def test_matching_by_hand():
    """Student 0 has B's box, student 1 has A's; the class cost 2 ln 2 is the same everywhere."""
    student, teacher = Scripted(torch.zeros(2, 2), [B, A]), Scripted(logit(PROBS), [A, B])
    (match,) = HungarianMatcher()(student.view(), teacher.view())
    assert match.teacher_index[0, match.student_index[0].argsort()].tolist() == [1, 0]
    costs = [
        [
            loops.prediction_cost([0.0, 0.0], own, logit(p).tolist(), other, "sigmoid", "sigmoid")
            for p, other in zip(PROBS, (A, B), strict=True)
        ]
        for own in (B, A)
    ]
    close(torch.tensor(costs), [[7.386294, -0.613706], [-0.613706, 7.386294]])

    terms = logits_terms(student, teacher)
    close(terms["logits_class"] + ENTROPY, 1.386294)
    assert terms["logits_l1"] == terms["logits_giou"] == 0


@pytest.mark.parametrize("matching", ["split", "all"])
def test_order_of_the_teachers_queries_changes_nothing(matching):
    student = Scripted(torch.tensor([[1.0, 0.5], [0.2, -1.0]]), [B, A])
    one = terms_of(student, Scripted(logit(PROBS), [A, B]), {"matching": matching, "weights": LOGITS})
    other = terms_of(student, Scripted(logit(PROBS[::-1]), [B, A]), {"matching": matching, "weights": LOGITS})
    for name, value in one.items():
        close(other[name], value)


@pytest.mark.parametrize("matching", ["split", "all"])
def test_identical_student_is_at_zero(matching):
    """The released class loss would be .911790, the entropy of the teacher."""
    teacher = Scripted(logit(PROBS), [A, B])
    terms = logits_terms(copy.deepcopy(teacher), teacher, matching)
    assert all(abs(value) < 1e-6 for value in terms.values())
    entropies = [-sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in probs) for probs in PROBS]
    assert sum(entropies) / 2 == pytest.approx(ENTROPY, abs=1e-6)


def test_boxes_by_hand():
    """Moved by .05 to the right and to the left: L1 .05, IoU = GIoU = .818182."""
    student = Scripted(logit(PROBS), [[0.30, 0.25, 0.5, 0.5], [0.70, 0.75, 0.5, 0.5]])
    terms = logits_terms(student, Scripted(logit(PROBS), [A, B]))
    close(terms["logits_l1"], 0.05)
    close(terms["logits_giou"], 1 - 0.818182)
    close(5 * terms["logits_l1"] + 2 * terms["logits_giou"], 0.613636)


def test_split_takes_the_class_from_positives_alone():
    """One target, near A: class is the KL of A's pair alone, boxes are the mean of both."""
    student = Scripted(torch.zeros(2, 2), [[0.30, 0.25, 0.5, 0.5], B])
    teacher = Scripted(logit(PROBS), [A, B])
    targets = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([A])}]
    terms = logits_terms(student, teacher, "split", targets)
    close(terms["logits_class"], loops.bernoulli_kl([[0.0, 0.0]], [logit(PROBS[0]).tolist()], [1.0]))
    close(terms["logits_l1"], 0.025)
    both = loops.bernoulli_kl([[0.0, 0.0]] * 2, logit(PROBS).tolist(), [1.0, 1.0])
    close(logits_terms(student, teacher, "all", targets)["logits_class"], both)
    # Without targets there are no positives, and the boxes are taught all the same
    nothing = [{"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    terms = logits_terms(student, teacher, "split", nothing)
    assert terms["logits_class"] == 0
    close(terms["logits_l1"], 0.025)


def test_boxes_only_where_the_teacher_is_better():
    """The student is on the first target exactly, the teacher is beside it; on the second it is the other way round."""
    beside_a, beside_b = [0.30, 0.25, 0.5, 0.5], [0.70, 0.75, 0.5, 0.5]
    student, teacher = Scripted(torch.zeros(2, 2), [A, beside_b]), Scripted(logit(PROBS), [beside_a, B])
    targets = [{"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([A, B])}]
    # Weights 1 on one pair alone: still .05, but nothing reaches the other
    student.boxes = student.boxes.clone().requires_grad_()
    terms = terms_of(student, teacher, {"better_boxes_only": True, "weights": LOGITS}, targets)
    close(terms["logits_l1"], 0.05)
    (gradient,) = torch.autograd.grad(terms["logits_l1"] + terms["logits_giou"], student.boxes)
    assert not gradient[0, 0, 0].any()
    assert gradient[0, 0, 1].any()


@pytest.mark.parametrize("matching", ["split", "all"])
def test_query_without_a_partner_counts_nothing(matching):
    """The released code trains it towards 80 in every class. Whatever it says, values and gradients are the same."""
    teacher = Scripted(logit(PROBS[:1]), [A])
    results = []
    for stray in ([0.0, 0.0], [3.0, -4.0]):
        logits = torch.tensor([[1.0, 0.0], stray], requires_grad=True)
        student = Scripted(logits, [A, B])
        terms = logits_terms(student, teacher, matching, [{name: x[:1] for name, x in TARGETS[0].items()}])
        sum(terms.values()).backward()
        assert not logits.grad[1].any()
        assert logits.grad[0].any()
        results.append(terms)
    assert results[0] == results[1]


def test_layers_are_paired():
    """Two student layers with the second and the fourth of four, as a sum."""
    student, teacher = Scripted(torch.zeros(2, 2), [A, B], layers=2), Scripted(logit(PROBS), [A, B], layers=4)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    teacher.logits = teacher.logits * scale
    expected = sum(loops.bernoulli_kl([[0.0] * 2] * 2, (f * logit(PROBS)).tolist(), [1.0, 1.0]) for f in (2, 4))
    close(logits_terms(student, teacher)["logits_class"], expected)


# -------------------------------------------------------------------------------------------- masks, by hand


def mask_of(states, quality, columns):
    """Of a feature map of one row, given cell by cell."""
    maps = torch.tensor(columns).T[None, :, None]
    real = torch.ones(1, 1, len(columns), dtype=torch.bool)
    return target_aware_mask(torch.tensor(states)[None], torch.tensor(quality)[None], maps, real)[0, 0]


COLUMNS = [[3.0, 0.0], [0.0, 4.0]]


@pytest.mark.parametrize(
    ("states", "quality", "expected"),
    [
        ([[2.0, 0.0]], [0.5], [1.0, 0.02]),
        ([[1.0, 0.0], [1.0, 1.0]], [0.8, 0.5], [1.0, 0.306491]),
        ([[-2.0, 0.0]], [0.5], [1.0, 1.0]),  # nothing is similar: plain mean squared error
    ],
)
def test_masks_by_hand(states, quality, expected):
    mask = mask_of(states, quality, COLUMNS)
    close(mask, expected)
    directions = [[x / math.hypot(*state) for x in state] for state in states]
    close(mask, loops.target_aware_mask(directions, quality, [[1.0, 0.0], [0.0, 1.0]]))


def one_query(**settings):
    """A teacher that sees one object of score .5 exactly on its target, and a student with empty maps."""
    teacher = Scripted(logit([[0.5, 1e-6]]), [A], states=[[2.0, 0.0]], maps=COLUMNS)
    student = Scripted(logit([[0.5, 1e-6]]), [A], maps=[[0.0, 0.0], [0.0, 0.0]])
    targets = [{name: x[:1] for name, x in TARGETS[0].items()}]
    return terms_of(student, teacher, {"weights": FEATURE, "mask_queries": 1, **settings}, targets)["feature"]


def test_feature_term_by_hand():
    """(9 * 1 + 16 * .02^2) / 4: the mask is inside the square."""
    close(one_query(), 2.2516)


def test_feature_sums_over_layers_and_levels():
    teacher = Scripted(logit([[0.5, 1e-6]]), [A], layers=3, states=[[2.0, 0.0]], maps=COLUMNS)
    student = Scripted(logit([[0.5, 1e-6]]), [A], layers=3, maps=[[0.0, 0.0], [0.0, 0.0]])
    targets = [{name: x[:1] for name, x in TARGETS[0].items()}]
    settings = {"weights": FEATURE, "mask_queries": 1}
    close(terms_of(student, teacher, settings, targets)["feature"], 3 * 2.2516)

    method = DETRDistill(configure(DETRDistillConfig, settings), student, teacher)

    def two_levels(view):
        return replace(view, memory=torch.cat([view.memory] * 2, 1), memory_shapes=view.memory_shapes * 2)

    levels = two_levels(student.view()), two_levels(teacher.view())
    close(method(*levels, targets, torch.Generator())["feature"], 6 * 2.2516)


def test_a_query_counts_once_per_class():
    """Of two queries and two classes, the two best entries belong to the first query."""
    teacher = Scripted(logit([[0.9, 0.8], [0.7, 0.1]]), [A, B], states=[[1.0, 0.0], [0.0, 1.0]], maps=COLUMNS)
    student = Scripted(logit([[0.9, 0.8]]), [A], maps=[[0.0, 0.0], [0.0, 0.0]])

    def mask_with(number):
        value = terms_of(student, teacher, {"weights": FEATURE, "mask_queries": number})["feature"]
        return ((4 * value - 9) / 16).sqrt().item()

    assert mask_with(2) == pytest.approx(0.01 / 1.7, abs=1e-4)
    assert mask_with(3) == pytest.approx(0.7 / 1.7, abs=1e-4)
    assert mask_with(100) == pytest.approx(0.8 / 1.7, abs=1e-4)  # no more entries than there are


@pytest.mark.parametrize(("gamma", "expected"), [(None, 0.4), (0.5, 0.632456)])
def test_quality_by_hand(gamma, expected):
    """Pixel boxes (0, 0, 10, 10) against (0, 0, 10, 5) and (20, 20, 30, 30) of an image of 40."""
    box = torch.tensor([[[5.0, 5.0, 10.0, 10.0]]]) / 40
    targets = torch.tensor([[5.0, 2.5, 10.0, 5.0], [25.0, 25.0, 10.0, 10.0]]) / 40
    score = torch.tensor([[0.8]])
    close(box_quality(score, box, [targets], gamma=gamma), [[expected]])
    # Without targets in the image; with targets in another image only
    close(box_quality(score, box, [targets[:0]], gamma=gamma), [[0.8]])
    both = box_quality(score.expand(2, 1), box.expand(2, 1, 4), [targets[:0], targets], gamma=gamma)
    close(both, [[0.8], [expected]])


def test_quality_counts_the_part_inside_the_image():
    box = torch.tensor([[[0.0, 0.5, 1.0, 1.0]]])  # half of it outside
    close(box_quality(torch.ones(1, 1), box, [torch.tensor([[0.25, 0.5, 0.5, 1.0]])]), [[1.0]])


def test_quality_is_of_boxes_in_one_unit():
    """TAO's pixel boxes against normalised targets give IoU 0, and a mask that is 1 everywhere."""
    targets = [torch.tensor([A])]
    close(box_quality(torch.tensor([[0.5]]), torch.tensor([[A]]), targets), [[0.5]])
    close(one_query(quality="gamma"), 2.25 + 4 * (0.01 / math.sqrt(0.5)) ** 2)


def test_padding_changes_nothing():
    """A third cell that is padding, whatever is in it; it isn't in the mean either."""
    states, quality = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[0.5]])
    maps = torch.tensor([*COLUMNS, [9.0, 0.0]]).T[None, :, None]
    mask = target_aware_mask(states, quality, maps, torch.tensor([[[True, True, False]]]))
    close(mask, [[[1.0, 0.02, 0.0]]])

    values = []
    for garbage in (0.0, 50.0):
        teacher = Scripted(logit([[0.5, 1e-6]]), [A], states=[[2.0, 0.0]], maps=[*COLUMNS, [garbage, 1.0]])
        student = Scripted(logit([[0.5, 1e-6]]), [A], maps=[[0.0, 0.0], [0.0, 0.0], [-garbage, 0.0]])
        method = DETRDistill(configure(DETRDistillConfig, {"weights": FEATURE, "mask_queries": 1}), student, teacher)
        real = torch.tensor([[True, True, False]])
        views = (replace(adapter.view(), memory_mask=real) for adapter in (student, teacher))
        targets = [{name: x[:1] for name, x in TARGETS[0].items()}]
        values.append(method(*views, targets, torch.Generator())["feature"])
    close(values[0], 2.2516)
    close(values[1], 2.2516)


# ------------------------------------------------------------------------------------------------ assignment


def reply_of(*layers):
    logits, boxes = zip(*layers, strict=True)
    return torch.stack([torch.tensor(z)[None] for z in logits]), torch.stack([torch.tensor(b)[None] for b in boxes])


def test_assignment_is_the_teachers():
    """The student's group would assign the other way round; the released code follows it."""
    teacher = Scripted(logit([[0.9, 0.1], [0.1, 0.9]]), [A, B])
    student = Scripted(torch.zeros(2, 2), [A, B], reply=reply_of(([[-1.0, 2.0], [2.0, -1.0]], [B, A])))
    fixed = Match(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), torch.ones(1, 2))
    others = Match(torch.tensor([[0, 1]]), torch.tensor([[1, 0]]), torch.ones(1, 2))
    assert torch.equal(ground_truth_matches(teacher.view(), TARGETS)[0].teacher_index, fixed.teacher_index)
    for assignment, match in (("teacher", fixed), ("own", others)):
        terms = terms_of(student, teacher, {"weights": ASSIGN, "assignment": assignment})
        expected = set_loss(student.reply[0][0], student.reply[1][0], "sigmoid", match, TARGETS)
        for name, value in expected.items():
            close(terms[f"assign_{name}"], value)
    assert terms["assign_l1"] == 0
    assert terms_of(student, teacher, {"weights": ASSIGN})["assign_l1"] == 1


def test_assignment_is_that_of_the_stage():
    """The teacher changes its mind between its stages; student stage k follows teacher stage k."""
    teacher = Scripted(logit([[0.9, 0.1], [0.1, 0.9]]), [A, B], layers=2)
    teacher.boxes = torch.tensor([[[B, A]], [[A, B]]])
    teacher.logits = torch.stack([teacher.logits[0].flip(1), teacher.logits[1]])
    layer = ([[2.0, -1.0], [-1.0, 2.0]], [A, B])
    student = Scripted(torch.zeros(2, 2), [A, B], layers=2, reply=reply_of(layer, layer))
    terms = terms_of(student, teacher, {"weights": ASSIGN})
    close(terms["assign_l1"], 1.0)  # the first stage is all wrong, the second all right
    close(terms["assign_giou"], 1.5)


# ------------------------------------------------------------------------------------------ on real decoders


def built(student="deformable_detr", teacher="deformable_detr", settings=None, of_student=None, of_teacher=None):
    adapters = (
        adapter_for(zoo.build(student, seed=1, **(of_student or {}))),
        adapter_for(zoo.build(teacher, seed=2, **(of_teacher or {}))),
    )
    (method,) = build_methods(["detrdistill"], settings, *adapters)
    return DistillationModel(adapters[0].model, adapters[0], [method]), adapters[1]


def test_nothing_leaks():
    """No gradient to the teacher or its queries; the detection loss is that of a run without distillation."""
    batch = zoo.batch()
    module, teacher = built()
    module.train()
    view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]  # with graph, worse than in training
    torch.manual_seed(0)
    alone = module(**batch)
    torch.manual_seed(0)
    output = module(**batch, teacher_view=view, generator=torch.Generator())
    output.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert torch.equal(alone.loss, output.detection_loss)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.methods.parameters())


@pytest.mark.parametrize("targets", [(0,), (3, 0)])
def test_without_targets(targets):
    batch = zoo.batch(targets=targets)
    module, teacher = built()
    module.train()
    with torch.no_grad():
        view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]
    output = module(**batch, teacher_view=view, generator=torch.Generator())
    empty = {name for name, value in output.terms.items() if value == 0}
    assert empty == ({"logits_class", "assign_l1", "assign_giou"} if targets == (0,) else set())
    assert all(value.isfinite() for value in output.terms.values())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)


def test_backbone_and_encoder_run_once():
    """The released code runs the student's whole transformer again for the teacher's queries."""
    module, teacher = built()
    calls = []
    base = module.student.model
    for name in ("backbone", "encoder", "decoder"):
        getattr(base, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    batch = zoo.batch()
    with torch.no_grad():
        view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]
    module.train()(**batch, teacher_view=view, generator=torch.Generator())
    assert sorted(calls) == ["backbone", "decoder", "decoder", "encoder"]


def test_the_convolution_between_widths_is_kept_and_trained():
    """A fork makes an untrained one at every step."""
    module, teacher = built("detr", "conditional_detr", of_teacher={"d_model": 32})
    (convolution,) = module.methods["detrdistill"].maps.levels
    before = convolution.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = zoo.batch()
    with torch.no_grad():
        view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]
    module.train()(**batch, teacher_view=view, generator=torch.Generator()).loss.backward()
    optimizer.step()
    assert module.methods["detrdistill"].maps.levels[0] is convolution
    assert not torch.equal(convolution.weight, before)


@pytest.mark.parametrize(("weights", "parts"), [(LOGITS, set()), (FEATURE, {"maps"}), (ASSIGN, {"queries"})])
def test_a_part_without_weight_is_not_computed(weights, parts):
    """It owns no parameters, its terms stay 0, and only the assignment decodes again."""
    settings = {"weights": weights}
    module, teacher = built("deformable_detr", "conditional_detr", settings, of_teacher={"d_model": 32})
    method = module.methods["detrdistill"]
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == parts
    calls = []
    module.student.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    batch = zoo.batch()
    with torch.no_grad():
        view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]
    terms = module.train()(**batch, teacher_view=view, generator=torch.Generator()).terms
    assert {name for name, value in terms.items() if value > 0} == {n for n, w in method.config.weights.items() if w}
    assert len(calls) == 1 + ("queries" in parts)


@pytest.mark.parametrize(
    "settings", [{"matching": "all", "assignment": "own", "quality": "gamma"}, {"tap": "backbone"}]
)
def test_other_settings_train(settings):
    module, teacher = built("lw_detr", "lw_detr", settings)
    batch = zoo.batch()
    with torch.no_grad():
        view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]
    output = module.train()(**batch, teacher_view=view, generator=torch.Generator())
    output.loss.backward()
    assert all(value.isfinite() and value > 0 for value in output.terms.values())


@pytest.mark.parametrize(
    ("student", "teacher", "settings"),
    [("deformable_detr", "yolos", {}), ("yolos", "deformable_detr", {"weights": LOGITS | {"feature": 1.0}})],
)
def test_a_model_without_a_decoder(student, teacher, settings):
    """YOLOS teaches with all terms, and learns all but the assignment."""
    module, teacher = built(student, teacher, settings)
    batch = zoo.batch()
    with torch.no_grad():
        view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]
    output = module.train()(**batch, teacher_view=view, generator=torch.Generator())
    output.loss.backward()
    weights = module.methods["detrdistill"].config.weights
    assert {name for name, value in output.terms.items() if value > 0} == {n for n, w in weights.items() if w}


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching": "both"}, r"`matching` of DETRDistillConfig is 'both'; allowed are 'split', 'all'"),
        ({"quality": "sum"}, r"`quality` of DETRDistillConfig is 'sum'; allowed are 'product', 'gamma'"),
        ({"assignment": "fixed"}, r"`assignment` of DETRDistillConfig is 'fixed'; allowed are 'teacher', 'own'"),
        ({"tap": "neck"}, r"`tap` of DETRDistillConfig is 'neck'; allowed are 'memory', 'backbone'"),
        ({"gamma": 1.5}, r"`gamma` of DETRDistillConfig is 1.5; it is an exponent from 0 to 1"),
        ({"mask_queries": 0}, r"`mask_queries` is 0; it must be 1 or more.*weight `feature` to 0"),
        ({"mask_floor": 0.0}, r"`mask_floor` is 0.0; it must be above 0 and below 1"),
        ({"weights": {**LOGITS, **dict.fromkeys(FEATURE, 0)}}, r"all `weights` of detrdistill are 0.*Use method none"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        terms_of(Scripted(torch.zeros(1, 2), [A]), Scripted(torch.zeros(1, 2), [A]), settings)


def test_maps_that_the_mask_cannot_use_are_refused():
    with pytest.raises(ValueError, match=r"the states have 16 channels and the backbone has \[8, 16\].*tap='memory'"):
        built("rt_detr", "rt_detr", {"tap": "backbone"})
    built("rt_detr", "rt_detr", {"tap": "backbone", "weights": {"feature": 0}})


def test_a_student_that_cannot_be_replayed_is_refused():
    student, teacher = Scripted(torch.zeros(1, 2), [A]), Scripted(torch.zeros(1, 2), [A])
    student.provides = frozenset()
    with pytest.raises(ValueError, match=r"decoder can be replayed.*`scripted` can't.*assign_giou to 0"):
        DETRDistill(DETRDistillConfig(), student, teacher)
    assert logits_terms(student, teacher)["logits_class"] == 0
