"""A video of thousands of frames in the positions of a few hundred: keyframes keep their visual tokens, each frame
between them becomes one (ViLaMP, section 3; in `hybrid` each clip, with LiteFrame's tokens at the key clips).

    clips ─▶ encoder ─▶ candidates ──▶ spool, on disk ────────────────────────┐
                            └─▶ embedding, relevance ─▶ keyframes             ├─▶ spans, in the order of time
                                                            └─▶ merger ───────┘

A candidate is a frame in `vilamp`, a clip in `hybrid`. What they are chosen by, the query, must be known before the
video is read; memory holds an embedding of each, and the tokens of one.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError, Model
from ..engines.package import LongVideo as Settings
from .engine import EngineError, Merger
from .keyframes import cosines, select

Mode = Literal["uniform", "vilamp", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)
MERGED_AT_ONCE = 32  # candidates that one call of the merger is given


@dataclass(frozen=True, eq=False)
class Query:
    """What a video is searched for, in the space of its features.

    vector: float32 (C,).
    parts: float32 (parts, C), words of a question or patches of a picture. Each looks for the token that is most like
        it, for what is searched may fill a small part of a frame.
    """

    vector: NDArray[np.float32]
    parts: NDArray[np.float32]

    @classmethod
    def of(cls, parts: NDArray[np.float32]) -> Query:
        return cls(parts.mean(0), parts)

    def relevance(self, features: NDArray[np.float32]) -> float:
        """Mean over the parts of the largest cosine to a feature; features (P, C)."""
        return float(cosines(self.parts, features).max(1).mean())


@dataclass(frozen=True, eq=False)
class Span:
    """Visual tokens (n, D) of the frames `first` to `last`, numbered from 1. `merged`: one of each candidate."""

    tokens: NDArray[np.float32]
    first: int
    last: int
    merged: bool = False


class MergerError(EngineError):
    """The merger failed while it ran; says on what, and why."""


def key_candidates(
    embeddings: NDArray[np.float32], relevance: NDArray[np.float32], settings: Settings, trained: bool
) -> NDArray[np.int64]:
    """See `select`: embeddings (N, C) as they are, or where nobody trained them, from their mean; int64."""
    if not trained:
        embeddings = embeddings - embeddings.mean(0)
    count = min(settings.keyframes, len(embeddings))  # a file may end before its header says
    return select(embeddings, relevance, count, settings.similar)


class LongVideo:
    """Takes the clips of a video one after the other; then gives what is left of them.

    Args:
        mode: "vilamp" or "hybrid".
        trained: the features were trained to be compared by their cosine, with a query encoder. Visual tokens were not:
            they share so much that all cosines between them are near 1, so embeddings are taken from their mean.

    Raises:
        InputError: see `check_mode`; the query has another width than the features.
    """

    def __init__(self, mode: Mode, query: Query, model: Model, merger: Merger, trained: bool):
        check_mode(mode, model)
        assert model.long_video is not None
        self._query, self._model, self._merger, self._settings = query, model, merger, model.long_video
        self._units = 1 if mode == "hybrid" else model.units_per_clip  # candidates of a clip
        self._spool = Spool()
        self._stopped = threading.Event()
        self._features_apart, self._trained = False, trained
        most = self._settings.max_frames // self._frames
        # in one piece, which goes back to the system; thousands of small ones would leave holes
        self._embeddings = np.empty((most, query.vector.shape[0]), np.float32)
        self._relevance: list[float] = []

    @property
    def _frames(self) -> int:
        """Of a candidate."""
        return self._model.clip_length // self._units

    def add(self, tokens: NDArray[np.float32], features: NDArray[np.float32] | None) -> None:
        """A clip's visual tokens (tokens_per_clip, D), and its features (tokens_per_clip, C) where they are not these.

        Raises:
            InputError: the disk is full; the query has another width than the features.
        """
        self._features_apart = features is not None
        compared = tokens if features is None else features
        if compared.shape[1] != self._query.vector.shape[0]:
            raise InputError(
                f"the query is {self._query.vector.shape[0]} wide, the features of the video {compared.shape[1]}; "
                "the artifact's query encoder must be as wide as what it is compared with"
            )
        for number, candidate in enumerate(np.split(compared, self._units)):
            self._embeddings[self.candidates] = candidate.mean(0)
            self._relevance.append(self._query.relevance(candidate))
            self._spool.append(np.split(tokens, self._units)[number])
            if features is not None:
                self._spool.append(candidate)

    @property
    def candidates(self) -> int:
        return len(self._relevance)

    def keyframes(self) -> NDArray[np.int64]:
        """Numbers of the key candidates, most relevant first; `keyframes` of them, or fewer where fewer differ."""
        relevance = np.array(self._relevance, np.float32)
        return key_candidates(self._embeddings[: self.candidates], relevance, self._settings, self._trained)

    def stop(self) -> None:
        """Nobody wants the rest; from any thread."""
        self._stopped.set()

    def go_on(self) -> None:
        """Raises InputError after `stop`."""
        if self._stopped.is_set():
            raise InputError("the long video was given up before it was read to its end; watch it again")

    def spans(self) -> Iterator[Span]:
        """What is left, in the order of time: a key candidate's tokens, and runs of merged ones.

        Raises:
            MergerError: the merger failed.
            InputError: it was stopped.
        """
        keys = sorted(self.keyframes().tolist()) if self.candidates else []
        key_features = None
        for key, end in zip([None, *keys], [*keys, self.candidates], strict=True):
            if key is not None:
                yield from self._whole(key)
                key_features = self._features(key)
            start = 0 if key is None else key + 1
            if start < end:
                tokens = [
                    self._merge(range(first, min(first + MERGED_AT_ONCE, end)), key_features)
                    for first in range(start, end, MERGED_AT_ONCE)
                ]
                yield Span(np.concatenate(tokens), start * self._frames + 1, end * self._frames, merged=True)

    def _whole(self, key: int) -> Iterator[Span]:
        """A key candidate, each time step of which is told apart."""
        steps = self._model.units_per_clip // self._units
        frames = self._frames // steps
        for step, tokens in enumerate(np.split(self._tokens(key), steps)):
            first = key * self._frames + step * frames
            yield Span(tokens, first + 1, first + frames)

    def _merge(self, candidates: range, key_features: NDArray[np.float32] | None) -> NDArray[np.float32]:
        self.go_on()
        features, settings = np.stack([self._features(candidate) for candidate in candidates]), self._settings
        try:
            return self._merger.merge(
                features, self._query.vector, key_features, settings.redundancy_weight, settings.temperature
            )
        except InputError:
            raise
        except Exception as error:
            first, last = candidates.start * self._frames + 1, candidates.stop * self._frames
            raise MergerError(f"the merger failed on the frames {first} to {last}: {error}") from error

    def _tokens(self, candidate: int) -> NDArray[np.float32]:
        return self._spool.read(candidate * (1 + self._features_apart))

    def _features(self, candidate: int) -> NDArray[np.float32]:
        return self._spool.read(candidate * 2 + 1 if self._features_apart else candidate)

    def close(self) -> None:
        self._spool.close()


class Spool:
    """Arrays on disk, where the system keeps temporary files, and not in memory.

    Raises:
        InputError: the disk is full.
    """

    def __init__(self) -> None:
        try:
            # unbuffered: what a buffer holds when the disk is full would be tried again at every later call
            self._file = tempfile.TemporaryFile(prefix="liteframe-", buffering=0)  # noqa: SIM115 - stays open
        except OSError as error:
            raise _no_room(error) from None
        self._places: list[tuple[int, tuple[int, ...]]] = []

    def append(self, array: NDArray[np.float32]) -> None:
        """Raises InputError when the disk is full."""
        rest = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8).data
        try:
            place = self._file.seek(0, 2)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _no_room(error) from None
        self._places.append((place, array.shape))

    def read(self, number: int) -> NDArray[np.float32]:
        place, shape = self._places[number]
        array = np.empty(shape, np.float32)
        self._file.seek(place)
        self._file.readinto(array.reshape(-1).view(np.uint8).data)
        return array

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def _no_room(error: OSError) -> InputError:
    return InputError(
        f"{tempfile.tempdir or 'temporary files'}: the visual tokens of a long video can't be kept there "
        f"({error.strerror}); make room, or set TMPDIR to a folder with room"
    )


def check_mode(mode: Mode, model: Model) -> None:
    """Raises InputError when a package can't keep long videos in this way."""
    if mode not in MODES:
        raise InputError(f"long_video is {mode!r}, expected one of {', '.join(MODES)}")
    if mode != "uniform" and model.long_video is None:
        raise InputError(f"--long-video {mode}: the package was not built for it; build with --long-video FRAMES")
    if mode == "vilamp" and model.units_per_clip != model.clip_length:
        raise InputError(
            f"--long-video vilamp keeps single frames, and this encoder makes {model.units_per_clip} time steps of the "
            f"{model.clip_length} frames of a clip; use --long-video hybrid, which keeps clips"
        )


def check_long_frames(mode: Mode, frames: int, there: int, model: Model) -> None:
    """Raises InputError when a package can't take so many frames in this way, of which `there` can be had: not in whole
    clips, more than it was built for, or fewer candidates than keyframes."""
    assert model.long_video is not None
    settings, clip = model.long_video, model.clip_length
    if frames < clip or frames % clip:
        raise InputError(f"{frames} frames, expected a multiple of {clip}, the frames of a clip")
    if frames > settings.max_frames:
        raise InputError(
            f"{frames} frames, the package was built for long videos of at most {settings.max_frames}; "
            f"build with --long-video {frames}"
        )
    candidates, what = (there, "frames") if mode == "vilamp" else (-(-there // clip), "clips")
    if settings.keyframes > candidates:
        raise InputError(
            f"{settings.keyframes} keyframes of {candidates} {what}: so short a video needs no --long-video; "
            "use --long-video uniform, or build with fewer --keyframes"
        )
