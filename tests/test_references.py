"""Our losses in their "released" settings against numbers that official and third-party code computed.

``references/<name>.json`` says which code at which commit, ``references/record.py`` how it was run. Where theirs and ours
are on another scale on purpose, the test says what the factor is and computes it from the inputs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from references import inputs
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_detrkd.losses.attention import splat
from hf_detrkd.losses.boxes import iou
from hf_detrkd.losses.distributions import decoupled_edge_kl, edge_kl
from hf_detrkd.losses.features import box_quality, cwd, fgd, pkd, scale_masks, squared_sums
from hf_detrkd.matching import HungarianMatcher, ground_truth_matches
from hf_detrkd.methods.base import configure
from hf_detrkd.methods.cl_detr import pseudo_targets
from hf_detrkd.methods.d3etr import D3ETR, D3ETRConfig
from hf_detrkd.methods.detrdistill import DETRDistill, DETRDistillConfig
from hf_detrkd.methods.features import SCALES, Features, FeaturesConfig
from hf_detrkd.methods.kd_detr import KDDetr, KDDetrConfig
from hf_detrkd.methods.qskd import QSKD, QSKDConfig
from hf_detrkd.projectors import GloRe
from hf_detrkd.sampling import group_queries
from hf_detrkd.view import AttentionMaps, DetrView, Queries

FOLDER = Path(__file__).parent / "references"


@functools.cache
def record(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def recorded(name: str, case: str):
    """What ``record.py`` stored under ``case`` of the source ``name``."""
    return record(name)["cases"][case]["values"]


def close(ours, theirs, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).double()
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


EPSILON = {"rtol": 0.0, "atol": 1e-4}
"""detrex adds 1e-6 to both denominators of the GIoU; the smallest box here has an area of 0.04, its IoU loses 2.5e-5."""


class Scripted:
    """An adapter whose model answers what it is told: with its own predictions, and to each replay with the next reply."""

    provides = frozenset({"replay", "queries_from_boxes", "reference", "self_attentions", "cross_attentions"})
    classification = "sigmoid"
    matching_costs = {"class_cost": 2.0, "l1_cost": 5.0, "giou_cost": 2.0}
    """Deformable DETR's, which both repositories train."""
    model = SimpleNamespace(config=SimpleNamespace(model_type="scripted"))

    def __init__(self, predictions: inputs.Predictions, *replies, maps=(), reply_attentions=None, **view):
        self.predictions, self.replies, self.maps = predictions, replies, maps
        self.reply_attentions, self.more = reply_attentions, view
        self.num_layers, self.num_classes = len(predictions.logits), predictions.logits.shape[-1]
        self.width = self.memory_width = maps[0].shape[1] if maps else 1

    def view(self) -> DetrView:
        own, maps = self.predictions, self.maps
        batch, queries = own.boxes.shape[1:3]
        memory = [level.flatten(2).mT for level in maps] or [torch.zeros(batch, 1, 1)]
        view = DetrView(
            logits=own.logits,
            boxes=own.boxes,
            hidden_states=own.hidden,
            classification=self.classification,
            queries=Queries(torch.zeros(batch, queries, self.width), None, own.boxes[0]),
            memory=torch.cat(memory, 1),
            memory_shapes=tuple(tuple(level.shape[-2:]) for level in maps) or ((1, 1),),
            memory_mask=None,
            features=(),
            adapter=self,
        )
        return replace(view, **self.more)

    def replay(self, view, groups, detach_memory=False):
        return tuple(
            replace(
                view,
                logits=reply.logits,
                boxes=reply.boxes,
                hidden_states=reply.hidden,
                self_attentions=self.reply_attentions,
            )
            for reply in self.replies[: len(groups)]
        )

    def queries_from_boxes(self, view, boxes, labels=None):
        return Queries(boxes.new_zeros(*boxes.shape[:2], self.width), None, boxes)


def layer_of(predictions: inputs.Predictions, layer: int, image: int | None = None) -> inputs.Predictions:
    """One layer, and one image."""
    images = slice(None) if image is None else slice(image, image + 1)
    own = slice(layer, layer + 1)
    return inputs.Predictions(*(x[own, images] for x in (predictions.logits, predictions.boxes, predictions.hidden)))


