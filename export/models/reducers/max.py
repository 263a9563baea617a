"""The largest value of each channel in each block."""

from __future__ import annotations

from torch import Tensor

from .base import GridReducer


class MaxPooling(GridReducer):
    def forward(self, features: Tensor) -> Tensor:
        return self.flatten(self.cut(features).amax((2, 4, 6)))
