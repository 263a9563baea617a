"""Channels that stand out beyond what smoothing evens out are multiplied apart, as LLM.int8() does (Dettmers et al.
2022, section 3.2), with channels chosen once, on calibration data:

    x ── MatMul(W, the outliers' rows zero) ── + ── y
    └─── Gather(outliers) ── MatMul(their rows) ┘

The first product is quantised: its range need not reach the outliers, which are clipped there and meet zeros. The
second one, of a few channels, stays in the precision beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..engines.graph_edits import add_initializer, bias_behind, output_like
from .placement import OF_OUTLIERS, linear_layers

SHARE = 24  # one of so many channels at most is set apart
STANDS_OUT = 4  # so many times the largest of the others: two of eight bits are won


def set_apart(model: ir.Model, channels: Mapping[str, NDArray[np.float32]]) -> list[str]:
    """Splits linear layers of an FP32 graph in place, which computes what it did; returns which.

    Args:
        channels: linear layer -> largest absolute value of each channel (K,) of its activation.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for layer in linear_layers(model):
        if layer.op_type == "MatMul":
            readers.setdefault(layer.inputs[0], []).append(layer)  # type: ignore[arg-type]
    split = []
    for activation, group in readers.items():
        largest = channels[str(group[0].name)]
        order, count = np.argsort(-largest, kind="stable"), len(largest) // SHARE
        if count and largest[order[0]] > STANDS_OUT * largest[order[count]]:
            _split(model.graph, activation, group, np.sort(order[:count]))
            split += [str(layer.name) for layer in group]
    return split


def _split(graph: ir.Graph, activation: ir.Value, group: list[ir.Node], outliers: NDArray[np.intp]) -> None:
    index = add_initializer(graph, f"{activation.name}:outliers", outliers.astype(np.int64))
    gather = ir.node("Gather", [activation, index], {"axis": -1}, name=f"{activation.name}_outliers")
    apart = output_like(gather, activation)
    apart.shape = ir.Shape([*activation.shape.dims[:-1], len(outliers)])  # type: ignore[union-attr]
    graph.insert_before(group[0], gather)
    for layer in group:
        matrix = layer.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        rest = matrix.copy()
        rest[outliers] = 0
        layer.replace_input_with(1, add_initializer(graph, f"{layer.name}:1_rest", rest))
        rows = add_initializer(graph, f"{layer.name}:1{OF_OUTLIERS}", matrix[outliers])
        end = found[0] if (found := bias_behind(layer)) else layer  # compilers know product and bias as one
        whole = end.outputs[0]
        product = ir.node("MatMul", [apart, rows], name=f"{layer.name}{OF_OUTLIERS}")
        add = ir.node("Add", [whole, output_like(product, whole)], name=f"{layer.name}_with_outliers")
        whole.replace_all_uses_with(output_like(add, whole), replace_graph_outputs=True)
        add.replace_input_with(0, whole)
        add.outputs[0].name = whole.name
        for value in {layer.outputs[0], whole}:  # what they hold is not what the graph before had under these names
            value.name = f"{value.name}_without_outliers"
        graph.insert_after(end, [product, add])