def terms_of(method, config, settings, student: Scripted, teacher: Scripted, targets=()) -> dict[str, torch.Tensor]:
    built = method(configure(config, settings), student, teacher)
    return built(student.view(), teacher.view(), targets, torch.Generator().manual_seed(0))


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of Bernoulli probabilities, in nats. Ours = their cross-entropy - the teacher's entropy."""
    return binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").sum(-1)


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.json"))])
def test_a_record_says_where_it_comes_from(name):
    source = record(name)
    assert len(source["commit"]) == 40
    assert source["repository"].count("/") == 1 and source["files"] and source["cases"]
    assert source["command"].endswith(f" {name}")


# --------------------------------------------------------------------------------------------------- DETRDistill


def only(config, *terms: str, **settings) -> dict:
    """Settings in which all other terms have weight 0."""
    return {"weights": {name: float(name in terms) for name in config().weights}, **settings}


LOGITS = only(DETRDistillConfig, "logits_class", "logits_l1", "logits_giou", matching="all")
ASSIGN = only(DETRDistillConfig, "assign_class", "assign_l1", "assign_giou")


@pytest.mark.parametrize("layer", range(3))
def test_detrdistill_matching(layer):
    case = inputs.detrdistill()
    views = (Scripted(layer_of(x, layer)).view() for x in (case.student, case.teacher))
    (match,) = HungarianMatcher()(*views)
    assert match.student_index.tolist() == [list(range(7))] * 3
    assert match.teacher_index.tolist() == recorded("detrdistill", "matching")[layer]


@pytest.mark.parametrize("layer", range(3))
def test_detrdistill_logits_of_the_release(layer):
    """All pairs in both parts (`matching="all"`). Their config has the weights 1, 5, 2 inside."""
    case = inputs.detrdistill()
    sides = (Scripted(layer_of(x, layer)) for x in (case.student, case.teacher))
    terms = terms_of(DETRDistill, DETRDistillConfig, LOGITS, *sides, case.targets)
    theirs = recorded("detrdistill", "logits")[layer]
    close(terms["logits_class"] + entropy(case.teacher.logits[layer]).mean(), theirs["class"])
    close(5 * terms["logits_l1"], theirs["l1"])
    close(2 * terms["logits_giou"], theirs["giou"])


@pytest.mark.parametrize("layer", range(3))
def test_detrdistill_logits_of_tprd(layer):
    case = inputs.detrdistill()
    sides = (Scripted(layer_of(x, layer)) for x in (case.student, case.teacher))
    terms = terms_of(DETRDistill, DETRDistillConfig, LOGITS, *sides, case.targets)
    theirs = recorded("tprd", "detrdistill")["logits"]
    close(terms["logits_class"] + entropy(case.teacher.logits[layer]).mean(), theirs["class"][layer])
    close(terms["logits_l1"], theirs["l1"][layer])
    close(terms["logits_giou"], theirs["giou"][layer], **EPSILON)


