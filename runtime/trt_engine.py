"""Engines on TensorRT 10.3 to 11.x and on TensorRT-RTX, for graphs in both dialects.

    encoder   frames ─pinned─▶ stream A: execute ─pinned─▶ visual tokens, features where asked for
    merger    features of clips and of a keyframe ─pinned─▶ a stream: execute ─pinned─▶ merged tokens
    decoder   embeddings ─pinned─▶ stream B: execute ─pinned─▶ logits          caches stay on the device

Each has a stream of its own, and they run at the same time. All buffers are allocated once, as large as the
engine's profile lets them become. Calls of a fixed shape, a full batch of clips, a full chunk, a single token, are
recorded as a CUDA graph at their second time, where addresses and shapes stay the same: in the `plain` dialect the
decoder's do not.

A `fused` decoder updates its caches in place: a cache and its output are one buffer. A `plain` one returns longer
caches, so each has two buffers that change places.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.package import Engine, InputError, Package, TensorSpec
from ..engines.targets import TENSORRT_MODULES
from .cuda import Cuda, DeviceFrames, Memory, Stream
from .engine import EngineError, check_embeddings, check_frames, check_merge


@dataclass(frozen=True)
class Tensor:
    """What an engine's input or output needs.

    Attributes:
        shape: the largest.
        buffer: name of the tensor whose buffer it shares; its own, unless it is a cache.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    buffer: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan(engine: Engine, capacity: int) -> dict[str, Tensor]:
    """Every input and output of an engine as large as its profile lets it become.

    Args:
        capacity: positions of a cache, of a decoder.

    Raises:
        InputError: an input varies and has no profile.
    """
    largest: dict[str, int] = {}
    for spec in engine.inputs:
        if spec.profile is None and any(isinstance(size, str) for size in spec.shape):
            raise InputError(f"{engine.files[0].path}: input {spec.name} varies and has no profile; build it again")
        for position, size in enumerate(spec.shape):
            if isinstance(size, str) and spec.profile is not None:
                largest[size] = spec.profile.max[position]
    tensors = {}
    for spec in [*engine.inputs, *engine.outputs]:
        name = spec.name.removesuffix("_out") if spec in engine.outputs else spec.name
        cache = is_cache(spec)
        sizes = [capacity if cache and axis == 2 else size for axis, size in enumerate(spec.shape)]
        shape = tuple(size if isinstance(size, int) else largest[size] for size in sizes)
        tensors[spec.name] = Tensor(spec.name, np.dtype(spec.dtype), shape, name if cache else spec.name)
    return tensors


def is_cache(spec: TensorSpec) -> bool:
    return "_cache_" in spec.name


@dataclass(frozen=True)
class Loaded:
    """A deserialised engine, and the module of the TensorRT that runs it."""

    trt: Any
    engine: Any

    def profiler(self, times: list[tuple[str, float]]) -> Any:
        """Appends (layer, milliseconds) to `times` as layers run."""

        class Profiler(self.trt.IProfiler):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.append((layer_name, ms))

        return Profiler()


def load(package: Package, engine: Engine, cuda: Cuda) -> Loaded:
    """Deserialises an engine; its file's hash was checked when the package was opened.

    Raises:
        InputError: TensorRT is not installed or of another version, the GPU has another compute capability, or
            TensorRT refuses the engine; each with what mends it.
    """
    where = package.folder / engine.files[0].path
    module = TENSORRT_MODULES[engine.compiler]
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(
            f"{where}: compiled by {engine.compiler}, which is not installed here; install version "
            f"{engine.compiler_version} of {module}"
        ) from None
    if trt.__version__ != engine.compiler_version:
        raise InputError(
            f"{where}: compiled by {engine.compiler} {engine.compiler_version}, {trt.__version__} is installed, and "
            "engines run on the version that made them; install that one, or compile again with this"
        )
    capability = cuda.capability()
    if capability not in engine.capabilities:
        raise InputError(
            f"{where}: compiled for compute capability {' '.join(engine.capabilities)}, this GPU has {capability}; "
            "build for a target that has it"
        )
    if engine.operators is not None and engine.operators.library is not None:
        _load_plugins(trt, package.path(engine.operators.library))
    logger = trt.Logger(trt.Logger.ERROR)
    loaded = trt.Runtime(logger).deserialize_cuda_engine(where.read_bytes())
    if loaded is None:
        raise InputError(f"{where}: {engine.compiler} {trt.__version__} refuses to load it; see its messages above")
    return Loaded(trt, loaded)


