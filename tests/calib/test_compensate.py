"""Rounding that makes up for its errors: the published algorithm written plainly finds the same."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.calib import compensate
from liteframe.calib.compensate import round_compensating, round_layers
from liteframe.calib.placement import INT4_BLOCK, linear_layers
from liteframe.calib.weights import ENDS, nearest, weights_of

FP32 = np.dtype(np.float32)
BITS = st.sampled_from([4, 8])


def correlated(seed, rows=2 * INT4_BLOCK, columns=5, count=400):
    """Weights (K, N), and activations (count, K) of which some channels go together."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, rows // 4)) @ rng.normal(size=(rows // 4, rows)) + 0.3 * rng.normal(
        size=(count, rows)
    )
    return rng.normal(size=(rows, columns)).astype(np.float32), mixed.astype(np.float32)


def damped(gram):
    return gram.astype(np.float64) + np.eye(len(gram)) * np.diag(gram).mean() * compensate.DAMPING


def one_by_one(matrix, gram, scale, bits):
    """Frantar et al., equations 2 and 3: after each row the inverse Hessian of those left, in double precision."""
    left, integers = matrix.astype(np.float64), np.zeros(matrix.shape)
    inverse = np.linalg.inv(damped(gram))
    for row in np.argsort(-np.diag(gram), kind="stable"):
        steps = np.atleast_2d(scale)[row * np.atleast_2d(scale).shape[0] // len(left)].astype(np.float64)
        integers[row] = np.clip(np.rint(left[row] / steps), *ENDS[bits])
        error = (left[row] - integers[row] * steps) / inverse[row, row]
        left -= np.outer(inverse[:, row], error)
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    return integers


@given(st.integers(0, 2**32), BITS)
def test_it_is_the_published_algorithm(seed, bits):
    matrix, x = correlated(seed)
    integers, _ = round_compensating(matrix, x.T @ x, bits, FP32)
    expected = one_by_one(matrix, x.T @ x, nearest(matrix, bits, FP32)[1], bits)
    assert (integers == expected).mean() > 0.99  # a tie decided by rounding errors changes what follows


@given(st.integers(0, 2**32), BITS)
def test_scales_are_those_of_least_squares(seed, bits):
    matrix, x = correlated(seed)
    integers, scale = round_compensating(matrix, x.T @ x, bits, FP32)
    assert scale.ndim == (2 if bits == 4 else 1)
    scale = np.atleast_2d(scale)
    size = len(matrix) // len(scale)
    root = np.linalg.cholesky(damped(x.T @ x)).T  # of whose rows the squares add up as those of x do
    for column, found in enumerate(scale.T):
        by_block = np.zeros((len(matrix), len(scale)))
        for block in range(len(scale)):
            rows = slice(block * size, (block + 1) * size)
            by_block[rows, block] = integers[rows, column]
        expected = np.linalg.lstsq(root @ by_block, root @ matrix[:, column])[0]
        np.testing.assert_allclose(found, expected, rtol=1e-3)


@given(st.integers(0, 2**32), BITS, st.sampled_from([FP32, np.dtype(np.float16)]))
def test_the_layers_output_errs_less_than_with_the_nearest(seed, bits, beside):
    matrix, x = correlated(seed)

    def error(integers, scale):
        low, high = ENDS[bits]
        assert low <= integers.min() and integers.max() <= high and scale.dtype == beside
        steps = np.atleast_2d(scale.astype(np.float32))
        return np.square(x @ (integers * np.repeat(steps, len(matrix) // len(steps), axis=0) - matrix)).sum()

    assert error(*round_compensating(matrix, x.T @ x, bits, beside)) < 0.6 * error(*nearest(matrix, bits, beside))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_stay_so_whatever_they_would_multiply(bits):
    """Channels that are set apart: their range is not observed."""
    matrix, x = correlated(0)
    matrix[[5, 70]] = 0
    x[:, 5] *= 1000
    integers, _ = round_compensating(matrix, x.T @ x, bits, FP32)
    assert not integers[[5, 70]].any()
    assert integers[6].any()


def test_channels_that_are_never_used_do_no_harm():
    matrix, x = correlated(0)
    x[:, 7] = 0
    for gram in (x.T @ x, np.zeros((len(matrix), len(matrix)), np.float32)):
        integers, _ = round_compensating(matrix, gram, 4, FP32)
        assert np.abs(integers).max() <= 8
    np.testing.assert_array_equal(integers, nearest(matrix, 4, FP32)[0])  # nothing is known: the nearest


@pytest.mark.parametrize("at_once", [1, compensate.AT_ONCE])
def test_layers_of_a_graph_are_rounded_by_their_own_activations(tiny_graphs, feeds, run, monkeypatch, at_once):
    path, calls = tiny_graphs["wide", "fused"], feeds["wide", "fused"]
    monkeypatch.setattr(compensate, "AT_ONCE", at_once)  # one activation at a time, or all
    layers = {str(n.name): n for n in linear_layers(ir.load(path))}
    bits, told = {name: 8 if "lm_head" in name or "down" in name else 4 for name in layers}, []
    made = round_layers(path, calls, bits, FP32, lambda done, total: told.append((done, total)))
    assert made.keys() == bits.items()
    assert told == [(i + 1, len(layers)) for i in range(len(layers))]
    for (name, _), (integers, _) in made.items():
        value = str(layers[name].inputs[0].name)
        x = np.concatenate([run(path, call, [value])[value].reshape(-1, len(integers)) for call in calls])
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        expected, _ = round_compensating(weights_of(layers[name]), x.T @ x, bits[name], FP32)
        assert (integers == expected).mean() > 0.99
