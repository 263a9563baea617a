"""Carries a placement out on a graph: types changed, Casts between them, Q/DQ pairs around linear layers.

    x ──────────── MatMul ── y        x ── QuantizeLinear ── DequantizeLinear ── MatMul ── y
    weights ────────┘                 INT8 weights ───────── DequantizeLinear ────┘

Where only signed integers are taken, a lopsided activation (behind a GELU, say) would waste one of eight bits. It is
centred first, which the bias makes up for: x W + b = (x - c) W + (b + c W), W as it is after rounding. Compilers fuse
the subtraction with what makes x.

Inputs and outputs of the graph keep their types, except KV caches, which take that of the attention they serve.
Values keep their names; what is added is named after the value it is made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..engines.graph_edits import add_cast, add_initializer, bias_behind, insert_behind, output_like
from ..engines.targets import PLAIN_OPSET_INT4
from .placement import INT4_BLOCK, Plan, Type, is_float, linear_layers, pixel_nodes
from .ranges import asymmetric, symmetric
from .weights import Rounded, int8_channels, nearest, representable, weights_of

TYPES: dict[Type, ir.DataType] = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
FP16 = np.finfo(np.float16)


def apply(
    model: ir.Model,
    placement: Plan,
    ranges: Mapping[str, tuple[float, float]],
    signed_activations: bool,
    rounded: Mapping[tuple[str, int], Rounded] = MappingProxyType({}),
) -> None:
    """Rewrites an FP32 graph in place.

    Args:
        ranges: linear layer -> lowest and highest value of its activation.
        signed_activations: INT8 with zero point 0, as TensorRT takes it; else UINT8 with a zero point, for which ONNX
            Runtime's CPU kernels are made.
        rounded: linear layer and bits -> weights, where they were rounded already; see compensate.py.
    """
    caches = {value for value in (*model.graph.inputs, *model.graph.outputs) if "_cache_" in str(value.name)}
    _retype(model, placement.types, caches)
    layers = {str(node.name): node for node in linear_layers(model)}
    made: dict[tuple[str, tuple[float, float]], ir.Value] = {}
    pixels = pixel_nodes(model)
    for name in placement.int8:
        activation = layers[name].inputs[0]
        assert activation is not None
        if activation.producer() in pixels:
            _multiply_pixels(model.graph, layers[name])
        else:
            _quantise(model, layers[name], ranges[name], signed_activations, made, rounded)
    for name, bits in placement.weights.items():
        _quantise_weights(model.graph, layers[name], bits, rounded)
    model.graph.sort()
    for value in [v for v in model.graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del model.graph.initializers[str(value.name)]


def _retype(model: ir.Model, types: Mapping[str, Type], free: set[ir.Value]) -> None:
    """Gives every node its type; `free` are inputs and outputs of the graph that take that of their node."""
    graph = model.graph
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    fixed_outputs = {v for v in graph.outputs if is_float(v) and v not in free}
    for node in list(graph):
        wanted = TYPES.get(types.get(str(node.name), "fp32"))
        if str(node.name) not in types:  # it computes integers; what it reads may have any type
            continue
        assert wanted is not None
        for position, value in enumerate(node.inputs):
            if value is None or not is_float(value):
                continue
            if value in free:
                value.dtype = wanted
            elif value.dtype != wanted:
                node.replace_input_with(position, _converted(graph, value, wanted, made))
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(wanted))
        for output in node.outputs:
            if not is_float(output):
                continue
            if output in fixed_outputs and wanted != output.dtype:
                _cast_output(graph, output, wanted)
            else:
                output.dtype = wanted


def _converted(
    graph: ir.Graph, value: ir.Value, wanted: ir.DataType, made: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> ir.Value:
    """The value in another type: a weight converted once, anything else by one Cast for all its readers."""
    if (value, wanted) not in made:
        suffix = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16"}[wanted]
        name = f"{value.name}_{suffix}"
        if value.is_initializer():
            assert value.const_value is not None
            made[value, wanted] = add_initializer(graph, name, _to_half(value.const_value.numpy()))
        else:
            made[value, wanted] = add_cast(graph, value, wanted, name)
    return made[value, wanted]


def _cast_output(graph: ir.Graph, output: ir.Value, computed: ir.DataType) -> None:
    """The graph's output stays as promised; the node before it computes in its own type."""
    node = output.producer()
    assert node is not None
    wanted, position = output.dtype, output.index()
    assert position is not None and wanted is not None
    inner = node.outputs[position]
    cast = ir.node("Cast", [inner], {"to": int(wanted)}, name=f"{inner.name}_output")
    final = cast.outputs[0]
    final.name, final.dtype, final.shape = output.name, wanted, output.shape
    inner.name, inner.dtype = f"{node.name}:{position}", computed
    graph.insert_after(node, cast)
    graph.outputs[graph.outputs.index(output)] = final


