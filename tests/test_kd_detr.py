"""KD-DETR: its equations worked by hand for two queries and two classes, and its distillation points."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import reference_loops as loops
import torch
import zoo

from hf_detrkd.families import FamilyAdapter, adapter_for
from hf_detrkd.methods import KDDetr, KDDetrConfig, build_methods, configure
from hf_detrkd.view import DetrView, Queries

TEACHER_LOGITS = [[2.0, 0.0], [-2.0, -3.0]]
STUDENT_LOGITS = [[0.0, 0.0], [-2.0, -3.0]]
TEACHER_BOXES = [[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]]
STUDENT_BOXES = [[0.5, 0.5, 0.4, 0.2], [0.3, 0.3, 0.2, 0.2]]
WEIGHT = 0.880797  # sigmoid(2); the other query has sigmoid(-2) = 0.119203, and the two sum to 1


class Scripted:
    """An adapter that answers every group of queries with the prediction it was given."""

    provides = frozenset({"replay", "queries_from_boxes", "reference"})
    width = 8

    def __init__(self, logits, boxes, layers: int = 1, images: int = 1, classification: str = "sigmoid"):
        self.prediction = torch.tensor(logits, requires_grad=True), torch.tensor(boxes, requires_grad=True)
        self.layers, self.images, self.classification = layers, images, classification
        self.num_layers, self.num_classes = layers, len(logits[0]) - (classification == "softmax")
        self.model = SimpleNamespace(config=SimpleNamespace(model_type="scripted"))
        self.asked: list[Queries] = []

    def view(self, queries: Queries | None = None) -> DetrView:
        logits, boxes = (x.expand(self.layers, self.images, *x.shape) for x in self.prediction)
        number = boxes.shape[2]
        own = Queries(torch.zeros(self.images, number, self.width), None, torch.full((self.images, number, 4), 0.5))
        return DetrView(
            logits=logits,
            boxes=boxes,
            hidden_states=torch.zeros(*boxes.shape[:3], self.width),
            classification=self.classification,
            queries=queries or own,
            memory=torch.zeros(self.images, 1, self.width),
            memory_shapes=((1, 1),),
            memory_mask=None,
            features=(),
            adapter=self,
        )

    def replay(self, view, groups, detach_memory=False):
        self.asked.extend(groups)
        return tuple(self.view(group) for group in groups)

    def queries_from_boxes(self, view, boxes, labels=None):
        return Queries(boxes.new_zeros(*boxes.shape[:2], self.width), None, boxes)


def scripted(settings=None, *, layers: int = 1, images: int = 1, teacher_layers: int = 1):
    """The method's terms for the hand-computed predictions."""
    student = Scripted(STUDENT_LOGITS, STUDENT_BOXES, layers, images)
    teacher = Scripted(TEACHER_LOGITS, TEACHER_BOXES, teacher_layers, images)
    method = KDDetr(configure(KDDetrConfig, {"general_points": 2, **(settings or {})}), student, teacher)
    terms = method(student.view(), teacher.view(), [], torch.Generator().manual_seed(0))
    return method, terms


def close(value: torch.Tensor, expected: float) -> None:
    torch.testing.assert_close(value, torch.tensor(expected), rtol=2e-5, atol=1e-6)


def total(method: KDDetr, terms: dict, group: str) -> torch.Tensor:
    return sum(method.config.weights[name] * value for name, value in terms.items() if name.startswith(group))


# ------------------------------------------------------------------------------------------------- numbers by hand


@pytest.mark.parametrize("group", ["specific", "general"])
def test_defaults_by_hand(group):
    """T = 10: KL x 100 = [.497511, 0]; l1 = .05 in the mean of the coordinates; 1 - GIoU = .5."""
    method, terms = scripted()
    close(terms[f"{group}_class"], 0.438206)
    close(terms[f"{group}_class"], WEIGHT * 0.497511)
    close(terms[f"{group}_l1"], 0.044040)
    close(terms[f"{group}_giou"], 0.440399)
    close(total(method, terms, group), 1.977409)


