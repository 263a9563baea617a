"""The CUDA kernels themselves, run thread by thread on this CPU, against NumPy and torch in double precision.

Each runs with threads and thread blocks in rising and in falling order, which must give the same bits: what lacks a
barrier, or counts on what another block left behind, does not.
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import native
import numpy as np
import operator_cases
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines import kernels
from liteframe.engines.kernels import ConvolutionShape
from operator_cases import TYPES, Convolution, at, close, convolutions, expected_pooling, poisoned, poolings, tokens

UNKNOWN_ENTRY, BAD_ARGUMENTS, BAD_GRID, DIVERGED = 1, 2, 3, 4
STUDENT = [
    (4, (1025,), (3, 1), (1, 1)),
    (2, (257,), (3, 1), (1, 1)),
    (1, (257,), (3, 1), (1, 1)),
    (4, (32, 32), (3, 3, 3), (2, 2, 2)),
    (2, (16, 16), (3, 1, 1), (2, 1, 1)),
]


def in_both_orders(emulated, kernel, clips, inputs, shape, dtype):
    made = []
    for falling in (False, True):
        out = poisoned(shape, dtype)
        assert emulated(kernel, clips, map(at, inputs), at(out), falling) == 0
        made.append(out)
    np.testing.assert_array_equal(*(out.view(np.uint8) for out in made))
    return made[0]


def convolve(emulated, case, fused):
    kernel = kernels.convolution(case.type, shape_of(case), fused)
    inputs = [case.x, case.weight, case.bias, *([case.residual] if fused else [])]
    return in_both_orders(emulated, kernel, len(case.x), inputs, case.out_shape, TYPES[case.type])


def shape_of(case):
    _, *sizes = case.sizes
    return ConvolutionShape.of(*sizes)


def pool(emulated, x, type_, blocks):
    shape = len(x), int(np.prod(blocks[::2])), x.shape[-1]
    kernel = kernels.pooling(type_, blocks, x.shape[-1])
    return in_both_orders(emulated, kernel, len(x), [x], shape, TYPES[type_])


@given(case=convolutions(), fused=st.booleans())
def test_convolution_equals_numpys(emulated, case, fused):
    close(convolve(emulated, case, fused), *case.expected(fused), case.type)


@pytest.mark.parametrize("layer", STUDENT, ids=str)
def test_the_students_layers(emulated, layer):
    """A slab of channels and some more; at these grids a thread has several positions, and the last one too few."""
    time, grid, kernel, strides = layer
    case = Convolution(0, "fp16", 2, time, grid, 72, kernel, strides)
    close(convolve(emulated, case, True), *case.expected(True), "fp16")


@given(case=convolutions())
def test_gradients_equal_those_that_torch_finds(emulated, case):
    clips, channels, shape = len(case.x), case.x.shape[-1], shape_of(case)
    inputs = [case.grad, case.weight]
    grad_x = in_both_orders(
        emulated, kernels.input_gradient(case.type, shape), clips, inputs, case.x.shape, TYPES[case.type]
    )
    kernel = kernels.weight_gradient(case.type, shape)
    parts_shape = kernel.blocks(clips), case.weight[0].size + 1, channels
    parts = in_both_orders(emulated, kernel, clips, [case.x, case.grad], parts_shape, TYPES["fp32"])
    *taps, bias = parts.sum(0, dtype=np.float64)
    made = [(grad_x, case.type), (np.stack(taps, 1).reshape(case.weight.shape), "fp32"), (bias, "fp32")]
    for (found, type_), expected, magnitude in zip(made, *case.expected_gradients(), strict=True):
        close(found, expected, 10 * magnitude, type_)


def test_more_positions_than_thread_blocks_that_sum_gradients(emulated):
    case = Convolution(0, "fp16", 600, 2, (60,), 8, (3, 1), (1, 1))
    kernel = kernels.weight_gradient("fp16", shape_of(case))
    assert kernel.blocks(600) == kernels.PARTIAL_SUMS
    parts = in_both_orders(emulated, kernel, 600, [case.x, case.grad], (kernels.PARTIAL_SUMS, 4, 8), TYPES["fp32"])
    (_, *expected), (_, *magnitude) = case.expected_gradients()
    close(parts[:, :3].sum(0).T.reshape(8, 1, 3, 1), expected[0], 10 * magnitude[0], "fp32")
    close(parts[:, 3].sum(0), expected[1], 10 * magnitude[1], "fp32")


@given(case=poolings(), type_=st.sampled_from([*TYPES]), size=st.sampled_from([1e-2, 1.0, 3.0]))
def test_pooling_equals_numpys(emulated, case, type_, size):
    seed, clips, blocks, channels = case
    x = tokens(seed, clips, blocks, channels, size, TYPES[type_])
    close(pool(emulated, x, type_, blocks), *expected_pooling(x, blocks), type_)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("channels", [1024, 2048, 3200])
def test_pooling_of_teachers(emulated, channels, type_):
    """At once in registers up to 2048 channels (1024 in FP32), InternViT-6B's 3200 with tokens read twice."""
    x = tokens(0, 1, (1, 4, 2, 2, 2, 2), channels, 1.0, TYPES[type_])
    close(pool(emulated, x, type_, (1, 4, 2, 2, 2, 2)), *expected_pooling(x, (1, 4, 2, 2, 2, 2)), type_)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("channels", [64, 65])
