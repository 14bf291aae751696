"""The contract of `DistillationMethod`, for every method and every pair of models it can serve."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
import zoo

from hf_detrkd import DistillationModel
from hf_detrkd.families import FAMILIES, FamilyAdapter, adapter_for
from hf_detrkd.labels import LabelMap
from hf_detrkd.methods import METHODS, DistillationMethod, build_methods, configure
from hf_detrkd.methods.base import check_choice

SETTINGS = {"kd_detr": {"general_points": 5}}
"""So that the tests are fast; a method without a line runs with its defaults."""
LAYERED = {"kd_detr": {"layers": "paired"}, "ld": {"layers": "paired"}}
"""Settings under which every layer of an identical student has nothing to learn."""
FAMILIES_OF = {"ld": {"d_fine", "deimv2"}, "proposals": {"rt_detr", "rt_detr_v2", "d_fine", "deimv2"}}
"""The families of a method that isn't for all."""
REPLAYS = {
    "student": {"kd_detr", "d3etr", "detrdistill", "clockdistill"},
    "teacher": {"kd_detr", "clockdistill"},
}
"""The methods that ask a decoder other queries under their default settings."""
COVERED = {"clockdistill": {"lcmd_background"}}
"""Terms that may be 0: where the memory has 2 x 2 cells the objects may cover it."""
ZERO = {
    "kd_detr": {"specific_class", "specific_l1", "specific_giou", "general_class", "general_l1", "general_giou"},
    "logit_kd": {"class", "l1", "giou"},
    "features": {"feature"},
    "d3etr": {
        f"{matching}_{term}"
        for matching in ("adaptive", "fixed")
        for term in ("class", "l1", "giou", "self_attention", "cross_attention")
    },
    "qskd": {"class", "l1", "giou", "feature"},
    "detrdistill": {"logits_class", "logits_l1", "logits_giou", "feature"},
    "clockdistill": {"lcmd_foreground", "lcmd_background", "tcld_class", "tcld_l1", "tcld_giou"},
    "ld": {"ld"},
    "proposals": {"class", "l1", "giou"},
    "drkd": {"pixel", "instance"},  # relation too, but it is small beside a difference too: test_drkd.py
}
"""Terms that vanish for an identical student, by their definition."""
FAINT = {
    "qskd": {"feature"},  # its mask leaves few cells
    "drkd": {"pixel", "instance"},  # RT-DETR's memory hardly changes where all weights grow alike
}
"""Those that are small on the tiny models whatever the student."""

SMALLER = {
    "detr": {"decoder_layers": 2, "num_queries": 4},
    "deformable_detr_two_stage": {"decoder_layers": 2, "two_stage_num_proposals": 4},
    "yolos": {"num_hidden_layers": 2, "num_detection_tokens": 4},
}
SAME_FAMILY = [(name, name, SMALLER.get(name, SMALLER["detr"]), {}) for name in zoo.NAMES]
CROSS_FAMILY = [
    # student, teacher, the student's config, the teacher's config: every kind of query meets every other
    ("detr", "rt_detr", {}, {"num_queries": 9}),
    ("detr", "conditional_detr", {"decoder_layers": 4}, {}),
    ("table-transformer", "dab-detr", {}, {"decoder_layers": 2}),
    ("conditional_detr", "detr", {}, {"d_model": 32}),
    ("conditional_detr", "deformable_detr", {}, {}),
    ("deformable_detr", "conditional_detr", {"num_queries": 5}, {}),
    ("deformable_detr_refine", "d_fine", {}, {}),
    ("deformable_detr_two_stage", "rt_detr", {}, {"decoder_layers": 4}),
    ("dab-detr", "table-transformer", {}, {}),
    ("dab-detr", "deformable_detr_two_stage", {}, {}),
    ("rt_detr", "detr", {"decoder_layers": 1}, {}),
    ("rt_detr", "deformable_detr_refine", {}, {}),
    ("rt_detr_v2", "dab-detr", {}, {}),
    ("rt_detr_v2", "d_fine", {"decoder_layers": 2}, {"num_queries": 10}),
    ("d_fine", "conditional_detr", {}, {}),
    ("deimv2", "lw_detr", {}, {}),
    ("lw_detr", "rf_detr", {}, {"num_queries": 8}),
    ("rf_detr", "rt_detr_v2", {}, {}),
    ("yolos", "dab-detr", {}, {"decoder_layers": 2}),
    ("rt_detr", "yolos", {}, {"num_detection_tokens": 9}),
]
PAIRS = [pair for pair in SAME_FAMILY + CROSS_FAMILY if {pair[0], pair[1]} <= set(zoo.NAMES)]
EVERY_KIND = [  # of heads, and of queries
    pair for pair in CROSS_FAMILY if pair[0] in ("detr", "conditional_detr", "deformable_detr_two_stage", "dab-detr")
]

