"""Which queries to compare: asked of both models, among the models' own, or one per object."""

from .groups import QueryGroups, group_queries, pair_by_key
from .points import DistillationPoints, places_of, random_boxes, random_queries, teacher_queries
from .targets import TargetPoints, TargetQueries, decode_targets

__all__ = [
    "DistillationPoints",
    "QueryGroups",
    "TargetPoints",
    "TargetQueries",
    "decode_targets",
    "group_queries",
    "pair_by_key",
    "places_of",
    "random_boxes",
    "random_queries",
    "teacher_queries",
]
