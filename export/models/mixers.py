"""How frames of a clip mix in the rows of the paper's Table 2 that LiteFrame is compared with.

    TempAttn    a whole transformer block over the time steps of each token        TemporalAttention
    TempConv    x + conv(norm(x)) over time, every channel into every channel      DenseTemporalConv
                and down-sampling by such convolutions                             DenseStridedConv

LiteFrame's own, depth-wise, is in liteframe.py; SpatioTempAttn is the attention of vit.py over several frames at once.
The paper gives each one's name, parameters and compute, not its form; docs/variants.md says what was assumed. All are
written as products with a matrix of weights, so quantisation and compilers see linear layers. CLS goes through like any
token, and the mixers begin as the identity: a fresh student equals its frame-wise teacher.
"""

from __future__ import annotations

import math

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vit import Block, ViTConfig, build_norm


class TemporalAttention(nn.Module):
    """A pre-norm block without layer scale whose sequences are the time steps of one token of one clip."""

    def __init__(self, config: ViTConfig, time_steps: int):
        super().__init__()
        self.time_steps = time_steps
        self.block = Block(msgspec.structs.replace(config, layer_scale=False))
        for layer in (self.block.attn.proj, self.block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (clips * T, N, C) -> (clips * T, N, C)"""
        tokens, size = x.shape[1:]
        x = x.reshape(-1, self.time_steps, tokens, size).transpose(1, 2).reshape(-1, self.time_steps, size)
        x = self.block(x).reshape(-1, tokens, self.time_steps, size).transpose(1, 2)
        return x.reshape(-1, tokens, size)


class DenseTemporalConv(nn.Module):
    """x + conv(norm(x)), over the time steps of each token; zero-padded, so clips never meet.

    The weights of tap i are columns i * C to (i + 1) * C of `conv`, whose input is the window's steps side by side.
    """

    def __init__(self, config: ViTConfig, kernel: int, time_steps: int):
        super().__init__()
        size = config.hidden_size
        self.kernel, self.time_steps = kernel, time_steps
        self.norm = build_norm(config.norm, size, config.norm_eps)
        self.conv = nn.Linear(kernel * size, size)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (clips * T, N, C) -> (clips * T, N, C)"""
        tokens, size = x.shape[1:]
        steps = self.norm(x).reshape(-1, self.time_steps, tokens, size)
        padded = F.pad(steps, (0, 0, 0, 0, self.kernel // 2, self.kernel // 2))
        windows = torch.cat([padded[:, i : i + self.time_steps] for i in range(self.kernel)], dim=-1)
        return x + self.conv(windows).reshape(-1, tokens, size)


class DenseStridedConv(nn.Module):
    """Blocks of `stride` positions over time, height and width become one, every channel of each into every channel.

    CLS, which has no place in the grid, has a convolution of its own over the time stride. Both start as the mean.
    """

    def __init__(self, size: int, grid: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.grid, self.stride = grid, stride
        self.conv, self.cls = (nn.Linear(n * size, size) for n in (math.prod(stride), stride[0]))
        for layer in (self.conv, self.cls):
            n = layer.in_features // size
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight.copy_(torch.eye(size).repeat(1, n) / n)

    def forward(self, x: Tensor) -> Tensor:
        """x (clips * T, 1 + H*W, C) -> (clips * T', 1 + H'*W', C)"""
        (t, h, w), (st, sh, sw), size = self.grid, self.stride, x.shape[-1]
        clips = x.reshape(-1, t, 1 + h * w, size)
        cls = self.cls(clips[:, :, 0].reshape(-1, 1, st * size))  # (clips * T', 1, C)
        patches = clips[:, :, 1:].reshape(-1, t // st, st, h // sh, sh, w // sw, sw, size)
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, (h // sh) * (w // sw), st * sh * sw * size)
        return torch.cat([cls, self.conv(patches)], dim=1)
