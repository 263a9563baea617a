"""Tokens are scaled, each by its own largest value, before the products that nothing evens out: what ZeroQuant calls
token-wise quantisation (Yao et al. 2022, section 4.2), in operators that every compiler has:

    x ──┬── Abs ── ReduceMax ── r ──┐
        └── Div(r) ── MatMul(W) ── Mul(r) ── y

One range, about [-1, 1], then serves tokens of any size, and none loses its bits to another's outliers. Channels that
only meet zeros, for outliers.py has set them apart, become zeros themselves before they could count as the largest.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..engines.graph_edits import add_initializer, output_like
from .placement import linear_layers, module

# Of the decoder: what attention and the gated MLP make. Behind norms tokens are of one size already, and a ViT's vary
# too little to pay for it.
LAYERS = ("o_proj", "down_proj")
SMALLEST = 2.0**-14  # of r, for a token of zeros: FP16's smallest normal number


def scale_tokens(model: ir.Model) -> list[str]:
    """Scales tokens before these layers of an FP32 graph in place, which computes what it did; returns which."""
    layers = [layer for layer in linear_layers(model) if module(layer).rpartition(".")[2] in LAYERS]
    for layer in layers:
        _scale(model.graph, layer)
    return [str(layer.name) for layer in layers]


def _scale(graph: ir.Graph, layer: ir.Node) -> None:
    x, y = layer.inputs[0], layer.outputs[0]
    assert x is not None and x.shape is not None
    one_each = x.shape.dims[:-1]
    last = add_initializer(graph, f"{layer.name}:token_axis", np.array([-1]))
    smallest = add_initializer(graph, f"{layer.name}:smallest_token", np.array(SMALLEST, np.float32))
    weights = layer.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    used = np.any(weights, axis=1).astype(np.float32)
    if not used.all():
        mask = add_initializer(graph, f"{layer.name}:used_channels", used)
        masked = ir.node("Mul", [x, mask], name=f"{layer.name}_used_channels")
        graph.insert_before(layer, masked)
        x = output_like(masked, x)
    magnitude = ir.node("Abs", [x], name=f"{layer.name}_magnitude")
    largest = ir.node("ReduceMax", [output_like(magnitude, x), last], name=f"{layer.name}_largest")
    scale = ir.node("Max", [output_like(largest, x), smallest], name=f"{layer.name}_token_scale")
    divided = ir.node("Div", [x, output_like(scale, x)], name=f"{layer.name}_scaled_tokens")
    for node in (largest, scale):
        node.outputs[0].shape = ir.Shape([*one_each, 1])
    graph.insert_before(layer, [magnitude, largest, scale, divided])
    layer.replace_input_with(0, output_like(divided, x))
    multiplied = ir.node("Mul", [y, scale.outputs[0]], name=f"{layer.name}_scaled_back")
    y.replace_all_uses_with(output_like(multiplied, y), replace_graph_outputs=True)
    multiplied.replace_input_with(0, y)
    multiplied.outputs[0].name, y.name = y.name, f"{y.name}_of_scaled_tokens"
    graph.insert_after(layer, multiplied)
