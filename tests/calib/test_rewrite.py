"""Q/DQ graphs compute what quantised numbers multiplied in double precision give, and every compiler takes them."""

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.calib.placement import INT4_BLOCK, Plan, linear_layers, plan
from liteframe.calib.ranges import choose_range
from liteframe.calib.rewrite import apply
from liteframe.engines import compile_tensorrt
from liteframe.engines.package import Precision
from liteframe.engines.proof import check, integer_layers
from liteframe.engines.targets import TARGETS
from onnx import numpy_helper

FLOAT = onnx.TensorProto.FLOAT
UNOPTIMISED = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
LAYER = "m/MatMul"


def linear(weight, bias=None):
    """x [rows, K] times weight, plus bias."""
    nodes = [oh.make_node("MatMul", ["x", "w"], ["y" if bias is None else LAYER], name=LAYER)]
    weights = {"w": weight}
    if bias is not None:
        nodes.append(oh.make_node("Add", [LAYER, "b"], ["y"], name="m/Add"))
        weights["b"] = bias
    graph = oh.make_graph(
        nodes,
        "linear",
        [oh.make_tensor_value_info("x", FLOAT, ["rows", weight.shape[0]])],
        [oh.make_tensor_value_info("y", FLOAT, ["rows", weight.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 24)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def numbers(seed, rows=9, inputs=16, outputs=12):
    rng = np.random.default_rng(seed)
    sizes = ((rows, inputs), (inputs, outputs), (outputs,))
    return [rng.normal(size=size).astype(np.float32) * 10 ** rng.uniform(-2, 2) for size in sizes]


def quantised_weights(weight):
    """Integers times scales, in double precision: symmetric, for each output channel."""
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.float64) * scale


def close(found, expected, x, w, b):
    """But for float32's rounding of the sum."""
    scale = np.abs(x).max() * np.abs(w).max() * len(w) + np.abs(b).max()
    assert np.abs(found - expected).max() <= 1e-6 * scale


# numbers


@given(st.integers(0, 2**32), st.booleans())
def test_int8_equals_numpys(run, seed, signed):
    x, w, b = numbers(seed)
    low, high = float(x.min()), float(x.max())
    if signed:
        low, high = (-max(-low, high), max(-low, high))
        scale, zero, ends = np.float32(high / 127), 0, (-128, 127)
    else:
        scale = np.float32((high - low) / 255)
        zero, ends = round(-low / float(scale)), (0, 255)
    model = linear(w, b)
    apply(model, Plan({}, int8=[LAYER]), {LAYER: (low, high)}, signed)
    found = {str(i.name): i.const_value.numpy() for i in model.graph.initializers.values()}
    assert found["x_zero_point"] == zero and found["x_zero_point"].dtype == (np.int8 if signed else np.uint8)
    np.testing.assert_allclose(found["x_scale"], scale, rtol=2e-7)
    quantised = np.clip(np.rint(x / found["x_scale"]) + zero, *ends)
    xq = (quantised - zero) * np.float64(found["x_scale"])
    wq = quantised_weights(w)
    close(run(model, {"x": x}, level=UNOPTIMISED)["y"], xq @ wq + b, x, w, b)
    zeros = run(model, {"x": np.zeros_like(x)}, level=UNOPTIMISED)["y"]
    np.testing.assert_array_equal(zeros, np.broadcast_to(b, zeros.shape))


@given(st.integers(0, 2**32), st.sampled_from([-1, 1]))
def test_a_lopsided_activation_is_centred_where_there_is_a_bias(run, seed, side):
    x, w, b = numbers(seed)
    x = side * np.abs(x)
    x[0, 0] = 0
    bounds = float(x.min()), float(x.max())
    plain, centred, unsigned = linear(w), linear(w, b), linear(w, b)
    for model, signed in ((plain, True), (centred, True), (unsigned, False)):
        apply(model, Plan({}, int8=[LAYER]), {LAYER: bounds}, signed)
    assert [sum(node.op_type == "Sub" for node in m.graph) for m in (plain, centred, unsigned)] == [0, 1, 0]
    step = np.float64(np.float32((bounds[1] - bounds[0]) / 254))
    centre = np.rint(sum(bounds) / 2 / step) * step
    wq = quantised_weights(w)
    shifted = (x - np.float32(centre)).astype(np.float32)
    xq = np.clip(np.rint(shifted / np.float32(step)), -128, 127) * step
    found = run(centred, {"x": x}, level=UNOPTIMISED)["y"]
    assert np.abs(found - (xq @ wq + b + centre * wq.sum(axis=0))).max() <= step * np.abs(w).max() * 1.01  # one tie
    zeros = run(centred, {"x": np.zeros_like(x)}, level=UNOPTIMISED)["y"]
    close(zeros, np.broadcast_to(b, zeros.shape), x, w, b)
    halved = np.abs(found - (x.astype(np.float64) @ wq + b)).mean()
    uncentred = np.abs(run(plain, {"x": x}, level=UNOPTIMISED)["y"] - x.astype(np.float64) @ wq).mean()
    assert halved < 0.75 * uncentred  # twice the levels


@given(st.integers(0, 2**32), st.sampled_from(["fp32", "fp16"]))
def test_int4_blocks_err_no_more_than_rounding_to_seven_levels(seed, beside):
    _, w, _ = numbers(seed, inputs=2 * INT4_BLOCK)
    model = linear(w)
    apply(model, Plan({LAYER: beside}, weights={LAYER: 4}), {}, True)
    stored, scale = (model.graph.initializers[f"{LAYER}:1_{part}"].const_value.numpy() for part in ("int4", "scale"))
    stored = stored.astype(np.float64)
    assert scale.shape == (2, w.shape[1])
    assert stored.min() >= -8 and stored.max() <= 7 and scale.min() > 0  # TensorRT 10's parser wants that
    found = (stored.reshape(2, INT4_BLOCK, -1) * scale[:, None].astype(np.float64)).reshape(w.shape)
    w = w.astype(beside.replace("fp", "float")).astype(np.float64)
    blocks = w.reshape(2, INT4_BLOCK, -1)
    rounding = (np.abs(blocks).max(axis=1, keepdims=True) / 7).astype(beside.replace("fp", "float")).astype(np.float64)
    plainly = (np.clip(np.rint(blocks / rounding), -8, 7) * rounding).reshape(w.shape)
    errors = [np.square(array - w).reshape(2, INT4_BLOCK, -1).sum(axis=1) for array in (found, plainly)]
    assert (errors[0] <= errors[1] * (1 + 1e-3)).all()


# graphs


@pytest.fixture
def lower(tiny_graphs, observed):
    """A tiny graph in a precision: FP16, or what is quantised between FP16 or FP32; and the plan."""

    def lower(key, asked, beside="fp16", signed=True):
        model = ir.load(tiny_graphs[key])
        ranges = {layer: choose_range(h, "minmax") for layer, h in observed[key].histograms.items()}
        made = plan(model, beside, asked, observed[key].largest)
        apply(model, made, ranges, signed)
        return model, made

    return lower


def wanted(key):
    """Precisions that a graph can be asked for."""
    return ["fp16", "int8", *(("int8-weights", "int4-weights") if key[0] != "encoder" else ())]


def save(model, path):
    ir.save(model, path, external_data=f"{path.stem}.data")
    return path


def test_what_is_written_is_valid_and_loads_and_is_nearly_the_same(lower, feeds, answers, tiny_graphs, tmp_path, key):
    expected = answers(tiny_graphs[key], feeds[key][:1]).ravel().astype(np.float64)
    for asked in wanted(key):
        for beside, signed in (("fp16", True), ("fp32", False)):
            path = save(lower(key, asked, beside, signed)[0], tmp_path / f"{asked}.{beside}.onnx")
            onnx.checker.check_model(str(path), full_check=True)
            found = answers(path, feeds[key][:1]).ravel().astype(np.float64)
            cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
            assert cosine > {"fp16": 0.9999, "int8": 0.97, "int8-weights": 0.999, "int4-weights": 0.95}[asked], asked


def test_names_of_values_stay(lower, tiny_graphs, key):
    before = {v.name for node in ir.load(tiny_graphs[key]).graph for v in node.outputs}
    for asked in wanted(key):
        model, _ = lower(key, asked)
        assert before <= {v.name for node in model.graph for v in node.outputs}
        names = [str(node.name) for node in model.graph]
        assert len({*names}) == len(names)


@pytest.mark.parametrize("biased", [True, False])
def test_what_bears_a_name_where_pixels_are_multiplied_is_what_bore_it(tiny_graphs, observed, feeds, run, biased):
    key = ("encoder", "fused")
    reference, model = ir.load(tiny_graphs[key]), ir.load(tiny_graphs[key])
    patches = "backbone.vit.patch_embedding/MatMul"
    for graph in (reference, model) if not biased else ():
        product = next(node for node in graph.graph if node.name == patches).outputs[0]
        ((add, _),) = product.uses()
        add.outputs[0].replace_all_uses_with(product)
        graph.graph.remove(add, safe=True)
    placement = plan(model, "fp32", "int8", {}, signed=False)
    apply(model, placement, dict.fromkeys(placement.int8, (-1.0, 1.0)), signed_activations=False)
    made = {value.name for node in model.graph for value in node.outputs}
    both = [v.name for n in reference.graph if "patch_embedding" in str(n.name) for v in n.outputs if v.name in made]
    floats = [name for name in both if name.rpartition("/")[2] in ("MatMul", "Add")]
    assert len(floats) == 1
    expected, found = (run(graph, feeds[key][0], floats)[floats[0]] for graph in (reference, model))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_weights_are_written_once_and_none_is_left_over(lower, key):
    for asked in wanted(key):
        model, _ = lower(key, asked)
        assert all(v.uses() for v in model.graph.initializers.values())
        if asked != "fp16":
            quantised = [n for n in model.graph if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer()]
            floats = [n for n in linear_layers(model) if n.name != "backbone.vit.patch_embedding/MatMul"]
            assert quantised and not floats


# TensorRT-RTX


def activations_of(model):
    products = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[0].producer() is not None]
    return [n.inputs[0] for n in products if n.inputs[0].producer().op_type == "DequantizeLinear"]


def prove(lower, specs, path, key, asked, capabilities):
    model, made = lower(key, asked)
    inputs = specs(model)
    graph = save(model, path / f"{asked}.onnx")
    compiled = compile_tensorrt.compile_graph(graph, inputs, "tensorrt-rtx", capabilities)
    proof = compiled.proof
    assert proof.wrong == []
    assert proof.integer_products == len(made.int8) + len(made.weights) == len(integer_layers(onnx.load(graph)))
    assert {*proof.found} == {"fp16", "fp32", *(["int8"] if asked == "int8" else [])}
    activations = sum(node.op_type == "QuantizeLinear" for node in model.graph)
    assert proof.found.get("int8", 0) == activations == len({*activations_of(model)})
    assert len(compiled.engine) > 10_000
    check(key[0], Precision(asked=asked, found=proof.found, kept=[]), proof)


def test_tensorrt_compiles_what_was_asked_for(lower, specs, tmp_path, key):
    for asked in wanted(key):
        prove(lower, specs, tmp_path, key, asked, ["8.0"])


@pytest.mark.slow
def test_tensorrt_compiles_for_every_capability_at_once(lower, specs, tmp_path, key):
    capabilities = TARGETS["rtx"].capabilities
    assert {"8.6", "8.9", "12.0"} <= {*capabilities}
    for asked in wanted(key):
        prove(lower, specs, tmp_path, key, asked, capabilities)
