"""Seeded inputs of the recorded values, built alike by ``record.py`` and by ``test_references.py``.

Drawn with Python's own generator: ``random.Random(seed).random()`` is guaranteed to give the same numbers on every
version and platform, which torch's generators are not. Boxes are ``(cx, cy, w, h)`` in [0, 1].
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


class Numbers:
    """A stream of numbers."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = [low + (high - low) * self._random.random() for _ in range(math.prod(shape))]
        return torch.tensor(values).reshape(shape)

    def boxes(self, *shape: int) -> Tensor:
        """Sides of 0.2 to 0.6, entirely inside the image."""
        size = self.uniform(*shape, 2, low=0.2, high=0.6)
        return torch.cat([size / 2 + self.uniform(*shape, 2) * (1 - size), size], dim=-1)

    def attention(self, *shape: int) -> Tensor:
        """Rows that sum to 1."""
        return self.uniform(*shape, low=-2, high=2).softmax(-1)


@dataclass
class Predictions:
    """Of one model: ``logits`` (L, B, Q, K), ``boxes`` (L, B, Q, 4), ``hidden`` (L, B, Q, D)."""

    logits: Tensor
    boxes: Tensor
    hidden: Tensor


def predictions(
    seed: int, *, layers: int = 3, images: int = 2, queries: int = 7, classes: int = 4, width: int = 5
) -> Predictions:
    numbers = Numbers(seed)
    return Predictions(
        logits=numbers.uniform(layers, images, queries, classes, low=-3, high=2),
        boxes=numbers.boxes(layers, images, queries),
        hidden=numbers.uniform(layers, images, queries, width, low=-1, high=1),
    )


def targets(seed: int, counts: tuple[int, ...] = (3, 2), classes: int = 4) -> list[dict[str, Tensor]]:
    """Per image ``class_labels`` (N,) and ``boxes`` (N, 4)."""
    numbers = Numbers(seed)
    return [
        {"class_labels": (numbers.uniform(count) * classes).long(), "boxes": numbers.boxes(count)} for count in counts
    ]


def maps(seed: int, *sizes: tuple[int, int], images: int = 2, channels: int = 5) -> list[Tensor]:
    """One (B, C, h, w) per size."""
    numbers = Numbers(seed)
    return [numbers.uniform(images, channels, *size, low=-1, high=1.5) for size in sizes]


def parameters(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of a module, by name."""
    numbers = Numbers(seed)
    return {name: numbers.uniform(*shape, low=-0.7, high=0.7) for name, shape in shapes.items()}


IMAGE_SIZE = 120, 80
"""Height and width in pixels, for code that works in pixels."""


def pixel_boxes(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy in pixels of `IMAGE_SIZE`."""
    height, width = IMAGE_SIZE
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1) * boxes.new_tensor([width, height, width, height])


# ---------------------------------------------------------------------------------------------- modules with weights

CHANNELS = 8
"""Of the maps of FGD, MGD and GloRe."""


def fgd_parameters(seed: int = 52) -> dict[str, Tensor]:
    """Under the names of yzd-v/FGD's module."""
    half = CHANNELS // 2
    shapes = {}
    for side in "st":
        shapes |= {
            f"conv_mask_{side}.weight": (1, CHANNELS, 1, 1),
            f"conv_mask_{side}.bias": (1,),
            f"channel_add_conv_{side}.0.weight": (half, CHANNELS, 1, 1),
            f"channel_add_conv_{side}.0.bias": (half,),
            f"channel_add_conv_{side}.1.weight": (half, 1, 1),
            f"channel_add_conv_{side}.1.bias": (half, 1, 1),
            f"channel_add_conv_{side}.3.weight": (CHANNELS, half, 1, 1),
            f"channel_add_conv_{side}.3.bias": (CHANNELS,),
        }
    return parameters(seed, shapes)


def mgd_parameters(seed: int = 62) -> dict[str, Tensor]:
    """Of the two 3x3 convolutions, under the names of an ``nn.Sequential``."""
    layer = {"weight": (CHANNELS, CHANNELS, 3, 3), "bias": (CHANNELS,)}
    return parameters(seed, {f"{i}.{name}": shape for i in (0, 2) for name, shape in layer.items()})


def glore_parameters(seed: int = 82, nodes: int = 2, states: int = 4) -> dict[str, Tensor]:
    """Under the names of facebookresearch/GloRe's unit."""
    shapes = {
        "conv_state.weight": (states, CHANNELS, 1, 1),
        "conv_state.bias": (states,),
        "conv_proj.weight": (nodes, CHANNELS, 1, 1),
        "conv_proj.bias": (nodes,),
        "gcn.conv1.weight": (nodes, nodes, 1),
        "gcn.conv1.bias": (nodes,),
        "gcn.conv2.weight": (states, states, 1),
        "conv_extend.weight": (CHANNELS, states, 1, 1),
        "blocker.weight": (CHANNELS,),
        "blocker.bias": (CHANNELS,),
    }
    return parameters(seed, shapes)


# ------------------------------------------------------------------------------------------------ one input per case


@dataclass
class Pair:
    """What a distillation criterion is given; a field that its case doesn't need is empty."""

    student: Predictions
    teacher: Predictions
    group: Predictions
    """The student's answers to the teacher's queries."""
    targets: list[dict[str, Tensor]]
    student_maps: list[Tensor]
    teacher_maps: list[Tensor]


