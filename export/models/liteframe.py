"""The LiteFrame student (§4.1, §5.1): a ViT whose frames mix through time and whose grid shrinks on the way.

    clip (4, 32, 32) --blocks 1-4--> --[2,2,2]--> (2, 16, 16) --blocks 5-8--> --[2,1,1]--> (1, 16, 16) --blocks 9-12-->
    --head--> 256 tokens a clip of the teacher's width

Every block in which the clip still has more than one time step mixes its frames: by a depth-wise temporal convolution
after the spatial attention, or as `mixer` says (Table 2's other rows; see mixers.py and docs/variants.md). The strided
convolutions act on patches; CLS, of which the paper says nothing, goes through a mixer like any token, is averaged over
the time stride, and dropped at the end.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from ..ops.depthwise_temporal_conv import depthwise_temporal_conv
from .mixers import DenseStridedConv, DenseTemporalConv, TemporalAttention
from .vit import VisionTransformer, ViTConfig, refuse_below_one

MIXERS = ("dw_temp_conv", "temp_conv", "temp_attn", "spatio_temp_attn", "none")


class Downsampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A depth-wise strided convolution after block `after` (1-based), with strides over (time, height, width)."""

    after: int
    stride: tuple[int, int, int]


class LiteFrameConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="liteframe"):
    """The defaults are LiteFrame-B as published: 87.15 M parameters."""

    vit: ViTConfig = msgspec.field(
        default_factory=lambda: ViTConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
        )
    )
    clip_length: int = 4
    mixer: str = "dw_temp_conv"
    temporal_kernel: int = 3
    downsampling: tuple[Downsampling, ...] = (Downsampling(4, (2, 2, 2)), Downsampling(8, (2, 1, 1)))
    head_size: int = 1024

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer is {self.mixer!r}, expected one of {', '.join(MIXERS)}")
        if self.temporal_kernel % 2 == 0:
            raise ValueError(f"temporal_kernel is {self.temporal_kernel}, expected an odd number")
        refuse_below_one(
            clip_length=self.clip_length, stride=min((n for d in self.downsampling for n in d.stride), default=1)
        )
        positions = [d.after for d in self.downsampling]
        if positions != sorted(set(positions)) or not all(0 < p <= self.vit.num_hidden_layers for p in positions):
            raise ValueError(f"downsampling after blocks {positions}: expected rising block numbers within the network")
        size = (self.clip_length, *self.vit.grid)
        for d in self.downsampling:
            if any(n % s for n, s in zip(size, d.stride, strict=True)):
                raise ValueError(f"downsampling stride {list(d.stride)} does not divide the grid {list(size)}")
            size = (size[0] // d.stride[0], size[1] // d.stride[1], size[2] // d.stride[2])

    def grids(self) -> list[tuple[int, int, int]]:
        """(T, H, W) inside each block, and after the last one."""
        size, out = (self.clip_length, *self.vit.grid), []
        strides = {d.after: d.stride for d in self.downsampling}
        for block in range(self.vit.num_hidden_layers + 1):
            t, h, w = (n // s for n, s in zip(size, strides.get(block, (1, 1, 1)), strict=True))
            size = (t, h, w)
            out.append(size)
        return out


class TemporalConv(nn.Module):
    """x plus its depth-wise convolution over the time steps of each token, CLS included; zero-padded, so clips never
    meet.

    Starts at zero: a fresh student equals its frame-wise teacher.
    """

    def __init__(self, size: int, kernel: int, time_steps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, 1, kernel, 1))
        self.bias = nn.Parameter(torch.zeros(size))
        self.time_steps = time_steps

    def forward(self, x: Tensor) -> Tensor:
        """x (clips * T, N, C) -> (clips * T, N, C)"""
        tokens, size = x.shape[1:]
        clips = x.reshape(-1, self.time_steps, tokens, size)
        out = depthwise_temporal_conv(clips, self.weight, self.bias, (tokens,), (1, 1), residual=clips)
        return out.reshape(-1, tokens, size)


class StridedConv(nn.Module):
    """Depth-wise strided convolution over time, height and width: 3 taps along an axis with a stride, 1 along others.

    Starts as the mean over the block that each output replaces.
    """

    def __init__(self, size: int, grid: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.grid, self.stride = grid, stride
        kernel = tuple(1 if s == 1 else 3 for s in stride)
        weight = torch.zeros(size, 1, *kernel)
        weight[..., -stride[0] :, -stride[1] :, -stride[2] :] = 1 / (stride[0] * stride[1] * stride[2])
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """x (clips * T, 1 + H*W, C) -> (clips * T', 1 + H'*W', C)"""
        t, h, w = self.grid
        size = x.shape[-1]
        clips = x.reshape(-1, t, 1 + h * w, size)
        cls = clips[:, :, :1].reshape(-1, t // self.stride[0], self.stride[0], size).mean(2).unsqueeze(2)
        patches = depthwise_temporal_conv(clips[:, :, 1:], self.weight, self.bias, grid=(h, w), strides=self.stride)
        out = torch.cat([cls, patches], dim=2)
        return out.reshape(-1, out.shape[2], size)


def temporal_mixer(config: LiteFrameConfig, time_steps: int) -> nn.Module | None:
    """What a block of a clip with so many time steps has after its attention: (F, N, C) -> (F, N, C), or nothing."""
    if config.mixer == "dw_temp_conv":
        return TemporalConv(config.vit.hidden_size, config.temporal_kernel, time_steps)
    if config.mixer == "temp_conv":
        return DenseTemporalConv(config.vit, config.temporal_kernel, time_steps)
    return TemporalAttention(config.vit, time_steps) if config.mixer == "temp_attn" else None


class LiteFrame(nn.Module):
    def __init__(self, config: LiteFrameConfig):
        super().__init__()
        self.config = config
        size, grids = config.vit.hidden_size, config.grids()
        time_steps = {block: t for block, (t, _, _) in enumerate(grids[:-1]) if t > 1}
        mixers = {block: mixer for block, t in time_steps.items() if (mixer := temporal_mixer(config, t)) is not None}
        self.vit = VisionTransformer(config.vit, mixers, time_steps if config.mixer == "spatio_temp_attn" else None)
        strided = DenseStridedConv if config.mixer == "temp_conv" else StridedConv
        self.downsampling = nn.ModuleDict(
            {str(d.after): strided(size, grids[d.after - 1], d.stride) for d in config.downsampling}
        )
        self.head = nn.Linear(size, config.head_size)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (clips * T, H, W, 3), normalised -> tokens (clips, T', H'*W', head_size)"""
        x = self.vit.embed(frames)
        for number, block in enumerate(self.vit.blocks, start=1):
            x = block(x)
            if str(number) in self.downsampling:
                x = self.downsampling[str(number)](x)
        t, h, w = self.config.grids()[-1]
        x = self.head(self.vit.final_norm(x)[:, 1:])
        return x.reshape(-1, t, h * w, x.shape[-1])
