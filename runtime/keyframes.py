"""Differential keyframe selection (ViLaMP, Algorithm 1): frames that answer to the query and differ from each other.

    walk down the ranking by relevance; keep a frame when its largest cosine to those kept is below `similar`

Cosines are taken in single precision for blocks of the ranking at once. Where one comes so close to `similar` that
rounding might decide, it is taken again in double precision and rounded to float32, so what is kept does not depend on
which frames were compared together.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError

BLOCK = 256  # frames of the ranking compared at once: they stay in the processor's cache


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each vector of a (N, C) with each of b (M, C): float32 (N, M); 0 where one of them is zero.

    Raises:
        InputError: they are not two matrices of the same width, or hold NaN or infinity.
    """
    a, b = _matrix(a, "a"), _matrix(b, "b")
    if a.shape[1] != b.shape[1]:
        raise InputError(f"cosines of vectors {a.shape[1]} and {b.shape[1]} wide; both must be of one width")
    return np.clip(_unit(a, _inverse_norms(a, "a")) @ _unit(b, _inverse_norms(b, "b")).T, -1, 1)


def select(
    embeddings: NDArray[np.float32], relevance: NDArray[np.float32], count: int, similar: float
) -> NDArray[np.int64]:
    """Keyframes in the order in which they were kept: int64, between 1 and `count` indices.

    embeddings: float32 (N, C), of frames.
    relevance: float32 (N,), usually the cosine with the query's embedding; among equals the earlier frame is first.
    count: how many are wanted at most, K.
    similar: the cosine from which two frames are too similar to keep both.

    O(max(NK, N log N)). Source: ViLaMP, Algorithm 1.

    Raises:
        InputError: shapes that do not fit, NaN, an infinite embedding, `count` below 1 or above N.
    """
    embeddings, relevance = _matrix(embeddings, "embeddings"), np.asarray(relevance, np.float32)
    if relevance.shape != embeddings.shape[:1]:
        raise InputError(
            f"keyframes of {len(embeddings)} embeddings and a relevance of shape {relevance.shape}; "
            f"expected ({len(embeddings)},), one number a frame"
        )
    if np.isnan(relevance).any():
        raise InputError(f"the relevance of frame {int(np.isnan(relevance).argmax())} is not a number")
    if not 1 <= count <= len(embeddings):
        raise InputError(f"{count} keyframes of {len(embeddings)} frames; ask for 1 to {len(embeddings)}")
    _check_similar(similar)
    inverse = _inverse_norms(embeddings, "embeddings")
    kept: list[int] = []
    _walk(embeddings, inverse, np.argsort(-relevance, kind="stable"), kept, count, similar)
    return np.array(kept, np.int64)


class KeyframeStream:
    """The same selection for a video that does not end: `selected` is what `select` gives for the frames so far, asked
    for `count`, or for as many as there are.

    A frame that comes and is not kept changes nothing; one that is kept has the ranking behind it walked again. Every
    frame may yet be kept when one before it in the ranking no longer is, so all embeddings stay in memory.

    Raises:
        InputError: `count` below 1, or `similar` is not a number.
    """

    def __init__(self, count: int, similar: float):
        if count < 1:
            raise InputError(f"{count} keyframes; ask for 1 or more")
        _check_similar(similar)
        self._count, self._similar = count, similar
        self._frames = 0
        self._embeddings: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._inverse: NDArray[np.float64] = np.empty(0)
        self._ranks: list[tuple[float, int]] = []  # of each frame: (-relevance, frame)
        self._ranking: list[tuple[float, int]] = []  # the same, sorted
        self._kept: list[int] = []

    @property
    def selected(self) -> NDArray[np.int64]:
        """Keyframes in the order in which `select` keeps them: int64, at most `count` indices."""
        return np.array(self._kept, np.int64)

    def add(self, embedding: NDArray[np.float32], relevance: float) -> None:
        """The next frame: its embedding (C,) and its relevance.

        Raises:
            InputError: another width than the frames before, NaN, an infinite embedding; the frame does not count.
        """
        row = np.asarray(embedding, np.float32)[None]
        if row.ndim != 2 or not row.shape[1] or (self._frames and row.shape[1] != self._embeddings.shape[1]):
            width = self._embeddings.shape[1] if self._frames else "width"
            raise InputError(f"frame {self._frames} has an embedding of shape {row.shape[1:]}, expected ({width},)")
        if np.isnan(relevance):
            raise InputError(f"the relevance of frame {self._frames} is not a number")
        inverse = _inverse_norms(row, f"frame {self._frames}")
        rank = (-float(np.float32(relevance)), self._frames)
        self._append(row, inverse, rank)
        place = bisect_left(self._ranking, rank)
        self._ranking.insert(place, rank)
        ahead = bisect_left(self._kept, rank, key=self._ranks.__getitem__)
        kept, frame = self._kept[:ahead], np.array(rank[1:])
        vectors = self._embeddings, self._inverse
        if ahead < self._count and not _too_similar(*vectors, frame, kept, self._similar)[0]:
            behind = np.array([number for _, number in self._ranking[place:]])
            _walk(*vectors, behind, kept, self._count, self._similar)
            self._kept = kept

    def _append(self, row: NDArray[np.float32], inverse: NDArray[np.float64], rank: tuple[float, int]) -> None:
        if self._frames == len(self._embeddings):
            room = max(64, 2 * self._frames)
            embeddings, inverses = np.empty((room, row.shape[1]), np.float32), np.empty(room)
            if self._frames:
                embeddings[: self._frames], inverses[: self._frames] = self._embeddings, self._inverse
            self._embeddings, self._inverse = embeddings, inverses
        self._embeddings[self._frames], self._inverse[self._frames] = row[0], inverse[0]
        self._ranks.append(rank)
        self._frames += 1