def test_scores_that_exp_can_not_hold(emulated, channels, type_):
    operator_cases.check_scores_that_exp_can_not_hold(partial(pool, emulated), type_, (1, 4, 2, 3, 2, 3), channels)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("channels", [16, 15])
def test_nan_and_infinity_stay_where_they_reach(emulated, channels, type_):
    operator_cases.check_nan_and_infinity_stay_where_they_reach(
        partial(convolve, emulated, fused=False), partial(pool, emulated), type_, channels
    )


def test_what_can_not_be_launched_is_told(emulated):
    kernel = kernels.pooling("fp32", (1, 1, 1, 1, 1, 1), 8)

    def launched(**changes):
        changed = kernels.Kernel(**{**vars(kernel), **changes})
        return emulated(changed, 1, [0], 0)

    assert launched(name="nothing") == UNKNOWN_ENTRY
    assert launched(integers=()) == BAD_ARGUMENTS
    assert launched(slabs=0) == launched(threads=48) == launched(threads=2048) == BAD_GRID


@pytest.mark.slow
def test_no_access_is_out_of_bounds_or_misaligned(tmp_path):
    """All of the above with the address and undefined-behaviour sanitizers, whose libraries the process must begin
    with."""
    library = native.build_emulated(tmp_path, "-fsanitize=address,undefined -fno-sanitize-recover=all -g")
    runtime = subprocess.check_output([shutil.which("c++"), "-print-file-name=libasan.so"], text=True).strip()
    assert Path(runtime).is_absolute(), "the address sanitizer's library is not here; it comes with GCC"
    environment = {
        **os.environ,
        "LITEFRAME_EMULATED": os.fspath(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "--hypothesis-profile=few"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


BARRIERS = (kernels.SOURCES / "kernels.cu").read_text().count("__syncthreads();")


@pytest.mark.slow
@pytest.mark.parametrize("missing", [None, *range(BARRIERS)])
def test_a_missing_barrier_is_seen(tmp_path, missing):
    """Without any one of them some result depends on the order of threads."""
    shutil.copy(native.SOURCES / "CMakeLists.txt", tmp_path)
    shutil.copytree(native.SOURCES / "engines/native", tmp_path / "engines/native")
    source = tmp_path / "engines/native/kernels.cu"
    first, *others = source.read_text().split("__syncthreads();")
    source.write_text(first + "".join((";" if n == missing else "__syncthreads();") + o for n, o in enumerate(others)))

    case = Convolution(0, "fp32", 2, 4, (9,), 16, (3, 1), (1, 1))
    x, blocks = tokens(1, 2, (1, 4, 2, 2, 2, 3), 263, 1.0, TYPES["fp32"]), (1, 4, 2, 2, 2, 3)
    gradient = kernels.weight_gradient("fp32", shape_of(case))
    used = [kernels.convolution("fp32", shape_of(case)), gradient]
    used += [kernels.pooling("fp32", blocks, channels) for channels in (256, 263)]
    entries = " ".join(kernel.entry for kernel in used)
    emulated = native.Emulated(native.build_emulated(tmp_path / "build", f"-DLITEFRAME_ENTRIES='{entries}'", tmp_path))

    def run():
        convolve(emulated, case, False)
        in_both_orders(emulated, gradient, 2, [case.x, case.grad], (gradient.blocks(2), 4, 16), TYPES["fp32"])
        pool(emulated, np.ascontiguousarray(x[..., :256]), "fp32", blocks)
        pool(emulated, x, "fp32", blocks)

    if missing is None:
        run()
    else:
        with pytest.raises(AssertionError, match="Arrays are not equal"):
            run()
