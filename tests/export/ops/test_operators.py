"""The custom operators: the torch function and the ONNX function body against the NumPy reference."""

import math

import numpy as np
import onnx
import onnx.helper as oh
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.export.ops import DOMAIN, VERSION, depthwise_temporal_conv, weighted_average_pool

# sums of up to 125 products of normal numbers: ten times their rounding errors
TOLERANCE = {np.float32: 1e-4, np.float64: 1e-12}
both_precisions = pytest.mark.parametrize("dtype", [np.float32, np.float64])
both_opsets = pytest.mark.parametrize("opset", [20, 24])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors this small, and for long when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(dtype)


def assert_close(got, expected, dtype=np.float32):
    assert got.dtype == dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype])


def build_session(operator, opset, inputs, output_shape, attributes):
    """A graph of one node, its first input and its output with a dynamic number of clips."""
    body = operator.function_body(opset)
    shapes = {"x": ["clips", *inputs["x"].shape[1:]]}
    values = [
        oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes.get(name, array.shape))
        for name, array in inputs.items()
    ]
    out = oh.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["clips", *output_shape[1:]])
    node = oh.make_node(operator.NAME, list(inputs), ["out"], domain=DOMAIN, plugin_namespace=DOMAIN, **attributes)
    model = oh.make_model(
        oh.make_graph([node], "one_node", values, [out]),
        functions=[body],
        opset_imports=[oh.make_opsetid("", opset), oh.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@st.composite
def convolutions(draw):
    """(time, grid, strides, kernel, channels), in both forms: over time and tokens, or over time, height and width.

    Two channels at least: of a single one laid out channels-last, torch 2.13 (oneDNN) convolves wrongly on CPU in FP32.
    """
    axes = draw(st.sampled_from([1, 2]))
    time, *grid = (draw(st.integers(1, 6)) for _ in range(1 + axes))
    strides = [draw(st.integers(1, 3)) for _ in range(1 + axes)]
    kernel = [draw(st.sampled_from([1, 3, 5])) for _ in range(1 + axes)]
    return time, grid, strides, kernel, draw(st.integers(2, 5))


def convolution_inputs(clips, time, grid, kernel, channels, dtype=np.float32):
    return {
        "x": normal(clips, time, math.prod(grid), channels, dtype=dtype),
        "weight": normal(channels, 1, *kernel, dtype=dtype),
        "bias": normal(channels, dtype=dtype),
    }


@both_precisions
@settings(max_examples=50, deadline=None)
@given(case=convolutions(), clips=st.integers(1, 3))
def test_torch_convolution_equals_the_reference(dtype, case, clips):
    time, grid, strides, kernel, channels = case
    inputs = convolution_inputs(clips, time, grid, kernel, channels, dtype)
    got = depthwise_temporal_conv.depthwise_temporal_conv(*map(torch.from_numpy, inputs.values()), grid, strides)
    expected = depthwise_temporal_conv.numpy_reference(*inputs.values(), grid, strides)
    assert_close(got.numpy(), expected, dtype)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)),
    taps=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
)
def test_convolution_over_time_is_conv1d_of_every_token(shape, taps, stride):
    clips, time, tokens, channels = shape
    inputs = convolution_inputs(clips, time, (tokens,), (taps, 1), channels, np.float64)
    x, weight, bias = map(torch.from_numpy, inputs.values())
    rows = x.permute(0, 2, 3, 1).reshape(clips * tokens, channels, time)
    expected = F.conv1d(rows, weight[..., 0], bias, stride=stride, padding=taps // 2, groups=channels)
    expected = expected.reshape(clips, tokens, channels, -1).permute(0, 3, 1, 2).numpy()
    got = depthwise_temporal_conv.depthwise_temporal_conv(x, weight, bias, (tokens,), (stride, 1))
    assert_close(got.numpy(), expected, np.float64)
    reference = depthwise_temporal_conv.numpy_reference(*inputs.values(), (tokens,), (stride, 1))
    assert_close(reference, expected, np.float64)


@both_opsets
@settings(max_examples=15, deadline=None)
@given(case=convolutions())
def test_onnx_convolution_equals_the_reference_for_any_number_of_clips(opset, case):
    time, grid, strides, kernel, channels = case
    session = None
    for clips in (2, 1, 3):
        inputs = convolution_inputs(clips, time, grid, kernel, channels)
        expected = depthwise_temporal_conv.numpy_reference(*inputs.values(), grid, strides)
        attributes = {
            "grid": grid,
            "strides": strides,
            "pads": [k // 2 for k in kernel] * 2,
            "channels": channels,
            "to_channels_first": [0, 3, 1, 2] if len(grid) == 1 else [0, 4, 1, 2, 3],
            "to_channels_last": [0, 2, 3, 1] if len(grid) == 1 else [0, 2, 3, 4, 1],
        }
        session = session or build_session(depthwise_temporal_conv, opset, inputs, expected.shape, attributes)
        assert_close(session.run(None, inputs)[0], expected)


blocks_and_channels = st.tuples(st.lists(st.integers(1, 4), min_size=6, max_size=6), st.integers(1, 6))


def pool_input(clips, blocks, channels, dtype=np.float32):
    nt, t, nh, h, nw, w = blocks
    return normal(clips, nt * t, 1 + nh * h * nw * w, channels, dtype=dtype)


@both_precisions
@settings(max_examples=50, deadline=None)
@given(case=blocks_and_channels, clips=st.integers(1, 3))
def test_torch_pool_equals_the_reference(dtype, case, clips):
    blocks, channels = case
    x = pool_input(clips, blocks, channels, dtype)
    got = weighted_average_pool.weighted_average_pool(torch.from_numpy(x), blocks)
    assert_close(got.numpy(), weighted_average_pool.numpy_reference(x, blocks), dtype)


@both_opsets
@settings(max_examples=15, deadline=None)
@given(case=blocks_and_channels)
def test_onnx_pool_equals_the_reference_for_any_number_of_clips(opset, case):
    blocks, channels = case
    session = None
    for clips in (2, 1, 3):
        x = pool_input(clips, blocks, channels)
        expected = weighted_average_pool.numpy_reference(x, blocks)
        attributes = {"blocks": blocks, "scale": channels**-0.5}
        session = session or build_session(weighted_average_pool, opset, {"x": x}, expected.shape, attributes)
        assert_close(session.run(None, {"x": x})[0], expected)
