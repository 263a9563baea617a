"""The kernels' arithmetic, compiled for this CPU, against NumPy and torch in double precision."""

import itertools
import subprocess
from functools import partial

import numpy as np
import operator_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    TYPES,
    Convolution,
    at,
    close,
    convolutions,
    expected_pooling,
    poisoned,
    poolings,
    tokens,
)

UNKNOWN_TYPE, BAD_SIZE, BAD_KERNEL, NO_THREADS = 1, 2, 3, 4


@settings(max_examples=150, deadline=None)
@given(case=convolutions(), fused=st.booleans())
def test_convolution_equals_numpys(native_host, case, fused):
    out = poisoned(case.out_shape, TYPES[case.type])
    residual = case.residual if fused else None
    pointers = map(at, (case.x, case.weight, case.bias, residual, out))
    assert native_host.liteframe_depthwise_temporal_conv([*TYPES].index(case.type), *pointers, *case.arguments()) == 0
    close(out, *case.expected(fused), case.type)


@settings(max_examples=100, deadline=None)
@given(case=convolutions())
def test_gradients_equal_those_that_torch_finds(native_host, case):
    grad_x = poisoned(case.x.shape, TYPES[case.type])
    grad_weight, grad_bias = (poisoned(array.shape, TYPES["fp32"]) for array in (case.weight, case.bias))
    pointers = map(at, (case.x, case.weight, case.grad, grad_x, grad_weight, grad_bias))
    found = native_host.liteframe_depthwise_temporal_conv_backward(
        [*TYPES].index(case.type), *pointers, *case.arguments()
    )
    assert found == 0
    expected, magnitude = case.expected_gradients()
    for number, (made, type_) in enumerate(((grad_x, case.type), (grad_weight, "fp32"), (grad_bias, "fp32"))):
        close(made, expected[number], 10 * magnitude[number], type_)


def pool(host, x, type_, blocks, threads=2):
    nt, _, nh, _, nw, _ = blocks
    out = poisoned((len(x), nt * nh * nw, x.shape[-1]), TYPES[type_])
    scale = x.shape[-1] ** -0.5
    arguments = len(x), *blocks, x.shape[-1], scale, threads
    assert host.liteframe_weighted_average_pool([*TYPES].index(type_), at(x), at(out), *arguments) == 0
    return np.asarray(out, np.float64)


@settings(max_examples=150, deadline=None)
@given(case=poolings(), type_=st.sampled_from([*TYPES]), size=st.sampled_from([1e-2, 1.0, 3.0]))
def test_pooling_equals_numpys(native_host, case, type_, size):
    seed, clips, blocks, channels = case
    x = tokens(seed, clips, blocks, channels, size, TYPES[type_])
    close(pool(native_host, x, type_, blocks), *expected_pooling(x, blocks), type_)


@pytest.mark.parametrize("type_", TYPES)
def test_scores_that_exp_can_not_hold(native_host, type_):
    """One token of each block wins by thousands; equal ones share."""
    blocks, channels = (1, 4, 2, 2, 2, 2), 64
    operator_cases.check_scores_that_exp_can_not_hold(partial(pool, native_host), type_, blocks, channels)
    x = tokens(0, 1, blocks, channels, 60.0, TYPES[type_])
    x[:, :, 1:] = x[:, :1, 1:2]
    x[:, :, 0] = x[:, :1, 0]
    found = pool(native_host, x, type_, blocks)
    close(found, np.broadcast_to(np.asarray(x[0, 0, 1], np.float64), found.shape), 60.0, type_)


@pytest.mark.parametrize("type_", TYPES)
def test_nan_and_infinity_stay_where_they_reach(native_host, type_):
    def convolve(case):
        out = poisoned(case.out_shape, TYPES[type_])
        pointers = map(at, (case.x, case.weight, case.bias, None, out))
        assert native_host.liteframe_depthwise_temporal_conv([*TYPES].index(type_), *pointers, *case.arguments()) == 0
        return out

    operator_cases.check_nan_and_infinity_stay_where_they_reach(convolve, partial(pool, native_host), type_, 16)


def test_any_number_of_threads_gives_the_same(native_host):
    case = Convolution(0, "fp32", 3, 4, (7, 5), 24, (3, 3, 3), (2, 2, 2))
    x = tokens(0, 3, (1, 4, 2, 2, 3, 2), 24, 1.0, TYPES["fp32"])
    made = []
    for threads in (1, 2, 3, 64):
        out = poisoned(case.out_shape, TYPES["fp32"])
        pointers = map(at, (case.x, case.weight, case.bias, None, out))
        assert native_host.liteframe_depthwise_temporal_conv(0, *pointers, *case.arguments(threads)) == 0
        made.append((out, pool(native_host, x, "fp32", (1, 4, 2, 2, 3, 2), threads)))
    for out, pooled in made[1:]:
        np.testing.assert_array_equal(out, made[0][0])
        np.testing.assert_array_equal(pooled, made[0][1])


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"type": 3}, UNKNOWN_TYPE),
        *(({place: 0}, BAD_SIZE) for place in (0, 1, 2, 3, 4, 8, 9, 10)),
        *(({place: size}, BAD_KERNEL) for place, size in itertools.product((5, 6, 7), (0, 2, 127))),
        ({5: 7, 6: 7, 7: 7}, BAD_KERNEL),
        ({11: 0}, NO_THREADS),
    ],
)
def test_what_can_not_be_done_is_refused(native_host, change, status):
    arguments = [1, 4, 1, 3, 8, 3, 1, 1, 1, 1, 1, 1]
    for place in change.keys() - {"type"}:
        arguments[place] = change[place]
    type_, untouched = change.get("type", 0), [0] * 6
    assert native_host.liteframe_depthwise_temporal_conv(type_, *untouched[:5], *arguments) == status
    assert native_host.liteframe_depthwise_temporal_conv_backward(type_, *untouched, *arguments) == status


def test_cmake_builds_the_host_part_without_nvcc_and_says_so(native_build):
    folder, told = native_build
    assert "no CUDA compiler (nvcc): the kernels and TensorRT's plugin library are left out" in told
    assert not [*folder.rglob("*.cubin")]
    done = subprocess.run(["ctest", "--test-dir", folder, "--output-on-failure"], capture_output=True, text=True)
    assert done.returncode == 0 and "100% tests passed" in done.stdout, done.stdout + done.stderr
