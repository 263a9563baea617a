"""INT4 weights whose rounding makes up for its own errors: GPTQ (Frantar et al. 2023, algorithm 1).

    activations x of a layer ──▶ Gram matrix, sum of x x^T / |x|^2 ──▶ rows rounded one after the other ──▶ integers
                                                                                    scales fitted to them ──┘

Rows of a matrix, its input channels, are rounded in the order of how large their activations are. What the rounding of
a row does to the layer's output, the rows still to come take over, as far as the Gram matrix says they can. The scales
are first those that plain rounding would take, then those with which the integers found err least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .observe import Feed, layers_by_activation, open_tapped
from .placement import INT4_BLOCK, linear_layers
from .weights import Rounded, int4_blocks, representable, to_int4

DAMPING = 0.05  # of the Gram matrix's mean diagonal, added to it
TINY = np.finfo(np.float32).tiny
LAZY = 128  # rows that are brought up to date at once
AT_ONCE = 2**30  # bytes of Gram matrices


def round_layers(
    graph: Path, feeds: list[Feed], layers: set[str], beside: np.dtype, progress: Callable[[int, int], None]
) -> dict[str, Rounded]:
    """Linear layer (MatMul) -> its weights in INT4.

    Args:
        graph: in FP32.
        feeds: calls of the graph, whose activations are those that count.
        layers: which.
        beside: type of the scales.
        progress: told how many of how many layers are done.
    """
    model = ir.load(graph)
    weights = {str(node.name): node.inputs[1] for node in linear_layers(model)}
    groups = {value: [name for name in group if name in layers] for value, group in layers_by_activation(model).items()}
    made: dict[str, Rounded] = {}
    widths = {value: len(weights[group[0]].const_value.numpy()) for value, group in groups.items() if group}  # type: ignore[union-attr]
    for values in _batches(widths):
        for value, gram in _grams(graph, feeds, values).items():
            for name in groups[value]:
                matrix = weights[name].const_value.numpy()  # type: ignore[union-attr]
                made[name] = round_compensating(matrix, gram, beside)
                progress(len(made), len(layers))
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


def round_compensating(matrix: NDArray[np.float32], gram: NDArray[np.float32], beside: np.dtype) -> Rounded:
    """Integers (K, N) and scales (K / INT4_BLOCK, N) for a matrix (K, N).

    Args:
        gram: (K, K), sum of x x^T over what the layer reads.
    """
    scale = int4_blocks(matrix, beside)[1].astype(np.float32)
    damped = gram.astype(np.float64)
    damped[np.diag_indices(len(matrix))] += DAMPING * np.diag(gram).mean() or 1.0  # an unused layer: any order will do
    integers = _round_rows(matrix, damped, scale)
    return integers, representable(_fit_scales(matrix, damped, integers, scale), beside)


def _round_rows(matrix: NDArray[np.float32], gram: NDArray[np.float64], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    order = np.argsort(-np.diag(gram), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T.astype(np.float32)
    steps = scale[order // INT4_BLOCK]
    left, integers = matrix[order], np.empty(matrix.shape, np.int8)
    for start in range(0, len(matrix), LAZY):
        block = slice(start, start + LAZY)
        errors = np.empty_like(left[block])
        for row in range(start, start + len(errors)):
            rounded = to_int4(left[row] / steps[row])
            integers[order[row]] = rounded
            errors[row - start] = (left[row] - rounded * steps[row]) / upper[row, row]
            left[row + 1 : block.stop] -= np.outer(upper[row, row + 1 : block.stop], errors[row - start])
        left[block.stop :] -= upper[block, block.stop :].T @ errors
    return integers


def _fit_scales(
    matrix: NDArray[np.float32], gram: NDArray[np.float64], integers: NDArray[np.int8], scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The scales with which these integers are closest to the matrix, in the norm of the Gram matrix: least squares
    for each column; those that would not stay near what they were do."""
    whole, blocks, columns = integers.astype(np.float32), len(scale), matrix.shape[1]
    weighed = gram.astype(np.float32)

    def by_block(products: NDArray[np.float32]) -> NDArray[np.float64]:
        return products.reshape(blocks, INT4_BLOCK, columns).sum(axis=1, dtype=np.float64).T

    normal = np.empty((columns, blocks, blocks))
    for number in range(blocks):
        rows = slice(number * INT4_BLOCK, (number + 1) * INT4_BLOCK)
        normal[:, :, number] = by_block(whole * (weighed[:, rows] @ whole[rows]))
    normal[:, range(blocks), range(blocks)] += np.finfo(np.float32).tiny  # of a block of zeros any scale will do
    fitted = np.linalg.solve(normal, by_block(whole * (weighed @ matrix))[..., None])[..., 0].T
    return np.where((fitted > scale / 2) & (fitted < 2 * scale), fitted, scale).astype(np.float32)