def _walk(
    embeddings: NDArray[np.float32],
    inverse: NDArray[np.float64],
    ranking: NDArray[np.int64],
    kept: list[int],
    count: int,
    similar: float,
) -> None:
    """Appends to `kept` what is to be kept of a ranking whose better part `kept` comes from."""
    for start in range(0, len(ranking), BLOCK):
        if len(kept) == count:
            return
        block = ranking[start : start + BLOCK]
        block = block[~_too_similar(embeddings, inverse, block, kept, similar)]
        while len(block) and len(kept) < count:
            kept.append(int(block[0]))
            block = block[1:][~_too_similar(embeddings, inverse, block[1:], kept[-1:], similar)]


def _too_similar(
    embeddings: NDArray[np.float32],
    inverse: NDArray[np.float64],
    frames: NDArray[np.int64],
    kept: list[int],
    similar: float,
) -> NDArray[np.bool_]:
    """Which of `frames` have a cosine of `similar` or more to one of `kept`: bool (frames,)."""
    cosine: NDArray[np.float32] = _unit(embeddings[frames], inverse[frames]) @ _unit(embeddings[kept], inverse[kept]).T
    margin = np.float32((embeddings.shape[1] + 8) * np.finfo(np.float32).eps)  # twice what rounding may add up to
    found: NDArray[np.bool_] = np.any(cosine >= similar + margin, axis=1)
    unsure = (np.abs(cosine - similar) <= margin) & ~found[:, None]
    for column in np.flatnonzero(unsure.any(axis=0)):
        rows = np.flatnonzero(unsure[:, column])
        dots = np.einsum("nc,c->n", embeddings[frames[rows]], embeddings[kept[column]], dtype=np.float64)
        exact = dots * inverse[frames[rows]] * inverse[kept[column]]
        found[rows] |= exact.astype(np.float32) >= np.float32(similar)
    return found


def _matrix(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.shape[1]:
        raise InputError(f"{name} of shape {values.shape}; expected (N, C), a vector in each row")
    return values


def _inverse_norms(vectors: NDArray[np.float32], name: str) -> NDArray[np.float64]:
    """1 / |v| of each row, 0 for zeros: (N,)."""
    squares = np.einsum("nc,nc->n", vectors, vectors, dtype=np.float64)  # double: no float32 over- or underflows
    if not np.isfinite(squares).all():
        raise InputError(f"{name}: vector {int(np.isfinite(squares).argmin())} holds NaN or infinity")
    return np.divide(1, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)


def _unit(vectors: NDArray[np.float32], inverse: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.multiply(vectors, inverse[:, None], dtype=np.float64).astype(np.float32)


def _check_similar(similar: float) -> None:
    if np.isnan(similar):
        raise InputError("the cosine from which frames are too similar is not a number; try 0.85")