def _to_half(array: NDArray) -> NDArray[np.float16]:
    """Beyond FP16's range lies nothing but masks' "minus infinity", for which the lowest number does as well."""
    return np.clip(array, FP16.min, FP16.max).astype(np.float16)


def _quantise(
    model: ir.Model,
    layer: ir.Node,
    bounds: tuple[float, float],
    signed: bool,
    made: dict[tuple[str, tuple[float, float]], ir.Value],
    rounded: Mapping[tuple[str, int], Rounded],
) -> None:
    activation, weight = layer.inputs[0], layer.inputs[1]
    assert activation is not None and weight is not None and weight.const_value is not None
    assert activation.dtype is not None
    beside = np.dtype(activation.dtype.numpy())
    quantised, scale = _rounded(layer, 8, beside, rounded)
    if layer.op_type == "Gemm":
        layer = _as_matmul(model.graph, layer)
    alone = sum(user.op_type != "Gather" for user, _ in activation.uses()) == 1  # but for its outliers
    if signed and alone and _is_lopsided(*bounds) and (bias := bias_behind(layer)) is not None:
        activation, bounds = _centre(model.graph, activation, bounds, layer, quantised * scale, *bias)
    key = str(activation.name), bounds
    if key not in made:
        made[key] = _quantised_activation(model.graph, activation, bounds, signed, beside)
    layer.replace_input_with(0, made[key])
    layer.replace_input_with(1, _quantised_weight(model.graph, layer, quantised, scale))


def _multiply_pixels(graph: ir.Graph, layer: ir.Node) -> None:
    """((pixels - mean) / std) W + b  ->  pixels (W / std) + (b - mean / std W), pixels as the UINT8 that they are."""
    chain: list[ir.Node] = []
    node = layer.inputs[0].producer()  # type: ignore[union-attr]
    while node is not None:
        chain.insert(0, node)
        node = node.inputs[0].producer()  # type: ignore[union-attr]
    constants = {n.op_type: n.inputs[1].const_value.numpy() for n in chain if n.op_type in ("Sub", "Div")}  # type: ignore[union-attr]
    matrix = layer.inputs[1].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    mean, std = (np.tile(constants[op].reshape(-1), len(matrix) // 3) for op in ("Sub", "Div"))
    matrix = matrix / std[:, None]
    _add_to_bias(graph, layer, -(mean @ matrix))
    value = chain[0].inputs[0]
    for node in chain:
        if node.op_type in ("Reshape", "Transpose"):
            node.replace_input_with(0, value)
            value = node.outputs[0]
            value.dtype = ir.DataType.UINT8
    assert value is not None
    name = f"{value.name}_DequantizeLinear"
    one = add_initializer(graph, f"{value.name}_scale", np.array(1, np.float32))
    zero = add_initializer(graph, f"{value.name}_zero_point", np.array(0, np.uint8))
    dequantise = ir.node("DequantizeLinear", [value, one, zero], name=name)
    out = output_like(dequantise, one)
    out.shape = value.shape
    graph.insert_before(layer, dequantise)
    layer.replace_input_with(0, out)
    layer.replace_input_with(1, _quantised_weight(graph, layer, *int8_channels(matrix, np.dtype(np.float32))))
    for node in reversed(chain):
        if not any(output.uses() for output in node.outputs):
            graph.remove(node, safe=True)


def _add_to_bias(graph: ir.Graph, layer: ir.Node, more: NDArray) -> None:
    """The sum keeps the name that it had; the product means something else now, and gets another."""
    product = layer.outputs[0]
    name, product.name = product.name, f"{product.name}_pixels"
    if (found := bias_behind(layer)) is not None:
        add, position = found
        before = add.inputs[position].const_value.numpy()  # type: ignore[union-attr]
        add.replace_input_with(position, add_initializer(graph, f"{add.name}:pixels", (before + more).astype("f4")))
        return
    bias = add_initializer(graph, f"{layer.name}:pixels", more.astype(np.float32))
    add = ir.node("Add", [product, bias], name=f"{layer.name}_Add")
    total = output_like(add, product)
    product.replace_all_uses_with(total)
    total.name = name
    add.replace_input_with(0, product)
    graph.insert_after(layer, add)


def _is_lopsided(low: float, high: float) -> bool:
    return abs(low + high) > (high - low) / 2


def _centre(
    graph: ir.Graph,
    value: ir.Value,
    bounds: tuple[float, float],
    layer: ir.Node,
    matrix: NDArray,
    add: ir.Node,
    position: int,
) -> tuple[ir.Value, tuple[float, float]]:
    """The activation less its centre, a whole number of steps so that zero keeps a level of its own, and its range."""
    assert value.dtype is not None
    beside = np.dtype(value.dtype.numpy())
    step = float(representable((bounds[1] - bounds[0]) / 254, beside))
    centre = round((bounds[0] + bounds[1]) / 2 / step) * step
    name = f"{value.name}_centred"
    subtract = ir.node("Sub", [value, add_initializer(graph, f"{name}:1", np.array(centre, beside))], name=name)
    out = output_like(subtract, value)
    graph.insert_before(layer, subtract)
    layer.replace_input_with(0, out)
    bias = add.inputs[position]
    assert bias is not None and bias.const_value is not None
    moved = bias.const_value.numpy() + centre * matrix.sum(axis=0, dtype=np.float64)
    add.replace_input_with(position, add_initializer(graph, f"{add.name}:{position}_centred", moved.astype(beside)))
    return out, (-127 * step, 127 * step)


def _as_matmul(graph: ir.Graph, gemm: ir.Node) -> ir.Node:
    """The same product with the weights the other way round."""
    product = ir.node("MatMul", gemm.inputs[:2], name=gemm.name)
    ir.convenience.replace_nodes_and_values(graph, gemm, [gemm], [product], gemm.outputs, product.outputs)
    return product


def _quantised_activation(
    graph: ir.Graph, value: ir.Value, bounds: tuple[float, float], signed: bool, beside: np.dtype
) -> ir.Value:
    if signed:
        scale, zero = symmetric(*bounds), np.int8(0)
    else:
        scale, point = asymmetric(*bounds)
        zero = np.uint8(point)  # type: ignore[assignment]
    name = str(value.name)
    step = add_initializer(graph, f"{name}_scale", np.array(representable(scale, beside), beside))
    point_value = add_initializer(graph, f"{name}_zero_point", np.array(zero))
    quantise = ir.node("QuantizeLinear", [value, step, point_value], name=f"{name}_QuantizeLinear")
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], step, point_value], name=f"{name}_DequantizeLinear")
    output_like(quantise, point_value).shape = value.shape
    output_like(dequantise, value)
    insert_behind(graph, value, [quantise, dequantise])
    return dequantise.outputs[0]