every_method = pytest.mark.parametrize("method", METHODS)
every_model = pytest.mark.parametrize("name", zoo.NAMES)


def pairs(selected):
    return pytest.mark.parametrize("pair", selected, ids=[f"{pair[0]}<-{pair[1]}" for pair in selected])


@functools.cache
def _built(name: str, seed: int, overrides: tuple):
    return zoo.build(name, seed=seed, **dict(overrides))


def build(name: str, seed: int = 0, **overrides):
    return copy.deepcopy(_built(name, seed, tuple(sorted(overrides.items()))))


def wrapped(student, teacher, method: str, settings: dict | None = None, **options):
    """Student and method as the trainer puts them together, and the teacher's adapter."""
    labels = LabelMap.between(teacher.config.id2label, student.config.id2label)
    adapter = adapter_for(student, classes=labels.student_classes)
    teacher_adapter = adapter_for(teacher, classes=labels.teacher_classes)
    if not {student.config.model_type, teacher.config.model_type} <= FAMILIES_OF.get(method, set(FAMILIES)):
        pytest.skip("not for these families")
    settings = {**SETTINGS.get(method, {}), **(settings or {})}
    if ("replay" not in adapter.provides and method in REPLAYS["student"]) or (
        "replay" not in teacher_adapter.provides and method in REPLAYS["teacher"]
    ):
        with pytest.raises(ValueError, match=r"replay|decoding again"):
            build_methods([method], settings, adapter, teacher_adapter)
        pytest.skip("refused, in words")
    methods = build_methods([method], settings, adapter, teacher_adapter)
    return DistillationModel(student, adapter, methods, **options), teacher_adapter


def a_pair(pair, method: str, settings: dict | None = None, **options):
    student, teacher, of_student, of_teacher = pair
    models = build(student, 1, **of_student), build(teacher, 2, **of_teacher)
    return wrapped(*models, method, settings, **options)


def see(adapter: FamilyAdapter, batch: dict):
    """The view in evaluation, without labels, with what any method may read."""
    with torch.no_grad():
        return adapter.forward({name: value for name, value in batch.items() if name != "labels"}, attentions=True)[1]


def same_task_loss(module: DistillationModel, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit, but where a method makes the student's decoder compute its attention in eager mode."""
    (method,) = module.methods.values()
    exact = {} if "student" in method.attentions else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loss, expected, **exact)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def terms_of(module: DistillationModel, teacher: FamilyAdapter, batch: dict) -> dict[str, torch.Tensor]:
    (method,) = module.methods.values()
    with torch.no_grad():
        return method(see(module.adapter, batch), see(teacher, batch), batch.get("labels"), rng())


