"""Records what the released code of the papers computes on the seeded inputs of ``inputs.py``.

    python tests/references/record.py /path/to/repositories [name ...]

The folder holds clones, or bare git directories, each under ``<owner>+<name>`` or ``<owner>+<name>/repo``. Nothing is
fetched, built or installed: functions and classes are taken by name from a file at a fixed commit (``git show``) and
run with stand-ins for the framework around them. None of that code is part of this repository; ``<name>.json`` holds
the numbers alone, with where they come from.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import datetime
import functools
import json
import math
import re
import subprocess
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union
from unittest import mock

import inputs
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
DIGITS = 9
"""Significant digits kept; float32 has 7."""


class Repository:
    """One repository at one commit, and the names taken from it."""

    def __init__(self, folder: Path, name: str, commit: str):
        place = folder / name.replace("/", "+")
        self.git = place / "repo" if (place / "repo").is_dir() else place
        self.name, self.commit = name, commit
        self.used: dict[str, list[str]] = {}

    def load(self, path: str, names: Iterable[str], into: dict[str, Any]) -> None:
        """Defines top-level functions and classes of a file in ``into``; class decorators (registries) are dropped."""
        names = list(names)
        source = subprocess.run(
            ["git", "-C", str(self.git), "show", f"{self.commit}:{path}"], check=True, capture_output=True, text=True
        ).stdout
        nodes = [node for node in ast.parse(source).body if getattr(node, "name", None) in names]
        missing = set(names) - {node.name for node in nodes}
        if missing:
            raise ValueError(f"{self.name}:{path} has no {sorted(missing)} at {self.commit}")
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                node.decorator_list = []
        exec(compile(ast.Module(nodes, []), f"{self.name}:{path}", "exec"), into)
        self.used.setdefault(path, []).extend(name for name in names if name not in self.used.get(path, []))


def surroundings(**more) -> dict[str, Any]:
    """What the files import, and stand-ins for mmcv, detectron2 and distributed training."""

    def unchanged(*_, **__) -> Callable:
        return lambda function: function

    return {
        "torch": torch,
        "nn": nn,
        "F": functional,
        "copy": copy,
        "math": math,
        "warnings": warnings,
        "functools": functools,
        "partial": functools.partial,
        "linear_sum_assignment": linear_sum_assignment,
        "List": list,
        "Tuple": tuple,
        "mmcv": SimpleNamespace(jit=unchanged),
        "force_fp32": unchanged,
        "reduce_mean": lambda value: value,
        "get_world_size": lambda: 1,
        "is_dist_avail_and_initialized": lambda: False,
        **more,
    }


def numbers(value: Any) -> Any:
    """Tensors as nested lists."""
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, dict):
        return {str(key): numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def by_layer(losses: dict[str, Tensor], name: str, layers: int, key: Callable[[str, int], str]) -> list[Tensor]:
    """One value per decoder layer; the last layer's has no number in its name."""
    return [losses[key(name, layer)] for layer in range(layers - 1)] + [losses[name]]


# --------------------------------------------------------------------------------------------------- DETRDistill


