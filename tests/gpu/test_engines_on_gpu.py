"""Whole sessions on a GPU: what they say is what ONNX Runtime says on a CPU, streamed or not."""

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from liteframe.engines import self_test
from liteframe.engines.targets import TENSORRT_MODULES
from liteframe.export.build_engine import build
from liteframe.runtime import InputError, VideoSession, profile
from liteframe.runtime import session as session_module
from liteframe.runtime.cuda import Cuda
from liteframe.runtime.engine import open_engines
from liteframe.runtime.trt_engine import open_trt

QUESTION = "what's in the video?"
EXECUTORS = ["ONNX Runtime, CUDA", "TensorRT, fused", "TensorRT, plain", "TensorRT-RTX, fused", "TensorRT-RTX, plain"]


def frames_of(clips, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (4 * clips, 56, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=EXECUTORS)
def engines(request, tiny_artifact, tmp_path_factory):
    """The package, and what opens its engines anew."""
    executor, _, dialect = request.param.rpartition(", ")
    folder = tmp_path_factory.mktemp("gpu")
    if dialect == "CUDA":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            pytest.skip("needs onnxruntime-gpu")
        package = build(tiny_artifact, "cuda", folder / "cuda", frames=16)
        return package, lambda: open_engines(package)
    module = TENSORRT_MODULES[executor.lower()]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")
    bundle = build(tiny_artifact, "jetson-orin", folder / "bundle", frames=16)
    try:  # in a process of its own, for polygraphy drives one TensorRT in a process
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            compiled = process.submit(self_test.compile_here, bundle, dialect, executor.lower(), folder).result()
    except self_test.NotTaken as why:
        pytest.skip(str(why))
    return bundle, lambda: open_trt(compiled)


@pytest.fixture
def session(engines, monkeypatch):
    package, open_anew = engines
    monkeypatch.setattr(session_module, "open_engines", lambda *_: open_anew())
    with VideoSession(package) as session:
        yield session


@pytest.fixture(scope="module")
def on_cpu(tiny_package):
    with VideoSession(tiny_package, threads=1) as session:
        yield session


def said(session, frames, push):
    session.reset()
    if push is None:
        session.watch(frames)
    else:
        for number, frame in enumerate(frames):
            session.push(push(frame), number / 4)
    return "".join(session.ask(QUESTION, 24))


def test_tokens_and_logits_are_those_of_the_cpu(session, on_cpu):
    (encoder, decoder), (expected_encoder, expected_decoder) = session.engines, on_cpu.engines
    decoder, expected_decoder = decoder.twin(), expected_decoder.twin()
    for count in (1, 4, 4, 4, 2):
        clips = frames_of(count, count).reshape(count, 4, 56, 56, 3)
        np.testing.assert_allclose(encoder.encode(clips), expected_encoder.encode(clips), rtol=0, atol=2e-3)
    random = np.random.default_rng(0)
    for length in (512, 1, 1, 1, 30, 1):
        given = random.standard_normal((length, 24)).astype(np.float32)
        np.testing.assert_allclose(decoder.forward(given), expected_decoder.forward(given), rtol=0, atol=2e-3)
    for each in (decoder, expected_decoder):
        each.rewind(77)
    np.testing.assert_allclose(decoder.forward(given), expected_decoder.forward(given), rtol=0, atol=2e-3)


def test_a_video_and_a_stream_are_answered_about_as_on_a_cpu(session, on_cpu):
    frames = frames_of(4)
    expected = said(on_cpu, frames, None)
    assert said(session, frames, None) == expected
    assert said(session, frames, lambda frame: frame) == expected


def test_the_window_moves_and_the_answer_is_that_of_a_fresh_session(session):
    frames = frames_of(11)
    moved = said(session, frames, lambda frame: frame)
    stats = session.stats()
    assert stats.moves > 0 and stats.pushed == 44 and stats.failed == stats.dropped == 0
    assert moved == said(session, frames[-stats.frames :], lambda frame: frame)


def test_frames_on_the_gpu_are_answered_about(session):
    if session.engines[0].device_frames() is None:
        with pytest.raises(InputError, match="takes it from the host"):
            session.push(OnDevice(Cuda(), frames_of(1)[0]), 0.0)
        return
    cuda, frames = Cuda(), frames_of(3)
    assert said(session, frames, lambda frame: OnDevice(cuda, frame)) == said(session, frames, lambda frame: frame)


class OnDevice:
    def __init__(self, cuda, frame):
        self._memory, stream, host = cuda.allocate(frame.nbytes), cuda.stream(), cuda.pinned(frame.shape, frame.dtype)
        host[...] = frame
        stream.to_device(self._memory, host)
        stream.finish()
        self.__cuda_array_interface__ = {
            "shape": frame.shape,
            "typestr": "|u1",
            "strides": None,
            "data": (self._memory.address, False),
            "version": 3,
        }


def test_a_long_stream_takes_no_more_memory_of_the_device(session):
    cuda, frames = Cuda(), frames_of(8)
    for number in range(64):
        session.push(frames[number % 32], number / 4)
    session.drain()
    before = cuda.used_memory()
    for number in range(64, 1024):
        session.push(frames[number % 32], number / 4)
    session.drain()
    assert cuda.used_memory() - before < 16 << 20


def test_profile_tells_what_the_device_holds(session):
    (row,) = profile.measure(session, [8], iterations=2, warmup=1)
    assert row["device_memory_mb"] > 0 and row["vision_ms"] > 0 and row["first_token_streamed_ms"] > 0


@pytest.mark.parametrize("executor", self_test.EXECUTORS)
def test_the_self_test_passes(executor):
    if (why := self_test.missing(executor)) is not None:
        pytest.skip(why)
    failed = [result for result in self_test.self_test([executor]) if result.passed is False]
    assert not failed
