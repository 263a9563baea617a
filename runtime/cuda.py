"""CUDA, as far as TensorRT's executor and `profile` need it: memory, streams and graphs, by cuda-python's bindings.

Every call's error becomes an exception, and what is allocated is freed with the object that stands for it. Nothing else
here decides anything, so that with other bindings that keep their memory on the host all of the executor can be tested.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..engines.package import InputError
from .engine import EngineError

_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor and Minor
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_SLEEPING_EVENT = 1 | 2  # cudaEventBlockingSync and cudaEventDisableTiming
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


class Cuda:
    """The current device of the CUDA runtime.

    Args:
        bindings: `cuda.bindings.runtime`, unless told otherwise.

    Raises:
        InputError: cuda-python is not installed, or there is no GPU or driver that it can use.
    """

    def __init__(self, bindings: Any = None):
        if bindings is None:
            try:
                bindings = importlib.import_module("cuda.bindings.runtime")
            except ModuleNotFoundError:
                raise InputError("cuda-python is not installed; run: pip install cuda-bindings") from None
        self._bindings = bindings
        try:
            count = self.call("cudaGetDeviceCount")
        except (EngineError, RuntimeError) as error:  # the latter where there is no driver to load
            older = "InsufficientDriver" in str(error)
            advice = "; for a driver of CUDA 12 run: pip install 'cuda-bindings<13'" if older else ""
            raise InputError(f"no NVIDIA GPU can be used here: {error}{advice}") from None
        if not count:
            raise InputError("no NVIDIA GPU can be used here: the driver finds none")

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the runtime returns besides its error code.

        Raises:
            EngineError: it failed.
        """
        code, *values = getattr(self._bindings, function)(*arguments)
        if int(code) != 0:
            raise EngineError(f"{function}: {getattr(code, 'name', code)}")
        return values[0] if len(values) == 1 else values

    def capability(self) -> str:
        """Of the current device, such as "8.7"."""
        device = self.call("cudaGetDevice")
        return ".".join(str(self.call("cudaDeviceGetAttribute", self._attribute(n), device)) for n in (_MAJOR, _MINOR))

    def _attribute(self, number: int) -> Any:
        return getattr(self._bindings, "cudaDeviceAttr", int)(number)

    def kind(self, number: int) -> Any:
        return getattr(self._bindings, "cudaMemcpyKind", int)(number)

    def capture_mode(self) -> Any:
        return getattr(self._bindings, "cudaStreamCaptureMode", int)(_THREAD_LOCAL)

    def used_memory(self) -> int:
        """Bytes of the device that are in use, by whomever."""
        free, total = self.call("cudaMemGetInfo")
        return int(total) - int(free)

    def allocate(self, size: int) -> Memory:
        return Memory(self, size)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array on the host that the device reads and writes directly."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.call("cudaHostAlloc", max(size, 1), 0))
        block = (ctypes.c_uint8 * max(size, 1)).from_address(address)
        weakref.finalize(block, self.call, "cudaFreeHost", address)
        return np.ctypeslib.as_array(block)[:size].view(dtype).reshape(shape)

    def stream(self) -> Stream:
        return Stream(self)


class Memory:
    """Bytes on the device, zero at first."""

    def __init__(self, cuda: Cuda, size: int):
        self.size = max(size, 1)  # TensorRT wants an address even for tensors that hold nothing
        self.address = int(cuda.call("cudaMalloc", self.size))
        weakref.finalize(self, cuda.call, "cudaFree", self.address)
        cuda.call("cudaMemset", self.address, 0, self.size)
        cuda.call("cudaStreamSynchronize", 0)  # the default stream is doing it, and ours do not wait for that one


