"""Weights whose rounding makes up for its own errors: GPTQ (Frantar et al. 2023, algorithm 1).

    activations x of a layer ──▶ Gram matrix, sum of x x^T / |x|^2 ──▶ rows rounded one after the other ──▶ integers
                                                                                    scales fitted to them ──┘

Rows of a matrix, its input channels, are rounded in the order of how large their activations are. What the rounding of
a row does to the layer's output, the rows still to come take over, as far as the Gram matrix says they can. The scales
are first those that plain rounding would take, then those with which the integers found err least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .observe import Feed, layers_by_activation, open_tapped
from .placement import linear_layers
from .weights import Rounded, nearest, representable, to_integers, weights_of

DAMPING = 0.05  # of the Gram matrix's mean diagonal, added to it
TINY = np.finfo(np.float32).tiny
LAZY = 128  # rows that are brought up to date at once
AT_ONCE = 2**30  # bytes of Gram matrices


def round_layers(
    graph: Path, feeds: list[Feed], bits: Mapping[str, int], beside: np.dtype, progress: Callable[[int, int], None]
) -> dict[tuple[str, int], Rounded]:
    """Linear layer and its bits -> its weights, rounded.

    Args:
        graph: in FP32.
        feeds: calls of the graph, whose activations are those that count.
        bits: linear layer -> 4 or 8.
        beside: type of the scales.
        progress: told how many of how many layers are done.
    """
    model = ir.load(graph)
    layers = {str(node.name): node for node in linear_layers(model)}
    groups = {value: [name for name in group if name in bits] for value, group in layers_by_activation(model).items()}
    made: dict[tuple[str, int], Rounded] = {}
    widths = {value: len(weights_of(layers[group[0]])) for value, group in groups.items() if group}
    for values in _batches(widths):
        for value, gram in _grams(graph, feeds, values).items():
            for name in groups[value]:
                made[name, bits[name]] = round_compensating(weights_of(layers[name]), gram, bits[name], beside)
                progress(len(made), len(bits))
    return made


def _batches(widths: dict[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    for value in widths:
        if batch and 4 * sum(widths[v] ** 2 for v in (*batch, value)) > AT_ONCE:
            yield batch
            batch = []
        batch.append(value)
    if batch:
        yield batch


def _grams(graph: Path, feeds: list[Feed], values: list[str]) -> dict[str, NDArray[np.float32]]:
    session = open_tapped(ir.load(graph), graph.parent, values)
    grams: dict[str, NDArray[np.float32]] = {}
    for feed in feeds:
        for value, array in zip(values, session.run(values, feed), strict=True):
            rows = array.reshape(-1, array.shape[-1])
            # all tokens count alike: the first of a text may be a thousand times as large as the others
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)
            grams[value] = grams.get(value, np.float32(0)) + rows.T @ rows
    return grams


def round_compensating(matrix: NDArray[np.float32], gram: NDArray[np.float32], bits: int, beside: np.dtype) -> Rounded:
    """Integers and scales for a matrix (K, N); see `Rounded`.

    Args:
        gram: (K, K), sum of x x^T over what the layer reads.
    """
    scale = nearest(matrix, bits, beside)[1].astype(np.float32).reshape(-1, matrix.shape[1])
    used = matrix.any(axis=1)
    damped = np.where(np.outer(used, used), gram, 0).astype(np.float64)  # zeros stay zeros: x may be anything there
    damped[np.diag_indices(len(matrix))] += DAMPING * np.diag(gram).mean() or 1.0  # an unused layer: any order will do
    integers = _round_rows(matrix, damped, np.repeat(scale, len(matrix) // len(scale), axis=0), bits)
    fitted = representable(_fit_scales(matrix, damped, integers, scale), beside)
    return integers, fitted[0] if bits == 8 else fitted


def _round_rows(
    matrix: NDArray[np.float32], gram: NDArray[np.float64], steps: NDArray[np.float32], bits: int
) -> NDArray[np.int8]:
    order = np.argsort(-np.diag(gram), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T.astype(np.float32)
    steps = steps[order]
    left, integers = matrix[order], np.empty(matrix.shape, np.int8)
    for start in range(0, len(matrix), LAZY):
        block = slice(start, start + LAZY)
        errors = np.empty_like(left[block])
        for row in range(start, start + len(errors)):
            rounded = to_integers(left[row] / steps[row], bits)
            integers[order[row]] = rounded
            errors[row - start] = (left[row] - rounded * steps[row]) / upper[row, row]
            left[row + 1 : block.stop] -= np.outer(upper[row, row + 1 : block.stop], errors[row - start])
        left[block.stop :] -= upper[block, block.stop :].T @ errors
    return integers


def _fit_scales(
    matrix: NDArray[np.float32], gram: NDArray[np.float64], integers: NDArray[np.int8], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The scales (blocks, N) with which these integers are closest to the matrix, in the norm of the Gram matrix: least
    squares for each column; those that would not stay near what they were do."""
    whole, blocks, columns = integers.astype(np.float32), len(scale), matrix.shape[1]
    size, weighed = len(matrix) // blocks, gram.astype(np.float32)

    def by_block(products: NDArray[np.float32]) -> NDArray[np.float64]:
        return products.reshape(blocks, size, columns).sum(axis=1, dtype=np.float64).T

    normal = np.empty((columns, blocks, blocks))
    for number in range(blocks):
        rows = slice(number * size, (number + 1) * size)
        normal[:, :, number] = by_block(whole * (weighed[:, rows] @ whole[rows]))
    normal[:, range(blocks), range(blocks)] += np.finfo(np.float32).tiny  # of a block of zeros any scale will do
    fitted = np.linalg.solve(normal, by_block(whole * (weighed @ matrix))[..., None])[..., 0].T
    return np.where((fitted > scale / 2) & (fitted < 2 * scale), fitted, scale).astype(np.float32)
