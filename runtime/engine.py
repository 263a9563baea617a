"""What an engine is to the runtime, and how a package's two engines are opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError, Package
from ..engines.targets import TARGETS

if TYPE_CHECKING:
    from .cuda import DeviceFrames


class EngineError(Exception):
    """An engine failed while it ran; says which, on what, and why."""


class Encoder(Protocol):
    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Clips uint8 (clips, T, H, W, 3), RGB -> visual tokens float32 (clips, tokens_per_clip, D).

        Raises:
            InputError: another type or shape, or no clips.
        """
        ...

    def encode_with_features(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `encode`, and what a Merger takes: float32 (clips, tokens_per_clip, C). Where the engine has no output
        `features` that is the visual tokens, the same array.
        """
        ...

    def device_frames(self) -> DeviceFrames | None:
        """Room for a clip whose frames lie on the GPU already; None if such are not taken."""
        ...

    def encode_on_device(self, clips: list[DeviceFrames]) -> NDArray[np.float32]:
        """As `encode`, of clips that `device_frames` had room for."""
        ...

    def node_times(self) -> list[tuple[str, float]]:
        """(node, milliseconds) in the order in which they ran since the engine was opened for profiling; once."""
        ...


class Decoder(Protocol):
    """Holds the KV cache of one conversation.

    Attributes:
        position: how many positions the cache holds.
        capacity: how many it may hold.
    """

    position: int
    capacity: int

    def reserve(self, positions: int) -> None:
        """Makes the cache large enough for so many positions, at most its capacity."""
        ...

    def forward(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Appends (S, D) embeddings to the cache; returns the logits (vocabulary,) after the last of them.

        Raises:
            InputError: they do not fit the cache, have another width, or are none.
        """
        ...

    def rewind(self, position: int) -> None:
        """Forgets everything from `position` on.

        Raises:
            InputError: the cache does not reach that far.
        """
        ...

    def twin(self) -> Decoder:
        """The same engine with an empty KV cache of its own."""
        ...

    def node_times(self) -> list[tuple[str, float]]:
        """See `Encoder.node_times`."""
        ...


class Merger(Protocol):
    def merge(
        self,
        features: NDArray[np.float32],
        query: NDArray[np.float32],
        key_features: NDArray[np.float32] | None,
        redundancy_weight: float,
        temperature: float,
    ) -> NDArray[np.float32]:
        """Clips, each merged into one token: float32 (clips, D).

        features: float32 (clips, P, C), of `Encoder.encode_with_features`.
        query: float32 (C,).
        key_features: float32 (P, C), of the keyframe that precedes all of them; None where there is none.
        redundancy_weight: lambda, what resemblance to the keyframe counts beside that to the query.
        temperature: alpha, above 0; small ones single patches out.

        Source: ViLaMP, equations 5-11.

        Raises:
            InputError: shapes that do not fit the engine or each other, no clips, a temperature not above 0, or numbers
                that are none.
        """
        ...


class QueryEncoder(Protocol):
    def encode(self, ids: list[int]) -> NDArray[np.float32]:
        """Token ids of a question -> its vector float32 (C,).

        Raises:
            InputError: no ids, or more than the engine takes.
        """
        ...


def check_merge(
    features: NDArray[np.float32],
    query: NDArray[np.float32],
    key_features: NDArray[np.float32] | None,
    redundancy_weight: float,
    temperature: float,
    width: int,
    most: int | None = None,
) -> None:
    """Raises InputError when what is to be merged is not `width` wide, no clips, or more than `most`; else as Merger
    says."""
    if features.ndim != 3 or features.shape[2] != width or 0 in features.shape:
        raise InputError(
            f"the merger was given features of shape {features.shape}, expected (clips, patches, {width}) with at "
            "least one clip"
        )
    if query.shape != (width,):
        raise InputError(f"the merger was given a query of shape {query.shape}, expected ({width},)")
    if key_features is not None and key_features.shape != features.shape[1:]:
        raise InputError(
            f"the merger was given a keyframe's features of shape {key_features.shape}, expected {features.shape[1:]}"
        )
    if not 0 < temperature < math.inf or not math.isfinite(redundancy_weight):
        raise InputError(
            f"the merger was given a temperature of {temperature} and a redundancy weight of {redundancy_weight}; "
            "expected a number above 0, and a number"
        )
    if most is not None and len(features) > most:
        raise InputError(f"the merger was given {len(features)} clips, its engine takes {most} at once")


def check_frames(frames: NDArray[np.uint8], shape: Sequence[int], most: int | None = None) -> None:
    """Raises InputError when clips are not uint8 (clips, *shape), none, or more than `most`."""
    if frames.dtype != np.uint8 or list(frames.shape[1:]) != list(shape) or not len(frames):
        raise InputError(
            f"the encoder was given {frames.dtype} {frames.shape}, expected uint8 (clips, "
            f"{', '.join(map(str, shape))}) with at least one clip"
        )
    if most is not None and len(frames) > most:
        raise InputError(f"the encoder was given {len(frames)} clips, its engine takes {most} at once")


def check_embeddings(
    embeddings: NDArray[np.float32], width: int, position: int, capacity: int, most: int | None = None
) -> None:
    """Raises InputError when embeddings are not (positions, width), none, more than `most`, or do not fit the cache."""
    if embeddings.ndim != 2 or embeddings.shape[1] != width or not len(embeddings):
        raise InputError(
            f"the decoder was given embeddings of shape {embeddings.shape}, expected (positions, {width}) "
            "with at least one position"
        )
    if most is not None and len(embeddings) > most:
        raise InputError(f"the decoder was given {len(embeddings)} positions, its engine takes {most} at once")
    end = position + len(embeddings)
    if end > capacity:
        raise InputError(
            f"{end} positions do not fit the KV cache of {capacity}; use fewer frames or a shorter question, "
            "or build with more --frames"
        )


def open_engines(
    package: Package, threads: int | None = None, profiling: Path | None = None
) -> tuple[Encoder, Decoder]:
    """Loads both engines of a checked package.

    Args:
        threads: CPU threads for each; None leaves it to the executor.
        profiling: a folder for the profiler's files, to be asked for `node_times`.

    Raises:
        InputError: the package is a bundle, its target can't run here, what runs it is not installed, or it was made
            for another version.
        EngineError: the GPU has no memory left for it.
    """
    target = TARGETS[package.manifest.target]
    encoder, decoder = package.engine("encoder"), package.engine("decoder")
    if target.provider is None:
        from .trt_engine import open_trt

        return open_trt(package, profiling is not None)
    try:
        from .ort_engine import OrtDecoder, OrtEncoder, check_version
    except ModuleNotFoundError as error:
        raise InputError(
            f"{package.folder}: built for {target.name}, which needs the module {error.name}; "
            f"run: pip install 'liteframe[{target.name}]'"
        ) from None
    check_version(package, encoder)
    capacity = package.manifest.model.capacity
    return (
        OrtEncoder(package.path(encoder.files[0]), target.provider, threads, profiling),
        OrtDecoder(package.path(decoder.files[0]), target.provider, capacity, threads, profiling),
    )


def open_merger(package: Package, threads: int | None = None) -> Merger:
    """The engine that makes one token of a clip; see long_video.py. Raises as `open_engines` does."""
    engine, target = package.engine("merger"), TARGETS[package.manifest.target]
    if target.provider is None:
        from .trt_engine import open_trt_merger

        return open_trt_merger(package)
    from .ort_engine import OrtMerger

    return OrtMerger(package.path(engine.files[0]), target.provider, threads)


def open_query_encoder(package: Package, threads: int | None = None) -> QueryEncoder:
    """The artifact's own query encoder. Raises as `open_engines` does."""
    engine, target = package.engine("query"), TARGETS[package.manifest.target]
    if target.provider is None:
        from .trt_engine import open_trt_query_encoder

        return open_trt_query_encoder(package)
    from .ort_engine import OrtQueryEncoder

    return OrtQueryEncoder(package.path(engine.files[0]), target.provider, threads)