LEVELS = (4, 5), (2, 3)


def detrdistill() -> Pair:
    """One image without targets among three, where the code knows what to do with it."""
    return Pair(
        *(predictions(seed, images=3) for seed in (11, 12, 13)),
        targets(14, (3, 2, 0)),
        maps(15, *LEVELS, images=3),
        maps(16, *LEVELS, images=3),
    )


def kd_detr() -> tuple[Predictions, Predictions, Predictions, Predictions]:
    """Student and teacher on the specific points, student and teacher on the general ones."""
    student, teacher, general_student, general_teacher = (predictions(seed) for seed in (21, 22, 23, 24))
    return student, teacher, general_student, general_teacher


@dataclass
class Attentions:
    """``self_attention`` (L, B, H, Q, Q) and ``cross_attention`` (L, B, Q, S) of one model."""

    self_attention: Tensor
    cross_attention: Tensor


def attentions(seed: int, layers: int = 3, images: int = 2, heads: int = 2, queries: int = 7, tokens: int = 20):
    numbers = Numbers(seed)
    return Attentions(
        numbers.attention(layers, images, heads, queries, queries), numbers.attention(layers, images, queries, tokens)
    )


def d3etr() -> tuple[Pair, Attentions, Attentions, Attentions]:
    """Predictions; attention of the student, the teacher and the student's group on the teacher's queries."""
    pair = Pair(*(predictions(seed) for seed in (31, 32, 33)), targets(34), [], [])
    return pair, attentions(35), attentions(36), attentions(37)


def qskd() -> tuple[Pair, Tensor]:
    """Predictions and one level of memory; the teacher's cross-attention (L, B, Q, S)."""
    pair = Pair(
        *(predictions(seed, queries=9) for seed in (41, 42, 43)), targets(44), maps(45, LEVELS[0]), maps(46, LEVELS[0])
    )
    return pair, attentions(47, queries=9).cross_attention


@dataclass
class Sampling:
    """Sampled cross-attention: ``locations`` (B, Q, H, levels, points, 2) and ``weights`` without the last axis."""

    locations: Tensor
    weights: Tensor


def sampling(seed: int = 38, images: int = 2, queries: int = 3, heads: int = 2, points: int = 3) -> Sampling:
    """Some points lie outside of the image."""
    numbers = Numbers(seed)
    locations = numbers.uniform(images, queries, heads, len(LEVELS), points, 2, low=-0.2, high=1.2)
    weights = numbers.attention(images, queries, heads, len(LEVELS) * points)
    return Sampling(locations, weights.unflatten(-1, (len(LEVELS), points)))


def feature_pair(seed: int, reach: float = 1.0) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """The student's and the teacher's map (2, CHANNELS, 6, 8), and targets that end before ``reach`` of the image."""
    student, teacher = (maps(s, (6, 8), channels=CHANNELS)[0] for s in (seed, seed + 1))
    return student, teacher, [{**image, "boxes": image["boxes"] * reach} for image in targets(seed + 3)]


INSIDE = 0.8
"""FGD's release counts cells beyond the edge of the map to a box that touches the last one; these don't reach it."""


MASKED_SHARE = 0.65


def mgd_uniform(seed: int = 63) -> Tensor:
    """The draw (2, 1, 6, 8) in [0, 1) that says which cells are left out."""
    return Numbers(seed).uniform(2, 1, 6, 8)


def distributions(seed: int = 91, edges: int = 12, bins: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    """Edge logits of student and teacher (edges, bins), and a weight per edge, equal on the four edges of a box."""
    numbers = Numbers(seed)
    student, teacher = (numbers.uniform(edges, bins, low=-3, high=3) for _ in range(2))
    return student, teacher, numbers.uniform(edges // 4).repeat_interleave(4)


@dataclass
class Refinement:
    """What D-FINE's localisation loss reads, for B images and Q queries."""

    student_edges: Tensor
    """(B, Q, 4 * 33)."""
    teacher_edges: Tensor
    teacher_logits: Tensor
    """(B, Q, K)."""
    boxes: Tensor
    """(B, Q, 4) of the student."""
    references: Tensor
    targets: list[dict[str, Tensor]]
    pairs: list[tuple[list[int], list[int]]]
    """Per image the matched queries and their targets."""


def refinement(seed: int = 95, bins: int = 33) -> Refinement:
    numbers = Numbers(seed)
    student, teacher = (numbers.uniform(2, 5, 4 * bins, low=-3, high=3) for _ in range(2))
    return Refinement(
        student,
        teacher,
        numbers.uniform(2, 5, 4, low=-3, high=2),
        numbers.boxes(2, 5),
        numbers.boxes(2, 5),
        targets(seed + 1),
        [([0, 2, 4], [1, 0, 2]), ([1, 3], [1, 0])],
    )


def cl_detr() -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """The old model's logits (B, Q, K) and boxes (B, Q, 4), and targets; some of its boxes lie on targets."""
    old, objects = predictions(71, layers=1, queries=12), targets(72)
    boxes = old.boxes[0].clone()
    shift = boxes.new_tensor([0.01, -0.01, 0.02, 0.0])
    for image, target in enumerate(objects):
        boxes[image, : len(target["boxes"])] = target["boxes"] + shift
    # Queries on targets are among the ten most certain ones
    logits = old.logits[0].clone()
    logits[:, :3, 1] += 3
    return logits, boxes, objects
