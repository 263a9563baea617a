"""The mean of each block."""

from __future__ import annotations

from torch import Tensor

from .base import GridReducer


class AveragePooling(GridReducer):
    def forward(self, features: Tensor) -> Tensor:
        return self.flatten(self.cut(features).mean((2, 4, 6)))
