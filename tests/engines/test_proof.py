"""A compiled graph that differs from what its ONNX graph asks for is found, by name, and refused."""

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
from liteframe.engines import compile_onnxruntime, compile_tensorrt
from liteframe.engines.package import GateError, Precision
from liteframe.engines.proof import Proof, check, integer_layers, prove_network, prove_onnxruntime, types_found
from liteframe.runtime.cli import guard
from onnx import numpy_helper

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
CPU = "CPUExecutionProvider"


def save(path, kind=FLOAT, quantised=False, signed=True):
    """x -> two layers with a bias and a Relu between; Q/DQ around the first, or not."""
    dtype, rng = oh.tensor_dtype_to_np_dtype(kind), np.random.default_rng(0)
    weights = {f"{name}.bias": rng.normal(size=16).astype(dtype) for name in ("a", "b")}
    nodes = []
    for name, before in (("a", "x"), ("b", "a/Relu")):
        left, right = before, f"{name}.weight"
        if quantised:
            left, right = f"{before}_DequantizeLinear", f"{name}:1_DequantizeLinear"
            weights |= {
                f"{before}_scale": np.array(0.05, dtype),
                f"{before}_zero": np.array(0 if signed else 128, np.int8 if signed else np.uint8),
                f"{name}.weight": rng.integers(-127, 128, (16, 16)).astype(np.int8),
                f"{name}.scale": np.full(16, 0.01, dtype),
                f"{name}.zero": np.zeros(16, np.int8),
            }
            pair = [f"{before}_scale", f"{before}_zero"]
            nodes += [
                oh.make_node("QuantizeLinear", [before, *pair], [f"{before}_q"], name=f"{before}_QuantizeLinear"),
                oh.make_node("DequantizeLinear", [f"{before}_q", *pair], [left], name=left),
                oh.make_node(
                    "DequantizeLinear", [f"{name}.{part}" for part in ("weight", "scale", "zero")], [right], name=right,
                    axis=1,
                ),
            ]  # fmt: skip
        else:
            weights[right] = rng.normal(size=(16, 16)).astype(dtype)
        nodes += [
            oh.make_node("MatMul", [left, right], [f"{name}/MatMul"], name=f"{name}/MatMul"),
            oh.make_node("Add", [f"{name}/MatMul", f"{name}.bias"], [f"{name}/Add"], name=f"{name}/Add"),
            oh.make_node("Relu", [f"{name}/Add"], [f"{name}/Relu"], name=f"{name}/Relu"),
        ]
    nodes[-1].output[0] = "y"
    graph = oh.make_graph(
        nodes,
        "tiny",
        [oh.make_tensor_value_info("x", kind, [4, 16])],
        [oh.make_tensor_value_info("y", kind, [4, 16])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


@pytest.fixture
def graphs(tmp_path):
    return {
        "fp32": save(tmp_path / "fp32.onnx"),
        "fp16": save(tmp_path / "fp16.onnx", HALF),
        "int8": save(tmp_path / "int8.onnx", HALF, quantised=True),
        "uint8": save(tmp_path / "uint8.onnx", quantised=True, signed=False),
    }


def precision(asked):
    return Precision(asked=asked, found={}, kept=[])


def tensorrt(graph):
    return compile_tensorrt.compile_graph(graph, [], "tensorrt-rtx", ["8.0"]).proof


# TensorRT


@pytest.mark.parametrize(
    ("name", "products", "kinds"),
    [("fp32", 0, {"fp32"}), ("fp16", 0, {"fp16"}), ("int8", 2, {"int8", "fp16"})],
)
def test_what_was_asked_for_is_proven(graphs, name, products, kinds):
    proof = tensorrt(graphs[name])
    assert proof.wrong == []
    assert proof.integer_products == products
    assert {*proof.found} == kinds
    check("encoder", precision(name), proof)


@pytest.mark.parametrize(("asked", "made"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_a_network_in_another_type_is_found(graphs, monkeypatch, asked, made):
    """The compiler is handed one graph, the proof another of the same names."""
    original = compile_tensorrt.prove_network
    monkeypatch.setattr(compile_tensorrt, "prove_network", lambda graph, layers: original(graphs[asked], layers))
    proof = tensorrt(graphs[made])
    assert {f"{layer}/{op}: {asked} asked for, computed in {made}" for layer in "ab" for op in ("MatMul", "Relu")} <= {
        *proof.wrong
    }
    with pytest.raises(GateError, match=rf"^encoder: asked for {asked}, .*{made}.*a/MatMul: {asked} asked for"):
        check("encoder", precision(asked), proof)


def test_quantisation_that_is_dropped_is_found(graphs):
    left_out = "a/Relu_QuantizeLinear"
    model = onnx.load(graphs["int8"])
    kinds = {"QuantizeLinear": "int8"}
    layers = [(n.name, kinds.get(n.op_type, "fp16")) for n in model.graph.node if n.name != left_out]
    proof = prove_network(graphs["int8"], layers)
    assert proof.wrong == [f"{left_out}: quantisation asked for, dropped by the parser"]
    with pytest.raises(GateError, match=left_out):
        check("encoder", precision("int8"), proof)


def test_layers_of_the_parsers_own_are_counted_but_not_judged(graphs):
    proof = prove_network(graphs["fp16"], [("", "fp32"), ("unheard of", "fp32"), ("a/Relu", "fp16")])
    assert proof == Proof({"fp16": 1, "fp32": 2}, 0, [])


# ONNX Runtime


def plainly_optimised(graph, engine):
    """Without the rewrites."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(engine)
    options.log_severity_level = 4
    ort.InferenceSession(graph, options, providers=[CPU])
    return engine


def test_integer_products_of_onnxruntime_are_proven(graphs, tmp_path):
    engine, *_ = compile_onnxruntime.compile_graph(graphs["uint8"], tmp_path / "engine.onnx", CPU)
    proof = prove_onnxruntime(graphs["uint8"], engine)
    assert proof.wrong == []
    assert proof.integer_products == 2
    check("encoder", precision("int8"), proof)


def test_an_integer_product_that_became_another_kernel_is_found(graphs, tmp_path):
    proof = prove_onnxruntime(graphs["uint8"], plainly_optimised(graphs["uint8"], tmp_path / "engine.onnx"))
    assert proof.integer_products == 0
    assert [sentence.partition(":")[0] for sentence in proof.wrong] == ["a/MatMul", "b/MatMul"]
    with pytest.raises(GateError, match="a/MatMul: an integer product asked for, became"):
        check("encoder", precision("int8"), proof)


def test_fp16_between_operators_is_proven_for_onnxruntime(graphs, tmp_path):
    engine, *_ = compile_onnxruntime.compile_graph(graphs["fp16"], tmp_path / "engine.onnx", CPU)
    proof = prove_onnxruntime(graphs["fp16"], engine)
    assert proof.wrong == []
    assert proof.found["fp16"] >= len(onnx.load(graphs["fp16"]).graph.node)
    check("encoder", precision("fp16"), proof)


def test_an_engine_of_another_graph_is_found(graphs):
    proof = prove_onnxruntime(graphs["fp16"], graphs["fp32"])
    assert "a/MatMul: fp16 asked for, computed in fp32" in proof.wrong
    with pytest.raises(GateError, match="a/MatMul: fp16 asked for"):
        check("encoder", precision("fp16"), proof)


# graphs and gates


def test_types_and_integer_layers_of_a_graph(graphs):
    assert types_found(graphs["fp32"]) == {"fp32": 6}
    assert types_found(graphs["int8"]) == {"fp16": 10, "int8": 2}
    assert integer_layers(onnx.load(graphs["int8"])) == ["a/MatMul", "b/MatMul"]
    assert integer_layers(onnx.load(graphs["fp16"])) == []


@pytest.mark.parametrize(
    ("asked", "proof"),
    [
        ("fp16", Proof({"fp32": 3}, 0, [])),
        ("fp32", Proof({"fp16": 1, "fp32": 3}, 0, [])),
        ("int8", Proof({"fp16": 3, "int8": 1}, 0, [])),
        ("int4-weights", Proof({"fp16": 3}, 0, [])),
    ],
)
def test_a_network_without_what_was_asked_for_is_refused(asked, proof):
    with pytest.raises(GateError) as caught:
        check("decoder", precision(asked), proof)
    assert str(caught.value) == f"decoder: asked for {asked}, the compiled network computes tensors of {proof.found}"


def test_many_differences_are_cut_short():
    with pytest.raises(GateError, match=r"layer 4; and 3 more$"):
        check("decoder", precision("fp16"), Proof({"fp16": 1}, 0, [f"layer {i}" for i in range(8)]))


def test_a_failed_proof_ends_the_command_with_exit_code_1(capsys):
    def command(arguments):
        return check("decoder", precision("fp16"), Proof({"fp16": 1, "fp32": 1}, 0, ["a/Relu: fp16 asked for"]))

    assert guard(command, []) == 1
    assert "a/Relu: fp16 asked for" in capsys.readouterr().err