def close(a: dict, b: dict, rtol: float = 2e-4, atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# ------------------------------------------------------------------------------------------------------ every pair


# What the task alone can teach: the selection of queries, denoising, D-FINE's head before the first layer ...
TASK_ONLY = ("enc_", "denoising", "pre_bbox_head")
# ... and a model's own queries, to methods that ask queries of their own.
_QUERIES = ("query_position", "query_refpoint", "reference_point", "ref_point_head", "query_feat")
OWN_QUERIES = {
    "kd_detr": _QUERIES,
    "clockdistill": (*_QUERIES, "pos_trans"),
    "ld": (*_QUERIES, "class_embed", "lqe_layers"),  # edges alone
}

MEMORY_ONLY = {"features", "drkd", "proposals"}
"""Methods that end before the decoder: decoder and heads learn from the task alone."""
ZERO_WITHOUT_TARGETS = {
    "d3etr": {"group_l1", "group_giou"},
    "qskd": {"class", "l1", "giou", "feature"},
    "detrdistill": {"logits_class", "assign_l1", "assign_giou"},
    "clockdistill": {"lcmd_foreground", "tcld_class", "tcld_l1", "tcld_giou"},
    "drkd": {"relation", "instance"},
}
"""By method, the terms that are 0 for an image without targets."""


@every_method
@pairs(PAIRS)
def test_step(method, pair):
    module, teacher = a_pair(pair, method)
    module.train()
    with torch.no_grad():  # a scale that starts at 0 keeps the gradient from what lies behind it
        for name, parameter in module.methods.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(0.1)
    batch = zoo.batch()
    view = see(teacher, batch)

    def step(**options):
        module.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        output = module(**batch, **options)
        output.loss.backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        return output, {name for name, gradient in gradients.items() if gradient.any()}

    task, from_task = step()
    module.detection_weight = 0.0
    output, from_kd = step(teacher_view=view, generator=rng())
    config = module.methods[method].config

    assert output.terms.keys() == config.weights.keys()
    assert all(value.shape == () and value.isfinite() for value in output.terms.values())
    assert all(value > 0 for name, value in output.terms.items() if name not in COVERED.get(method, set()))
    torch.testing.assert_close(output.loss, sum(config.weights[name] * value for name, value in output.terms.items()))
    same_task_loss(module, output.detection_loss, task.loss)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    projectors = {name for name, _ in module.named_parameters() if name.startswith("methods.")}
    assert from_kd - from_task == projectors
    if method in MEMORY_ONLY:
        assert any("encoder" in name or "input_proj" in name or "backbone" in name for name in from_kd & from_task)
        return
    allowed = (*TASK_ONLY, *OWN_QUERIES.get(method, ()))
    assert [name for name in sorted(from_task - from_kd) if not any(part in name for part in allowed)] == []


@every_method
def test_ten_steps_lower_the_terms(method):
    """The method's terms alone, without the task."""
    names = ("d_fine", "d_fine") if method == "ld" else ("rt_detr", "rt_detr_v2")
    module, teacher = a_pair((*names, {}, {}), method)
    batch = zoo.batch()
    images, view = {"pixel_values": batch["pixel_values"]}, see(teacher, batch)
    distill = module.methods[method]
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    values = []
    for _ in range(11):
        own = module.adapter.forward(images, attentions="student" in distill.attentions)[1]
        terms = distill(own, view, batch["labels"], rng())
        loss = sum(distill.config.weights[name] * value for name, value in terms.items())
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0]


@every_method
@every_model
def test_identical_student(method, name):
    """Padded images too. Not to the last bit: replayed references went through a sigmoid and its inverse."""
    if method not in ZERO:
        pytest.skip("no term of this method vanishes")
    teacher = build(name)
    module, teacher_adapter = wrapped(copy.deepcopy(teacher), teacher, method, LAYERED.get(method))
    batch = zoo.batch(pad="padding" in teacher_adapter.provides)
    terms = terms_of(module.eval(), teacher_adapter, batch)
    faint = FAINT.get(method, set())
    assert {term for term, value in terms.items() if abs(value) < (1e-9 if term in faint else 3e-4)} >= ZERO[method]

    with torch.no_grad():  # and the test would see a difference
        for parameter in module.student.parameters():
            parameter.mul_(1.1)
    terms = terms_of(module, teacher_adapter, batch)
    seen = ZERO[method] - COVERED.get(method, set())
    assert all(terms[term] > (1e-6 if term in faint else 1e-3) for term in seen)


@every_method
@pairs(EVERY_KIND)
def test_batch_doubling_changes_nothing(method, pair):
    module, teacher = a_pair(pair, method)
    module.eval()
    batch = zoo.batch()
    doubled = {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1), "labels": batch["labels"] * 2}
    close(terms_of(module, teacher, doubled), terms_of(module, teacher, batch))


