"""Post-hoc token reducers: they compress what a frame-wise teacher returns, without training.

features (clips, T, 1 + H*W, C), CLS first -> (clips, T', H' * W', C)
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.weighted_average_pool import weighted_average_pool

# The paper's ratios (Appendix A) as blocks of (time, height, width)
WINDOWS: dict[int, tuple[int, int, int]] = {4: (1, 2, 2), 8: (2, 2, 2), 16: (4, 2, 2)}


class Reducer(nn.Module):
    """Cuts a clip's features into blocks of `window` = (time, height, width) tokens; subclasses reduce each to one.

    Raises:
        ValueError: `window` does not divide the grid.
    """

    def __init__(self, size: tuple[int, int, int], window: tuple[int, int, int]):
        super().__init__()
        if any(n % w for n, w in zip(size, window, strict=True)):
            raise ValueError(f"reducer window {list(window)} does not divide the clip's grid {list(size)}")
        (t, h, w), (a, b, c) = size, window
        self.blocks = (t // a, a, h // b, b, w // c, c)
        self.grid = (t // a, h // b, w // c)


class WeightedAveragePooling(Reducer):
    """WAP, equation 1."""

    def forward(self, features: Tensor) -> Tensor:
        out = weighted_average_pool(features, self.blocks)
        return out.reshape(-1, self.grid[0], self.grid[1] * self.grid[2], features.shape[-1])


class AveragePooling(Reducer):
    def forward(self, features: Tensor) -> Tensor:
        channels = features.shape[-1]
        blocks = features[:, :, 1:].reshape(-1, *self.blocks, channels)
        return blocks.mean((2, 4, 6)).reshape(-1, self.grid[0], self.grid[1] * self.grid[2], channels)


class NoReduction(Reducer):
    """Drops CLS and keeps every patch."""

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :, 1:]


REDUCERS: dict[str, type[Reducer]] = {"wap": WeightedAveragePooling, "average": AveragePooling, "none": NoReduction}
