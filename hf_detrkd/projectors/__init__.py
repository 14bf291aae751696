"""Everything that owns parameters besides the student. Trained with it, saved beside it, never part of it."""

from .features import GlobalContext, MaskedGeneration
from .maps import MapProjector, MatchedScale, PairedMaps
from .queries import BoxEmbedding, LearnedQueries, QueryProjector, identity_linear
from .relations import GloRe, ObjectRelation, PairFilter, PixelRelation

__all__ = [
    "BoxEmbedding",
    "GloRe",
    "GlobalContext",
    "LearnedQueries",
    "MapProjector",
    "MaskedGeneration",
    "MatchedScale",
    "ObjectRelation",
    "PairFilter",
    "PairedMaps",
    "PixelRelation",
    "QueryProjector",
    "identity_linear",
]