def test_detrdistill_quality():
    """Also of the image without targets, where it is the score."""
    case, entries = inputs.detrdistill(), record("detrdistill")["cases"]["quality"]["entries"]
    theirs = recorded("detrdistill", "quality")
    for layer, (logits, boxes) in enumerate(zip(case.teacher.logits, case.teacher.boxes, strict=True)):
        scores, index = logits.sigmoid().flatten(1).topk(entries)
        boxes = boxes.take_along_dim((index // logits.shape[-1])[..., None], 1)
        close(box_quality(scores, boxes, [x["boxes"] for x in case.targets]), theirs[layer])


def test_detrdistill_features():
    """Summed over stages and levels, no weight; the contrastive loss left out in both."""
    case = inputs.detrdistill()
    theirs = recorded("detrdistill", "features")
    entries = record("detrdistill")["cases"]["quality"]["entries"]
    settings = only(DETRDistillConfig, "feature", mask_queries=entries)
    for layers in ([0], [1], [2], [0, 1, 2]):
        teacher = inputs.Predictions(*(x[layers] for x in vars(case.teacher).values()))
        student = inputs.Predictions(*(x[layers] for x in vars(case.student).values()))
        sides = Scripted(student, maps=case.student_maps), Scripted(teacher, maps=case.teacher_maps)
        terms = terms_of(DETRDistill, DETRDistillConfig, settings, *sides, case.targets)
        close(terms["feature"], sum(theirs[layer] for layer in layers))


@pytest.mark.parametrize("assignment", ["teacher", "own"])
@pytest.mark.parametrize("layer", range(3))
def test_detrdistill_group(layer, assignment):
    """ "own" is what the release does, "teacher" what its `loss_teacher_group` does with the assignment it loses on the
    way. Its weights 2, 5, 2 are inside."""
    case = inputs.detrdistill()
    student = Scripted(layer_of(case.student, layer), layer_of(case.group, layer))
    teacher = Scripted(layer_of(case.teacher, layer))
    settings = {**ASSIGN, "assignment": assignment}
    terms = terms_of(DETRDistill, DETRDistillConfig, settings, student, teacher, case.targets)
    theirs = recorded("detrdistill", f"group_{assignment}_assignment")
    for name, weight in (("class", 2), ("l1", 5), ("giou", 2)):
        close(weight * terms[f"assign_{name}"], theirs[name][layer])


def test_the_releases_two_assignments_differ():
    assert recorded("detrdistill", "group_own_assignment") != recorded("detrdistill", "group_teacher_assignment")


@pytest.mark.parametrize("layer", range(3))
def test_detrdistill_group_of_tprd(layer):
    case = inputs.detrdistill()
    student = Scripted(layer_of(case.student, layer), layer_of(case.group, layer))
    teacher = Scripted(layer_of(case.teacher, layer))
    terms = terms_of(DETRDistill, DETRDistillConfig, ASSIGN, student, teacher, case.targets)
    theirs = recorded("tprd", "detrdistill")["group"]
    close(terms["assign_class"], theirs["class"][layer])
    close(terms["assign_l1"], theirs["l1"][layer])
    close(terms["assign_giou"], theirs["giou"][layer], **EPSILON)


# -------------------------------------------------------------------------------------------------------- KD-DETR


def kd_terms(settings, layer=None, image=None):
    """The method on the recorded points, whole or of one layer and image."""
    sides = inputs.kd_detr()
    if layer is not None:
        sides = [layer_of(side, layer, image) for side in sides]
    student, teacher, general_student, general_teacher = sides
    return terms_of(
        KDDetr, KDDetrConfig, settings, Scripted(student, student, general_student), Scripted(teacher, general_teacher)
    )


def test_kd_detr_of_the_release():
    """Boxes as they are. Class: theirs is a sum over queries of means over class slots, ours a mean over queries, by
    weight, of sums over class slots: theirs = ours * (sum of weights) / (number of slots)."""
    terms = kd_terms({"general_points": 7})
    theirs = recorded("kd_detr", "points")
    _, teacher, _, general_teacher = inputs.kd_detr()
    for group, their, of_teacher in (("specific", "auxrf", teacher), ("general", "randomrf", general_teacher)):
        last = of_teacher.logits[-1]
        scale = last.sigmoid().amax(-1).sum() / last.shape[-1]
        close(scale * terms[f"{group}_class"], theirs[f"loss_kd_{their}_cls"])
        close(terms[f"{group}_l1"], theirs[f"loss_kd_{their}_bbox"])
        close(terms[f"{group}_giou"], theirs[f"loss_kd_{their}_giou"])


@pytest.mark.parametrize("layer", range(3))
def test_kd_detr_of_tprd(layer):
    """Layer by layer, boxes summed over coordinates. Theirs normalises the weights image by image and averages images;
    ours normalises them over the batch: theirs is the mean of ours, one image at a time."""
    settings = {"general_points": 7, "layers": "paired", "box_coordinates": "sum"}
    images = [kd_terms(settings, layer, image) for image in range(2)]
    theirs = recorded("tprd", "kd_detr")
    for group in ("specific", "general"):
        for name in ("class", "l1", "giou"):
            ours = sum(terms[f"{group}_{name}"] for terms in images) / len(images)
            close(ours, theirs[group][name][layer], **(EPSILON if name == "giou" else {}))


# ---------------------------------------------------------------------------------------------------------- D3ETR


def heads_of(attention: inputs.Attentions, layer: int, head: int) -> AttentionMaps:
    return AttentionMaps("dense", (attention.self_attention[layer][:, head : head + 1],))


def d3etr_terms(layer: int, head: int) -> dict[str, torch.Tensor]:
    pair, *attentions = inputs.d3etr()
    student, teacher, group = (heads_of(attention, layer, head) for attention in attentions)
    names = [name for name in D3ETRConfig().weights if name.startswith(("adaptive", "fixed")) and "cross" not in name]
    own, others, reply = (layer_of(side, layer) for side in (pair.student, pair.teacher, pair.group))
    return terms_of(
        D3ETR,
        D3ETRConfig,
        only(D3ETRConfig, *names, attention_loss="mse"),
        Scripted(own, reply, reply_attentions=group, self_attentions=student),
        Scripted(others, self_attentions=teacher),
        pair.targets,
    )


@pytest.mark.parametrize("layer", range(3))
def test_d3etr_of_tprd(layer):
    """TPRD's cross-attention is a sum over queries without matching, which ours isn't compared with (methods.md 5.5).
    Its self-attention is compared head by head, ours averages heads first: theirs is the mean of ours, one at a time."""
    pair = inputs.d3etr()[0]
    views = (Scripted(layer_of(x, layer)).view() for x in (pair.student, pair.teacher))
    (match,) = HungarianMatcher()(*views)
    theirs = recorded("tprd", "d3etr")
    assert match.teacher_index.tolist() == theirs["matching"][layer]

    heads = [d3etr_terms(layer, head) for head in range(2)]
    for matching in ("adaptive", "fixed"):
        released = theirs[matching]
        terms = {name: heads[0][f"{matching}_{name}"] for name in ("class", "l1", "giou")}
        close(terms["class"] + entropy(pair.teacher.logits[layer]).mean(), released["class"][layer])
        close(terms["l1"], released["l1"][layer])
        close(terms["giou"], released["giou"][layer], **EPSILON)
        close(sum(x[f"{matching}_self_attention"] for x in heads) / 2, released["self_attention"][layer])


def test_splat_of_tprd():
    """Sum over queries, head by head. TPRD leaves out the half pixel between the edge of the image and the centre of its
    first cell: with points half a cell further right and down ours is the same."""
    sampling, theirs = inputs.sampling(), recorded("tprd", "splat")
    half = torch.tensor([(0.5 / width, 0.5 / height) for height, width in inputs.LEVELS])
    locations = (sampling.locations + half[:, None]).flatten(3, 4)
    points = sampling.weights.shape[-1]
    for head in range(sampling.weights.shape[2]):
        own = slice(head, head + 1)
        weights = sampling.weights[:, :, own].flatten(3)
        ours = splat(weights, locations[:, :, own], [points] * len(inputs.LEVELS), inputs.LEVELS)
        close(ours.sum(1), [image[head] for image in theirs])


# ----------------------------------------------------------------------------------------------------------- QSKD

QSKD_RELEASED = {"masks": "per_layer", "mask_floor": 0.01, "hard_per_target": 9}
"""TPRD's; 9 queries, so that the cap leaves out none."""


def qskd_sides(layer: int) -> tuple[Scripted, Scripted, inputs.Pair]:
    pair, cross_attention = inputs.qskd()
    attention = AttentionMaps("dense", (cross_attention[layer][:, None],))
    student = Scripted(layer_of(pair.student, layer), maps=pair.student_maps)
    teacher = Scripted(layer_of(pair.teacher, layer), maps=pair.teacher_maps, cross_attentions=attention)
    return student, teacher, pair


@pytest.mark.parametrize("layer", range(3))
def test_qskd_selection_of_tprd(layer):
    _, teacher, pair = qskd_sides(layer)
    (match,) = ground_truth_matches(teacher.view(), pair.targets)
    groups = group_queries(pair.teacher.boxes[layer], match, pair.targets, 0.0, per_target=9)
    theirs = recorded("tprd", "qskd")
    for image, (selected, overlap) in enumerate(zip(theirs["selected"][layer], theirs["giou"][layer], strict=True)):
        assert groups.selected[image].nonzero()[:, 0].tolist() == sorted(selected)
        close(groups.overlap[image, selected], overlap, **EPSILON)


@pytest.mark.parametrize("layer", range(3))
def test_qskd_predictions_of_tprd(layer):
    """Means over the pairs of the batch. Their cross-entropy holds the entropy of the paired teacher queries."""
    student, teacher, pair = qskd_sides(layer)
    theirs = recorded("tprd", "qskd")
    terms = terms_of(
        QSKD, QSKDConfig, only(QSKDConfig, "class", "l1", "giou", **QSKD_RELEASED), student, teacher, pair.targets
    )
    paired = [of_teacher for _, of_teacher in theirs["pairs"][layer]]
    taught = torch.cat([logits[index] for logits, index in zip(pair.teacher.logits[layer], paired, strict=True)])
    close(terms["class"] + entropy(taught).mean(), theirs["logits"]["class"][layer])
    close(terms["l1"], theirs["logits"]["l1"][layer])
    close(terms["giou"], theirs["logits"]["giou"][layer], **EPSILON)


@pytest.mark.parametrize("layer", range(3))
def test_qskd_features_of_tprd(layer):
    """The mask has 1 + GIoU as a factor, so detrex's 1e-6 is in it too."""
    student, teacher, pair = qskd_sides(layer)
    settings = only(QSKDConfig, "feature", **QSKD_RELEASED)
    terms = terms_of(QSKD, QSKDConfig, settings, student, teacher, pair.targets)
    close(terms["feature"], recorded("tprd", "qskd")["features"][layer], **EPSILON)


# -------------------------------------------------------------------------------------------------- feature losses


def everywhere(maps: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(maps), *maps.shape[-2:], dtype=torch.bool)


def features_term(loss: str, student, teacher, targets=(), parameters=None, **settings) -> torch.Tensor:
    """The `features` method without the factor it gives the loss."""
    sides = [Scripted(inputs.predictions(0), maps=[side]) for side in (student, teacher)]
    method = Features(configure(FeaturesConfig, {"loss": loss, **settings}), *sides)
    if parameters is not None:
        parameters(method)
    terms = method(sides[0].view(), sides[1].view(), targets, torch.Generator())
    return terms["feature"] / SCALES[loss]


def load_fgd(method: Features) -> None:
    """Their 1x1 convolutions on one cell are our linear maps."""
    weights = inputs.fgd_parameters()
    for side, context in zip("st", method.context[0], strict=True):
        names = {f"conv_mask_{side}": "attention"}
        names |= {f"channel_add_conv_{side}.{i}": f"transform.{i}" for i in (0, 1, 3)}
        own = context.state_dict()
        loaded = {
            f"{ours}.{kind}": weights[f"{theirs}.{kind}"]
            for theirs, ours in names.items()
            for kind in ("weight", "bias")
        }
        context.load_state_dict({name: value.reshape(own[name].shape) for name, value in loaded.items()})


def test_fgd_of_the_release():
    student, teacher, targets = inputs.feature_pair(50, inputs.INSIDE)
    mask = everywhere(student)
    masks = scale_masks([x["boxes"] for x in targets], mask, inclusive=True)
    parts = recorded("fgd", "parts")
    for name in ("alpha", "beta", "gamma"):
        factors = {factor: float(factor == name) for factor in ("alpha", "beta", "gamma")}
        close(fgd(student, teacher, masks, mask, **factors), parts[name])
    close(features_term("fgd", student, teacher, targets, load_fgd), recorded("fgd", "loss"))


def test_fgd_of_tprd():
    """With boxes up to the edge, where TPRD keeps their cells on the map as we do and the release doesn't."""
    student, teacher, targets = inputs.feature_pair(50)
    assert max(float(x["boxes"][:, 0].add(x["boxes"][:, 2] / 2).max()) for x in targets) > 7 / 8
    close(features_term("fgd", student, teacher, targets, load_fgd), recorded("tprd", "fgd"))


def test_clockdistill_memory_is_fgd_without_attention():
    student, teacher, targets = inputs.feature_pair(50, inputs.INSIDE)
    mask = everywhere(student)
    masks = scale_masks([x["boxes"] for x in targets], mask, inclusive=True)
    theirs = recorded("fgd", "without_attention")
    for value, name in zip(squared_sums(student, teacher, masks, mask), ("alpha", "beta"), strict=True):
        close(value, theirs[name])


def test_mgd():
    """The release drops a cell where u > 1 - share, we keep one where u > share: the same for 1 - u. It sums over cells
    and channels, by the images, times 2e-5; TPRD divides the mean by the images once more; ours is the mean."""
    student, teacher, _ = inputs.feature_pair(60)

    def load(method: Features) -> None:
        method.generation[0].layers.load_state_dict(inputs.mgd_parameters())

    with mock.patch.object(torch, "rand", lambda *_, **__: 1 - inputs.mgd_uniform()):
        ours = features_term("mgd", student, teacher, (), load, masked_share=inputs.MASKED_SHARE)
    close(2e-5 * ours * student[0].numel(), recorded("mgd", "loss"))
    close(ours / len(student), recorded("tprd", "mgd"))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd(temperature):
    student, teacher, _ = inputs.feature_pair(65)
    ours = cwd(student, teacher, everywhere(student), temperature=temperature)
    close(ours, recorded("mmrazor", f"cwd_{temperature}"))
    close(features_term("cwd", student, teacher, temperature=temperature), ours)


def test_pkd():
    """Theirs divides by the unbiased deviation of the n values of a channel: (n - 1) / n of ours, which is 1 - r."""
    student, teacher, _ = inputs.feature_pair(65)
    number = student[:, 0].numel()
    ours = pkd(student, teacher, everywhere(student))
    close(ours * (number - 1) / number, recorded("mmrazor", "pkd"))
    close(features_term("pkd", student, teacher), ours)


def test_glore_of_drkd():
    """`graph="released"`, which divides by the cells (their `normalize`). Theirs adds what the adjacency gives, ours
    takes it off; ours has the batch norm's scale only, its statistics are 0 and 1 here and its shift comes on top."""
    maps = inputs.feature_pair(80)[0][:1, :, :3, :3]
    weights = inputs.glore_parameters()
    unit = GloRe(inputs.CHANNELS, released=True)
    linear = weights["gcn.conv1.weight"][..., 0], weights["gcn.conv2.weight"][..., 0]
    unit.load_state_dict(
        {
            **{f"state.{kind}": weights[f"conv_state.{kind}"] for kind in ("weight", "bias")},
            **{f"projection.{kind}": weights[f"conv_proj.{kind}"] for kind in ("weight", "bias")},
            "adjacency.weight": -linear[0],
            "adjacency.bias": -weights["gcn.conv1.bias"],
            "update.weight": linear[1],
            "expansion.weight": weights["conv_extend.weight"],
            "scale": (weights["blocker.weight"] / (1 + 1e-4) ** 0.5)[:, None, None],
        }
    )
    theirs = recorded("glore", "unit")
    close(unit(maps, everywhere(maps)) + weights["blocker.bias"][:, None, None], theirs["result"])
    torch.nn.init.ones_(unit.scale)
    close(unit(maps, everywhere(maps)) - maps, theirs["correction"])


# ---------------------------------------------------------------------------------------------------- distributions


def test_ld():
    """Weight 0.25 of the main region. Theirs divides the sum over edges by 4, ours the mean over edges by the weights:
    theirs = 0.25 * ours * (sum of the boxes' weights)."""
    student, teacher, weight = inputs.distributions()
    edges = (x.unflatten(0, (-1, 4)) for x in (student, teacher))
    ours = edge_kl(*edges, weight[::4], temperature=10.0)
    close(0.25 * ours * weight[::4].sum(), recorded("ld", "main_region"))


def test_go_lsd_of_d_fine():
    case = inputs.refinement()
    matched = torch.zeros(case.boxes.shape[:2], dtype=torch.bool)
    weight = case.teacher_logits.sigmoid().amax(-1)
    for image, (queries, objects) in enumerate(case.pairs):
        matched[image, queries] = True
        weight[image, queries] = iou(case.boxes[image, queries], case.targets[image]["boxes"][objects])
    edges = (x.unflatten(-1, (4, -1)) for x in (case.student_edges, case.teacher_edges))
    close(decoupled_edge_kl(*edges, weight, matched), recorded("d_fine", "ddf"))


# -------------------------------------------------------------------------------------------------------- CL-DETR


def test_cl_detr_targets():
    """Ten best entries, minus those on targets; a query may give several objects, of different classes."""
    logits, boxes, targets = inputs.cl_detr()
    ours = pseudo_targets(logits.sigmoid(), boxes, targets)
    for given, own, theirs in zip(targets, ours, recorded("cl_detr", "targets"), strict=True):
        assert 0 < len(theirs["labels"]) - len(given["boxes"]) < 10  # some are left out
        assert own["class_labels"].tolist() == theirs["labels"]
        close(own["boxes"], theirs["boxes"])
