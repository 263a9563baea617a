"""What is beyond TensorRT 10's documented floor is named: operator, type, opset."""

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from liteframe.engines.package import GateError
from liteframe.export.check_plain import check_plain
from onnx import TensorProto, numpy_helper

FLOAT, UINT8, DOUBLE = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.DOUBLE


def save(path, nodes, kind=FLOAT, opset=20, functions=(), weights=()):
    values = [oh.make_tensor_value_info(name, kind, [2, 4]) for name in ("x", "y")]
    domains = [oh.make_opsetid("", opset), *(oh.make_opsetid(f.domain, 1) for f in functions)]
    graph = oh.make_graph(nodes, "small", values[:1], values[1:], list(weights))
    onnx.save(oh.make_model(graph, opset_imports=domains, ir_version=10, functions=functions), path)
    return path


def refusal(path):
    with pytest.raises(GateError) as caught:
        check_plain(path)
    return str(caught.value)


def test_what_is_documented_passes(tmp_path):
    nodes = [oh.make_node("Softmax", ["x"], ["s"]), oh.make_node("Add", ["s", "x"], ["y"])]
    check_plain(save(tmp_path / "a.onnx", nodes))


@pytest.mark.parametrize(
    ("operator", "kind", "opset", "fragments"),
    [
        ("Mish", FLOAT, 20, ["opset 20 with Mish,"]),
        ("Neg", DOUBLE, 20, ["Neg on an unknown type"]),
        ("Transpose", UINT8, 20, ["Transpose on uint8"]),
        ("Neg", FLOAT, 21, ["opset 21 with no INT4"]),
    ],
)
def test_what_is_not_is_named(tmp_path, operator, kind, opset, fragments):
    message = refusal(save(tmp_path / "a.onnx", [oh.make_node(operator, ["x"], ["y"])], kind, opset))
    for fragment in (*fragments, "a.onnx", "TensorRT 10.3 may not parse"):
        assert fragment in message


def test_types_are_followed_into_custom_operators(tmp_path):
    body = [oh.make_node("Cast", ["a"], ["c"], to=DOUBLE), oh.make_node("Neg", ["c"], ["n"])]
    body.append(oh.make_node("Cast", ["n"], ["b"], to=FLOAT))
    custom = oh.make_function("own", "Halved", ["a"], ["b"], body, [oh.make_opsetid("", 20)])
    path = save(tmp_path / "a.onnx", [oh.make_node("Halved", ["x"], ["y"], domain="own")], functions=[custom])
    assert "Neg on an unknown type" in refusal(path)


def test_int4_may_have_the_opset_that_brought_it(tmp_path):
    integers = oh.make_tensor("w", TensorProto.INT4, [4, 4], np.zeros(16, np.int8))
    scales = numpy_helper.from_array(np.ones((2, 4), np.float32), "s")
    nodes = [
        oh.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=2),
        oh.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    check_plain(save(tmp_path / "a.onnx", nodes, opset=21, weights=[integers, scales]))
