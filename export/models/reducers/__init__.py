"""Post-hoc token reducers: they compress what a frame-wise teacher returns, without training; docs/reducers.md.

grid methods   none, average, max, subsample, wap     before the pixel shuffle; a smaller grid is left
token methods  tome, prumerge, fastvid                behind it, before the projector's MLP; tokens are left, no grid
"""

from __future__ import annotations

from .average import AveragePooling
from .base import GridReducer, TokenReducer, window_of
from .fastvid import FastVID
from .max import MaxPooling
from .none import NoReduction
from .prumerge import PruMerge
from .subsample import Subsampling
from .tome import ToMe
from .wap import WeightedAveragePooling

GRID_REDUCERS: dict[str, type[GridReducer]] = {
    "none": NoReduction,
    "average": AveragePooling,
    "max": MaxPooling,
    "subsample": Subsampling,
    "wap": WeightedAveragePooling,
}
TOKEN_REDUCERS: dict[str, type[TokenReducer]] = {"tome": ToMe, "prumerge": PruMerge, "fastvid": FastVID}
REDUCERS: dict[str, type[GridReducer] | type[TokenReducer]] = {**GRID_REDUCERS, **TOKEN_REDUCERS}

__all__ = ["GRID_REDUCERS", "REDUCERS", "TOKEN_REDUCERS", "GridReducer", "TokenReducer", "window_of"]
