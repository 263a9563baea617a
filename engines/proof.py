"""Proof of precision: what a compiler made of a graph, node by node, against what the graph asks for.

graph.onnx ──asked──▶ node -> types of its outputs   ┐
TensorRT's parsed network: (node, type) of each layer ├─▶ counts by type, and what differs
ONNX Runtime's optimised graph: values, kernels       ┘
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .package import GateError, Precision

if TYPE_CHECKING:  # imported where it is used: inspecting a package does without it
    import onnx

# numbers of ONNX's TensorProto.DataType
_NAMES = {1: "fp32", 10: "fp16", 16: "bf16", 3: "int8", 2: "uint8", 22: "int4", 21: "uint4"}
_FLOATS = ("fp32", "fp16", "bf16")
# ONNX Runtime's kernels that multiply integers
INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "MatMulNBits", "QLinearMatMul")


@dataclass(frozen=True)
class Proof:
    """
    Attributes:
        found: type -> how many tensors of it the compiled network computes.
        integer_products: how many products take weights that are integers.
        wrong: a sentence for each node that differs from what the graph asks for.
    """

    found: dict[str, int]
    integer_products: int
    wrong: list[str]


def prove_network(graph: Path, layers: Iterable[tuple[str, str]]) -> Proof:
    """The proof for a parsed TensorRT network.

    Args:
        layers: for each output of each layer the ONNX node it came from ("" if unknown), and its type.
    """
    model = _load(graph)
    asked = _asked(model)
    found: Counter[str] = Counter()
    wrong: dict[str, None] = {}
    present = set()
    for node, kind in layers:
        found[kind] += 1
        present.add(node)
        if node in asked and kind not in asked[node]:
            wrong[f"{node}: {' or '.join(sorted(asked[node]))} asked for, computed in {kind}"] = None
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.name not in present:
            wrong[f"{node.name}: quantisation asked for, dropped by the parser"] = None
    return Proof(dict(sorted(found.items())), len(present & set(integer_layers(model))), list(wrong))


def prove_onnxruntime(graph: Path, engine: Path) -> Proof:
    """The proof for a graph that ONNX Runtime has optimised."""
    asked, made = _load(graph), _load(engine)
    types = _types(made)
    found = Counter(types.values())
    wrong = []
    for value, kind in _types(asked).items():
        if kind in _FLOATS and types.get(value, kind) != kind:
            wrong.append(f"{value}: {kind} asked for, computed in {types[value]}")
    kernels = {node.name: node.op_type for node in made.graph.node}
    for layer in integer_layers(asked):
        names = [name for name in (layer, *(f"{layer}_{part}" for part in "qkv")) if name in kernels]
        if not names or any(kernels[name] not in INTEGER_PRODUCTS for name in names):
            what = kernels[names[0]] if names else "something else"
            wrong.append(f"{layer}: an integer product asked for, became {what}")
    products = sum(kind in INTEGER_PRODUCTS for kind in kernels.values())
    return Proof(dict(sorted(found.items())), products, wrong)


def types_found(graph: Path) -> dict[str, int]:
    """Type -> how many of an ONNX graph's values have it, of those that nodes compute."""
    return dict(sorted(Counter(_types(_load(graph)).values()).items()))


def integer_layers(model: onnx.ModelProto) -> list[str]:
    """Names of the products whose weights are dequantised integers."""
    makers = {output: node for node in model.graph.node for output in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in makers and makers[node.input[1]].op_type == "DequantizeLinear"
    ]


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(path, load_external_data=False)


def _asked(model: onnx.ModelProto) -> dict[str, frozenset[str]]:
    """Node -> types of its outputs. A custom operator may compute in FP32 inside."""
    types = _types(model)
    inside = {function.name for function in model.functions}
    asked = {}
    for node in model.graph.node:
        kinds = {types[output] for output in node.output if types.get(output) in (*_FLOATS, "int8", "int4")}
        if kinds:
            asked[node.name] = frozenset(kinds | {"fp32"} if node.op_type in inside else kinds)
    return asked


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Value -> type, of all values that nodes compute."""
    computed = {output for node in model.graph.node for output in node.output}
    return {
        value.name: _NAMES[value.type.tensor_type.elem_type]
        for value in (*model.graph.value_info, *model.graph.output)
        if value.name in computed and value.type.tensor_type.elem_type in _NAMES
    }


def check(name: str, precision: Precision, proof: Proof) -> None:
    """Raises GateError when a compiled network is not what was asked for."""
    asked = precision.asked
    lacking = asked in ("fp32", "fp16") and asked not in proof.found
    lacking |= asked not in ("fp32", "fp16") and proof.integer_products == 0
    strays = asked == "fp32" and set(proof.found) - {"fp32"}
    if proof.wrong or lacking or strays:
        reasons = "; ".join(proof.wrong[:5]) + (f"; and {len(proof.wrong) - 5} more" if len(proof.wrong) > 5 else "")
        raise GateError(
            f"{name}: asked for {precision.asked}, the compiled network computes tensors of {proof.found}"
            + (f": {reasons}" if reasons else "")
        )
