"""Which precision each node of a graph gets: all rules, in one place. `rewrite.py` carries them out.

FP16    Every floating-point tensor is FP16, except islands of FP32:
        norms       LayerNormalization, RMSNormalization and the parts it is written out in: their statistics are sums
                    of squares, which overflow first
        softmax     and the mask before it
        angles      of the rotary embedding: positions times frequencies, up to their cosines and sines
        pixels      their normalisation, before the first product
        selection   a module in which a TopK chooses: a token chosen otherwise is no rounding error, and the weights by
                    which others are added to it are too small for FP16
        range       whatever the audit found beyond FP16_LIMIT: a node that computes or reads such a value
        The weights of WeightedAveragePool are FP32 inside the operator's body.
INT8    Every product with a matrix of weights (a linear layer), except those named in `kept`. Its activation is
        quantised per tensor, its weights per output channel, symmetric. All else, attention's products and
        DepthwiseTemporalConv among it, stays in the precision beside it: FP16, on CPUs FP32.
        Pixels are integers already: where UINT8 is taken, the patch embedding multiplies them as they are, their
        normalisation moved into its weights. Elsewhere it is left out, for rounding pixels anew costs as much as all
        layers behind it together.
        A layer of which only one position is wanted, the language model's head, waits for its weights, not for
        arithmetic: only they are INT8. So it is with the decoder's layers in `kept`.
WEIGHTS Only the weights of every linear layer: INT8 per output channel, or INT4 in blocks of INT4_BLOCK along
        the inputs; the head, and layers that such blocks or pairs of outputs do not divide, in INT8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from ..engines.targets import Asked

Type = Literal["fp32", "fp16"]

# a quarter of FP16's largest number, 65504: what calibration did not see may be larger than what it saw
FP16_LIMIT = 65504 / 4

INT4_BLOCK = 64

OF_OUTLIERS = "_of_outliers"  # ends the names of products with channels set apart; see outliers.py

NORMS = ("LayerNormalization", "RMSNormalization")
# part of a norm wherever it is written out, and of nothing else in these graphs
NORM_PARTS = ("Pow", "Reciprocal")


@dataclass
class Plan:
    """What `rewrite.apply` does.

    Attributes:
        types: node -> type of the floating-point tensors that it reads and writes.
        islands: node -> why it is FP32 although FP16 was asked for.
        int8: the linear layers to quantise, by node.
        weights: linear layer -> bits that only its weights are quantised to.
        kept: linear layer -> why its activation is not quantised although INT8 was asked for.
    """

    types: dict[str, Type]
    islands: dict[str, str] = field(default_factory=dict)
    int8: list[str] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def plan(
    model: ir.Model,
    beside: Type,
    quantise: Asked,
    largest: Mapping[str, float],
    kept: Mapping[str, str] | None = None,
    weights_of_kept: bool = False,
    signed: bool = True,
) -> Plan:
    """The plan for an FP32 graph.

    Args:
        beside: type of what is not quantised.
        quantise: what becomes of linear layers; "fp32" and "fp16" leave them as what is beside them.
        largest: value -> its largest absolute value over the calibration clips. Values that are missing count as small.
        kept: linear layers that cost too much, with the reason.
        weights_of_kept: whether at least their weights are quantised.
        signed: whether activations become INT8 with zero point 0, as TensorRT takes them, or UINT8.
    """
    nodes = [node for node in model.graph if any(is_float(value) for value in node.outputs)]
    made = Plan(types={str(node.name): beside for node in nodes})
    if beside == "fp16":
        made.islands = _islands(model, nodes, largest)
        made.types |= dict.fromkeys(made.islands, "fp32")
    pixels = pixel_nodes(model)
    for layer in linear_layers(model):
        name, head = str(layer.name), is_head(layer)
        if quantise in ("fp32", "fp16"):
            break
        activation, weight = layer.inputs
        assert activation is not None and weight is not None and weight.shape is not None
        if activation.producer() in pixels and (signed or quantise != "int8"):
            made.kept[name] = "pixels"
        elif kept is not None and name in kept:
            made.kept[name] = kept[name]
            if weights_of_kept:
                made.weights[name] = 8
        elif quantise == "int4-weights":
            rows, columns = weight.shape.numpy()
            made.weights[name] = 8 if head or rows % INT4_BLOCK or columns % 2 else 4
        elif quantise == "int8-weights" or head:
            made.weights[name] = 8
        else:
            made.int8.append(name)
    return made


def _islands(model: ir.Model, nodes: list[ir.Node], largest: Mapping[str, float]) -> dict[str, str]:
    found: dict[str, str] = {}
    norms = {module(node) for node in nodes if node.op_type in (*NORMS, *NORM_PARTS)}
    angles = _before([node for node in nodes if node.op_type in ("Cos", "Sin")])
    pixels = pixel_nodes(model)
    selections = {module(node) for node in nodes if node.op_type == "TopK"}
    for node in nodes:
        if module(node) in norms:
            found[str(node.name)] = "norm"
        elif node.op_type == "Softmax" or (node.op_type == "Where" and _feeds_only(node, "Softmax")):
            found[str(node.name)] = "softmax"
        elif node in angles or (node.inputs and all(v is None or _comes_from(v, angles) for v in node.inputs)):
            found[str(node.name)] = "angles"
            angles.add(node)
        elif node in pixels:
            found[str(node.name)] = "pixels"
        elif module(node) in selections:
            found[str(node.name)] = "selection"
        elif over := [v for v in (*node.outputs, *node.inputs) if v is not None and _largest(v, largest) > FP16_LIMIT]:
            worst = max(over, key=lambda v: _largest(v, largest))
            found[str(node.name)] = f"range: {worst.name} reaches {_largest(worst, largest):.4g}"
    return found


def _largest(value: ir.Value, observed: Mapping[str, float]) -> float:
    if value.is_initializer() and is_float(value) and value.const_value is not None:
        array = value.const_value.numpy()
        return float(np.abs(array).max()) if array.size else 0.0
    return observed.get(str(value.name), 0.0)


def _before(nodes: list[ir.Node]) -> set[ir.Node]:
    """The nodes and all that they are computed from."""
    seen: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [v.producer() for v in node.inputs if v is not None and v.producer() is not None]  # type: ignore[misc]
    return seen


def _comes_from(value: ir.Value, nodes: set[ir.Node]) -> bool:
    return value.is_initializer() or value.producer() in nodes


def _feeds_only(node: ir.Node, operator: str) -> bool:
    return all(user.op_type == operator for value in node.outputs for user, _ in value.uses())


def pixel_nodes(model: ir.Model) -> set[ir.Node]:
    """What happens to pixels before the first operator that mixes them."""
    seen: set[ir.Node] = set()
    waiting = [user for v in model.graph.inputs if v.dtype == ir.DataType.UINT8 for user, _ in v.uses()]
    while waiting:
        node = waiting.pop()
        if node not in seen and node.op_type in ("Cast", "Reshape", "Transpose", "Sub", "Div", "Mul"):
            seen.add(node)
            waiting += [user for value in node.outputs for user, _ in value.uses()]
    return seen


def linear_layers(model: ir.Model) -> list[ir.Node]:
    """Products of an activation with a matrix of weights: MatMul, and Gemm without a bias and with its weights
    transposed, which is how a linear layer over single vectors is exported. Not those of outliers."""
    return [node for node in model.graph if _is_linear(node)]


def is_head(layer: ir.Node) -> bool:
    """Whether only one position of this linear layer is wanted."""
    return layer.op_type == "Gemm"


def _is_linear(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "" or str(node.name).endswith(OF_OUTLIERS):
        return False
    activation, weight, *bias = node.inputs
    if weight is None or activation is None or not weight.is_initializer() or activation.is_initializer():
        return False
    if weight.shape is None or len(weight.shape) != 2 or not is_float(weight):
        return False
    gemm = node.attributes
    return node.op_type == "MatMul" or (
        not any(bias) and gemm.get_int("transB", 0) == 1 and gemm.get_int("transA", 0) == 0
    )


def is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def module(node: ir.Node) -> str:
    """The module of the PyTorch model that a node came from."""
    return str(node.name).rpartition("/")[0]