def _load_plugins(trt: Any, library: Path) -> None:
    """Once in a process; the file's hash was checked when the package was opened."""
    registry = trt.get_plugin_registry()
    known = registry.get_creator("DepthwiseTemporalConv", "1", "liteframe") is not None
    if not known and registry.load_library(os.fspath(library)) is None:
        raise InputError(
            f"{library}: TensorRT {trt.__version__} does not load this library of plugins, which the engine needs; "
            "compile the package again on this device"
        )


def open_trt(package: Package, profiling: bool = False, cuda: Cuda | None = None) -> tuple[TrtEncoder, TrtDecoder]:
    """Loads both engines; see `engine.open_engines`.

    Args:
        profiling: layers are timed one by one, for `node_times`; nothing is recorded as a CUDA graph.
        cuda: the device, unless it is the current one.
    """
    encoder, decoder = package.engine("encoder"), package.engine("decoder")
    cuda = cuda or _device(package)
    return (
        TrtEncoder(encoder, load(package, encoder, cuda), cuda, profiling),
        TrtDecoder(decoder, load(package, decoder, cuda), cuda, package.manifest.model.capacity, profiling),
    )


def open_trt_merger(package: Package, cuda: Cuda | None = None) -> TrtMerger:
    """See `engine.open_merger`."""
    engine, cuda = package.engine("merger"), cuda or _device(package)
    return TrtMerger(engine, load(package, engine, cuda), cuda)


def open_trt_query_encoder(package: Package, cuda: Cuda | None = None) -> TrtQueryEncoder:
    """See `engine.open_query_encoder`."""
    engine, cuda = package.engine("query"), cuda or _device(package)
    return TrtQueryEncoder(engine, load(package, engine, cuda), cuda)


def _device(package: Package) -> Cuda:
    try:
        return Cuda()
    except InputError as error:
        raise InputError(
            f"{package.folder}: holds TensorRT engines for {package.manifest.target}; {error}; for this machine's CPU, "
            "build with --target cpu"
        ) from None


class _Execution:
    """An engine's execution context with its buffers; one caller at a time.

    Args:
        stream: what this execution is put on.
        profiling: see `open_trt`.
    """

    def __init__(
        self, name: str, loaded: Loaded, tensors: dict[str, Tensor], cuda: Cuda, stream: Stream, profiling: bool
    ):
        self._name, self.stream, self._profiling = name, stream, profiling
        self.context = loaded.engine.create_execution_context()
        if self.context is None:
            raise EngineError(f"the {name} has no memory on the GPU left to run in; use fewer --frames")
        self.memory: dict[str, Memory] = {}
        for tensor in tensors.values():
            if tensor.buffer not in self.memory:
                self.memory[tensor.buffer] = cuda.allocate(tensor.bytes)
            self.set_address(tensor.name, self.memory[tensor.buffer])
        self.layer_times: list[tuple[str, float]] = []
        if profiling:
            self.context.profiler = loaded.profiler(self.layer_times)
        self._seen: set[object] = set()
        self._recorded: dict[object, Callable[[], None]] = {}

    def set_address(self, tensor: str, memory: Memory) -> None:
        if not self.context.set_tensor_address(tensor, memory.address):
            raise EngineError(f"TensorRT refuses a buffer for {tensor} of the {self._name}")

    def set_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        if not self.context.set_input_shape(tensor, shape):
            raise EngineError(f"TensorRT refuses {tensor} of shape {shape} of the {self._name}")

    def execute(self) -> None:
        if not self.context.execute_async_v3(int(self.stream.handle)):
            raise EngineError(f"TensorRT could not run the {self._name}; see its messages above")

    def run(self, work: Callable[[], None], fixed: object = None) -> None:
        """Puts work on the stream and waits for it.

        Args:
            fixed: names work that is the same each time; its second time is recorded, and then replayed.
        """
        if self._profiling:
            fixed = None
        self._recorded.get(fixed, work)()
        self.stream.finish()
        if fixed in self._seen and fixed not in self._recorded:
            # only now: when it is called TensorRT allocates and takes in new shapes, which a recording must not do
            self._recorded[fixed] = self._record(work)
        elif fixed is not None:
            self._seen.add(fixed)

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What replays work, or work itself where that can't be."""
        capturable = getattr(self.context, "is_stream_capturable", None)  # TensorRT-RTX has it
        try:
            if capturable is not None and not capturable(int(self.stream.handle)):
                raise EngineError("TensorRT does not let it")
            return self.stream.capture(work)
        except EngineError as error:
            warnings.warn(f"the {self._name} runs without a CUDA graph, more slowly: {error}", stacklevel=2)
            return work


