"""Tokens are scaled, each by its own largest value, which ZeroQuant calls token-wise quantisation (Yao et al. 2022,
section 4.2), in operators that every compiler has:

    x ──┬── Abs ── ReduceMax ── r ──┐
        └── Div(r) ── MatMul(W) ── Mul(r) ── y

One range, about [-1, 1], then serves tokens of any size, and none loses its bits to another's outliers. Channels that
only meet zeros, for outliers.py has set them apart, become zeros themselves before they could count as the largest.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ..engines.graph_edits import add_initializer, output_like
from .placement import linear_layers, module, pixel_nodes

# What attention and the gated MLP of the decoder make, which nothing evens out. Behind norms tokens are of one size
# already, and a ViT's vary too little to pay for it; there it is done where the scan finds a layer too costly.
LAYERS = ("o_proj", "down_proj")
SMALLEST = 2.0**-14  # of r, for a token of zeros: FP16's smallest normal number


def could_be_scaled(model: ir.Model, layers: Collection[str]) -> set[str]:
    """Those of these layers that `scale_tokens` leaves alone unless it is told. Pixels are no tokens, and the head's
    activation is not quantised."""
    pixels = pixel_nodes(model)
    return {
        str(layer.name)
        for layer in linear_layers(model)
        if layer.name in layers and layer.op_type == "MatMul" and not _is_always_scaled(layer)
        if layer.inputs[0].producer() not in pixels  # type: ignore[union-attr, operator]
    }


def _is_always_scaled(layer: ir.Node) -> bool:
    return module(layer).rpartition(".")[2] in LAYERS


def scale_tokens(model: ir.Model, others: Collection[str] = ()) -> list[str]:
    """Scales tokens before LAYERS, and before others, of an FP32 graph in place, which computes what it did; returns
    which layers read scaled tokens.

    Args:
        others: layers that `could_be_scaled`; those that share an activation come together.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for layer in linear_layers(model):
        if layer.name in others or _is_always_scaled(layer):
            readers.setdefault(layer.inputs[0], []).append(layer)  # type: ignore[arg-type]
    for x, layers in readers.items():
        _scale(model.graph, x, layers)
    return [str(layer.name) for layers in readers.values() for layer in layers]


def _scale(graph: ir.Graph, x: ir.Value, layers: list[ir.Node]) -> None:
    assert x.shape is not None
    name, one_each = str(layers[0].name), x.shape.dims[:-1]
    last = add_initializer(graph, f"{name}:token_axis", np.array([-1]))
    smallest = add_initializer(graph, f"{name}:smallest_token", np.array(SMALLEST, np.float32))
    weights = [layer.inputs[1].const_value.numpy() for layer in layers]  # type: ignore[union-attr]
    used = np.any(np.concatenate(weights, axis=1), axis=1).astype(np.float32)
    if not used.all():
        mask = add_initializer(graph, f"{name}:used_channels", used)
        masked = ir.node("Mul", [x, mask], name=f"{name}_used_channels")
        graph.insert_before(layers[0], masked)
        x = output_like(masked, x)
    magnitude = ir.node("Abs", [x], name=f"{name}_magnitude")
    largest = ir.node("ReduceMax", [output_like(magnitude, x), last], name=f"{name}_largest")
    scale = ir.node("Max", [output_like(largest, x), smallest], name=f"{name}_token_scale")
    divided = ir.node("Div", [x, output_like(scale, x)], name=f"{name}_scaled_tokens")
    for node in (largest, scale):
        node.outputs[0].shape = ir.Shape([*one_each, 1])
    graph.insert_before(layers[0], [magnitude, largest, scale, divided])
    output_like(divided, x)
    for layer in layers:
        layer.replace_input_with(0, divided.outputs[0])
        y = layer.outputs[0]
        multiplied = ir.node("Mul", [y, scale.outputs[0]], name=f"{layer.name}_scaled_back")
        y.replace_all_uses_with(output_like(multiplied, y), replace_graph_outputs=True)
        multiplied.replace_input_with(0, y)
        multiplied.outputs[0].name, y.name = y.name, f"{y.name}_of_scaled_tokens"
        graph.insert_after(layer, multiplied)
