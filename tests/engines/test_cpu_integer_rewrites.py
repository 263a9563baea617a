"""Integer products and FP16 on ONNX Runtime's CPU provider, against the same graphs run unoptimised and NumPy."""

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.cpu_rewrites import make_half_explicit, rewrite_for_cpu
from liteframe.runtime.ort_engine import open_session
from onnx import numpy_helper

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
CPU = "CPUExecutionProvider"


def make(nodes, weights, shape, output, kind=FLOAT):
    graph = oh.make_graph(
        nodes,
        "tiny",
        [oh.make_tensor_value_info("x", kind, shape)],
        [oh.make_tensor_value_info(name, kind, None) for name in output],
        [numpy_helper.from_array(a, n) if isinstance(a, np.ndarray) else a for n, a in weights.items()],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 24)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def unoptimised(model, x):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU]).run(None, {"x": x})


def rewritten(model, x):
    """Kernels by node, and results."""
    made = ir.from_proto(model)
    rewrite_for_cpu(made)
    session = open_session(ir.to_proto(made).SerializeToString(), ort.SessionOptions(), CPU)
    return {str(node.name): node.op_type for node in made.graph}, session.run(None, {"x": x})


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def quantised_layer(seed, outputs=12, bias=True, split=False, axis=-1, rows=5, activation=True):
    """x -> Q/DQ -> layer/MatMul of dequantised weights (-> layer/Add -> three parts), and an x."""
    rng = np.random.default_rng(seed)
    scale, x = np.float32(rng.uniform(0.01, 0.1)), rng.normal(size=(2, rows, 32)).astype(np.float32)
    weights = {
        "x_scale": np.array(scale),
        "x_zero": np.array(rng.integers(0, 256), np.uint8),
        "w": rng.integers(-127, 128, (32, outputs)).astype(np.int8),
        "w_scale": rng.uniform(0.001, 0.1, outputs).astype(np.float32),
        "w_zero": np.zeros(outputs, np.int8),
    }
    nodes = [oh.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["dw"], axis=1, name="dw")]
    if activation:
        nodes += [
            oh.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"], name="q"),
            oh.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["dx"], name="dx"),
        ]
    nodes.append(oh.make_node("MatMul", ["dx" if activation else "x", "dw"], ["product"], name="layer/MatMul"))
    if bias:
        weights["b"] = rng.normal(size=outputs).astype(np.float32)
        nodes.append(oh.make_node("Add", ["product", "b"], ["sum"], name="layer/Add"))
    last = nodes[-1].output[0]
    if split:
        nodes.append(oh.make_node("Split", [last], ["a", "c", "d"], axis=axis, num_outputs=3, name="split"))
    return make(nodes, weights, [2, rows, 32], ["a", "c", "d"] if split else [last]), x


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.booleans())
def test_an_integer_product_and_its_bias_are_one_kernel(seed, bias):
    model, x = quantised_layer(seed, bias=bias)
    kernels, found = rewritten(model, x)
    assert kernels == {"q": "QuantizeLinear", "layer/MatMul": "MatMulIntegerToFloat"}
    close(found, unoptimised(model, x))


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_three_integer_products(seed):
    model, x = quantised_layer(seed, split=True)
    kernels, found = rewritten(model, x)
    assert {f"layer/MatMul_{part}": "MatMulIntegerToFloat" for part in "qkv"}.items() <= kernels.items()
    assert "Split" not in kernels.values()
    close(found, unoptimised(model, x))


def test_parts_of_another_axis_stay():
    model, x = quantised_layer(0, split=True, axis=-2, rows=6)
    kernels, found = rewritten(model, x)
    assert kernels["split"] == "Split"
    close(found, unoptimised(model, x))


def test_a_product_that_two_nodes_read_keeps_its_bias_apart():
    model, x = quantised_layer(1)
    model.graph.output.append(oh.make_tensor_value_info("product", FLOAT, [2, 5, 12]))
    kernels, found = rewritten(model, x)
    assert kernels["layer/MatMul"] == "MatMulIntegerToFloat" and kernels["layer/Add"] == "Add"
    close(found, unoptimised(model, x))


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([4, 8]))
def test_weights_in_integers_are_block_products(seed, bits):
    """Which quantise the activation too, by blocks: their error is of that size, not of float32's."""
    rng = np.random.default_rng(seed)
    if bits == 8:
        model, x = quantised_layer(seed, bias=False, activation=False)
    else:
        x = rng.normal(size=(2, 5, 128)).astype(np.float32)
        integers = rng.integers(-8, 8, (128, 12))
        packed = oh.make_tensor("w", onnx.TensorProto.INT4, integers.shape, integers.reshape(-1))
        scale = (rng.uniform(0.001, 0.1, (2, 12)) * rng.choice([-1, 1], (2, 12))).astype(np.float32)
        nodes = [
            oh.make_node("DequantizeLinear", ["w", "w_scale"], ["dw"], axis=0, block_size=64, name="dw"),
            oh.make_node("MatMul", ["x", "dw"], ["product"], name="layer/MatMul"),
        ]
        model = make(nodes, {"w": packed, "w_scale": scale}, [2, 5, 128], ["product"])
    kernels, found = rewritten(model, x)
    assert kernels == {"layer/MatMul": "MatMulNBits"}
    close(found, unoptimised(model, x), 0.02)


