"""What was observed of a tensor, and the range of its values that 8 bits are to represent.

    arrays ──observe──▶ Histogram ──choose_range──▶ (low, high) ──symmetric──▶ scale                 int8, for TensorRT
                                                                 ──asymmetric──▶ scale, zero point   uint8, for CPUs

One histogram serves every method, and one range both renderings.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError

BINS = 2048
_SMALLEST = 2.0**-149  # float32 above zero: bins for nothing but zeros must not be wider than those for any value
_CHUNK = 1 << 16  # elements whose double-precision copies stay in the cache


class Histogram:
    """Counts of a tensor's values in 2048 bins, over everything observed.

    Bins are 2**exponent wide and their edges are integer multiples of that: bin i holds the values from
    (first + i) * 2**exponent up to the next edge. They are the narrowest that reach from the smallest value to the
    largest, zero included. When values fall outside, each two neighbours become one until all fit, which is exact, so
    what was observed decides the counts, and in which order and pieces it came does not.

    Attributes:
        counts: int64 (2048,).
        minimum, maximum: the exact extremes; inf and -inf before anything was observed.
        zeros: how many values are exactly zero. Every range represents them, so they say nothing about which is good.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.minimum, self.maximum, self.zeros = math.inf, -math.inf, 0

    @property
    def absmax(self) -> float:
        return max(-self.minimum, self.maximum, 0.0)

    def edges(self) -> NDArray[np.float64]:
        """Edges of the bins: (2049,)."""
        exponent, first = self._layout()
        return np.ldexp(np.arange(first, first + BINS + 1, dtype=np.float64), exponent)

    def observe(self, array: NDArray[np.floating]) -> None:
        """Counts a float16 or float32 array of any shape, or nothing of it: ValueError if it has a NaN or infinity."""
        if array.dtype not in (np.float16, np.float32):
            raise ValueError(f"observed values are float16 or float32, not {array.dtype}")
        if array.size == 0:
            return
        low, high = float(array.min()), float(array.max())
        if strange := [value for value in (low, high) if not math.isfinite(value)]:  # with a NaN, both are
            raise ValueError(
                f"an observed array of shape {array.shape} holds {strange[0]}; finite values were expected"
            )
        self._reach(low, high)
        self.zeros += array.size - int(np.count_nonzero(array))
        exponent, first = self._layout()
        flat = array.reshape(-1)
        for start in range(0, len(flat), _CHUNK):
            # in double precision, where no float32 underflows and every bin is told exactly
            position = np.multiply(flat[start : start + _CHUNK], math.ldexp(1.0, -exponent), dtype=np.float64)
            np.floor(position, out=position)
            position -= first
            self.counts += np.bincount(position.astype(np.intp), minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Adds what the other one observed, as if it had been observed here."""
        self._reach(other.minimum, other.maximum)
        self.zeros += other.zeros
        self.counts += _rebinned(other.counts, other._layout(), self._layout())

    def to_arrays(self) -> dict[str, NDArray]:
        """`counts`, int64 (2048,), and `bins`, float64 [exponent, first, minimum, maximum, zeros]; see the class."""
        bins = np.array([*self._layout(), self.minimum, self.maximum, self.zeros], np.float64)
        return {"counts": self.counts.copy(), "bins": bins}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray]) -> Histogram:
        """The histogram that `to_arrays` described. Raises ValueError if there is none such."""
        histogram, (exponent, first, low, high, zeros) = cls(), arrays["bins"].tolist()
        histogram.minimum, histogram.maximum, histogram.zeros = low, high, int(zeros)
        histogram.counts = arrays["counts"].astype(np.int64, casting="safe")
        if histogram.counts.shape != (BINS,) or histogram._layout() != (exponent, first):
            raise ValueError(f"not a histogram of {BINS} bins: {histogram.counts.shape} from {first} at 2**{exponent}")
        return histogram

    def _nonzero(self) -> NDArray[np.int64]:
        """Counts without the values that are exactly zero."""
        counts = self.counts.copy()
        counts[-self._layout()[1]] -= self.zeros
        return counts

    def _layout(self) -> tuple[int, int]:
        """Exponent and first of the narrowest bins that reach from minimum to maximum, zero included."""
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        exponent = math.frexp(self.absmax or _SMALLEST)[1] - 11  # absmax is less than 2048 bins of that width
        while _bin(high, exponent) - _bin(low, exponent) >= BINS:
            exponent += 1
        return exponent, _bin(low, exponent)

    def _reach(self, low: float, high: float) -> None:
        before = self._layout()
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.counts = _rebinned(self.counts, before, self._layout())


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _rebinned(counts: NDArray[np.int64], before: tuple[int, int], after: tuple[int, int]) -> NDArray[np.int64]:
    """Counts in bins as wide or wider; `before` and `after` are exponent and first."""
    (index,) = np.nonzero(counts)
    target = ((index + before[1]) >> min(after[0] - before[0], 63)) - after[1]
    rebinned = np.zeros_like(counts)
    np.add.at(rebinned, target, counts[index])
    return rebinned


def choose_range(histogram: Histogram, method: str, bits: int = 8) -> tuple[float, float]:
    """The range (low, high), low <= 0 <= high, for a grid of 2**bits levels; values outside it are clipped.

    Args:
        method: minmax: all that was observed.
            percentile: 99.99 %, without the 0.005 % smallest and the 0.005 % largest values, to a bin.
            entropy: |x| up to the threshold with the least Kullback-Leibler divergence; see `_entropy`.
            mse: the least expected squared error, of rounding and clipping, on the grid that `asymmetric` describes.

    Raises:
        InputError: the method is none of METHODS.
        ValueError: nothing was observed.
    """
    if method not in _METHODS:
        raise InputError(f"{method!r} is no way to choose a range; expected one of {', '.join(METHODS)}")
    if not histogram.counts.any():
        raise ValueError("no range can be chosen: nothing was observed")
    if histogram.absmax == 0:
        return 0.0, 0.0
    low, high = _METHODS[method](histogram, bits)
    return float(min(max(low, histogram.minimum), 0.0)), float(max(min(high, histogram.maximum), 0.0))


def _minmax(histogram: Histogram, bits: int) -> tuple[float, float]:
    return histogram.minimum, histogram.maximum


def _percentile(histogram: Histogram, bits: int) -> tuple[float, float]:
    counts, edges = histogram.counts, histogram.edges()
    cut = int(counts.sum()) * 5 // 100_000  # values at each end
    from_below, from_above = np.cumsum(counts), np.cumsum(counts[::-1])
    low = edges[np.searchsorted(from_below, cut, side="right")]
    high = edges[BINS - np.searchsorted(from_above, cut, side="right")]
    return float(low), float(high)


def _entropy(histogram: Histogram, bits: int) -> tuple[float, float]:
    """Symmetric, whatever the rendering: positive and negative values are folded onto the bins of |x|.

    Of the first n bins, P has their counts, the last one also all that is clipped; Q has them merged into 2**(bits - 1)
    levels and spread again, evenly over those bins of a level that P does not leave empty. The n with the least
    divergence of Q from P gives the threshold (n + 0.5) bins. Values of exactly zero are left out.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017. There levels take whole bins; here n bins are divided as
    evenly as can be. There Q is normalised, so that with nearly everything clipped into one bin P and Q agree; here it
    lacks what is clipped, and the divergence is the generalised one, the sum of p log(p / q) - p + q. While a
    fraction f is clipped, that adds about f^2 / 2.
    """
    levels, (exponent, first) = 2 ** (bits - 1), histogram._layout()
    bins = np.arange(first, first + BINS)
    magnitudes = np.bincount(np.where(bins < 0, -1 - bins, bins), histogram._nonzero())
    magnitudes = magnitudes[: np.flatnonzero(magnitudes)[-1] + 1]
    candidates = range(min(levels, len(magnitudes)), len(magnitudes) + 1)
    n = min(candidates, key=lambda n: _divergence(magnitudes, n, levels))
    threshold = math.ldexp(n + 0.5, exponent)
    return -threshold, threshold


def _divergence(magnitudes: NDArray, n: int, levels: int) -> float:
    level = np.arange(n) * levels // n
    p = magnitudes[:n].copy()
    p[-1] += magnitudes[n:].sum()
    merged, filled = np.bincount(level, magnitudes[:n]), np.bincount(level, p > 0)
    q = (merged / np.maximum(filled, 1))[level]
    p, q = p[p > 0], q[p > 0]
    if not q.all():  # what is clipped falls where nothing is
        return math.inf
    return float(p @ np.log(p / q) - p.sum() + q.sum())


def _mse(histogram: Histogram, bits: int) -> tuple[float, float]:
    """Search over factors by which each end shrinks: four to the octave, then 16, then 64 around the best."""
    counts, edges = histogram._nonzero(), histogram.edges()
    first, last = np.flatnonzero(counts)[[0, -1]]
    counts, edges = counts[first : last + 1], edges[first : last + 2]
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    for factors in [0.0, *2.0 ** (-np.arange(45) / 4)], 2.0 ** (np.arange(-3, 4) / 16), 2.0 ** (np.arange(-3, 4) / 64):
        candidates = {(low * shrink, high * other) for shrink in factors for other in factors}
        low, high = min(
            (candidate for candidate in sorted(candidates) if candidate[0] < candidate[1]),
            key=lambda candidate: _squared_error(counts, edges, candidate[0], candidate[1], 2**bits - 1),
        )
    return low, high


def _squared_error(counts: NDArray[np.int64], edges: NDArray[np.float64], low: float, high: float, steps: int) -> float:
    """Sum of (x - quantised x)^2, but for a constant factor, if values are spread evenly within their bins.

    With t = x / scale and q the integer that t is rounded and clipped to, the integral of (t - q)^2 from 0 to t is
    q / 12 + (t - q)^3 / 3, inside the range and outside.
    """
    scale = (high - low) / steps
    lowest = round(low / scale)
    t = edges / scale
    q = np.clip(np.rint(t), lowest, lowest + steps)
    rest = t - q
    return float(counts @ np.diff(q / 12 + rest * rest * rest / 3)) * scale**3


_METHODS = {"minmax": _minmax, "percentile": _percentile, "entropy": _entropy, "mse": _mse}
METHODS = tuple(_METHODS)


def symmetric(low: float, high: float) -> float:
    """Scale of the int8 grid with zero point 0 that spans low <= 0 <= high with the integers -127 to 127."""
    return _scale(max(-low, high) / 127)


def asymmetric(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of the uint8 grid that spans low <= 0 <= high, as x = scale * (q - zero point).

    Zero is represented exactly; its place is rounded, so the grid's ends may lie half a step inside the range.
    """
    scale = _scale((high - low) / 255)
    return scale, round(-low / scale)


def _scale(exact: float) -> float:
    """The next float32 that is no smaller, so that the grid spans all of the range; at least the smallest normal one,
    below which devices compute with zero. 1.0 for a tensor of nothing but zeros."""
    if exact == 0:
        return 1.0
    rounded = max(np.float32(exact), np.finfo(np.float32).tiny)
    if float(rounded) < exact:  # NumPy would compare in float32
        rounded = np.nextafter(rounded, np.float32(np.inf))
    return float(rounded)
