"""WeightedAveragePool: LiteFrame's reducer (equation 1), a block of tokens averaged with weights from its CLS tokens.

    x       (clips, T, 1 + H*W, C)                      CLS first
    out     (clips, nt * nh * nw, C)                    blocks in time, row, column order
    blocks  (nt, t, nh, h, nw, w)                       T = nt * t, H = nh * h, W = nw * w

    out = sum over the block of softmax_block(x_cls(tau) . x(tau, i, j) / sqrt(C)) x(tau, i, j)

The softmax runs over the whole block; each position is scored by the CLS of its own frame.

Attributes of the ONNX node: `blocks`, and `scale` = 1 / sqrt(C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import torch
from torch import Tensor

from . import DOMAIN, VERSION

NAME = "WeightedAveragePool"
ATTRIBUTES = ("blocks", "scale", "plugin_namespace")


def weighted_average_pool(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """See the head of this file for shapes. Under export it becomes one node; on CUDA it is a kernel of
    engines/native."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (x,),
            {"blocks": list(blocks), "scale": x.shape[3] ** -0.5, "plugin_namespace": DOMAIN},
            dtype=x.dtype,
            shape=output_shape(x.shape, blocks),
            version=VERSION,
        )
    if x.is_cuda and x.dtype != torch.float64:
        from . import torch_library

        return torch_library.pool(x, list(blocks))
    return reference(x, blocks)


def output_shape(shape: Sequence[int], blocks: Sequence[int]) -> tuple[int, int, int]:
    """Of tokens of a shape."""
    nt, _, nh, _, nw, _ = blocks
    return shape[0], nt * nh * nw, shape[3]


def reference(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """By torch's own operators."""
    clips, channels = x.shape[0], x.shape[3]
    nt, t, nh, h, nw, w = blocks
    cls, patches = x[:, :, :1], x[:, :, 1:]
    scores = (patches * (cls * channels**-0.5)).sum(-1)  # (clips, T, H*W)
    scores = scores.reshape(clips, nt, t, nh, h, nw, w).permute(0, 1, 3, 5, 2, 4, 6)
    values = patches.reshape(clips, nt, t, nh, h, nw, w, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    weights = scores.reshape(clips, nt * nh * nw, 1, t * h * w).softmax(-1)
    return (weights @ values.reshape(clips, nt * nh * nw, t * h * w, channels)).squeeze(2)


def function_body(opset: int) -> onnx.FunctionProto:
    """The operator in standard ONNX. Scores and weights are FP32 whatever the type of x: FP16 would overflow first in
    these sums of products."""

    def node(op: str, inputs: list[str], *outputs: str, **constants: Any):
        return oh.make_node(op, inputs, outputs, name=outputs[0], **constants)  # by which profilers call it

    def reference(name: str, source: str, kind: Any, output: str):
        made = oh.make_node("Constant", [], [output])
        made.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=source, type=kind))
        return made

    def ints(output: str, *values: int):
        return oh.make_node("Constant", [], [output], value_ints=values)

    nodes = [
        reference("value_ints", "blocks", onnx.AttributeProto.INTS, "block_shape"),
        reference("value_float", "scale", onnx.AttributeProto.FLOAT, "scale"),
        *(ints(f"i{i}", i) for i in range(4)),
        ints("far", 2**31 - 1),
        ints("rest", -1),
        ints("one", 1),
        # scores (clips, T, H*W): CLS of the frame times its patches
        node("Slice", ["x", "i0", "i1", "i2"], "cls"),
        node("Slice", ["x", "i1", "far", "i2"], "patches"),
        node("Cast", ["cls"], "cls_fp32", to=onnx.TensorProto.FLOAT),
        node("Cast", ["patches"], "patches_fp32", to=onnx.TensorProto.FLOAT),
        node("Mul", ["cls_fp32", "scale"], "scaled_cls"),
        node("Mul", ["patches_fp32", "scaled_cls"], "products"),
        node("ReduceSum", ["products", "i3"], "scores", keepdims=0),
        # both cut into blocks: (clips, nt, t, nh, h, nw, w[, C]) -> (clips, nt, nh, nw, t, h, w[, C])
        node("Concat", ["i0", "block_shape"], "scores_cut_shape", axis=0),
        node("Reshape", ["scores", "scores_cut_shape"], "scores_cut"),
        node("Transpose", ["scores_cut"], "scores_blocked", perm=[0, 1, 3, 5, 2, 4, 6]),
        node("Shape", ["x"], "channels", start=3, end=4),
        node("Shape", ["x"], "clips", start=0, end=1),
        node("Concat", ["clips", "block_shape", "channels"], "patches_cut_shape", axis=0),
        node("Reshape", ["patches", "patches_cut_shape"], "patches_cut"),
        node("Transpose", ["patches_cut"], "patches_blocked", perm=[0, 1, 3, 5, 2, 4, 6, 7]),
        # softmax over t*h*w, then the weighted sum as one product a block
        node("Split", ["block_shape"], "nt", "t", "nh", "h", "nw", "w", num_outputs=6),
        node("Mul", ["t", "h"], "th"),
        node("Mul", ["th", "w"], "size"),
        node("Concat", ["clips", "rest", "one", "size"], "weights_shape", axis=0),
        node("Reshape", ["scores_blocked", "weights_shape"], "logits"),
        node("Softmax", ["logits"], "weights_fp32", axis=-1),
        node("CastLike", ["weights_fp32", "x"], "weights"),
        node("Concat", ["clips", "rest", "size", "channels"], "values_shape", axis=0),
        node("Reshape", ["patches_blocked", "values_shape"], "values"),
        node("MatMul", ["weights", "values"], "pooled"),
        node("Squeeze", ["pooled", "i2"], "out"),
    ]
    return oh.make_function(DOMAIN, NAME, ["x"], ["out"], nodes, [oh.make_opsetid("", opset)], ATTRIBUTES)


def numpy_reference(x: np.ndarray, blocks: Sequence[int]) -> np.ndarray:
    """Equation 1 in float64, block by block."""
    nt, t, nh, h, nw, w = blocks
    clips, time, _, channels = x.shape
    x = x.astype(np.float64)
    cls, patches = x[:, :, 0], x[:, :, 1:].reshape(clips, time, nh * h, nw * w, channels)
    out = np.empty((clips, nt, nh, nw, channels))
    for clip, a, b, c in np.ndindex(clips, nt, nh, nw):
        frames = slice(a * t, (a + 1) * t)
        block = patches[clip, frames, b * h : (b + 1) * h, c * w : (c + 1) * w]  # (t, h, w, C)
        scores = np.einsum("tc,thwc->thw", cls[clip, frames], block) / np.sqrt(channels)
        weights = np.exp(scores - scores.max())
        out[clip, a, b, c] = np.einsum("thw,thwc->c", weights / weights.sum(), block)
    return out.reshape(clips, nt * nh * nw, channels)
