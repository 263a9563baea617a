"""WAP, LiteFrame's own (equation 1): each block averaged with weights from the CLS tokens of its frames."""

from __future__ import annotations

from torch import Tensor

from ...ops.weighted_average_pool import weighted_average_pool
from .base import GridReducer


class WeightedAveragePooling(GridReducer):
    def forward(self, features: Tensor) -> Tensor:
        return self.flatten(weighted_average_pool(features, self.blocks))