@every_method
@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr", "lw_detr"])
@pytest.mark.parametrize("targets", [(3, 0), (0,)], ids=["one image", "all images"])
def test_images_without_targets(method, name, targets):
    module, teacher = a_pair((name, name, {}, {}), method)
    module.train()
    batch = zoo.batch(targets=targets)
    output = module(**batch, teacher_view=see(teacher, batch), generator=rng())
    output.loss.backward()
    assert output.loss.isfinite()
    zero = ZERO_WITHOUT_TARGETS.get(method, set()) if not any(targets) else set()
    assert all(value.isfinite() and (value == 0 if name in zero else value > 0) for name, value in output.terms.items())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())


@every_method
@pairs(EVERY_KIND + [pair for pair in SAME_FAMILY if pair[0] in ("d_fine", "lw_detr", "rt_detr_v2")])
def test_bf16_autocast(method, pair):
    module, teacher = a_pair(pair, method)
    module.train()
    batch = zoo.batch()
    with torch.autocast("cpu", torch.bfloat16):
        view = see(teacher, batch)
        output = module(**batch, teacher_view=view, generator=rng())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 and value.isfinite() for value in output.terms.values())
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())


@every_method
def test_teacher_in_half_precision(method):
    """As ``teacher_model_init_kwargs={"dtype": "bfloat16"}`` loads it, without autocast."""
    module, teacher = a_pair(("deformable_detr", "deformable_detr", {}, {}), method)
    teacher.model.bfloat16()
    batch = zoo.batch()
    view = see(teacher, {"pixel_values": batch["pixel_values"].bfloat16()})
    output = module.train()(**batch, teacher_view=view, generator=rng())
    output.loss.backward()
    assert output.loss.isfinite()


@every_method
@pytest.mark.parametrize("name", ["detr", "conditional_detr", "deformable_detr", "dab-detr", "rt_detr"])
def test_detection_is_left_alone(method, name):
    """With dropout and BatchNorm statistics in training, as without a teacher: loss, gradient path and buffers."""
    dropout = {} if name == "rt_detr" else {"dropout": 0.3}
    student = build(name, 1, **dropout)
    batch = zoo.batch()
    results = []
    for distilled in (False, True):
        module, teacher = wrapped(copy.deepcopy(student), build(name, 2), method)
        module.train()
        view = see(teacher, batch) if distilled else None
        torch.manual_seed(0)
        output = module(**batch, teacher_view=view, generator=rng())
        results.append((output.detection_loss, dict(module.student.named_buffers())))
    (loss, buffers), (distilled_loss, distilled_buffers) = results
    same_task_loss(module, distilled_loss, loss)
    assert all(torch.equal(buffers[key], distilled_buffers[key]) for key in buffers)


@every_method
def test_inputs_are_left_alone(method):
    """No method writes into the views, the targets or the batch."""
    module, teacher = a_pair(("rt_detr", "detr", {}, {}), method)
    batch = zoo.batch()
    student_view, teacher_view = see(module.adapter, batch), see(teacher, batch)
    tensors = [
        *(getattr(view, field) for view in (student_view, teacher_view) for field in ("logits", "boxes", "memory")),
        batch["labels"][0]["boxes"],
        batch["pixel_values"],
    ]
    before = [tensor.clone() for tensor in tensors]
    module.methods[method](student_view, teacher_view, batch["labels"], rng())
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("class_loss", ["bernoulli", "softmax"])
@pytest.mark.parametrize("teacher", ["detr", "dab-detr"])
def test_logit_kd_does_not_see_the_order_of_the_teachers_queries(teacher, class_loss):
    module, adapter = a_pair(("conditional_detr", teacher, {}, {}), "logit_kd", {"class_loss": class_loss})
    batch = zoo.batch()
    student_view, view = see(module.adapter, batch), see(adapter, batch)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    permuted = replace(view, logits=view.logits[:, :, order], boxes=view.boxes[:, :, order])
    method = module.methods["logit_kd"]
    close(method(student_view, permuted, [], rng()), method(student_view, view, [], rng()), rtol=1e-5)
    # a student query alone does matter
    other = replace(view, logits=view.logits.roll(1, 2))
    assert method(student_view, other, [], rng())["class"] != method(student_view, view, [], rng())["class"]