def test_by_the_slowest_obvious_python():
    _, terms = scripted()
    weights = [loops.sigmoid(max(z)) for z in TEACHER_LOGITS]
    close(terms["specific_class"], loops.softmax_kl(STUDENT_LOGITS, TEACHER_LOGITS, weights, 10.0))
    close(terms["specific_l1"], loops.l1(STUDENT_BOXES, TEACHER_BOXES, weights, "mean"))
    close(terms["specific_giou"], loops.giou(STUDENT_BOXES, TEACHER_BOXES, weights))


def test_paper_weights_by_hand():
    """1, 5, 2 with either form of the box term."""
    weights = {f"{group}_class": 1 for group in ("specific", "general")}
    method, terms = scripted({"weights": weights})
    close(total(method, terms, "specific"), 1.539203)
    method, terms = scripted({"weights": weights, "box_coordinates": "sum"})
    close(terms["specific_l1"], 0.176159)
    close(total(method, terms, "specific"), 2.199800)


def test_default_weights_are_documented_ones():
    assert KDDetrConfig().weights == {
        "specific_class": 2,
        "specific_l1": 5,
        "specific_giou": 2,
        "general_class": 2,
        "general_l1": 5,
        "general_giou": 2,
    }


def test_six_layers_sum():
    method, terms = scripted(layers=6, teacher_layers=6)
    close(terms["specific_class"], 6 * 0.438206)
    close(total(method, terms, "general"), 6 * 1.977409)


@pytest.mark.parametrize("images", [2, 8])
def test_batch_size_is_no_factor(images):
    """The released class term would double with two images."""
    for name, value in scripted(images=images)[1].items():
        torch.testing.assert_close(value, scripted()[1][name], rtol=1e-5, atol=1e-7)


def test_the_released_normalisation_is_the_same_among_processes(monkeypatch):
    """A sum over this process's images, whatever the others have."""
    setting = {"class_normalization": "released"}
    alone = scripted(setting)[1]["specific_class"]
    for module in ("losses.reduction", "methods.kd_detr"):
        monkeypatch.setattr(f"hf_detrkd.{module}.mean_over_processes", lambda value: 3 * value)
    close(scripted(setting)[1]["specific_class"], alone.item())


def test_bernoulli_by_hand():
    """First query .327813, second 0; temperature 1 whatever is set."""
    _, terms = scripted({"class_loss": "bernoulli"})
    close(terms["specific_class"], WEIGHT * 0.327813)
    assert scripted({"class_loss": "bernoulli", "temperature": 3.0})[1] == terms


def test_identical_predictions_are_exactly_zero():
    student, teacher = (Scripted(TEACHER_LOGITS, TEACHER_BOXES) for _ in range(2))
    for class_loss in ("softmax", "bernoulli"):
        method = KDDetr(KDDetrConfig(class_loss=class_loss), student, teacher)
        terms = method(student.view(), teacher.view(), [], None)
        assert all(value == 0 for value in terms.values())


def test_gradient_goes_to_the_student_alone():
    student, teacher = Scripted(STUDENT_LOGITS, STUDENT_BOXES), Scripted(TEACHER_LOGITS, TEACHER_BOXES)
    method = KDDetr(KDDetrConfig(general_points=2), student, teacher)
    sum(method(student.view(), teacher.view(), [], None).values()).backward()
    assert all(x.grad.any() for x in student.prediction)
    assert all(x.grad is None for x in teacher.prediction)


def test_weight_of_general_points_has_a_floor():
    """The floor lifts the second query's weight, and no weight of the specific points."""
    _, terms = scripted({"general_weight_floor": 0.5})
    weights = [WEIGHT, 0.5]
    close(terms["general_class"], loops.softmax_kl(STUDENT_LOGITS, TEACHER_LOGITS, weights, 10.0))
    close(terms["general_giou"], loops.giou(STUDENT_BOXES, TEACHER_BOXES, weights))
    close(terms["specific_class"], 0.438206)


