"""A `plain` graph against what TensorRT 10's first parsers document: opset, operators, and their types."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import TensorProto

from ..engines.package import GateError
from ..engines.targets import PLAIN_OPSET, PLAIN_OPSET_INT4, PLAIN_TYPES

_NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.UINT8: "uint8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}


def check_plain(path: Path) -> None:
    """Custom operators are looked into. The type of a node is that of its first input, of Where its second; where there
    is none, of its output.

    Raises:
        GateError: the graph needs more than the floor; the message names every kind of node that does.
    """
    model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    has_int4 = any(tensor.data_type == TensorProto.INT4 for tensor in graph.initializer)
    beyond: dict[str, None] = {}
    for node in graph.node:
        values = node.input[1:] if node.op_type == "Where" else node.input
        kind = _NAMES.get(types.get((values or node.output)[0], 0), "an unknown type")
        if node.domain or node.op_type not in PLAIN_TYPES:
            beyond[node.op_type] = None
        elif kind not in PLAIN_TYPES[node.op_type]:
            beyond[f"{node.op_type} on {kind}"] = None
    if beyond or opset > (PLAIN_OPSET_INT4 if has_int4 else PLAIN_OPSET):
        raise GateError(
            f"{path.name}: opset {opset} with {', '.join(beyond) or 'no INT4'}, which TensorRT 10.3 may not parse"
        )