def test_logit_kd_last_layer_only():
    """The last of three layers, with the teacher's last."""
    all_layers, teacher = a_pair(("dab-detr", "dab-detr", {}, {"decoder_layers": 2}), "logit_kd")
    last, _ = wrapped(all_layers.student, teacher.model, "logit_kd", {"layers": "last"})
    batch = zoo.batch()
    student_view, teacher_view = see(all_layers.adapter, batch), see(teacher, batch)

    def only(layer, of_teacher):
        view = replace(student_view, logits=student_view.logits[[layer]], boxes=student_view.boxes[[layer]])
        answer = replace(teacher_view, logits=teacher_view.logits[[of_teacher]], boxes=teacher_view.boxes[[of_teacher]])
        single = copy.copy(all_layers.methods["logit_kd"])
        single.teacher_layers = (0,)
        return single(view, answer, [], rng())

    layers = [only(layer, of_teacher) for layer, of_teacher in enumerate((0, 1, 1))]
    close(last.methods["logit_kd"](student_view, teacher_view, [], rng()), layers[2])
    sums = {name: sum(layer[name] for layer in layers) for name in layers[0]}
    close(all_layers.methods["logit_kd"](student_view, teacher_view, [], rng()), sums)


# ---------------------------------------------------------------------------------------------------------- classes

NAMES = ("cat", "dog", "person", "car", "bus")
LISTS = {
    "other order": (("car", "cat", "bus", "dog", "person"), NAMES),
    "teacher knows more": (("tree", "bus", "cat", "sky", "dog", "car", "person"), NAMES),
    "student knows more": (("person", "cat"), NAMES),
    "some in common": (("person", "tree", "bus"), NAMES),
    "one in common": (("tree", "bus"), NAMES),
    "spelled otherwise": (("Cat", "DOG", "Person", "car", "bus"), NAMES),
}


def labelled(name: str, names: tuple[str, ...], seed: int):
    labels = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    return zoo.build(name, seed=seed, **labels)


HEADS = [("detr", "detr"), ("detr", "dab-detr"), ("dab-detr", "detr"), ("dab-detr", "dab-detr")]


@every_method
@pytest.mark.parametrize(
    ("student", "teacher", "classes"),
    [
        *((*heads, "some in common") for heads in HEADS),
        *((*HEADS[2], classes) for classes in LISTS if classes != "some in common"),
        ("rt_detr", "rt_detr", "other order"),  # it has denoising embeddings of the classes
    ],
)
def test_two_steps_with_other_classes(method, student, teacher, classes):
    of_teacher, of_student = LISTS[classes]
    models = labelled(student, of_student, 1), labelled(teacher, of_teacher, 2)
    settings = {"class_loss": "bernoulli"} if classes == "one in common" and method == "kd_detr" else {}
    module, teacher_adapter = wrapped(*models, method, settings)
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    before = copy.deepcopy(models[1].state_dict())
    for step in range(2):
        batch = zoo.batch(seed=step)
        output = module(**batch, teacher_view=see(teacher_adapter, batch), generator=rng(step))
        assert output.loss.isfinite()
        # where none of the targets is of a class in common
        zero = ZERO_WITHOUT_TARGETS.get(method, set()) | COVERED.get(method, set())
        assert all(value > 0 or (value == 0 and name in zero) for name, value in output.terms.items())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in models[1].state_dict().items())


@every_method
@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_classes_are_mapped_by_name(method, name):
    """A teacher that is the student with its class columns in another order says the same."""
    if method not in ZERO:
        pytest.skip("no term of this method vanishes")
    order = [3, 0, 4, 1, 2]
    student = labelled(name, NAMES, 1)
    teacher = copy.deepcopy(student)
    teacher.config.id2label = {i: NAMES[c] for i, c in enumerate(order)}
    heads = [teacher.class_labels_classifier] if name == "detr" else [*teacher.model.decoder.class_embed]
    if name == "rt_detr":
        heads.append(teacher.model.enc_score_head)
    with torch.no_grad():
        if name == "rt_detr":  # denoising too
            embedding = teacher.model.denoising_class_embed.weight
            embedding[: len(order)] = embedding[order]
        for head in heads:
            columns = [*order, 5][: len(head.bias)]
            head.weight.copy_(head.weight[columns])
            head.bias.copy_(head.bias[columns])
    module, teacher_adapter = wrapped(student, teacher, method, LAYERED.get(method))
    terms = terms_of(module.eval(), teacher_adapter, zoo.batch())
    assert all(abs(terms[term]) < 3e-4 for term in ZERO[method])