def test_softmax_heads():
    """No-object is no foreground: the weight is the largest of the other probabilities; it is a class of the KL."""
    teacher_logits, student_logits = [[2.0, 0.0, 1.0], [-2.0, -3.0, 4.0]], [[0.0, 0.5, 1.0], [0.0, -3.0, 1.0]]
    student = Scripted(student_logits, STUDENT_BOXES, classification="softmax")
    teacher = Scripted(teacher_logits, TEACHER_BOXES, classification="softmax")
    for settings in ({}, {"class_loss": "bernoulli"}):  # softmax students always have the softmax form
        method = KDDetr(KDDetrConfig(**settings), student, teacher)
        terms = method(student.view(), teacher.view(), [], None)
        weights = [max(loops.softmax(z)[:-1]) for z in teacher_logits]
        close(terms["specific_class"], loops.softmax_kl(student_logits, teacher_logits, weights, 10.0))
        close(terms["specific_l1"], loops.l1(STUDENT_BOXES, TEACHER_BOXES, weights, "mean"))


@pytest.mark.parametrize(("layers", "expected"), [("final", (2, 2)), ("paired", (1, 2))])
def test_layers(layers, expected):
    """Two student layers and three teacher layers, whose classes, boxes and confidences differ."""
    student = Scripted(STUDENT_LOGITS, STUDENT_BOXES, 2)
    teacher = Scripted(TEACHER_LOGITS, TEACHER_BOXES, 3)
    view = teacher.view()
    shift = torch.tensor([0.0, 1.0, -2.0])[:, None, None, None]
    view = replace(view, logits=view.logits + shift * torch.tensor([1.0, -1.0]), boxes=view.boxes + shift / 50)
    weights = {f"general_{term}": 0 for term in ("class", "l1", "giou")}
    method = KDDetr(configure(KDDetrConfig, {"layers": layers, "weights": weights}), student, teacher)
    terms = method(student.view(), view, [], None)
    assert method.teacher_layers == expected

    value = {"class": 0.0, "l1": 0.0, "giou": 0.0}
    for layer in expected:
        logits, boxes = view.logits[layer, 0].tolist(), view.boxes[layer, 0].tolist()
        confidence = [loops.sigmoid(max(z)) for z in logits]
        value["class"] += loops.softmax_kl(STUDENT_LOGITS, logits, confidence, 10.0)
        value["l1"] += loops.l1(STUDENT_BOXES, boxes, confidence, "mean")
        value["giou"] += loops.giou(STUDENT_BOXES, boxes, confidence)
    for name, expected_value in value.items():
        close(terms[f"specific_{name}"], expected_value)


def test_a_group_without_weight_is_not_computed():
    for left_out, kept in (("general", "specific"), ("specific", "general")):
        weights = {f"{left_out}_{term}": 0 for term in ("class", "l1", "giou")}
        student, teacher = Scripted(STUDENT_LOGITS, STUDENT_BOXES), Scripted(TEACHER_LOGITS, TEACHER_BOXES)
        method = KDDetr(configure(KDDetrConfig, {"general_points": 2, "weights": weights}), student, teacher)
        terms = method(student.view(), teacher.view(), [], None)
        assert list(method.projectors) == [kept]
        assert len(student.asked) == 1
        assert terms.keys() == KDDetrConfig().weights.keys()
        assert all((value == 0) == name.startswith(left_out) for name, value in terms.items())


# -------------------------------------------------------------------------------------------------------- the points


class Spy:
    """Keeps what an adapter's decoder is asked, and what it answers."""

    def __init__(self, adapter: FamilyAdapter, monkeypatch):
        self.groups: list[Queries] = []
        self.answers: list[DetrView] = []
        replay = adapter.replay

        def spying(view, groups, detach_memory=False):
            before = len(self.groups)
            answers = replay(view, groups, detach_memory)  # may call itself for each group
            self.groups[before:], self.answers[before:] = groups, answers
            return answers

        monkeypatch.setattr(adapter, "replay", spying)


def pair(student: str, teacher: str, settings: dict | None = None, batch: dict | None = None):
    """Method, views and adapters of two random models, or of one and its copy where the names agree."""
    models = {name: zoo.build(name, seed=seed) for seed, name in enumerate(dict.fromkeys([student, teacher]))}
    adapters = adapter_for(models[student]), adapter_for(copy.deepcopy(models[teacher]))
    (method,) = build_methods(["kd_detr"], {"general_points": 5, **(settings or {})}, *adapters)
    batch = batch or zoo.batch(labels=False)
    with torch.no_grad():
        views = [adapter.forward(batch)[1] for adapter in adapters]
    return method, views, adapters