def detrdistill(repository: Repository) -> dict:
    """The head's and the distiller's own code; transformers, samplers of pixels and the contrastive head left out."""
    root = "deformdetr_project/mmdet/"
    scope = surroundings(AnchorFreeHead=object, BaseAssigner=object, BaseDetector=object, BaseSampler=object)
    scope["util_mixins"] = SimpleNamespace(NiceRepr=object)
    take = functools.partial(repository.load, into=scope)
    take(root + "models/losses/utils.py", ["reduce_loss", "weight_reduce_loss", "weighted_loss"])
    take(root + "core/bbox/iou_calculators/iou2d_calculator.py", ["fp16_clamp", "bbox_overlaps"])
    take(root + "core/bbox/transforms.py", ["bbox_cxcywh_to_xyxy", "bbox_xyxy_to_cxcywh"])
    take(root + "core/utils/misc.py", ["multi_apply"])
    take(root + "models/utils/transformer.py", ["inverse_sigmoid"])
    take(root + "models/losses/iou_loss.py", ["giou_loss", "GIoULoss"])
    take(root + "models/losses/smooth_l1_loss.py", ["l1_loss", "L1Loss"])
    take(root + "models/losses/focal_loss.py", ["py_sigmoid_focal_loss", "FocalLoss"])
    take(root + "models/losses/distill_cross_entropy_loss.py", ["binary_cross_entropy", "DistillCrossEntropyLoss"])
    costs = ["BBoxL1Cost", "FocalLossCost", "IoUCost", "DistillCrossEntropyLossCost"]
    take(root + "core/bbox/match_costs/match_cost.py", costs)
    take(root + "core/bbox/assigners/assign_result.py", ["AssignResult"])
    take(root + "core/bbox/samplers/sampling_result.py", ["SamplingResult"])
    take(root + "core/bbox/samplers/pseudo_sampler.py", ["PseudoSampler"])
    scope["build_match_cost"] = lambda cost: cost
    take(root + "core/bbox/assigners/hungarian_assigner.py", ["HungarianAssigner"])
    take(root + "core/bbox/assigners/distill_hungarian_assigner.py", ["DistillHungarianAssigner"])
    take(root + "models/dense_heads/detr_head.py", ["DETRHead"])
    take(root + "models/dense_heads/distill_deformable_detr_head.py", ["DistillDeformableDETRHead"])
    take(root + "distillation/distillers/distiller.py", ["Distiller"])

    case = inputs.detrdistill()
    layers, images, _, classes = case.teacher.logits.shape
    height, width = inputs.IMAGE_SIZE
    metas = [{"img_shape": (height, width, 3), "batch_input_shape": (height, width), "scale_factor": 1.0}] * images
    objects = {
        "gt_bboxes": [inputs.pixel_boxes(target["boxes"]) for target in case.targets],
        "gt_labels": [target["class_labels"] for target in case.targets],
    }

    def head(predictions: inputs.Predictions):
        """With settings of cfg_distill/deformable_detr/deformable_detr_r50_16x2_50e_coco_student.py."""
        result = scope["DistillDeformableDETRHead"].__new__(scope["DistillDeformableDETRHead"])
        overlap = scope["IoUCost"](iou_mode="giou", weight=2.0)
        distance = scope["BBoxL1Cost"](weight=5.0, box_format="xywh")
        result.__dict__.update(
            num_classes=classes,
            cls_out_channels=classes,
            bg_cls_weight=0,
            sync_cls_avg_factor=False,
            as_two_stage=False,
            with_box_refine=False,
            test_cfg=SimpleNamespace(max_per_img=MASK_QUERIES),
            loss_cls=scope["FocalLoss"](use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
            loss_bbox=scope["L1Loss"](loss_weight=5.0),
            loss_iou=scope["GIoULoss"](loss_weight=2.0),
            loss_cls_distill=scope["DistillCrossEntropyLoss"](use_sigmoid=True, loss_weight=1.0),
            loss_bbox_distill=scope["L1Loss"](loss_weight=5.0),
            loss_iou_distill=scope["GIoULoss"](loss_weight=2.0),
            assigner=scope["HungarianAssigner"](scope["FocalLossCost"](weight=2.0), distance, overlap),
            distill_assigner=scope["DistillHungarianAssigner"](
                scope["DistillCrossEntropyLossCost"](weight=1.0), distance, overlap
            ),
            sampler=scope["PseudoSampler"](),
            distill_sampler=scope["PseudoSampler"](),
            # A decoder that gives the predictions it was told, all from a reference in the middle, whose logit is 0
            query_embedding=SimpleNamespace(weight=None),
            positional_encoding=lambda mask: None,
            transformer=lambda *_, **__: (
                predictions.hidden.transpose(1, 2),
                torch.full((images, 1, 2), 0.5),
                [torch.full((images, 1, 2), 0.5)] * layers,
                None,
                None,
            ),
            cls_branches=[lambda _, layer=layer: predictions.logits[layer] for layer in range(layers)],
            reg_branches=[
                lambda _, layer=layer: scope["inverse_sigmoid"](predictions.boxes[layer]) for layer in range(layers)
            ],
        )
        return result

    teacher, student, group = (head(side) for side in (case.teacher, case.student, case.group))
    answers = teacher.simple_test_teacher_distill(case.teacher_maps, metas, **objects)
    boxes, scores, _, _, _, quality, _, assignment = answers

    losses, indices = [], []
    for layer in range(layers):
        result = student.loss_single_distill(
            case.student.logits[layer], case.student.boxes[layer], *objects.values(), boxes[layer], scores[layer], metas
        )
        losses.append(dict(zip(("class", "l1", "giou"), result[3:6], strict=True)))
        indices.append(result[6])

    distiller = scope["Distiller"].__new__(scope["Distiller"])
    distiller.teacher = SimpleNamespace(eval=lambda: None, extract_feat=lambda _: case.teacher_maps, bbox_head=teacher)
    distiller.student = SimpleNamespace(
        forward_train_distill=lambda *_, **__: ({}, None, None, case.student_maps), bbox_head=group
    )
    distiller.is_layer_by_layer_distill, distiller.use_teacher_group, distiller.cl_head = True, True, None
    released = distiller.forward_train(torch.zeros(images, 3, height, width), metas, **objects)
    fixed = group.loss_teacher_group(
        case.group.logits, case.group.boxes, None, None, *objects.values(), metas, all_stage_tea_assign_res=assignment
    )

    def group_terms(losses: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        names = {"class": "cls", "l1": "bbox", "giou": "iou"}
        key = "d{1}.{0}".format
        return {ours: by_layer(losses, f"teacher_query_loss_{name}", layers, key) for ours, name in names.items()}

    return {
        "matching": {
            "of": "DistillDeformableDETRHead.loss_single_distill: teacher query of every student query, [layer][image]",
            "values": indices,
        },
        "logits": {
            "of": "DistillDeformableDETRHead.loss_single_distill with the weights 1, 5, 2 of the config, [layer]",
            "values": losses,
        },
        "quality": {
            "of": "DistillDeformableDETRHead.simple_test_teacher_distill: score x IoU of the entries with the highest "
            "scores, [layer][image]",
            "entries": MASK_QUERIES,
            "values": quality,
        },
        "features": {
            "of": "Distiller.forward_train: stage{layer}_relation_distill_loss without the contrastive head, [layer]",
            "values": [released[f"stage{layer}_relation_distill_loss"] for layer in range(layers)],
        },
        "group_own_assignment": {
            "of": "DistillDeformableDETRHead.forward_train_teacher_group as released, weights 2, 5, 2, [layer]",
            "values": group_terms(released),
        },
        "group_teacher_assignment": {
            "of": "DistillDeformableDETRHead.loss_teacher_group given the teacher's assignment, weights 2, 5, 2, [layer]",
            "values": group_terms(fixed),
        },
    }


MASK_QUERIES = 6
"""``test_cfg.max_per_img`` of the teacher; 100 in the config, of 300 queries."""


# -------------------------------------------------------------------------------------------------------- KD-DETR


def as_outputs(predictions: inputs.Predictions, **more: Callable[[int], Any]) -> dict:
    """The dict of DETR's criteria: last layer, and the others in ``aux_outputs``."""
    layers = [
        {"pred_logits": logits, "pred_boxes": boxes, **{key: value(layer) for key, value in more.items()}}
        for layer, (logits, boxes) in enumerate(zip(predictions.logits, predictions.boxes, strict=True))
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def kd_detr(repository: Repository) -> dict:
    scope, boxes = surroundings(), surroundings(**BOX_AREA)
    repository.load("util/box_ops.py", ["box_cxcywh_to_xyxy", "box_iou", "generalized_box_iou"], boxes)
    scope["box_ops"] = SimpleNamespace(**boxes)
    repository.load("models/DAB_DETR/kd_loss.py", ["KDCriterion"], scope)
    student, teacher, general_student, general_teacher = map(as_outputs, inputs.kd_detr())
    criterion = scope["KDCriterion"](8, 8, aux_refpoints=True, random_refpoints=True)
    losses = criterion({"auxrf": student, "randomrf": general_student}, {**teacher, "randomrf": general_teacher})
    return {
        "points": {
            "of": "KDCriterion.forward, sums over the student's layers, unweighted; auxrf = specific, randomrf = general",
            "values": losses,
        }
    }


def _box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


BOX_AREA = {"box_area": _box_area}
"""torchvision's, which needs its compiled part."""


# ------------------------------------------------------------------------------------------------ the TPRD toolbox


def tprd(repository: Repository) -> dict:
    scope = surroundings(**BOX_AREA)
    take = functools.partial(repository.load, into=scope)
    take("detrex/layers/box_ops.py", ["box_cxcywh_to_xyxy", "box_xyxy_to_cxcywh", "box_iou", "generalized_box_iou"])
    take("detrex/modeling/criterion/criterion.py", ["sigmoid_focal_loss", "SetCriterion"])
    take("detrex/modeling/matcher/matcher.py", ["HungarianMatcher"])
    project = "projects/deformable_detr/"

    def criterion(method: str, classes: int, losses: tuple[str, ...] = ("class", "boxes"), **more):
        part = dict(scope)
        repository.load(f"{project}{method}/distill_criterion.py", ["DistillCriterion"], part)
        if method != "KD_DETR":
            matcher = ["distill_classification_cost", "DistillHungarianMatcher"]
            repository.load(f"{project}{method}/distill_matcher.py", matcher, part)
            more["distill_matcher"] = part["DistillHungarianMatcher"](1, 5, 2)
        ground_truth = part["HungarianMatcher"](2.0, 5.0, 2.0)
        result = part["DistillCriterion"](
            num_classes=classes, matcher=ground_truth, weight_dict={}, losses=list(losses), **more
        )
        return result

    def labelled(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [{"labels": target["class_labels"], "boxes": target["boxes"]} for target in targets]

    def terms(losses: dict[str, Tensor], prefix: str, layers: int, names: dict[str, str]) -> dict[str, list[Tensor]]:
        key = "{}_{}".format
        return {ours: by_layer(losses, prefix + name, layers, key) for ours, name in names.items()}

    prediction = {"class": "loss_class", "l1": "loss_bbox", "giou": "loss_giou"}
    cases = {}

    student, teacher, general_student, general_teacher = map(as_outputs, inputs.kd_detr())
    losses = criterion("KD_DETR", 4)(
        {"auxiliary_predictions": general_student, "teacher_predictions": student},
        {**teacher, "auxiliary_predictions": general_teacher},
    )
    cases["kd_detr"] = {
        "of": f"{project}KD_DETR DistillCriterion.forward, unweighted, [layer]",
        "values": {
            "specific": terms(losses, "teacher_", 3, prediction),
            "general": terms(losses, "auxilary_", 3, prediction),
        },
    }

    pair = inputs.detrdistill()
    student, teacher, group = map(as_outputs, (pair.student, pair.teacher, pair.group))
    distill = criterion("DETRDistill", 4)
    extra = {"features": pair.teacher_maps, "all_stage_cls_iou_score": [], "all_stage_weight_query": []}
    losses = distill(
        {**student, "teacher_predictions": group, "features": pair.student_maps},
        {**teacher, **extra},
        labelled(pair.targets),
    )
    cases["detrdistill"] = {
        "of": f"{project}DETRDistill DistillCriterion.forward, unweighted, [layer]; group = the student's answers to "
        "the teacher's queries under the teacher's assignment",
        "values": {
            "logits": terms(losses, "distill_", 3, prediction),
            "group": terms(losses, "teacher_", 3, prediction),
        },
    }

    pair, of_student, of_teacher, of_group = inputs.d3etr()

    def attended(predictions: inputs.Predictions, attention: inputs.Attentions) -> dict:
        return as_outputs(
            predictions,
            self_attn_maps=lambda layer: attention.self_attention[layer],
            # Its maps are the sums over queries, which our matched rows are not compared with
            cross_attn_maps=lambda layer: attention.cross_attention[layer].sum(1, keepdim=True),
        )

    sides = (pair.student, of_student), (pair.teacher, of_teacher), (pair.group, of_group)
    student, teacher, group = (attended(*side) for side in sides)
    distill = criterion("D3DETR", 4, ("class", "boxes", "attn"))
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):  # its index of the fixed matching asks for a GPU
        losses = distill({**student, "teacher_predictions": group}, teacher, labelled(pair.targets))
    names = {**prediction, "self_attention": "loss_self_attn"}
    order = [*student["aux_outputs"], student], [*teacher["aux_outputs"], teacher]
    cases["d3etr"] = {
        "of": f"{project}D3DETR DistillCriterion.forward, unweighted, [layer]; matching = teacher query of every "
        "student query, [layer][image]",
        "values": {
            "matching": [
                [teacher for _, teacher in distill.distill_matcher(*layer)] for layer in zip(*order, strict=True)
            ],
            "adaptive": terms(losses, "distill_", 3, names),
            "fixed": terms(losses, "teacher_", 3, names),
        },
    }

    part = dict(scope)
    repository.load(f"{project}D3DETR/attention.py", ["attn_map_to_flat_grid"], part)
    sampling = inputs.sampling()
    shapes = torch.tensor(inputs.LEVELS)
    start = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    grid = part["attn_map_to_flat_grid"](shapes, start, sampling.locations[:, None], sampling.weights[:, None])[:, 0]
    cases["splat"] = {
        "of": f"{project}D3DETR/attention.py attn_map_to_flat_grid: sum over queries, [image][head][token]",
        "values": grid,
    }

    pair, cross_attention = inputs.qskd()
    memory = {"student": pair.student_maps[0], "teacher": pair.teacher_maps[0]}
    memory = {side: value.flatten(2).mT for side, value in memory.items()}
    student, teacher = map(as_outputs, (pair.student, pair.teacher))
    distill = criterion("QSKD", 4)
    objects = labelled(pair.targets)
    losses = distill(dict(student), dict(teacher), objects)
    layers = zip([*student["aux_outputs"], student], [*teacher["aux_outputs"], teacher], strict=True)
    pairs, selected, overlap = zip(*(distill.get_teacher_student_matching(*x, objects) for x in layers), strict=True)
    features = distill.compute_target_aware_loss(
        {"features": memory["student"]},
        {"features": memory["teacher"], "cross_attn_maps": cross_attention},
        selected,
        overlap,
    )
    cases["qskd"] = {
        "of": f"{project}QSKD DistillCriterion.forward, unweighted, [layer]; pairs (student, teacher) and the teacher's "
        "selected queries of get_teacher_student_matching, [layer][image]; features = compute_target_aware_loss with "
        "the selections in the order of the layers (forward begins with the last)",
        "values": {
            "pairs": pairs,
            "selected": selected,
            "giou": overlap,
            "logits": terms(losses, "distill_", 3, prediction),
            "features": by_layer(features, "target_aware_loss", 3, "{}_{}".format),
        },
    }

    part = dict(scope, init=nn.init)
    repository.load(f"{project}FGD/distill_criterion.py", ["FeatureLoss"], part)
    module = part["FeatureLoss"](inputs.CHANNELS, inputs.CHANNELS)
    module.load_state_dict(inputs.fgd_parameters())
    cases["fgd"] = {
        "of": f"{project}FGD FeatureLoss.forward with its default weights",
        "values": module(*inputs.feature_pair(50)),
    }

    part = dict(scope)
    repository.load(f"{project}MGD/distill_criterion.py", ["DistillCriterion"], part)
    settings = {"num_classes": 4, "matcher": None, "weight_dict": {}}
    channels = inputs.CHANNELS
    module = part["DistillCriterion"](inputs.MASKED_SHARE, channels, channels, 1, **settings)
    module.generation[0].load_state_dict(inputs.mgd_parameters())
    nn.init.dirac_(module.align[0].weight)
    nn.init.zeros_(module.align[0].bias)
    own, others, _ = inputs.feature_pair(60)
    with drawn(inputs.mgd_uniform()):
        value = module.get_dis_loss(own, others, 0)
    cases["mgd"] = {
        "of": f"{project}MGD DistillCriterion.get_dis_loss with the identity as `align`",
        "values": value,
    }
    return cases


def drawn(values: Tensor):
    """While it is open, torch.rand gives these values."""
    return mock.patch.object(torch, "rand", lambda *_, **__: values)


# -------------------------------------------------------------------------------------------------- feature losses


def fgd(repository: Repository) -> dict:
    scope = surroundings(constant_init=lambda *_, **__: None, kaiming_init=lambda *_, **__: None)
    repository.load("mmdet/distillation/losses/fgd.py", ["FeatureLoss"], scope)
    student, teacher, objects = inputs.feature_pair(50, inputs.INSIDE)
    boxes = [inputs.pixel_boxes(target["boxes"]) for target in objects]
    metas = [{"img_shape": (*inputs.IMAGE_SIZE, 3)}] * len(boxes)
    module = scope["FeatureLoss"](inputs.CHANNELS, inputs.CHANNELS, "fgd")
    module.load_state_dict(inputs.fgd_parameters())

    def only(**weights) -> Tensor:
        for name in ("alpha", "beta", "gamma", "lambda"):
            setattr(module, f"{name}_fgd", weights.get(name, 0.0))
        return module(student, teacher, boxes, metas)

    parts = {name: only(**{name: 1.0}) for name in ("alpha", "beta", "gamma", "lambda")}
    released = only(alpha=1e-3, beta=5e-4, gamma=1e-3, **{"lambda": 5e-6})
    ones = torch.ones(2, 6, 8), torch.ones(2, inputs.CHANNELS)
    with mock.patch.object(module, "get_attention", lambda *_: ones):
        plain = {name: only(**{name: 1.0}) for name in ("alpha", "beta")}
    return {
        "loss": {"of": "FeatureLoss.forward with its default weights", "values": released},
        "parts": {"of": "FeatureLoss.forward with one weight 1 and the others 0", "values": parts},
        "without_attention": {
            "of": "FeatureLoss.forward, get_attention replaced by ones: the masked squared error that CLoCKDistill "
            "starts from, objects (alpha) and background (beta)",
            "values": plain,
        },
    }


def mgd(repository: Repository) -> dict:
    scope = surroundings()
    repository.load("det/mmdet/distillation/losses/mgd.py", ["FeatureLoss"], scope)
    student, teacher, _ = inputs.feature_pair(60)
    module = scope["FeatureLoss"](inputs.CHANNELS, inputs.CHANNELS, "mgd", lambda_mgd=inputs.MASKED_SHARE)
    module.generation.load_state_dict(inputs.mgd_parameters())
    with drawn(inputs.mgd_uniform()):
        value = module(student, teacher)
    return {"loss": {"of": "FeatureLoss.forward with alpha 2e-5, its default", "values": value}}


def mmrazor(repository: Repository) -> dict:
    scope = surroundings(Union=Union, Tuple=tuple)
    repository.load("mmrazor/models/losses/cwd.py", ["ChannelWiseDivergence"], scope)
    repository.load("mmrazor/models/losses/pkd_loss.py", ["PKDLoss"], scope)
    student, teacher, _ = inputs.feature_pair(65)
    return {
        f"cwd_{tau}": {
            "of": f"ChannelWiseDivergence.forward, tau={tau}",
            "values": scope["ChannelWiseDivergence"](tau=tau)(student, teacher),
        }
        for tau in (1.0, 4.0)
    } | {"pkd": {"of": "PKDLoss.forward", "values": scope["PKDLoss"]()(student, teacher)}}


def glore(repository: Repository) -> dict:
    scope = surroundings()
    names = ["GCN", "GloRe_Unit", "GloRe_Unit_2D"]
    repository.load("network/global_reasoning_unit.py", names, scope)
    maps = inputs.feature_pair(80)[0][:1, :, :3, :3]
    unit = scope["GloRe_Unit_2D"](inputs.CHANNELS, 2, normalize=True)
    unit.load_state_dict(inputs.glore_parameters(), strict=False)  # statistics of the batch norm stay 0 and 1
    unit.eval()
    extended = []
    unit.conv_extend.register_forward_hook(lambda module, given, result: extended.append(result))
    with torch.no_grad():
        result = unit(maps.contiguous())
    return {
        "unit": {
            "of": "GloRe_Unit_2D(normalize=True) in evaluation, and what enters its batch norm",
            "values": {"result": result, "correction": extended[0]},
        }
    }


# ---------------------------------------------------------------------------------------------------- distributions


def ld(repository: Repository) -> dict:
    scope = surroundings()
    repository.load("mmdet/models/losses/utils.py", ["reduce_loss", "weight_reduce_loss", "weighted_loss"], scope)
    names = ["knowledge_distillation_kl_div_loss", "KnowledgeDistillationKLDivLoss"]
    repository.load("mmdet/models/losses/kd_loss.py", names, scope)
    student, teacher, weight = inputs.distributions()
    module = scope["KnowledgeDistillationKLDivLoss"](loss_weight=0.25, T=10)
    return {
        "main_region": {
            "of": "KnowledgeDistillationKLDivLoss.forward, T=10, loss_weight=0.25, weights and avg_factor=4 as LDHead "
            "gives them",
            "values": module(student, teacher, weight=weight, avg_factor=4.0),
        }
    }


def d_fine(repository: Repository) -> dict:
    scope = surroundings(**BOX_AREA)
    boxes = ["box_cxcywh_to_xyxy", "box_xyxy_to_cxcywh", "box_iou"]
    repository.load("src/zoo/dfine/box_ops.py", boxes, scope)
    repository.load("src/zoo/dfine/dfine_utils.py", ["weighting_function", "translate_gt", "bbox2distance"], scope)
    repository.load("src/zoo/dfine/dfine_criterion.py", ["DFINECriterion"], scope)
    case = inputs.refinement()
    criterion = scope["DFINECriterion"](None, {}, ["local"], num_classes=case.teacher_logits.shape[-1])
    losses = criterion.loss_local(
        {
            "pred_corners": case.student_edges,
            "teacher_corners": case.teacher_edges,
            "teacher_logits": case.teacher_logits.clone(),
            "pred_boxes": case.boxes,
            "ref_points": case.references,
            "up": torch.tensor([0.5]),
            "reg_scale": torch.tensor([4.0]),
        },
        [{"labels": target["class_labels"], "boxes": target["boxes"]} for target in case.targets],
        [tuple(map(torch.tensor, pairs)) for pairs in case.pairs],
        num_boxes=5,
    )
    return {"ddf": {"of": "DFINECriterion.loss_local, loss_ddf", "values": losses["loss_ddf"]}}


# ------------------------------------------------------------------------------------------------------- CL-DETR


def cl_detr(repository: Repository) -> dict:
    scope, box_scope = surroundings(), surroundings(**BOX_AREA)
    repository.load("util/box_ops.py", ["box_cxcywh_to_xyxy", "box_iou"], box_scope)
    scope["box_ops"] = SimpleNamespace(**box_scope)
    repository.load("models/deformable_detr.py", ["PostProcess"], scope)
    scope.update(Iterable=Iterable, utils=mock.MagicMock(), math=math)
    logits, boxes, objects = inputs.cl_detr()
    targets = [
        {"labels": x["class_labels"], "boxes": x["boxes"], "orig_size": torch.tensor(inputs.IMAGE_SIZE)}
        for x in objects
    ]
    scope["data_prefetcher"] = lambda *_, **__: SimpleNamespace(next=lambda: (None, targets))
    repository.load("engine.py", ["train_one_epoch_incremental"], scope)

    class Criterion(nn.Module):
        """Remembers the targets it was given last and ends the epoch there."""

        ref_weight_dict: dict = {}

        def forward(self, outputs, targets, enable_aux=True):
            self.targets = targets
            if enable_aux:
                raise StopIteration
            return {}

    def old(_):
        return {"pred_logits": logits, "pred_boxes": boxes}

    model, criterion, steps = nn.Module(), Criterion(), mock.MagicMock()
    model.forward = old
    steps.__len__.return_value = 1
    scope["utils"].MetricLogger.return_value.log_every = lambda rows, *_: rows
    with contextlib.suppress(StopIteration):
        scope["train_one_epoch_incremental"](
            model, model, 1.0, criterion, {"bbox": scope["PostProcess"]()}, steps, None, None, 0
        )
    return {
        "targets": {
            "of": "train_one_epoch_incremental and PostProcess.forward: the targets that reach the criterion, ground "
            "truth first, [image]",
            "values": [{"labels": x["labels"], "boxes": x["boxes"]} for x in criterion.targets],
        }
    }


SOURCES: dict[str, tuple[Callable[[Repository], dict], str, str]] = {
    "detrdistill": (detrdistill, "BIVLab-USTC/DETRDistill", "b5ee33d79f8ebc87d8f4dee335a163fae0642536"),
    "kd_detr": (kd_detr, "Myleswork/KD-DETR", "e7dfccb880808f621b73060dd4b6758a75c70496"),
    "tprd": (tprd, "xingyitong1/TPRD", "bb8ed016db5ba0b6e52d8b5e7c4ff29d55a8e39f"),
    "fgd": (fgd, "yzd-v/FGD", "c03a6cf3b3cb3cbfd5554dbf4766e7135747d22d"),
    "mgd": (mgd, "yzd-v/MGD", "2c9da0b28625eb948db57afc02c824452c3910fe"),
    "mmrazor": (mmrazor, "open-mmlab/mmrazor", "90c7af1fdf35a606a2fceaaeb4b6be2f0dac4eb7"),
    "glore": (glore, "facebookresearch/GloRe", "9c6a7340ebb44a66a3bf1945094fc685fb7b730d"),
    "ld": (ld, "HikariTJU/LD", "4287990ca27f51f6f15dc66d28bb420a053c307e"),
    "d_fine": (d_fine, "Peterande/D-FINE", "4a1f73a8bcfac736a88abde9596d87f116d780a7"),
    "cl_detr": (cl_detr, "yaoyao-liu/CL-DETR", "af36983303838bfc5f4ec0690b47026831e548ca"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repositories", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SOURCES)}; all without")
    arguments = parser.parse_args()
    for name in arguments.names or SOURCES:
        function, repository, commit = SOURCES[name]
        source = Repository(arguments.repositories, repository, commit)
        cases = function(source)
        record = {
            "repository": repository,
            "commit": commit,
            "files": source.used,
            "command": f"python tests/references/record.py REPOSITORIES {name}",
            "inputs": "tests/references/inputs.py",
            "recorded": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "cases": numbers(cases),
        }
        text = json.dumps(record, indent=1)
        # The innermost lists in one line
        text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{name}: {len(cases)} cases")


if __name__ == "__main__":
    main()
