"""Attention maps of two decoders in common terms, and their distance.

A map here is (B, Q, S): how much of its attention each query gives to each cell, averaged over the heads, which have no
order that two models share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..grids import frames_differ, nearest_grid, on_grid
from ..matching import Match
from ..view import AttentionMaps, DetrView
from .reduction import weighted_mean

Shapes = Sequence[tuple[int, int]]
"""(h, w) of every level."""

_LEAST = 1e-3  # rows with less of their attention on the columns compared say nothing about them


def splat(weights: Tensor, locations: Tensor, levels: Sequence[int], shapes: Shapes) -> Tensor:
    """(B, Q, S) sampled attention as a map: every point gives its weight to the four cells around it.

    The bilinear adjoint of ``grid_sample(align_corners=False)``, by which deformable attention reads: a cell's weight is
    how much the head reads of it. What falls outside of the level is lost, as it is there.

    Args:
        weights: (B, Q, H, P).
        locations: (B, Q, H, P, 2), x and y in [0, 1] of the point's level.
        levels: the number of points on each level; their sum is P.
        shapes: of the levels, in the order of ``levels``.
    """
    weights, locations = weights.float() / weights.shape[2], locations.float()
    cells, shares, start = [], [], 0
    for share, place, (height, width) in zip(
        weights.split(tuple(levels), -1), locations.split(tuple(levels), -2), shapes, strict=True
    ):
        x, y = place[..., 0] * width - 0.5, place[..., 1] * height - 0.5
        for right in (0, 1):
            for below in (0, 1):
                column, row = x.detach().floor() + right, y.detach().floor() + below
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
                cells.append((start + index.long()).flatten(2))
                part = share * (1 - (x - column).abs()) * (1 - (y - row).abs())
                shares.append(torch.where(inside, part, 0.0).flatten(2))
        start += height * width
    empty = weights.new_zeros(*weights.shape[:2], start)
    return empty.scatter_add(2, torch.cat(cells, -1), torch.cat(shares, -1))


def attention_map(maps: AttentionMaps | None, layer: int, shapes: Shapes = ()) -> Tensor:
    """(B, Q, S) of one layer, in the order of the memory, or (B, Q, Q) of self-attention.

    Args:
        maps: of a view.
        layer: counted from 0.
        shapes: of the memory; read where the attention is sampled.
    """
    _check_held(maps)
    if maps.kind == "sampled":
        return splat(maps.weights[layer], maps.locations[layer], maps.levels, shapes)
    return maps.weights[layer].float().mean(1)


def attention_of(maps: AttentionMaps | None, layer: int, shapes: Shapes, share: Tensor) -> Tensor:
    """(B, S) the rows of `attention_map` added up, each ``share`` (B, Q) times, without a map of every query."""
    _check_held(maps)
    share = share.float()
    if maps.kind == "sampled":
        weights = (maps.weights[layer].float() * share[..., None, None]).flatten(1, 2)[:, None]
        locations = maps.locations[layer].flatten(1, 2)[:, None]
        return splat(weights, locations, maps.levels, shapes)[:, 0] * share.shape[1]  # all queries as heads of one
    return (share[..., None] * maps.weights[layer].float().mean(1)).sum(1)  # not a product of matrices: autocast


def attention_mask(
    maps: AttentionMaps | None, layer: int, shapes: Shapes, share: Tensor, real: Tensor | None, floor: float
) -> Tensor:
    """(B, S) where the queries look, 1 at the most (QSKD's mask): ``m / max(max m, floor)``.

    m is the mean over the queries with ``share`` (B, Q) > 0 of ``share`` times their attention; all 0 where there are
    none. ``real`` (B, S) leaves padding out.
    """
    mass = attention_of(maps, layer, shapes, share / (share > 0).sum(-1, keepdim=True).clamp(min=1))
    if real is not None:
        mass = mass * real
    return mass / mass.amax(-1, keepdim=True).clamp(min=floor)


def to_grid(
    rows: Tensor, masks: Sequence[Tensor], wanted: Sequence[Tensor], padded: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A map on the levels of another memory, and (S,) which of its cells it says something about (None: all).

    Each level goes, resized and with the attention it has, to the level of the nearest number of cells, as
    `MapProjector` pairs them. Levels of the other memory that get none aren't compared.

    Args:
        rows: (B, Q, S), without gradient.
        masks: (B, h, w) of the levels of ``rows``, True = real.
        wanted: of the other memory.
        padded: images lie otherwise in the two memories, see `on_grid`.
    """
    shapes, sizes = [mask.shape[1:] for mask in masks], [mask.shape[1:] for mask in wanted]
    if shapes == sizes and not padded:
        return rows, None
    onto = [rows.new_zeros(*rows.shape[:2], height * width) for height, width in sizes]
    covered = [False] * len(wanted)
    for level, mask, (height, width) in zip(rows.split([h * w for h, w in shapes], -1), masks, shapes, strict=True):
        nearest = nearest_grid((height, width), sizes)
        # Antialiased: on a coarser grid, plain bilinear weights would leave out the cells between
        moved = on_grid(
            level.unflatten(-1, (height, width)), mask, wanted[nearest], padded=padded, mode="bilinear", antialias=True
        ).flatten(2)
        scale = level.sum(-1, keepdim=True) / moved.sum(-1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
        onto[nearest], covered[nearest] = onto[nearest] + scale * moved, True
    cells = [rows.new_full((h * w,), float(got)).bool() for (h, w), got in zip(sizes, covered, strict=True)]
    return torch.cat(onto, -1), None if all(covered) else torch.cat(cells)


def row_distance(
    student: Tensor,
    teacher: Tensor,
    columns: Tensor | None = None,
    *,
    form: Literal["kl", "mse"] = "kl",
    floor: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """(B, M) distances of paired rows, and (B, M) their weights: 0 where a row has next to nothing on the columns.

    Rows are first normalised to 1 over the columns. "kl" is ``sum_j (t_j + f) log((t_j + f) / (s_j + f))``: Kullback and
    Leibler's divergence of the raised rows, so 0 for equal rows and never negative, and a cell that the student doesn't
    reach costs, and pulls, finitely. "mse" is the mean over the columns of the squared difference (TPRD).

    Args:
        student: (B, M, S).
        teacher: (B, M, S), taken as constants.
        columns: broadcastable to (B, M, S), True = compared (no padding); None: all.
        floor: f, in shares of a row.
    """
    student, teacher = student.float(), teacher.detach().float()
    if columns is not None:
        student, teacher = student * columns, teacher * columns
    of_student, of_teacher = student.sum(-1, keepdim=True), teacher.sum(-1, keepdim=True)
    usable = ((of_student > _LEAST) & (of_teacher > _LEAST))[..., 0].float()
    student, teacher = student / of_student.clamp(min=_LEAST), teacher / of_teacher.clamp(min=_LEAST)
    if form == "kl":
        raised = teacher + floor
        return (raised * (raised.log() - (student + floor).log())).sum(-1), usable
    number = student.shape[-1] if columns is None else columns.expand_as(student).sum(-1).clamp(min=1)
    return (student - teacher).square().sum(-1) / number, usable


def self_attention_loss(
    student: DetrView,
    student_layer: int,
    teacher: DetrView,
    teacher_layer: int,
    match: Match,
    form: Literal["kl", "mse"] = "kl",
) -> Tensor:
    """Mean distance of the paired rows, whose columns are paired too: how paired queries look at each other."""
    own = attention_map(student.self_attentions, student_layer)
    others = attention_map(teacher.self_attentions, teacher_layer)
    own, others = match.student(match.student(own).mT).mT, match.teacher(match.teacher(others).mT).mT
    values, usable = row_distance(own, others, match.weight[:, None] > 0, form=form)
    return weighted_mean(values, usable * match.weight)


@torch.no_grad()
def on_memory_of(student: DetrView, teacher: DetrView, teacher_layer: int) -> tuple[Tensor, Tensor | None]:
    """(B, Q, S) where the teacher's queries look, on the student's memory, and the columns to compare, (B or 1, 1, S).

    Padding and levels that the teacher says nothing about are left out; None: all are compared.
    """
    rows = attention_map(teacher.cross_attentions, teacher_layer, teacher.memory_shapes)
    if teacher.memory_mask is not None:
        rows = rows * teacher.memory_mask[:, None]
    rows, columns = to_grid(rows, teacher.memory_masks(), student.memory_masks(), frames_differ(student, teacher))
    columns = None if columns is None else columns[None, None]
    if student.memory_mask is not None:
        real = student.memory_mask[:, None]
        columns = real if columns is None else columns & real
    return rows, columns


def cross_attention_loss(
    student: DetrView,
    student_layer: int,
    teacher_rows: Tensor,
    columns: Tensor | None,
    match: Match,
    form: Literal["kl", "mse"] = "kl",
    sampled_floor: float = 1e-3,
) -> Tensor:
    """Mean distance of the paired rows over the student's memory.

    Args:
        student: a view of the student's own queries or a replay.
        student_layer: counted from 0.
        teacher_rows: of `on_memory_of`, with ``columns``.
        match: of the student's queries with the teacher's.
        form: see `row_distance`.
        sampled_floor: the floor of its "kl" where the student samples its memory and reaches few cells.
    """
    maps = student.cross_attentions
    _check_held(maps)
    floor = {"floor": sampled_floor} if maps.kind == "sampled" else {}

    def distance() -> tuple[Tensor, Tensor]:
        rows = match.student(attention_map(maps, student_layer, student.memory_shapes))
        return row_distance(rows, match.teacher(teacher_rows), columns, form=form, **floor)

    # Maps of Q x S cells, many of each layer: rather made again in the backward pass than kept
    values, usable = checkpoint(distance, use_reentrant=False)
    return weighted_mean(values, usable * match.weight)


def _check_held(maps: AttentionMaps | None) -> None:
    if maps is None:
        raise ValueError(
            "The view holds no attention maps. A method that reads them names the roles in its `attentions`; "
            "without a trainer, call `adapter.forward(inputs, attentions=True)`."
        )
