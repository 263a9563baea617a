"""Random tensors of the two operators for tests of their arithmetic and of their kernels, and how close is close."""

import math

import ml_dtypes
import numpy as np
import torch
from hypothesis import strategies as st
from liteframe.export.ops import depthwise_temporal_conv as conv_op
from liteframe.export.ops import weighted_average_pool as pool_op

TYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# half a unit in the last place of what comes out, and FP32's own on the way
ERROR = {"fp32": 2e-6, "fp16": 2.0**-11 * 1.01, "bf16": 2.0**-8 * 1.01}
SMALLEST = {"fp32": 1e-30, "fp16": 2.0**-24, "bf16": 1e-30}  # step of numbers near zero


def aligned(values, dtype):
    """A copy at a multiple of 16 bytes that is all of its memory, so that a sanitizer sees what lies behind."""
    values = np.asarray(values)
    out = np.empty(values.size * dtype.itemsize, np.uint8)
    assert out.ctypes.data % 16 == 0
    out = out.view(dtype).reshape(values.shape)
    out[...] = values
    return out


def at(array):
    return None if array is None else array.ctypes.data


def poisoned(shape, dtype):
    return aligned(np.full(shape, np.nan), dtype)


def three_axes(grid, kernel, strides):
    """The library's sizes: a grid of one axis is one row."""
    if len(grid) == 2:
        return [*grid], [*kernel], [*strides]
    return [1, *grid], [kernel[0], 1, kernel[1]], [strides[0], 1, strides[1]]


