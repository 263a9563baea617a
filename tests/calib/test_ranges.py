"""Histograms and the ranges chosen from them, against NumPy in double precision on the values themselves."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from liteframe.calib.ranges import BINS, METHODS, Histogram, asymmetric, choose_range, symmetric
from liteframe.engines.package import InputError
from safetensors.numpy import load, save

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)  # zeros of both signs and denormals among them
tensors = arrays(np.float32, array_shapes(max_dims=3, max_side=12), elements=floats)
ranges = st.tuples(floats.map(lambda x: min(x, 0.0)), floats.map(lambda x: max(x, 0.0)))
distributions = st.sampled_from(["normal", "laplace", "student", "uniform", "gelu", "relu", "lognormal", "shifted"])


def observed(*pieces: np.ndarray) -> Histogram:
    histogram = Histogram()
    for piece in pieces:
        histogram.observe(piece)
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    mine, its = one.to_arrays(), other.to_arrays()
    return all(np.array_equal(mine[name], its[name]) for name in mine)


def draw(distribution: str, seed: int, size: int = 30_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(size)
    values = {
        "normal": normal,
        "laplace": rng.laplace(size=size),
        "student": rng.standard_t(3, size),
        "uniform": rng.uniform(-0.3, 1, size),
        "gelu": normal * (1 + np.tanh(np.sqrt(2 / np.pi) * (normal + 0.044715 * normal**3))) / 2,
        "relu": np.maximum(normal, 0),
        "lognormal": np.exp(normal),
        "shifted": 7 + normal,
    }[distribution]
    return (values * 10 ** rng.uniform(-6, 6)).astype(np.float32)


def quantisation_error(values: np.ndarray, low: float, high: float) -> float:
    """Mean squared error of uint8 and back, in double precision."""
    scale, zero_point = asymmetric(low, high)
    quantised = np.clip(np.rint(values.astype(np.float64) / scale) + zero_point, 0, 255)
    return float(np.mean((scale * (quantised - zero_point) - values) ** 2))


# -- histograms ------------------------------------------------------------------------------------------------------


@given(tensors)
def test_counts_are_numpys_on_the_same_edges(tensor: np.ndarray) -> None:
    histogram = observed(tensor)
    edges = histogram.edges()
    width = edges[1] - edges[0]
    assert (edges.shape, histogram.counts.dtype) == ((BINS + 1,), np.int64)
    assert math.frexp(width)[0] == 0.5, "a power of two"
    assert np.array_equal(edges / width, np.rint(edges / width)), "edges are multiples of it"
    # numpy counts what lies on the last edge into the last bin; nothing lies there
    assert np.array_equal(histogram.counts, np.histogram(tensor.astype(np.float64), edges)[0])
    assert edges[0] <= min(tensor.min(), 0)
    assert edges[-1] > max(tensor.max(), 0)
    assert (histogram.minimum, histogram.maximum) == (tensor.min(), tensor.max())
    assert histogram.absmax == np.abs(tensor).max()
    assert histogram.zeros == np.sum(tensor == 0)


@given(tensors)
def test_bins_are_as_narrow_as_they_can_be(tensor: np.ndarray) -> None:
    assume(tensor.any())
    edges = observed(tensor).edges()
    half = (edges[1] - edges[0]) / 2
    below, above = min(float(tensor.min()), 0.0), max(float(tensor.max()), 0.0)
    assert math.floor(above / half) - math.floor(below / half) >= BINS


@given(st.lists(tensors, min_size=1, max_size=5), st.randoms())
def test_pieces_in_any_order_are_as_good_as_the_whole(pieces: list[np.ndarray], random) -> None:
    whole = observed(np.concatenate([piece.ravel() for piece in pieces]))
    random.shuffle(pieces)
    assert same(observed(*pieces), whole)


@given(tensors, tensors, tensors)
def test_merging_is_commutative_and_associative(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    def merged(*histograms: Histogram) -> Histogram:
        result = Histogram()
        for histogram in histograms:
            result.merge(histogram)
        return result

    one, two, three = observed(a), observed(b), observed(c)
    assert same(merged(one, two), merged(two, one))
    assert same(merged(merged(one, two), three), merged(one, merged(two, three)))
    assert same(merged(one, two, three), observed(a, b, c))
    assert same(one, observed(a)), "what is merged into another stays as it was"


@given(st.lists(tensors, max_size=2))
def test_a_histogram_survives_a_file(pieces: list[np.ndarray]) -> None:
    histogram = observed(*pieces)
    again = Histogram.from_arrays(load(save(histogram.to_arrays())))
    assert same(again, histogram)
    again.observe(np.float32([-3, 1e30]))
    histogram.observe(np.float32([-3, 1e30]))
    assert same(again, histogram), "and goes on from there"


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: {**a, "counts": a["counts"][:-1]},
        lambda a: {**a, "bins": a["bins"][:-1]},
        lambda a: {**a, "bins": a["bins"] + [1, 0, 0, 0, 0]},
        lambda a: {**a, "bins": a["bins"] + [0, 0, 0, 1000, 0]},
        lambda a: {**a, "bins": a["bins"] * np.nan},
    ],
    ids=["counts cut", "bins cut", "exponent", "maximum", "nan"],
)
def test_arrays_that_are_no_histogram_are_refused(damage) -> None:
    with pytest.raises(ValueError):
        Histogram.from_arrays(damage(observed(draw("normal", 0)).to_arrays()))


def test_large_tensors_are_counted_across_chunks_whatever_their_strides() -> None:
    tensor = draw("student", 1, 200_000).reshape(200, 1000)
    expected = observed(*tensor)
    assert expected.counts.sum() == tensor.size
    for view in (tensor, tensor.T, tensor[::-1, ::-1]):
        assert same(observed(view), expected)
    assert same(observed(tensor[::2], tensor[1::2]), expected)


def test_float16_is_counted_like_the_float32_it_stands_for() -> None:
    half = np.random.default_rng(0).standard_normal(5000).astype(np.float16)
    assert same(observed(half), observed(half.astype(np.float32)))


def test_nothing_observed_changes_nothing() -> None:
    histogram = observed(draw("normal", 0), np.empty((0, 4), np.float32))
    histogram.merge(Histogram())
    assert same(histogram, observed(draw("normal", 0)))
    with pytest.raises(ValueError, match="nothing was observed"):
        choose_range(Histogram(), "minmax")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_value_that_is_not_finite_is_named_and_nothing_is_counted(value: float, dtype: type) -> None:
    tensor = draw("normal", 0).astype(dtype)
    histogram = observed(tensor)
    tensor[12345] = value
    with pytest.raises(ValueError, match=f"holds {value}"):
        histogram.observe(tensor * 2)
    assert same(histogram, observed(draw("normal", 0).astype(dtype)))


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match=f"not {np.dtype(dtype)}"):
        Histogram().observe(np.ones(3, dtype))


# -- ranges ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(tensors, st.sampled_from(METHODS))
def test_a_range_holds_zero_and_nothing_that_was_not_observed(tensor: np.ndarray, method: str) -> None:
    low, high = choose_range(observed(tensor), method)
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert min(float(tensor.min()), 0) <= low <= 0 <= high <= max(float(tensor.max()), 0)
    assert low < high or not tensor.any()


@given(tensors)
def test_minmax_is_exact(tensor: np.ndarray) -> None:
    assert choose_range(observed(tensor), "minmax") == (min(tensor.min(), 0), max(tensor.max(), 0))


@given(distributions, st.integers(0, 99), st.integers(1, 60_000))
def test_percentile_cuts_five_in_100_000_at_each_end(distribution: str, seed: int, size: int) -> None:
    tensor = draw(distribution, seed, size)
    histogram = observed(tensor)
    low, high = choose_range(histogram, "percentile")
    width = histogram.edges()[1] - histogram.edges()[0]
    cut = size * 5 // 100_000
    ordered = np.sort(tensor.astype(np.float64))
    if low < 0:
        assert ordered[cut] - width <= low <= ordered[cut]
    else:
        assert ordered[cut] >= -width
    if high > 0:
        assert ordered[-1 - cut] <= high <= ordered[-1 - cut] + width
    else:
        assert ordered[-1 - cut] <= width


def test_percentile_does_not_stop_between_the_bulk_and_an_outlier() -> None:
    values = np.linspace(0, 1, 40_000, dtype=np.float32)
    values[-2:] = 100  # exactly 0.005 %
    assert choose_range(observed(values), "percentile")[1] == pytest.approx(1, abs=100 / 1024)


@settings(max_examples=30, deadline=None)
@given(distributions, st.integers(0, 99), st.sampled_from([0, 10, 100]), st.booleans())
def test_mse_is_no_worse_than_minmax_and_percentile(distribution: str, seed: int, far: int, negative: bool) -> None:
    values = draw(distribution, seed)
    if far:
        values[0] = far * np.abs(values).max() * (-1 if negative else 1)
    histogram = observed(values)
    errors = {method: quantisation_error(values, *choose_range(histogram, method)) for method in METHODS}
    assert errors["mse"] <= 1.05 * min(errors["minmax"], errors["percentile"])


@pytest.mark.parametrize("distribution", ["normal", "laplace", "student", "gelu", "relu", "lognormal", "uniform"])
def test_mse_is_near_the_best_of_a_brute_force_search(distribution: str) -> None:
    values = draw(distribution, 3, 10_000)
    low, high = min(float(values.min()), 0), max(float(values.max()), 0)
    factors = np.linspace(0.02, 1, 50)
    lows = low * factors if low else [0.0]
    best = min(quantisation_error(values, a, b) for a in lows for b in high * factors)
    assert quantisation_error(values, *choose_range(observed(values), "mse")) <= 1.02 * best


def test_a_point_mass_costs_mse_less_than_a_bin() -> None:
    values = np.float32([5.0] * 100 + [-1.0] * 100 + [0.3])  # as unlike an even spread within the bins as can be
    histogram = observed(values)
    width = histogram.edges()[1] - histogram.edges()[0]
    minmax = quantisation_error(values, *choose_range(histogram, "minmax"))
    assert quantisation_error(values, *choose_range(histogram, "mse")) <= minmax + width**2


@pytest.mark.parametrize("method", ["entropy", "mse"])
@pytest.mark.parametrize("distribution", ["normal", "relu"])
def test_zeros_of_every_grid_do_not_move_a_range(method: str, distribution: str) -> None:
    values = draw(distribution, 4)
    padded = np.concatenate([values, np.zeros(300_000, np.float32)])
    expected = choose_range(observed(values[values != 0]), method)
    assert choose_range(observed(padded), method) == pytest.approx(expected, rel=0.01)


def slow_entropy(magnitudes: np.ndarray, width: float, levels: int) -> float:
    """The threshold of Migacz's slides, but of the generalised divergence; in plain loops."""
    bins = [0] * (int(magnitudes.max() // width) + 1)
    for magnitude in magnitudes.tolist():
        bins[int(magnitude // width)] += 1
    best, threshold = math.inf, 0.0
    for n in range(levels, len(bins) + 1):
        reference = bins[:n]
        reference[n - 1] += sum(bins[n:])
        merged, filled = [0] * levels, [0] * levels
        for i in range(n):
            merged[i * levels // n] += bins[i]
            filled[i * levels // n] += reference[i] > 0
        spread = [merged[i * levels // n] / filled[i * levels // n] if reference[i] else 0 for i in range(n)]
        total = sum(reference)
        divergence = sum(spread) / total - 1
        for p, q in zip(reference, spread, strict=True):
            if p:
                divergence += p / total * math.log(p / q) if q else math.inf
        if divergence < best:
            best, threshold = divergence, (n + 0.5) * width
    return threshold


@pytest.mark.parametrize(("distribution", "bits"), [("normal", 8), ("student", 8), ("laplace", 6), ("gelu", 9)])
def test_entropy_is_that_of_a_direct_implementation(distribution: str, bits: int) -> None:
    values = draw(distribution, 5, 3000)
    values[:3] *= 2
    histogram = observed(values)
    threshold = slow_entropy(
        np.abs(values[values != 0]).astype(np.float64), np.diff(histogram.edges())[0], 2 ** (bits - 1)
    )
    expected = max(-threshold, min(values.min(), 0)), min(threshold, max(values.max(), 0))
    assert choose_range(histogram, "entropy", bits) == pytest.approx(expected)


def test_one_value_far_from_all_others_is_clipped() -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    values[0] = 12.0
    for method in ("entropy", "mse", "percentile"):
        low, high = choose_range(observed(values), method)
        assert -5 < low < -2
        assert 2 < high < 6


@pytest.mark.parametrize("distribution", ["shifted", "lognormal", "laplace", "uniform", "relu"])
def test_entropy_clips_no_more_than_a_tail(distribution: str) -> None:
    values = draw(distribution, 6)
    low, high = choose_range(observed(values), "entropy")
    assert np.mean((values < low) | (values > high)) < 0.02


def test_fewer_bits_clip_more() -> None:
    histogram = observed(draw("laplace", 0))
    widths = [high - low for low, high in (choose_range(histogram, "mse", bits) for bits in (8, 6, 4, 2))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 2


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(InputError, match=r"'max'.*minmax, percentile, entropy, mse"):
        choose_range(observed(draw("normal", 0)), "max")


# -- renderings ------------------------------------------------------------------------------------------------------


def is_scale(scale: float) -> bool:
    return isinstance(scale, float) and scale == np.float32(scale) >= np.finfo(np.float32).tiny and scale < math.inf


@given(ranges, st.floats(0, 1))
def test_symmetric_int8_is_off_by_half_a_step_at_most(bounds: tuple[float, float], at: float) -> None:
    low, high = bounds
    scale = symmetric(low, high)
    assert is_scale(scale)
    value = min(max(low + at * (high - low), low), high)
    quantised = np.clip(np.rint(value / scale), -127, 127)
    assert 127 * scale >= max(-low, high) * (1 - 1e-15)
    assert abs(scale * quantised - value) <= scale / 2
    assert scale <= max(max(-low, high) / 127 * (1 + 2**-23), np.finfo(np.float32).tiny) or low == high == 0


@given(ranges, st.floats(0, 1))
def test_asymmetric_uint8_is_off_by_half_a_step_at_most(bounds: tuple[float, float], at: float) -> None:
    low, high = bounds
    scale, zero_point = asymmetric(low, high)
    assert is_scale(scale)
    assert isinstance(zero_point, int)
    assert 0 <= zero_point <= 255
    value = min(max(low + at * (high - low), low), high)
    quantised = np.clip(np.rint(value / scale) + zero_point, 0, 255)
    assert 255 * scale >= (high - low) * (1 - 1e-15)
    assert abs(scale * (quantised - zero_point) - value) <= scale / 2 * (1 + 1e-12)
    assert scale <= max((high - low) / 255 * (1 + 2**-23), np.finfo(np.float32).tiny) or low == high == 0


def test_renderings_by_hand() -> None:
    assert symmetric(-1.0, 254.0) == 2.0
    assert symmetric(-127.0, 0.0) == 1.0
    assert asymmetric(0.0, 255.0) == (1.0, 0)
    assert asymmetric(-255.0, 0.0) == (1.0, 255)
    assert asymmetric(-28.0, 482.0) == (2.0, 14)
    assert (symmetric(0.0, 0.0), asymmetric(0.0, 0.0)) == (1.0, (1.0, 0))