class DeviceFrames:
    """Room for a clip's frames on the device, uint8 `shape` (T, H, W, 3); they come there without a way over the host.

    Args:
        stream: what the copies are put on.
    """

    def __init__(self, cuda: Cuda, stream: Stream, shape: tuple[int, ...]):
        self._cuda, self._stream, self._shape = cuda, stream, shape
        self._frame = math.prod(shape[1:])
        self.memory = cuda.allocate(shape[0] * self._frame)

    def put(self, index: int, frame: Any) -> None:
        """Copies a frame that speaks DLPack or `__cuda_array_interface__`, behind what its own stream does to it.

        Raises:
            InputError: it is not uint8 of the clip's height and width, RGB, contiguous.
        """
        address, dtype, shape, strides = self._view(frame)
        contiguous = shape != self._shape[1:] or strides in (None, (self._shape[2] * 3, 3, 1))
        if dtype != np.uint8 or shape != self._shape[1:] or not contiguous:
            raise InputError(
                f"a frame on the GPU is {dtype} {shape}{'' if contiguous else ', not contiguous'}; there uint8 "
                f"{self._shape[1:]} in RGB, contiguous, was expected: resize it, or push it from the host"
            )
        self._stream.on_device(self.memory.address + index * self._frame, address, self._frame)
        self._stream.finish()

    def _view(self, frame: Any) -> tuple[int, np.dtype[Any], tuple[int, ...], tuple[int, ...] | None]:
        """Address, type, shape, and strides in bytes. What the frame's own stream does to it is done."""
        found = getattr(frame, "__cuda_array_interface__", None)
        if found is not None and (found["version"] >= 3 or not hasattr(frame, "__dlpack__")):
            # before version 3 it does not tell its stream; the legacy default one waits for all that are not special
            stream = found.get("stream") if found["version"] >= 3 else 1
            if stream is not None:
                self._cuda.call("cudaStreamSynchronize", stream)
            strides = found.get("strides")
            return found["data"][0], np.dtype(found["typestr"]), tuple(found["shape"]), strides and tuple(strides)
        try:
            from cuda.core.utils import StridedMemoryView
        except ModuleNotFoundError:
            raise InputError("frames on a GPU by DLPack need cuda-core; run: pip install cuda-core") from None
        try:
            view = StridedMemoryView.from_dlpack(frame, stream_ptr=int(self._stream.handle))
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"a {type(frame).__name__} can't be read as a frame: {error}") from None
        strides = view.strides and tuple(stride * view.dtype.itemsize for stride in view.strides)
        return view.ptr, view.dtype, tuple(view.shape), strides

    def fill(self, given: int) -> None:
        """Repeats the last of the first `given` frames to the end."""
        for index in range(given, self._shape[0]):
            last = self.memory.address + (given - 1) * self._frame
            self._stream.on_device(self.memory.address + index * self._frame, last, self._frame)
        self._stream.finish()


def is_on_device(frame: Any) -> bool:
    """Whether an array lies in a GPU's memory. Source: DLPack's DLDeviceType, kDLCUDA and kDLCUDAManaged."""
    if isinstance(frame, np.ndarray):
        return False
    if hasattr(frame, "__dlpack_device__"):
        return frame.__dlpack_device__()[0] in (2, 13)
    return hasattr(frame, "__cuda_array_interface__")


class Stream:
    """What is put on a stream is done in this order; the host goes on."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self.handle = cuda.call("cudaStreamCreateWithFlags", _NON_BLOCKING)
        weakref.finalize(self, cuda.call, "cudaStreamDestroy", self.handle)
        self._done = cuda.call("cudaEventCreateWithFlags", _SLEEPING_EVENT)
        weakref.finalize(self, cuda.call, "cudaEventDestroy", self._done)

    def to_device(self, memory: Memory, array: NDArray[Any]) -> None:
        """The array is pinned, contiguous, and stays as it is until this is done."""
        self._copy(memory.address, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def to_host(self, array: NDArray[Any], memory: Memory) -> None:
        self._copy(array.ctypes.data, memory.address, array.nbytes, _TO_HOST)

    def on_device(self, target: int, source: int, size: int) -> None:
        """Copies bytes from address to address."""
        self._copy(target, source, size, _ON_DEVICE)

    def rows_on_device(
        self, target: Memory, target_pitch: int, source: Memory, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copies the first `width` bytes of each row; rows begin a pitch apart."""
        kind = self._cuda.kind(_ON_DEVICE)
        arguments = target.address, target_pitch, source.address, source_pitch, width, rows, kind, self.handle
        self._cuda.call("cudaMemcpy2DAsync", *arguments)

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size, self._cuda.kind(kind), self.handle)

    def finish(self) -> None:
        """Waits until all of it is done. The thread sleeps, and others run."""
        self._cuda.call("cudaEventRecord", self._done, self.handle)
        self._cuda.call("cudaEventSynchronize", self._done)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` puts on the stream, without doing it; what is returned does it, by one call."""
        self._cuda.call("cudaStreamBeginCapture", self.handle, self._cuda.capture_mode())
        try:
            work()
        except BaseException:
            with contextlib.suppress(EngineError):  # ends the capture, which is of no use and may have been broken off
                self._cuda.call("cudaGraphDestroy", self._cuda.call("cudaStreamEndCapture", self.handle))
            raise
        graph = self._cuda.call("cudaStreamEndCapture", self.handle)
        ready = self._cuda.call("cudaGraphInstantiate", graph, 0)
        self._cuda.call("cudaGraphDestroy", graph)

        def launch() -> None:
            self._cuda.call("cudaGraphLaunch", ready, self.handle)

        weakref.finalize(launch, self._cuda.call, "cudaGraphExecDestroy", ready)
        return launch