def test_no_class_in_common():
    with pytest.raises(ValueError, match="share no class name"):
        wrapped(labelled("detr", NAMES, 1), labelled("detr", ("tree", "sky"), 2), "logit_kd")


@every_method
def test_softmax_over_one_class_is_refused(method):
    if "class_loss" not in METHODS[method].config_class.__dataclass_fields__:
        pytest.skip("no choice of a class loss")
    models = labelled("rt_detr", NAMES, 1), labelled("rt_detr", ("tree", "bus"), 2)
    with pytest.raises(ValueError, match=r"constant with a single class.*class_loss='bernoulli'"):
        wrapped(*models, method, {"class_loss": "softmax"})


# --------------------------------------------------------------------------------------------------- several methods


def adapters(student: str = "detr", teacher: str = "detr"):
    return adapter_for(build(student, 1)), adapter_for(build(teacher, 2))


def test_methods_combined():
    """Terms carry the method's name, and the loss is the sum of the parts; what is switched off is not reported."""
    adapter, teacher = adapters()
    settings = {"kd_detr": {"general_points": 5, "weights": {"general_l1": 0}}, "logit_kd": {"weights": {"class": 3}}}
    methods = build_methods(["kd_detr", "logit_kd"], settings, adapter, teacher)
    module = DistillationModel(adapter.model, adapter, methods, detection_weight=2.0).train()
    batch = zoo.batch()
    view = see(teacher, batch)
    output = module(**batch, teacher_view=view, generator=rng(), kd_scale=0.5)
    weights = {f"{method.name}_{term}": w for method in methods for term, w in method.config.weights.items() if w}
    assert output.terms.keys() == weights.keys() and "kd_detr_general_l1" not in weights
    assert weights["logit_kd_class"] == 3
    kd = sum(weights[name] * value for name, value in output.terms.items())
    torch.testing.assert_close(output.loss, 2 * output.detection_loss + 0.5 * kd)

    # each method draws and computes as if it were alone
    for method in methods:
        alone = DistillationModel(adapter.model, adapter, [method]).train()
        terms = alone(**batch, teacher_view=view, generator=rng()).terms
        close(
            {f"{method.name}_{name}": value for name, value in terms.items()},
            {name: value for name, value in output.terms.items() if name.startswith(method.name)},
        )


@every_method
def test_gradient_norms(method):
    """They are the norms of the weighted parts' gradients, over the student alone."""
    module, teacher = a_pair(("detr", "detr", {}, {}), method)
    module.train()
    batch = zoo.batch()
    options = {"teacher_view": see(teacher, batch), "generator": rng()}
    norms = module(**batch, **options, gradient_norms=True).gradient_norms
    weights = module.methods[method].config.weights
    assert norms.keys() == {"detection", "kd", *weights}
    module.detection_weight = 0.0
    module(**batch, teacher_view=options["teacher_view"], generator=rng()).loss.backward()
    gradients = [p.grad.flatten() for p in module.student.parameters() if p.grad is not None]
    torch.testing.assert_close(norms["kd"], torch.cat(gradients).norm())


def test_gradient_norms_of_light_terms_in_fp16():
    """fp16 ends at 6e-8: a term whose gradients are smaller would have a share of 0, and be called switched off."""
    module, teacher = a_pair(("detr", "detr", {}, {}), "features")
    module.train()
    batch = zoo.batch()
    norms = []
    with torch.autocast("cpu", torch.float16):
        for scale in (1.0, 1e-7):
            options = {"teacher_view": see(teacher, batch), "generator": rng(), "kd_scale": scale}
            norms.append(module(**batch, **options, gradient_norms=True).gradient_norms["kd"].item())
    assert norms[1] == pytest.approx(1e-7 * norms[0], rel=0.05)