# FP16


def half_chain():
    """x W, + b, GELU by its parts: FP16 throughout; and what NumPy's float16 makes of it."""
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(64, 64)).astype(np.float16), rng.normal(size=64).astype(np.float16)
    nodes = [
        oh.make_node("MatMul", ["x", "w"], ["m/MatMul"], name="m/MatMul"),
        oh.make_node("Add", ["m/MatMul", "b"], ["m/Add"], name="m/Add"),
        oh.make_node("Mul", ["m/Add", "m/Add"], ["m/Mul"], name="m/Mul"),
        oh.make_node("Sub", ["m/Mul", "m/MatMul"], ["m/Sub"], name="m/Sub"),
        oh.make_node("Transpose", ["m/Sub"], ["y"], perm=[1, 0], name="m/Transpose"),
    ]

    def emulate(x):
        product = (x.astype(np.float32) @ w.astype(np.float32)).astype(np.float16)
        total = product + b
        return (total * total - product).T

    return make(nodes, {"w": w, "b": b}, ["rows", 64], ["y"], HALF), emulate


def test_every_operator_rounds_to_fp16(tmp_path):
    model, emulate = half_chain()
    made = ir.from_proto(model)
    assert make_half_explicit(made) == 4  # the Transpose only moves
    onnx.save(model, tmp_path / "graph.onnx")
    engine, *_ = compile_graph(tmp_path / "graph.onnx", tmp_path / "engine.onnx", CPU)
    x = np.random.default_rng(1).normal(size=(9, 64)).astype(np.float16)
    memory = ort.InferenceSession(ir.to_proto(made).SerializeToString(), providers=[CPU])
    expected = emulate(x)
    for session in (memory, ort.InferenceSession(engine, providers=[CPU])):
        (found,) = session.run(None, {"x": x})
        assert found.dtype == np.float16
        # the order of a sum's terms decides ties: a step of float16 now and then, of the largest term
        assert (found == expected).mean() > 0.98
        np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=2e-2, atol=0.25)
    nodes = onnx.load(engine).graph.node
    assert {"m/MatMul_round", "m/Add_round", "m/Mul_round"} <= {node.name for node in nodes}


def test_an_overflow_of_fp16_is_infinite_between_operators():
    nodes = [
        oh.make_node("Mul", ["x", "a"], ["big"], name="m/Mul"),
        oh.make_node("Div", ["big", "a"], ["y"], name="m/Div"),
    ]
    model = make(nodes, {"a": np.array(100, np.float16)}, [2], ["y"], HALF)
    _, (found,) = rewritten(model, np.array([1000, 1], np.float16))
    np.testing.assert_array_equal(found, np.array([np.inf, 1], np.float16))


def test_weights_are_stored_as_fp16_and_widened_to_the_same_numbers(tmp_path):
    sizes, results = {}, {}
    x = np.random.default_rng(1).normal(size=(9, 64))
    for kind in (np.float32, np.float16):
        model, _ = half_chain()
        if kind == np.float32:
            weights = [numpy_helper.to_array(i).astype(kind) for i in model.graph.initializer]
            named = dict(zip((i.name for i in model.graph.initializer), weights, strict=True))
            model = make(list(model.graph.node), named, ["rows", 64], ["y"])
        name = np.dtype(kind).name
        onnx.save(model, tmp_path / f"{name}.onnx")
        files = compile_graph(tmp_path / f"{name}.onnx", tmp_path / f"{name}.engine.onnx", CPU)
        sizes[kind] = files[1].stat().st_size
        results[kind] = files[0]
    assert 0.4 <= sizes[np.float16] / sizes[np.float32] <= 0.6
    stored = ir.load(results[np.float16]).graph.initializers.values()
    assert {v.dtype for v in stored if v.const_value.size > 1} == {ir.DataType.FLOAT16}
    original = {i.name: numpy_helper.to_array(i) for i in half_chain()[0].graph.initializer}
    np.testing.assert_array_equal(next(v.const_value.numpy() for v in stored if v.shape == (64, 64)), original["w"])
    assert np.isfinite(ort.InferenceSession(results[np.float16]).run(None, {"x": x.astype(np.float16)})[0]).all()
