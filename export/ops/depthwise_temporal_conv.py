"""DepthwiseTemporalConv: a depth-wise convolution over time, or over time, height and width, on the token layout.

    x       (clips, T, N, C)       tokens of N = prod(grid) positions; grid (N,) or (H, W)
    weight  (C, 1, kt, kn) or (C, 1, kt, kh, kw), odd kernel sizes
    bias    (C,)
    out     (clips, T', N', C)     T' = ceil(T / st), and likewise each axis of the grid

Cross-correlation with zero padding of (k - 1) / 2 on both ends of every axis, as torch's convolutions.

Attributes of the ONNX node: `grid`, `strides` (one more entry than grid: time first), `pads`, `channels`, and two
permutations that spare the function body any arithmetic on ranks; a plugin needs only grid and strides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from . import DOMAIN, VERSION

NAME = "DepthwiseTemporalConv"
ATTRIBUTES = ("grid", "strides", "pads", "channels", "to_channels_first", "to_channels_last", "plugin_namespace")


def depthwise_temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    strides: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """See the head of this file for shapes. Under export it becomes one node; on CUDA it is a kernel of engines/native.

    Args:
        residual: (clips, T', N', C), added to what comes out; in a graph by a node of its own.
    """
    if torch.compiler.is_exporting():
        pads, (to_first, to_last) = [k // 2 for k in weight.shape[2:]], axes(grid)
        out = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (x, weight, bias),
            {
                "grid": list(grid),
                "strides": list(strides),
                "pads": pads * 2,
                "channels": x.shape[3],
                "to_channels_first": to_first,
                "to_channels_last": to_last,
                "plugin_namespace": DOMAIN,
            },
            dtype=x.dtype,
            shape=output_shape(x.shape, grid, strides),
            version=VERSION,
        )
    elif x.is_cuda and x.dtype != torch.float64:
        from . import torch_library

        return torch_library.convolve(x, weight, bias, list(grid), list(strides), residual)
    else:
        out = reference(x, weight, bias, grid, strides)
    return out if residual is None else out + residual


def output_shape(shape: Sequence[int], grid: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int, int]:
    """Of tokens of a shape."""
    time, *space = (math.ceil(n / s) for n, s in zip((shape[1], *grid), strides, strict=True))
    return shape[0], time, math.prod(space), shape[3]


def reference(x: Tensor, weight: Tensor, bias: Tensor, grid: Sequence[int], strides: Sequence[int]) -> Tensor:
    """By torch's own convolution."""
    to_first, to_last = axes(grid)
    clips, time, _, channels = x.shape
    conv = {1: F.conv2d, 2: F.conv3d}[len(grid)]
    pads = tuple(k // 2 for k in weight.shape[2:])
    x = x.reshape(clips, time, *grid, channels).permute(to_first)
    out = conv(x, weight, bias, stride=tuple(strides), padding=pads, groups=channels)
    return out.permute(to_last).reshape(clips, out.shape[2], -1, channels)


def axes(grid: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of (clips, T, *grid, C) with the channels behind the clips, and back."""
    return [0, len(grid) + 2, *range(1, len(grid) + 2)], [0, *range(2, len(grid) + 3), 1]


def function_body(opset: int) -> onnx.FunctionProto:
    """The operator in standard ONNX: a grouped convolution between two transposes.

    It convolves with stride 1 and then takes every stride-th position: TensorRT's parser (seen in TensorRT-RTX 1.7.1)
    follows references to attributes for `pads` and `group` of a Conv, but silently takes 1 for its `strides`.
    """

    def attribute(name: str, source: str, kind: Any) -> onnx.AttributeProto:
        return onnx.AttributeProto(name=name, ref_attr_name=source, type=kind)

    ints, integer = onnx.AttributeProto.INTS, onnx.AttributeProto.INT

    def node(op: str, inputs: list[str], output: str, *references: onnx.AttributeProto, **constants: Any):
        made = oh.make_node(op, inputs, [output], **constants)
        made.attribute.extend(references)
        return made

    nodes = [
        node("Constant", [], "grid_shape", attribute("value_ints", "grid", ints)),
        node("Constant", [], "same_clips_and_time", value_ints=[0, 0]),
        node("Constant", [], "rest", value_ints=[-1]),
        node("Concat", ["same_clips_and_time", "grid_shape", "rest"], "gridded_shape", axis=0),
        node("Reshape", ["x", "gridded_shape"], "gridded"),
        node("Transpose", ["gridded"], "channels_first", attribute("perm", "to_channels_first", ints)),
        node(
            "Conv",
            ["channels_first", "weight", "bias"],
            "convolved",
            attribute("pads", "pads", ints),
            attribute("group", "channels", integer),
        ),
        node("Constant", [], "steps", attribute("value_ints", "strides", ints)),
        node("Constant", [], "clips_and_channels_step", value_ints=[1, 1]),
        node("Concat", ["clips_and_channels_step", "steps"], "all_steps", axis=0),
        node("Shape", ["all_steps"], "rank"),
        node("ConstantOfShape", ["rank"], "starts", value=numpy_helper.from_array(np.array([0]))),
        node("ConstantOfShape", ["rank"], "ends", value=numpy_helper.from_array(np.array([2**31 - 1]))),
        node("Slice", ["convolved", "starts", "ends", "", "all_steps"], "strided"),
        node("Transpose", ["strided"], "channels_last", attribute("perm", "to_channels_last", ints)),
        node("Constant", [], "channel_shape", attribute("value_int", "channels", integer)),
        node("Constant", [], "first", value_ints=[0]),
        node("Unsqueeze", ["channel_shape", "first"], "last_axis"),
        node("Concat", ["same_clips_and_time", "rest", "last_axis"], "tokens_shape", axis=0),
        node("Reshape", ["channels_last", "tokens_shape"], "out"),
    ]
    opsets = [oh.make_opsetid("", opset)]
    return oh.make_function(DOMAIN, NAME, ["x", "weight", "bias"], ["out"], nodes, opsets, ATTRIBUTES)


def numpy_reference(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, grid: Sequence[int], strides: Sequence[int]
) -> np.ndarray:
    """The same in float64, one kernel tap at a time."""
    clips, time, _, channels = x.shape
    kernel = weight.shape[2:]
    x = x.astype(np.float64).reshape(clips, time, *grid, channels)
    padding = [(0, 0), *((k // 2, k // 2) for k in kernel), (0, 0)]
    padded = np.pad(x, padding)
    sizes = [math.ceil(n / s) for n, s in zip((time, *grid), strides, strict=True)]
    out = np.broadcast_to(bias.astype(np.float64), (clips, *sizes, channels)).copy()
    taps = weight.astype(np.float64).reshape(channels, -1)
    for number, tap in enumerate(itertools.product(*map(range, kernel))):
        window = tuple(slice(t, t + (n - 1) * s + 1, s) for t, n, s in zip(tap, sizes, strides, strict=True))
        out += padded[(slice(None), *window)] * taps[:, number]
    return out.reshape(clips, sizes[0], -1, channels)