def test_every_method_has_what_the_table_needs():
    for name, method in METHODS.items():
        assert issubclass(method, DistillationMethod)
        assert method.name == name
        assert method.config_class().weights
        assert "Terms" in method.__doc__
        assert "Differs from the paper" in method.__doc__  # or papers
        if method.paper is not None:
            assert method.paper.title
            assert method.paper.bibtex.lstrip().startswith("@")


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["kd_dert"], None, r"`method` is 'kd_dert'; known methods are none, .*kd_detr.* Did you mean 'kd_detr'\?"),
        (["magic"], None, r"`method` is 'magic'; known methods are none, "),
        (
            ["kd_detr"],
            {"temprature": 2},
            r"unknown keys \['temprature'\]; KDDetrConfig knows \['weights', 'temperature'",
        ),
        (["kd_detr"], {"weights": {"class": 1}}, r"unknown terms \['class'\]; the terms are \['general_class'"),
        (["kd_detr"], {"weights": {"specific_l1": -1}}, r"-1 for `specific_l1`; a weight must be 0 or more"),
        (["kd_detr"], {"weights": {"specific_l1": "5"}}, r"`weights.specific_l1` .* is '5'; it must be a number"),
        (["kd_detr"], {"weights": 5}, r"`weights` of `method_config` is 5; it must be a dict"),
        (
            ["kd_detr"],
            {"temperature": "10"},
            r"`temperature` of `method_config` is '10'; it must be a number such as 10.0",
        ),
        (["kd_detr"], {"general_points": 10.5}, r"`general_points` .* is 10.5; it must be a int such as 300"),
        (
            ["kd_detr"],
            {"general_points": 0},
            r"`general_points` is 0; it must be 1 or more.*set their three weights to 0",
        ),
        (["kd_detr"], {"layers": "all"}, r"`layers` of KDDetrConfig is 'all'; allowed are 'final', 'paired'"),
        (["kd_detr"], {"temperature": 0}, r"`temperature` of kd_detr is 0; it must be above 0"),
        (["logit_kd"], {"temperature": -1.0}, r"`temperature` of logit_kd is -1.0; it must be above 0"),
        (["logit_kd"], {"layers": "final"}, r"`layers` of LogitKDConfig is 'final'; allowed are 'all', 'last'"),
        (["logit_kd", "kd_detr"], {"temperature": 2}, r"settings for \['temperature'\].*must be a dict by method name"),
        (
            ["logit_kd", "kd_detr"],
            {"logit_kd": 2},
            r"`method_config` must hold a dict of the settings of LogitKDConfig",
        ),
    ],
)
def test_settings_that_are_refused(names, settings, message):
    with pytest.raises(ValueError, match=message):
        build_methods(names, settings, *adapters())


@pytest.mark.parametrize("name", METHODS)
def test_all_weights_zero_is_refused(name):
    weights = dict.fromkeys(configure(METHODS[name].config_class, None).weights, 0)
    family = next(iter(sorted(FAMILIES_OF.get(name, {"detr"}) & {*zoo.NAMES})), None)
    if family is None:
        pytest.skip("not for these families")
    with pytest.raises(ValueError, match=rf"all `weights` of {name} are 0.*Use method none"):
        build_methods([name], {"weights": weights}, *adapters(family, family))


def test_a_pair_that_lacks_what_a_method_needs():
    class Needy(DistillationMethod):
        name = "needy"
        needs_teacher = frozenset({"queries_from_boxes", "replay"})

    student, teacher = adapters()
    config = configure(METHODS["logit_kd"].config_class, None)
    message = (
        r"method `needy` needs queries_from_boxes from the teacher, which `detr` doesn't provide \(it provides .*replay"
    )
    with pytest.raises(ValueError, match=message):
        Needy(config, student, teacher)
    Needy(config, student, adapter_for(build("dab-detr")))


def test_configure_merges_weights():
    config_class = METHODS["logit_kd"].config_class
    config = configure(config_class, {"temperature": 2, "weights": {"l1": 0}})
    assert config.weights == {"class": 1.0, "l1": 0.0, "giou": 2.0}
    assert config.temperature == 2
    assert configure(config_class, None) == config_class()
    assert config_class().weights["l1"] == 5  # the default is not shared


def test_check_choice_names_the_allowed_values():
    config = METHODS["logit_kd"].config_class()
    with pytest.raises(ValueError, match=r"`layers` of LogitKDConfig is 'all'; allowed are 'x', 'y'"):
        check_choice(config, layers=("x", "y"))
