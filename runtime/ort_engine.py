"""Engines on ONNX Runtime, CPU or CUDA provider, for graphs in both dialects.

A `fused` decoder updates its cache in place: each cache output is bound to its input's own buffer. A `plain` one
returns longer caches, which become the next call's inputs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from ..engines.package import Engine, InputError, Package
from .cuda import DeviceFrames
from .engine import check_embeddings, check_frames, check_merge

# ONNX Runtime's CPU attention takes memory for the whole capacity, and in FP16 time, so caches grow with
# what they hold unless all of it is reserved
GROWTH = 256


def check_version(package: Package, engine: Engine) -> None:
    """Raises InputError when the installed ONNX Runtime is older than the one that made the engine."""
    made, here = (
        tuple(int(part) for part in version.split(".")[:2]) for version in (engine.compiler_version, ort.__version__)
    )
    if here < made:
        raise InputError(
            f"{package.folder}: compiled by ONNX Runtime {engine.compiler_version}, {ort.__version__} is installed; "
            f"run: pip install onnxruntime=={engine.compiler_version}"
        )


def node_times(session: ort.InferenceSession) -> list[tuple[str, float]]:
    """(node, milliseconds) in the order in which they ran since an engine was opened with `profiling`; ends it.

    Source: the events of category "Node" whose name ends in "_kernel_time" in ONNX Runtime's profile.
    """
    path = Path(session.end_profiling())
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
    finally:
        path.unlink()
    end = "_kernel_time"
    return [
        (event["name"].removesuffix(end), event["dur"] / 1e3)
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(end)
    ]


def open_session(model: Path | bytes, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    """A session in which integer products do not overflow. On an x86 processor without VNNI, ONNX Runtime adds pairs of
    products of UINT8 and INT8 in 16 bits unless it is told not to; for two INT8, which do not overflow, it has no
    kernel then.

    Source: "session.x64quantprecision" in ONNX Runtime's onnxruntime_session_options_config_keys.h.
    """
    # on by default there, and FP32 asked for is FP32
    providers = [(provider, {"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {})]
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(model, options, providers=providers)
    except NoKernel:
        options.add_session_config_entry("session.x64quantprecision", "0")
        return ort.InferenceSession(model, options, providers=providers)


def _session(path: Path, provider: str, threads: int | None, profiling: Path | None) -> ort.InferenceSession:
    if provider not in ort.get_available_providers():
        raise InputError(
            f"{path}: needs ONNX Runtime's {provider}, which is not there; install onnxruntime-gpu on a machine with "
            "an NVIDIA GPU, or build with --target cpu"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # or the threads of one engine, waiting in a loop for its next call, would take the cores from the other
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profiling is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profiling / path.stem)
    try:
        session = open_session(path, options, provider)
    except Exception as error:  # the library's errors share no base class
        raise InputError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {error}") from None
    if provider not in session.get_providers():
        raise InputError(f"{path}: ONNX Runtime fell back from {provider}; is the GPU driver working?")
    return session


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Whose memory is there, not promised: a stream that begins has what it needs."""
    return np.full(shape, 0, dtype)