class Convolution:
    """Tensors of one, drawn from a seed in a type."""

    def __init__(self, seed, type_, clips, time, grid, channels, kernel, strides, size=1.0):
        random, self.type, dtype = np.random.default_rng(seed), type_, TYPES[type_]
        self.sizes = clips, time, grid, channels, kernel, strides
        self.grid, self.strides = grid, strides
        self.x = aligned(random.normal(0, size, (clips, time, math.prod(grid), channels)), dtype)
        self.weight = aligned(random.normal(0, 0.5, (channels, 1, *kernel)), dtype)
        self.bias = aligned(random.normal(0, 1, channels), dtype)
        out_time, *out_grid = (-(-n // s) for n, s in zip((time, *grid), strides, strict=True))
        self.out_shape = clips, out_time, math.prod(out_grid), channels
        self.residual, self.grad = (aligned(random.normal(0, size, self.out_shape), dtype) for _ in range(2))

    def arguments(self, threads=2):
        clips, time, grid, channels, kernel, strides = self.sizes
        grid, kernel, strides = three_axes(grid, kernel, strides)
        return [clips, time, *grid, channels, *kernel, *strides, threads]

    def _doubles(self, change, *more):
        return [change(np.asarray(array, np.float64)) for array in (self.x, self.weight, self.bias, *more)]

    def expected(self, fused):
        """What comes out, and what would if all numbers were positive, by NumPy in double precision."""

        def out(change):
            *inputs, residual = self._doubles(change, self.residual)
            return conv_op.numpy_reference(*inputs, self.grid, self.strides) + (residual if fused else 0.0)

        return out(np.positive), out(np.abs)

    def expected_gradients(self):
        """Of x, weight and bias, and what they would be if all numbers were positive, by torch in double precision."""

        def gradients(change):
            *inputs, grad = map(torch.from_numpy, self._doubles(change, self.grad))
            inputs = [array.requires_grad_() for array in inputs]
            out = conv_op.reference(*inputs, self.grid, self.strides)
            return [g.numpy() for g in torch.autograd.grad(out, inputs, grad)]

        return gradients(np.positive), gradients(np.abs)


@st.composite
def convolutions(draw):
    """The student's forms, and any other."""
    small = st.integers(1, 3)
    known = draw(st.sampled_from([None, ((4,), (3, 1), (1, 1)), ((2,), (3, 1), (1, 1)), ((4, 0), (3, 3, 3), (2, 2, 2)),
                                  ((2, 0), (3, 1, 1), (2, 1, 1))]))  # fmt: skip
    if known is not None:
        (time, *_), kernel, strides = known
        axes = len(kernel) - 1
    else:
        axes, time = draw(st.integers(1, 2)), draw(st.integers(1, 6))
        kernel = tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(axes + 1))
        strides = tuple(draw(small) for _ in range(axes + 1))
    grid = tuple(draw(st.integers(1, 9)) for _ in range(axes))
    channels = draw(st.sampled_from([1, 3, 8, 13, 16, 24, 72]))
    seed, type_, clips = draw(st.integers(0, 2**32)), draw(st.sampled_from([*TYPES])), draw(small)
    size = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    return Convolution(seed, type_, clips, time, grid, channels, kernel, strides, size)


def close(found, expected, magnitude, type_):
    """Within what rounding sums of such magnitudes may cost."""
    allowed = ERROR[type_] * np.abs(expected) + 2e-6 * magnitude + SMALLEST[type_]
    assert (np.abs(np.asarray(found, np.float64) - expected) <= allowed).all()


@st.composite
def poolings(draw):
    blocks = tuple(draw(st.integers(1, n)) for n in (2, 4, 3, 5, 3, 4))
    return draw(st.integers(0, 2**32)), draw(st.integers(1, 3)), blocks, draw(st.sampled_from([1, 5, 8, 24, 40, 264]))


def tokens(seed, clips, blocks, channels, size, dtype):
    nt, t, nh, h, nw, w = blocks
    return aligned(np.random.default_rng(seed).normal(0, size, (clips, nt * t, 1 + nh * h * nw * w, channels)), dtype)


def expected_pooling(x, blocks):
    """What comes out by NumPy in double precision, and the size of what errors come from: a score's is a weight's."""
    x = np.asarray(x, np.float64)
    largest = np.abs(x).max()
    return pool_op.numpy_reference(x, blocks), largest * (1 + largest**2 * x.shape[-1] ** 0.5)


def check_scores_that_exp_can_not_hold(pool, type_, blocks, channels):
    """Of `pool(x, type_, blocks)`: one token of each block wins by thousands, in whichever chunk it is."""
    x = tokens(0, 1, blocks, channels, 60.0, TYPES[type_])
    found = np.asarray(pool(x, type_, blocks), np.float64)
    assert np.isfinite(found).all()
    close(found, expected_pooling(x, blocks)[0], 1e-3, type_)


def check_nan_and_infinity_stay_where_they_reach(convolve, pool, type_, channels):
    """Of `convolve(case)` and `pool(x, type_, blocks)`."""
    case = Convolution(0, type_, 2, 4, (9,), channels, (3, 1), (1, 1))
    case.x[0, 1, 4, 3] = np.nan
    case.x[1, 3, 0, 5] = np.inf
    out = np.asarray(convolve(case), np.float64)
    reached = np.zeros(out.shape, bool)
    reached[0, 0:3, 4, 3] = reached[1, 2:4, 0, 5] = True
    assert (np.isfinite(out) != reached).all()
    assert np.isnan(out[0, 0:3, 4, 3]).all() and np.isinf(out[1, 2:4, 0, 5]).all()

    blocks = (1, 4, 2, 2, 2, 2)
    x = tokens(1, 2, blocks, channels, 1.0, TYPES[type_])
    x[0, 2, 1, 0] = np.nan  # of the first block of the first clip
    found = np.asarray(pool(x, type_, blocks), np.float64)
    assert np.isnan(found[0, 0]).all()
    assert np.isfinite(found[0, 1:]).all() and np.isfinite(found[1]).all()
    x[0, 2, 1, 0] = 0.0
    x[0, 2, 1] = x[0, 2, 0] = np.finfo(np.float32).max if type_ != "fp16" else np.inf  # its score is infinite
    assert np.isnan(np.asarray(pool(x, type_, blocks), np.float64)[0, 0]).all()
