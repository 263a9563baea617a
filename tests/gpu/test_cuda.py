"""The layer over the CUDA runtime, on the CUDA runtime; tests/runtime/test_trt_engine.py has it on a stand-in."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime")

from liteframe.engines.device import find_gpus
from liteframe.engines.package import InputError
from liteframe.runtime.cuda import Cuda, DeviceFrames
from liteframe.runtime.engine import EngineError

SIZE = 1 << 20


@pytest.fixture(scope="module")
def cuda():
    return Cuda()


@pytest.fixture
def stream(cuda):
    return cuda.stream()


def on_host(cuda, stream, memory):
    array = cuda.pinned((memory.size,), np.uint8)
    array[:] = 255
    stream.to_host(array, memory)
    stream.finish()
    return array


def filled(cuda, stream, content):
    memory, array = cuda.allocate(content.nbytes), cuda.pinned(content.shape, content.dtype)
    array[...] = content
    stream.to_device(memory, array)
    stream.finish()
    return memory


def some_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class OnDevice:
    """A frame in device memory, by the CUDA array interface."""

    def __init__(self, memory, shape):
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "|u1", "strides": None, "data": (memory.address, False), "version": 3
        }  # fmt: skip


def test_the_driver_and_the_runtime_tell_the_same_device(cuda):
    assert cuda.capability() == find_gpus()[0][0].capability


def test_memory_is_zero_at_first_and_goes_there_and_back(cuda, stream):
    assert not on_host(cuda, stream, cuda.allocate(SIZE)).any()
    content = some_bytes(SIZE)
    memory = filled(cuda, stream, content)
    copy = cuda.allocate(SIZE)
    stream.on_device(copy.address, memory.address, SIZE)
    np.testing.assert_array_equal(on_host(cuda, stream, copy), content)


def test_rows_of_another_pitch_are_copied(cuda, stream):
    content = some_bytes(6, 100)
    target = cuda.allocate(6 * 40)
    stream.rows_on_device(target, 40, filled(cuda, stream, content), 100, 40, 6)
    np.testing.assert_array_equal(on_host(cuda, stream, target).reshape(6, 40), content[:, :40])


def test_memory_is_given_back(cuda):
    before = cuda.used_memory()
    memory = cuda.allocate(256 << 20)
    assert cuda.used_memory() - before >= 256 << 20
    del memory
    gc.collect()
    assert cuda.used_memory() - before < 256 << 20


def test_a_full_device_is_an_error_and_no_end(cuda, stream):
    with pytest.raises(EngineError, match="cudaMalloc: cudaErrorMemoryAllocation"):
        cuda.allocate(1 << 50)
    assert not on_host(cuda, stream, cuda.allocate(16)).any()


def test_recorded_work_is_not_done_before_it_is_launched_and_reads_what_is_there_then(cuda, stream):
    source, target = cuda.pinned((SIZE,), np.uint8), cuda.allocate(SIZE)
    source[:] = 1
    launch = stream.capture(lambda: stream.to_device(target, source))
    assert not on_host(cuda, stream, target).any()
    for value in (2, 3):
        source[:] = value
        launch()
        assert (on_host(cuda, stream, target) == value).all()


def test_a_recording_that_fails_leaves_the_stream_usable(cuda, stream):
    def work():
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        stream.capture(work)
    assert not on_host(cuda, stream, cuda.allocate(16)).any()


def test_streams_are_independent(cuda):
    """One records while another works, as encoder and decoder do."""
    first, second = cuda.stream(), cuda.stream()
    source, target = cuda.pinned((SIZE,), np.uint8), cuda.allocate(SIZE)
    source[:] = 7

    def meanwhile():
        return on_host(cuda, second, filled(cuda, second, some_bytes(64)))

    def work():
        first.to_device(target, source)
        np.testing.assert_array_equal(other_thread.submit(meanwhile).result(), some_bytes(64))

    with ThreadPoolExecutor(1) as other_thread:  # what a recording forbids, it forbids its own thread
        launch = first.capture(work)
    launch()
    assert (on_host(cuda, first, target) == 7).all()


def test_frames_are_copied_on_the_device_and_a_clip_is_filled(cuda, stream):
    frames = some_bytes(2, 8, 10, 3)
    clip = DeviceFrames(cuda, stream, (4, 8, 10, 3))
    for index, frame in enumerate(frames):
        clip.put(index, OnDevice(filled(cuda, stream, frame), frame.shape))
    clip.fill(2)
    copied = on_host(cuda, stream, clip.memory).reshape(4, 8, 10, 3)
    np.testing.assert_array_equal(copied, frames[[0, 1, 1, 1]])
    with pytest.raises(InputError, match="there uint8"):
        clip.put(0, OnDevice(filled(cuda, stream, frames[0]), (10, 8, 3)))


def test_frames_by_dlpack_are_read_where_they_lie(cuda, stream):
    """cuda-core's own buffers speak it: one long row of bytes, which is seen, and no frame."""
    core = pytest.importorskip("cuda.core")
    device = core.Device()
    device.set_current()
    buffer = device.memory_resource.allocate(8 * 10 * 3, stream=device.default_stream)
    clip = DeviceFrames(cuda, stream, (1, 8, 10, 3))
    address, dtype, shape, _ = clip._view(buffer)
    assert (address, dtype.itemsize, shape) == (int(buffer.handle), 1, (240,))
    with pytest.raises(InputError, match=r"\(240,\); there uint8 \(8, 10, 3\)"):
        clip.put(0, buffer)