class OrtEncoder:
    """
    Args:
        profiling: a folder for ONNX Runtime's profile; see `node_times`.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        profiling: Path | None = None,
    ):
        self._session = _session(path, provider, threads, profiling)
        self._shape = self._session.get_inputs()[0].shape[1:]
        self._has_features = "features" in (output.name for output in self._session.get_outputs())

    def node_times(self) -> list[tuple[str, float]]:
        """See `node_times`."""
        return node_times(self._session)

    def device_frames(self) -> None:
        """Frames come from the host."""

    def encode_on_device(self, clips: list[DeviceFrames]) -> NDArray[np.float32]:
        raise InputError("ONNX Runtime's executor takes frames from the host")

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Clips uint8 (clips, T, H, W, 3), RGB -> visual tokens float32 (clips, tokens_per_clip, D).

        Raises:
            InputError: another type or shape, or no clips.
        """
        check_frames(frames, self._shape)
        (tokens,) = self._session.run(["visual_tokens"], {"frames": frames})
        return tokens

    def encode_with_features(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `engine.Encoder`."""
        if not self._has_features:
            tokens = self.encode(frames)
            return tokens, tokens
        check_frames(frames, self._shape)
        tokens, features = self._session.run(["visual_tokens", "features"], {"frames": frames})
        return tokens, features


class OrtMerger:
    def __init__(self, path: Path, provider: str = "CPUExecutionProvider", threads: int | None = None):
        self._session = _session(path, provider, threads, None)
        self._width = self._session.get_inputs()[0].shape[2]

    def merge(
        self,
        features: NDArray[np.float32],
        query: NDArray[np.float32],
        key_features: NDArray[np.float32] | None,
        redundancy_weight: float,
        temperature: float,
    ) -> NDArray[np.float32]:
        """See `engine.Merger`."""
        check_merge(features, query, key_features, redundancy_weight, temperature, self._width)
        key = np.zeros(features.shape[1:], np.float32) if key_features is None else key_features
        feed = {
            "features": features,
            "query": query[None],
            "key_features": key[None],
            "redundancy_weight": [redundancy_weight],
            "temperature": [temperature],
        }
        (tokens,) = self._session.run(None, {name: np.asarray(value, np.float32) for name, value in feed.items()})
        return tokens


class OrtQueryEncoder:
    def __init__(self, path: Path, provider: str = "CPUExecutionProvider", threads: int | None = None):
        self._session = _session(path, provider, threads, None)

    def encode(self, ids: list[int]) -> NDArray[np.float32]:
        """See `engine.QueryEncoder`; how many ids it takes only running it tells."""
        options = ort.RunOptions()
        options.log_severity_level = 4  # the error is told below
        try:
            (query,) = self._session.run(["query"], {"input_ids": np.array([ids], np.int64)}, options)
        except Exception as error:  # the library's errors share no base class
            raise InputError(
                f"the query encoder failed on a question of {len(ids)} tokens: {error}; ask a shorter question"
            ) from None
        return np.asarray(query[0], np.float32)


class OrtDecoder:
    """One conversation; see `engine.Decoder`.

    Args:
        capacity: how many positions the cache may hold; a graph whose caches have a fixed size overrules it.
        profiling: a folder for ONNX Runtime's profile; see `node_times`.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        capacity: int = 4096,
        threads: int | None = None,
        profiling: Path | None = None,
    ):
        self._session = _session(path, provider, threads, profiling)
        self._device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
        inputs = {value.name: value for value in self._session.get_inputs()}
        self._width = inputs["inputs_embeds"].shape[2]
        self._caches = [name for name in inputs if name not in ("inputs_embeds", "write_index")]
        _, self._kv_heads, length, self._head_dim = inputs[self._caches[0]].shape
        self._cache_type = np.float16 if inputs[self._caches[0]].type == "tensor(float16)" else np.float32
        self._in_place = length != "past"
        self._fixed = length if isinstance(length, int) else None
        self.capacity = self._fixed or capacity
        self._forget()

    def node_times(self) -> list[tuple[str, float]]:
        """See `node_times`."""
        return node_times(self._session)

    def _forget(self) -> None:
        self.position = 0
        self._buffers = self._empty(self._fixed or 0)

    def twin(self) -> OrtDecoder:
        """The same engine with an empty KV cache of its own."""
        twin = copy.copy(self)
        twin._forget()
        return twin

    def _empty(self, length: int) -> dict[str, ort.OrtValue]:
        shape = (1, self._kv_heads, length, self._head_dim)
        # on a CPU an OrtValue is a view of its array, so each cache needs one of its own
        return {
            name: ort.OrtValue.ortvalue_from_numpy(_zeros(shape, self._cache_type), self._device)
            for name in self._caches
        }

    def forward(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Appends (S, D) embeddings to the cache; returns the logits (vocabulary,) after the last of them.

        Raises:
            InputError: they do not fit the cache, have another width, or are none.
        """
        check_embeddings(embeddings, self._width, self.position, self.capacity)
        end = self.position + len(embeddings)
        self.reserve(end)
        binding = self._session.io_binding()
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeddings[None], np.float32))
        binding.bind_cpu_input("write_index", np.array([self.position], np.int64))
        binding.bind_output("logits")
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            if self._in_place:
                binding.bind_ortvalue_output(f"{name}_out", buffer)
            else:
                binding.bind_output(f"{name}_out", self._device)
        self._session.run_with_iobinding(binding)
        outputs = dict(zip((o.name for o in self._session.get_outputs()), binding.get_outputs(), strict=True))
        if not self._in_place:
            self._buffers = {name: outputs[f"{name}_out"] for name in self._caches}
        self.position = end
        return outputs["logits"].numpy()[0]

    def reserve(self, positions: int) -> None:
        """Makes the cache large enough for so many positions, at most its capacity."""
        has = self._buffers[self._caches[0]].shape()[2]
        if not self._in_place or min(positions, self.capacity) <= has:
            return
        shape = (1, self._kv_heads, min(-(-positions // GROWTH) * GROWTH, self.capacity), self._head_dim)
        buffers = {}  # all or none
        for name, buffer in self._buffers.items():
            old, new = buffer.numpy(), _zeros(shape, self._cache_type)
            new[:, :, : self.position] = old[:, :, : self.position]
            buffers[name] = ort.OrtValue.ortvalue_from_numpy(new, self._device)
        self._buffers = buffers

    def rewind(self, position: int) -> None:
        """Forgets everything from `position` on.

        Raises:
            InputError: the cache does not reach that far.
        """
        if not 0 <= position <= self.position:
            raise InputError(f"cannot rewind the KV cache to {position}, it holds {self.position} positions")
        self.position = position
        if not self._in_place:
            for name, buffer in self._buffers.items():
                kept = np.ascontiguousarray(buffer.numpy()[:, :, :position])
                self._buffers[name] = ort.OrtValue.ortvalue_from_numpy(kept, self._device)
