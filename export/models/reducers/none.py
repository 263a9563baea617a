"""Drops CLS and keeps every patch."""

from __future__ import annotations

from torch import Tensor

from .base import GridReducer


class NoReduction(GridReducer):
    def forward(self, features: Tensor) -> Tensor:
        return features[:, :, 1:]
