"""InternVL's projector: pixel shuffle, then LayerNorm, Linear, GELU, Linear (`mlp1` in its checkpoints).

(units, H*W, C) --shuffle s--> (units, H/s * W/s, C*s*s) --MLP--> (units, H/s * W/s, D_llm)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def pixel_shuffle(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Gathers each factor x factor square of tokens into the channels of one, rows before columns before channels.

    x (units, H*W, C) -> (units, H/s * W/s, s*s*C). InternVL's `ps_version` v2.
    """
    (h, w), s, channels = grid, factor, x.shape[-1]
    x = x.reshape(-1, h // s, s, w // s, s, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, (h // s) * (w // s), s * s * channels)


class Projector(nn.Module):
    """
    Raises:
        ValueError: `shuffle` does not divide the grid.
    """

    def __init__(self, input_size: int, output_size: int, grid: tuple[int, int], shuffle: int):
        super().__init__()
        if grid[0] % shuffle or grid[1] % shuffle:
            raise ValueError(f"pixel shuffle {shuffle} does not divide the grid {list(grid)}")
        self.grid, self.shuffle = grid, shuffle
        self.norm = nn.LayerNorm(input_size * shuffle**2, eps=1e-5)
        self.fc1 = nn.Linear(input_size * shuffle**2, output_size)
        self.fc2 = nn.Linear(output_size, output_size)

    @property
    def tokens(self) -> int:
        """Tokens that come out of one unit."""
        return self.grid[0] * self.grid[1] // self.shuffle**2

    def gather(self, x: Tensor) -> Tensor:
        """The pixel shuffle. x (units, H*W, C) -> (units, H/s * W/s, s*s*C)"""
        return pixel_shuffle(x, self.grid, self.shuffle)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP, token by token. x (..., s*s*C), gathered -> (..., D_llm)"""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))