def _quantised_weight(graph: ir.Graph, layer: ir.Node, quantised: NDArray[np.int8], scale: NDArray) -> ir.Value:
    """(K, N), symmetric with a scale for each of N output channels."""
    name = str(layer.name)
    inputs = [
        add_initializer(graph, f"{name}:1_int8", quantised),
        add_initializer(graph, f"{name}:1_scale", scale),
        add_initializer(graph, f"{name}:1_zero_point", np.zeros(scale.shape, np.int8)),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{name}:1_DequantizeLinear")
    out = output_like(node, inputs[1])
    out.shape = ir.Shape(quantised.shape)
    graph.insert_before(layer, node)
    return out


def _rounded(layer: ir.Node, bits: int, beside: np.dtype, rounded: Mapping[tuple[str, int], Rounded]) -> Rounded:
    if (known := rounded.get((str(layer.name), bits))) is not None:
        return known[0], known[1].astype(beside)
    return nearest(weights_of(layer), bits, beside)


def _quantise_weights(graph: ir.Graph, layer: ir.Node, bits: int, rounded: Mapping[tuple[str, int], Rounded]) -> None:
    weight = layer.inputs[1]
    assert weight is not None and weight.dtype is not None
    quantised, scale = _rounded(layer, bits, np.dtype(weight.dtype.numpy()), rounded)
    if layer.op_type == "Gemm":
        layer = _as_matmul(graph, layer)
    if bits == 8:
        layer.replace_input_with(1, _quantised_weight(graph, layer, quantised, scale))
        return
    name = str(layer.name)
    stored = add_initializer(graph, f"{name}:1_int4", quantised.astype(ml_dtypes.int4))
    steps = add_initializer(graph, f"{name}:1_scale", scale)
    zero = add_initializer(graph, f"{name}:1_zero_point", np.zeros(scale.shape, ml_dtypes.int4))
    attributes = {"axis": 0, "block_size": INT4_BLOCK}
    graph.opset_imports[""] = max(graph.opset_imports[""], PLAIN_OPSET_INT4)
    node = ir.node("DequantizeLinear", [stored, steps, zero], attributes, name=f"{name}:1_DequantizeLinear")
    out = output_like(node, steps)
    out.shape = stored.shape
    graph.insert_before(layer, node)
    layer.replace_input_with(1, out)