class TrtEncoder:
    def __init__(self, engine: Engine, loaded: Loaded, cuda: Cuda, profiling: bool = False):
        tensors = plan(engine, 0)
        self._run = _Execution("encoder", loaded, tensors, cuda, cuda.stream(), profiling)
        self._frames = cuda.pinned(tensors["frames"].shape, tensors["frames"].dtype)
        self._outputs = {
            spec.name: cuda.pinned(tensors[spec.name].shape, tensors[spec.name].dtype) for spec in engine.outputs
        }
        self._cuda, self._arrivals = cuda, cuda.stream()

    def device_frames(self) -> DeviceFrames:
        """Room for a clip whose frames lie on the GPU already."""
        return DeviceFrames(self._cuda, self._arrivals, self._frames.shape[1:])

    def node_times(self) -> list[tuple[str, float]]:
        """See `engine.Encoder`."""
        return self._run.layer_times

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `engine.Encoder`; no more clips than the engine's profile has."""
        return self._encode_from_host(frames, ("visual_tokens",))[0]

    def encode_with_features(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `engine.Encoder`; no more clips than the engine's profile has."""
        if "features" not in self._outputs:
            tokens = self.encode(frames)
            return tokens, tokens
        tokens, features = self._encode_from_host(frames, ("visual_tokens", "features"))
        return tokens, features

    def _encode_from_host(self, frames: NDArray[np.uint8], outputs: tuple[str, ...]) -> list[NDArray[np.float32]]:
        most, *shape = self._frames.shape
        check_frames(frames, shape, most)
        staged = self._frames[: len(frames)]
        staged[:] = frames
        return self._encode(
            len(frames), lambda: self._run.stream.to_device(self._run.memory["frames"], staged), outputs
        )

    def encode_on_device(self, clips: list[DeviceFrames]) -> NDArray[np.float32]:
        """As `encode`, of clips that lie on the GPU."""

        def gather() -> None:
            start = self._run.memory["frames"].address
            for number, clip in enumerate(clips):
                self._run.stream.on_device(start + number * clip.memory.size, clip.memory.address, clip.memory.size)

        return self._encode(len(clips), gather, ("visual_tokens",))[0]

    def _encode(self, clips: int, gather: Callable[[], None], outputs: tuple[str, ...]) -> list[NDArray[np.float32]]:
        run = self._run
        run.set_shape("frames", (clips, *self._frames.shape[1:]))
        gather()

        def work() -> None:
            run.execute()
            for name in outputs:
                run.stream.to_host(self._outputs[name][:clips], run.memory[name])

        run.run(work, outputs if clips == len(self._frames) else None)
        return [self._outputs[name][:clips].astype(np.float32) for name in outputs]


class TrtMerger:
    """See `engine.Merger`; no more clips and patches at once than the engine's profile has."""

    def __init__(self, engine: Engine, loaded: Loaded, cuda: Cuda, profiling: bool = False):
        tensors = plan(engine, 0)
        self._run = _Execution("merger", loaded, tensors, cuda, cuda.stream(), profiling)
        self._most, self._patches, self._width = tensors["features"].shape
        self._pinned = {spec.name: cuda.pinned(tensors[spec.name].shape, np.float32) for spec in engine.inputs}
        self._tokens = cuda.pinned(tensors["merged_tokens"].shape, np.float32)

    def merge(
        self,
        features: NDArray[np.float32],
        query: NDArray[np.float32],
        key_features: NDArray[np.float32] | None,
        redundancy_weight: float,
        temperature: float,
    ) -> NDArray[np.float32]:
        """See `engine.Merger`."""
        check_merge(features, query, key_features, redundancy_weight, temperature, self._width, self._most)
        clips, patches, _ = features.shape
        if patches > self._patches:
            raise InputError(f"the merger was given {patches} patches a clip, its engine takes {self._patches}")
        staged = {
            name: pinned.reshape(-1)[: math.prod(shape)].reshape(shape)
            for (name, pinned), shape in zip(
                self._pinned.items(),
                (features.shape, (1, self._width), (1, *features.shape[1:]), (1,), (1,)),
                strict=True,
            )
        }
        staged["features"][:] = features
        staged["query"][0] = query
        staged["key_features"][0] = 0 if key_features is None else key_features
        staged["redundancy_weight"][0], staged["temperature"][0] = redundancy_weight, temperature
        for name in ("features", "key_features"):
            self._run.set_shape(name, staged[name].shape)

        def work() -> None:
            for name, array in staged.items():
                self._run.stream.to_device(self._run.memory[name], array)
            self._run.execute()
            self._run.stream.to_host(self._tokens[:clips], self._run.memory["merged_tokens"])

        self._run.run(work, patches if clips == self._most else None)
        return self._tokens[:clips].copy()


class TrtQueryEncoder:
    """See `engine.QueryEncoder`; no more tokens than the engine's profile has."""

    def __init__(self, engine: Engine, loaded: Loaded, cuda: Cuda):
        tensors = plan(engine, 0)
        self._run = _Execution("query encoder", loaded, tensors, cuda, cuda.stream(), False)
        self._ids = cuda.pinned(tensors["input_ids"].shape, np.int64)
        self._query = cuda.pinned(tensors["query"].shape, tensors["query"].dtype)

    def encode(self, ids: list[int]) -> NDArray[np.float32]:
        """See `engine.QueryEncoder`."""
        most = self._ids.shape[1]
        if not 0 < len(ids) <= most:
            raise InputError(f"a question of {len(ids)} tokens; the query encoder's engine takes 1 to {most}")
        self._ids[0, : len(ids)] = ids
        self._run.set_shape("input_ids", (1, len(ids)))

        def work() -> None:
            self._run.stream.to_device(self._run.memory["input_ids"], self._ids[:, : len(ids)])
            self._run.execute()
            self._run.stream.to_host(self._query, self._run.memory["query"])

        self._run.run(work, None)
        return self._query[0].astype(np.float32)


class TrtDecoder:
    """One conversation; see `engine.Decoder`.

    Args:
        capacity: how many positions the caches hold.
    """

    def __init__(self, engine: Engine, loaded: Loaded, cuda: Cuda, capacity: int, profiling: bool = False):
        self._engine, self._loaded, self._cuda, self._profiling = engine, loaded, cuda, profiling
        self._in_place = engine.dialect == "fused"
        self._stream = cuda.stream()
        self.capacity = capacity
        self._open()

    def _open(self) -> None:
        cuda, tensors = self._cuda, plan(self._engine, self.capacity)
        self._caches = [tensors[spec.name] for spec in self._engine.inputs if is_cache(spec)]
        self._run = _Execution("decoder", self._loaded, tensors, cuda, self._stream, self._profiling)
        self._embeddings = cuda.pinned(tensors["inputs_embeds"].shape, np.float32)
        self._index = cuda.pinned((1,), np.int64)
        self._logits = cuda.pinned(tensors["logits"].shape, np.float32)
        self._spare = {} if self._in_place else {cache.name: cuda.allocate(cache.bytes) for cache in self._caches}
        self.position = 0

    def reserve(self, positions: int) -> None:
        """See `engine.Decoder`; caches are allocated once."""

    def twin(self) -> TrtDecoder:
        """The same engine with an empty KV cache of its own."""
        twin = TrtDecoder.__new__(TrtDecoder)
        twin.__dict__.update(self.__dict__)
        twin._open()
        return twin

    def node_times(self) -> list[tuple[str, float]]:
        """See `engine.Encoder`."""
        return self._run.layer_times

    def forward(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Appends (S, D) embeddings to the cache; returns the logits (vocabulary,) after the last of them.

        Raises:
            InputError: they do not fit the cache or the engine's profile, have another width, or are none.
            EngineError: TensorRT or CUDA failed; the cache holds what it held.
        """
        _, most, width = self._embeddings.shape
        check_embeddings(embeddings, width, self.position, self.capacity, most)
        length, run = len(embeddings), self._run
        self._embeddings[0, :length] = embeddings
        self._index[0] = self.position
        run.set_shape("inputs_embeds", (1, length, width))
        if not self._in_place:
            for cache in self._caches:
                _, heads, _, size = cache.shape
                run.set_shape(cache.name, (1, heads, self.position, size))
                run.set_address(cache.name, run.memory[cache.name])
                run.set_address(f"{cache.name}_out", self._spare[cache.name])

        def work() -> None:
            run.stream.to_device(run.memory["inputs_embeds"], self._embeddings[0, :length])
            run.stream.to_device(run.memory["write_index"], self._index)
            run.execute()
            run.stream.to_host(self._logits, run.memory["logits"])

        run.run(work, length if self._in_place and length in (1, most) else None)
        if not self._in_place:
            self._swap()
        self.position += length
        return self._logits[0].copy()

    def rewind(self, position: int) -> None:
        """Forgets everything from `position` on.

        Raises:
            InputError: the cache does not reach that far.
        """
        if not 0 <= position <= self.position:
            raise InputError(f"cannot rewind the KV cache to {position}, it holds {self.position} positions")
        if not self._in_place and 0 < position < self.position:
            for cache in self._caches:  # each head's positions follow those of the head before
                _, heads, _, size = cache.shape
                row = size * cache.dtype.itemsize
                self._stream.rows_on_device(
                    self._spare[cache.name],
                    position * row,
                    self._run.memory[cache.name],
                    self.position * row,
                    position * row,
                    heads,
                )
            self._stream.finish()
            self._swap()
        self.position = position

    def _swap(self) -> None:
        for cache in self._caches:
            memory = self._run.memory
            memory[cache.name], self._spare[cache.name] = self._spare[cache.name], memory[cache.name]