def ask(method, views, seed: int = 0) -> dict[str, float]:
    with torch.no_grad():
        terms = method(*views, [], torch.Generator().manual_seed(seed))
    return {name: value.item() for name, value in terms.items()}


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr", "dab-detr", "rt_detr", "lw_detr"])
def test_teacher_and_student_are_asked_the_same(name, monkeypatch):
    """Content, position and reference, of both groups, where the models are copies of each other."""
    method, views, (student, teacher) = pair(name, name)
    ours, theirs = Spy(student, monkeypatch), Spy(teacher, monkeypatch)
    ask(method, views)
    assert len(ours.groups) == 2
    assert len(theirs.groups) == 1  # its own queries are answered already
    for asked, answered in zip(ours.groups, [views[1].queries, *theirs.groups], strict=True):
        for part in ("content", "position", "reference"):
            of_student, of_teacher = getattr(asked, part), getattr(answered, part)
            assert (of_student is None) == (of_teacher is None)
            if of_student is not None:
                torch.testing.assert_close(of_student, of_teacher, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("student", ["dab-detr", "deformable_detr", "rt_detr"])
@pytest.mark.parametrize("teacher", ["dab-detr", "deformable_detr_two_stage", "conditional_detr"])
def test_general_points_lie_at_the_same_places(student, teacher, monkeypatch):
    """Across families too; TPRD's anchors differ between the models, and some are outside [0, 1]."""
    method, views, adapters = pair(student, teacher)
    ours, theirs = (Spy(adapter, monkeypatch) for adapter in adapters)
    ask(method, views)
    places, answered = ours.groups[-1].reference, theirs.groups[0].reference
    size = min(places.shape[-1], answered.shape[-1])
    torch.testing.assert_close(places[..., :size], answered[..., :size])
    assert places.min() > 0
    assert places.max() <= 1
    assert torch.equal(places[0], places[1])  # the same for all images


@pytest.mark.parametrize("teacher", ["detr", "dab-detr", "rt_detr"])
def test_points_are_new_in_every_step_and_reproducible(teacher, monkeypatch):
    method, views, adapters = pair("conditional_detr", teacher)
    spy = Spy(adapters[1], monkeypatch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            method(*views, [], generator)
    ask(method, views, seed=0)
    first, second, again = ((q.position if teacher == "detr" else q.reference) for q in spy.groups)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert ask(method, views, seed=3) == ask(method, views, seed=3)
    assert ask(method, views, seed=3) != ask(method, views, seed=4)


def test_global_random_numbers_are_left_alone():
    """The run's other random numbers (dropout, denoising) don't depend on the points."""
    method, views, _ = pair("dab-detr", "dab-detr")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ask(method, views)
    assert torch.equal(torch.rand(3), expected)


def test_specific_target_is_the_teachers_ordinary_output(monkeypatch):
    """Only the teacher's logits and boxes as its model gives them enter, and no second pass of the teacher."""
    batch = zoo.batch(labels=False)
    weights = {f"general_{term}": 0 for term in ("class", "l1", "giou")}
    method, (student_view, view), (student, teacher) = pair("dab-detr", "rt_detr", {"weights": weights}, batch)
    asked = Spy(teacher, monkeypatch)
    spy = Spy(student, monkeypatch)
    terms = ask(method, (student_view, view))
    assert asked.groups == []

    with torch.no_grad():
        output = teacher.model(**batch)
    (reply,) = spy.answers
    logits, boxes = output.logits.flatten(0, 1).tolist(), output.pred_boxes.flatten(0, 1).tolist()
    confidence = [loops.sigmoid(max(z)) for z in logits]
    expected = sum(loops.softmax_kl(z.flatten(0, 1).tolist(), logits, confidence, 10.0) for z in reply.logits)
    assert terms["specific_class"] == pytest.approx(expected, rel=1e-4)
    expected = sum(loops.giou(b.flatten(0, 1).tolist(), boxes, confidence) for b in reply.boxes)
    assert terms["specific_giou"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["deformable_detr_two_stage", "rt_detr", "d_fine", "lw_detr"])
def test_two_stage_students_own_selection_is_ignored(name):
    """The specific terms stay where other queries are given to the student's view as its own."""
    method, (student, teacher), _ = pair(name, name, {"layers": "paired"})
    own = replace(student.queries, reference=student.queries.reference.flip(1) * 0.5)
    terms = ask(method, (replace(student, queries=own), teacher))
    assert all(abs(value) < 3e-4 for term, value in terms.items() if term.startswith("specific"))


@pytest.mark.parametrize("settings", [{}, {"content": "own"}])
def test_content_of_specific_points(settings, monkeypatch):
    """The teacher's through the map, or the student's own at the place."""
    method, views, adapters = pair("rt_detr", "deimv2", settings)
    spy = Spy(adapters[0], monkeypatch)
    ask(method, views)
    content, own = spy.groups[0].content, views[0].queries.content
    if settings:
        assert all(any(torch.equal(row, query) for query in own[0]) for row in content[0])
    else:
        torch.testing.assert_close(content, views[1].queries.content)


def test_general_distribution(monkeypatch):
    """The release's boxes keep to the middle: nine of ten numbers within sigmoid(+-1.645)."""
    references = {}
    for distribution in ("uniform", "logit_normal"):
        settings = {"general_points": 200, "general_distribution": distribution}
        method, views, adapters = pair("dab-detr", "dab-detr", settings)
        spy = Spy(adapters[1], monkeypatch)
        ask(method, views)
        (asked,) = spy.groups
        assert len(asked) == 200
        references[distribution] = asked.reference[0]
    inside = {name: ((x > 0.1618) & (x < 0.8382)).float().mean() for name, x in references.items()}
    assert inside["uniform"] == pytest.approx(0.676, abs=0.06)
    assert inside["logit_normal"] == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize(
    "name", ["detr", "conditional_detr", "deformable_detr", "deformable_detr_two_stage", "dab-detr"]
)
def test_padding_content_changes_nothing(name):
    """Memory under the padding is other in both models; every term stays as it is."""
    method, views, _ = pair(name, name, batch=zoo.batch(labels=False, pad=True))
    with torch.no_grad():  # the student is no longer the teacher's copy
        for parameter in views[0].adapter.model.parameters():
            parameter.mul_(1.05)

    def other(view: DetrView) -> DetrView:
        padded = ~view.memory_mask[..., None]
        assert padded.any()
        memory = torch.where(padded, 7 * torch.ones_like(view.memory), view.memory)
        return replace(
            view, memory=memory, decoder_arguments={**view.decoder_arguments, "encoder_hidden_states": memory}
        )

    assert ask(method, map(other, views)) == pytest.approx(ask(method, views), rel=1e-5)


@pytest.mark.parametrize("name", ["detr", "dab-detr", "rt_detr"])
def test_groups_do_not_see_each_other(name):
    """Each group alone gives the terms it gives beside the other."""
    method, views, adapters = pair(name, name)
    together = ask(method, views)
    for left_out, kept in (("general", "specific"), ("specific", "general")):
        weights = {f"{left_out}_{term}": 0 for term in ("class", "l1", "giou")}
        (alone,) = build_methods(["kd_detr"], {"general_points": 5, "weights": weights}, *adapters)
        terms = ask(alone, views)
        assert all(together[t] == pytest.approx(terms[t], rel=1e-4) for t in terms if t.startswith(kept))


# ---------------------------------------------------------------------------------------------------------- refusals


def test_teacher_that_cannot_be_replayed():
    student, teacher = Scripted(STUDENT_LOGITS, STUDENT_BOXES), Scripted(TEACHER_LOGITS, TEACHER_BOXES)
    teacher.provides = frozenset()
    with pytest.raises(
        ValueError, match=r"decoder can be replayed .*`scripted` can't.*weights of the general terms to 0"
    ):
        KDDetr(KDDetrConfig(), student, teacher)
    weights = {f"general_{term}": 0 for term in ("class", "l1", "giou")}
    KDDetr(configure(KDDetrConfig, {"weights": weights}), student, teacher)


def test_student_that_cannot_be_replayed():
    student, teacher = Scripted(STUDENT_LOGITS, STUDENT_BOXES), Scripted(TEACHER_LOGITS, TEACHER_BOXES)
    student.provides = frozenset({"reference"})
    with pytest.raises(ValueError, match=r"`kd_detr` needs replay from the student, which `scripted` doesn't provide"):
        KDDetr(KDDetrConfig(), student, teacher)
