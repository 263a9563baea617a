"""How weights are rounded, and what to.

INT8    per output channel, symmetric
INT4    in blocks of INT4_BLOCK along the inputs, each with the scale of least squared error

To the nearest, that is; see compensate.py for better.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .placement import INT4_BLOCK

Rounded = tuple[NDArray[np.int8], NDArray]  # integers (K, N); scales (N,) of INT8, (K / INT4_BLOCK, N) of INT4
ENDS = {4: (-8, 7), 8: (-127, 127)}


def weights_of(layer: ir.Node) -> NDArray[np.float32]:
    """The matrix (K, N) of a linear layer."""
    matrix = layer.inputs[1].const_value.numpy().astype(np.float32)  # type: ignore[union-attr]
    return np.ascontiguousarray(matrix.T) if layer.op_type == "Gemm" else matrix


def nearest(matrix: NDArray[np.float32], bits: int, beside: np.dtype) -> Rounded:
    return int8_channels(matrix, beside) if bits == 8 else int4_blocks(matrix, beside)


def int8_channels(matrix: NDArray, beside: np.dtype) -> Rounded:
    """Integers from -127 to 127 (K, N) and scales (N,), in the type beside them."""
    scale = representable(np.abs(matrix).max(axis=0) / 127, beside)
    return to_integers(matrix / scale.astype(np.float32), 8).astype(np.int8), scale


def int4_blocks(matrix: NDArray[np.float32], beside: np.dtype) -> Rounded:
    """Integers from -8 to 7 (K, N) and scales (K / INT4_BLOCK, N), in the type beside them."""
    blocks = matrix.reshape(-1, INT4_BLOCK, matrix.shape[1])
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    best = np.full(peak.shape, np.inf, np.float32)
    scale, integers = np.ones_like(peak), np.zeros(blocks.shape, np.int8)
    for divisor in (8.0, 7.5, 7.0, 6.5, 6.0, 5.5):  # what is largest may be clipped
        candidate = representable(peak / divisor, beside).astype(np.float32)
        rounded = to_integers(blocks / candidate, 4)
        error = np.square(rounded * candidate - blocks).sum(axis=1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, candidate, scale)
        integers = np.where(better, rounded, integers).astype(np.int8)
    return integers.reshape(matrix.shape), scale[:, 0].astype(beside)


def to_integers(steps: NDArray, bits: int) -> NDArray:
    return np.clip(np.rint(steps), *ENDS[bits])


def representable(scale: float | NDArray, beside: np.dtype) -> NDArray:
    """Scales are stored in the type beside the integers; no smaller than its smallest normal number."""
    return np.maximum(np.asarray(scale, np.float64), np.finfo(beside).tiny).astype(beside)
