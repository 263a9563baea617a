"""TensorRT's executor up to the last call into driver and TensorRT, whose places are taken by stand-ins.

The CUDA runtime's keeps the device's memory on the host, filled with garbage when it is allocated, and refuses to touch
what is not allocated. TensorRT's computes with ONNX Runtime on the graph that the engine is made of, from the addresses
and shapes it was given. So buffers, shapes, aliases, profiles, streams and graphs are what is tested here, against
ONNX Runtime's own executor on the same graphs; kernels are not.
"""

import ctypes
import gc
import importlib
import shutil
import sys
import threading
import types

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.engines import self_test
from liteframe.engines.compile_tensorrt import Compiled
from liteframe.engines.device import Gpu, find_gpus
from liteframe.engines.operators import Chosen
from liteframe.engines.package import (
    Engine,
    InputError,
    Operators,
    Package,
    Precision,
    Profile,
    TensorSpec,
    describe_file,
    open_package,
)
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import build
from liteframe.export.models.encoder import VideoEncoder
from liteframe.export.trace import trace_encoder, trace_merger
from liteframe.runtime import EngineError, VideoSession, profile, trt_engine
from liteframe.runtime import session as session_module
from liteframe.runtime.cuda import Cuda
from liteframe.runtime.ort_engine import OrtDecoder, OrtEncoder, OrtMerger
from liteframe.runtime.trt_engine import TrtEncoder, TrtMerger, open_trt, plan

CAPACITY_ERROR = 2  # cudaErrorMemoryAllocation


class Cudart:
    """The functions of cuda.bindings.runtime that are used, with the device's memory on the host."""

    def __init__(self, capability=(8, 7), devices=1):
        self.capability, self.devices = capability, devices
        self.blocks, self.handles, self.captures, self.graphs = {}, set(), {}, {}
        self.launches, self.fail, self.waited, self.kinds = 0, set(), [], []
        self.setting, self.recording = {}, {}  # what the default stream has still to do; threads of captures

    def __getattribute__(self, name):
        if name.startswith("cuda") and name in object.__getattribute__(self, "fail"):
            return lambda *_: (CAPACITY_ERROR, 0)
        return object.__getattribute__(self, name)

    def cudaGetDeviceCount(self):
        return 0, self.devices

    def cudaGetDevice(self):
        return 0, 0

    def cudaDeviceGetAttribute(self, attribute, device):
        return 0, self.capability[attribute - 75]

    def cudaMemGetInfo(self):
        used = sum(len(block) for block in self.blocks.values())
        return 0, 10**9 - used, 10**9

    def _allocate(self, size):
        assert threading.get_ident() not in self.recording.values()  # which would break the recording off
        block = (ctypes.c_uint8 * size)()
        ctypes.memset(block, 0xFF, size)  # NaN as floats
        self.blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaHostAlloc(self, size, flags):
        return self._allocate(size)

    def cudaFree(self, address):
        del self.blocks[address]
        return (0,)

    cudaFreeHost = cudaFree

    def check(self, address, size):
        (start,) = (start for start, b in self.blocks.items() if start <= address and address + size <= start + len(b))
        assert start not in self.setting

    def cudaMemset(self, address, value, size):
        self.check(address, size)
        self.setting[address] = value, size
        return (0,)

    def _handle(self):
        handle = max(self.handles, default=0) + 1
        self.handles.add(handle)
        return handle

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1
        return 0, self._handle()

    def cudaEventCreateWithFlags(self, flags):
        assert flags == 3
        return 0, self._handle()

    def _destroy(self, handle):
        self.handles.remove(handle)
        return (0,)

    cudaStreamDestroy = cudaEventDestroy = _destroy

    def put(self, stream, work):
        """On a stream, which does it at once unless it records."""
        assert stream in self.handles
        if stream in self.captures:
            self.captures[stream].append(work)
        else:
            work()

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.kinds.append((int(kind), size))

        def copy():
            self.check(target, size)
            self.check(source, size)
            ctypes.memmove(target, source, size)

        self.put(stream, copy)
        return (0,)

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, rows, kind, stream):
        assert width <= min(target_pitch, source_pitch)
        for row in range(rows):
            self.cudaMemcpyAsync(target + row * target_pitch, source + row * source_pitch, width, kind, stream)
        return (0,)

    def cudaStreamSynchronize(self, stream):
        assert stream in (0, 1, 42)  # the legacy default stream, or a frame's own
        if stream == 0:
            for address, (value, size) in self.setting.items():
                ctypes.memset(address, value, size)
            self.setting.clear()
        else:
            self.waited.append(stream)
        return (0,)

    def cudaEventRecord(self, event, stream):
        assert {event, stream} <= self.handles and stream not in self.captures
        return (0,)

    def cudaEventSynchronize(self, event):
        assert event in self.handles and threading.get_ident() not in self.recording.values()
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert mode == 1 and stream not in self.captures
        self.captures[stream], self.recording[stream] = [], threading.get_ident()
        return (0,)

    def cudaStreamEndCapture(self, stream):
        graph = self._handle()
        self.graphs[graph] = self.captures.pop(stream)
        del self.recording[stream]
        return 0, graph

    def cudaGraphInstantiate(self, graph, flags):
        ready = self._handle()
        self.graphs[ready] = self.graphs[graph]
        return 0, ready

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return self._destroy(graph)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, ready, stream):
        self.launches += 1
        for work in self.graphs[ready]:
            self.put(stream, work)
        return (0,)


class Context:
    def __init__(self, trt, engine, session):
        self.trt, self.engine, self.session = trt, engine, session
        self.addresses, self.shapes, self.runs = {}, {}, 0
        self.profiler = None

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address != 0

    def set_input_shape(self, name, shape):
        spec = next(spec for spec in self.engine.inputs if spec.name == name)
        low, high = (spec.profile.min, spec.profile.max) if spec.profile is not None else (spec.shape, spec.shape)
        self.shapes[name] = shape
        return all(a <= size <= b for size, a, b in zip(shape, low, high, strict=True))

    def execute_async_v3(self, stream):
        if self.trt.broken:
            return False
        self.runs += 1
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.trt.cudart.put(stream, lambda: self.compute(shapes, addresses))
        if self.profiler is not None:
            self.profiler.report_layer_time("backbone.blocks.0.attn/MatMul", 0.5)
        return True

    def compute(self, shapes, addresses):
        feeds = {}
        for spec in self.engine.inputs:
            shape = shapes.get(spec.name, spec.shape)
            feeds[spec.name] = self.array(addresses[spec.name], shape, spec.dtype).copy()
        outputs = self.session.run(None, feeds)
        for spec, output in zip(self.session.get_outputs(), outputs, strict=True):
            self.array(addresses[spec.name], output.shape, output.dtype)[...] = output

    def array(self, address, shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.trt.cudart.check(address, size)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


def stand_in(package, cudart, version="10.3.0"):
    """The module `tensorrt`, for a package whose engines' files are graphs."""
    trt = types.SimpleNamespace(__version__=version, cudart=cudart, broken=False, contexts=[], memory=True)

    class Logger:
        ERROR = 1

        def __init__(self, severity):
            assert severity == self.ERROR

    class Runtime:
        def __init__(self, logger):
            assert isinstance(logger, Logger)

        def deserialize_cuda_engine(self, content):
            for engine in package.manifest.engines:
                path = package.folder / engine.files[0].path
                if path.read_bytes() == content:
                    session = ort.InferenceSession(path)

                    def create(engine=engine, session=session):
                        if not trt.memory:
                            return None
                        trt.contexts.append(Context(trt, engine, session))
                        return trt.contexts[-1]

                    return types.SimpleNamespace(create_execution_context=create)
            return None

    trt.Logger, trt.Runtime, trt.IProfiler = Logger, Runtime, object
    return trt


def import_in_executor(patch, import_module):
    """In this module only: threads of the test runner import, too."""
    patch.setattr(trt_engine, "importlib", types.SimpleNamespace(import_module=import_module))


@pytest.fixture(scope="module")
def bundle(tiny_artifact, tmp_path_factory):
    return build(tiny_artifact, "jetson-orin", tmp_path_factory.mktemp("trt") / "bundle", frames=16)


def package_of(bundle, dialect, **model):
    """As if `liteframe compile` had made engines of the bundle's graphs of a dialect; their files are the graphs."""
    engines = [
        Engine(
            name=graph.name,
            dialect=dialect,
            files=graph.files[:1],
            inputs=graph.inputs,
            outputs=graph.outputs,
            precision=graph.precision,
            compiler="tensorrt",
            compiler_version="10.3.0",
            capabilities=["8.7"],
            operators=None,
            parity=None,
        )
        for graph in bundle.manifest.graphs
        if graph.dialect == dialect
    ]
    model = msgspec.structs.replace(bundle.manifest.model, **model)
    return Package(bundle.folder, msgspec.structs.replace(bundle.manifest, engines=engines, model=model))


both_dialects = pytest.mark.parametrize("dialect", ["fused", "plain"])


@pytest.fixture
def opened(bundle, monkeypatch):
    """Opens a package of a dialect on the stand-ins: encoder, decoder, CUDA runtime, TensorRT."""

    def open_package(dialect, profiling=False):
        package, cudart = package_of(bundle, dialect), Cudart()
        trt = stand_in(package, cudart)
        import_in_executor(monkeypatch, lambda name: {"tensorrt": trt}[name])
        encoder, decoder = open_trt(package, profiling, Cuda(cudart))
        return encoder, decoder, cudart, trt

    return open_package


def graph_of(bundle, name, dialect):
    return bundle.folder / bundle.graph(name, dialect).files[0].path


def embeddings(seed, length, width=24):
    return np.random.default_rng(seed).standard_normal((length, width)).astype(np.float32)


def clips(seed, count):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 56, 56, 3), dtype=np.uint8)


# -- against ONNX Runtime's executor ---------------------------------------------------------------------------------


@both_dialects
def test_clips_in_batches_of_every_size_become_the_same_tokens(bundle, opened, dialect):
    encoder, _, cudart, trt = opened(dialect)
    expected = OrtEncoder(graph_of(bundle, "encoder", dialect))
    for count in (1, 4, 2, 4, 4, 3, 4, 1):
        tokens = encoder.encode(clips(count, count))
        np.testing.assert_array_equal(tokens, expected.encode(clips(count, count)))
        assert tokens.dtype == np.float32
    assert cudart.launches == 2  # of four full batches, the second is recorded
    assert trt.contexts[0].runs == 4 + 2 + 1  # the recording is one more


@pytest.mark.parametrize("why", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "not capturable"])
def test_what_can_not_be_recorded_runs_without(bundle, opened, why):
    encoder, _, cudart, trt = opened("fused")
    expected = OrtEncoder(graph_of(bundle, "encoder", "fused")).encode(clips(4, 4))
    if why == "not capturable":
        trt.contexts[0].is_stream_capturable = lambda stream: False
    else:
        cudart.fail = {why}
    np.testing.assert_array_equal(encoder.encode(clips(4, 4)), expected)
    with pytest.warns(UserWarning, match="the encoder runs without a CUDA graph, more slowly: "):
        np.testing.assert_array_equal(encoder.encode(clips(4, 4)), expected)
    cudart.captures.clear()  # what the failed end would have ended
    cudart.recording.clear()
    np.testing.assert_array_equal(encoder.encode(clips(4, 4)), expected)
    assert cudart.launches == 0


steps = st.one_of(
    st.tuples(st.just("forward"), st.sampled_from([1, 1, 2, 7, 64, 512])),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
)


@both_dialects
@settings(max_examples=12)
@given(st.lists(steps, min_size=3, max_size=14))
def test_a_conversation_goes_as_on_onnx_runtime(bundle, dialect, done):
    package, cudart = package_of(bundle, dialect), Cudart()
    with pytest.MonkeyPatch.context() as patch:
        import_in_executor(patch, lambda name: stand_in(package, cudart))
        _, decoder = open_trt(package, cuda=Cuda(cudart))
    expected = OrtDecoder(graph_of(bundle, "decoder", dialect), capacity=decoder.capacity, threads=1)
    for number, (what, amount) in enumerate(done):
        if what == "rewind":
            decoder.rewind(int(amount * decoder.position))
            expected.rewind(int(amount * expected.position))
        elif decoder.position + amount <= decoder.capacity:
            logits = decoder.forward(embeddings(number, amount))
            np.testing.assert_allclose(logits, expected.forward(embeddings(number, amount)), rtol=0, atol=2e-6)
            assert logits.shape == (340,) and logits.flags.owndata
        assert decoder.position == expected.position


@both_dialects
def test_calls_of_a_fixed_shape_are_recorded_and_replayed(opened, dialect):
    _, decoder, cudart, trt = opened(dialect)
    for _ in range(2):
        decoder.rewind(0)
        decoder.forward(embeddings(0, 512))
        for number in range(5):
            decoder.forward(embeddings(number, 1))
        decoder.forward(embeddings(9, 30))
    # chunks: eager, then recorded; tokens: eager, then recorded and replayed nine times; others always eager
    assert cudart.launches == (0 + 8 if dialect == "fused" else 0)
    assert trt.contexts[-1].runs == (3 + 3 + 2 if dialect == "fused" else 14)


@both_dialects
def test_a_twin_has_a_cache_of_its_own(opened, dialect):
    _, decoder, _, _ = opened(dialect)
    first = decoder.forward(embeddings(1, 20))
    twin = decoder.twin()
    assert (twin.position, decoder.position) == (0, 20)
    twin.forward(embeddings(2, 30))
    again = twin.twin()
    np.testing.assert_array_equal(again.forward(embeddings(1, 20)), first)
    other = decoder.forward(embeddings(3, 5))
    np.testing.assert_array_equal(again.forward(embeddings(3, 5)), other)


@both_dialects
def test_a_session_answers_as_on_a_cpu(bundle, tiny_package, opened, monkeypatch, dialect):
    frames = clips(5, 4).reshape(-1, 56, 56, 3)
    with VideoSession(tiny_package, threads=1) as session:
        session.watch(frames)
        expected = "".join(session.ask("what's in the video?", 24))
    engines = opened(dialect)[:2]
    monkeypatch.setattr(session_module, "open_engines", lambda *_: engines)
    with VideoSession(package_of(bundle, dialect)) as session:
        session.watch(frames)
        assert "".join(session.ask("what's in the video?", 24)) == expected
        session.reset()
        for number, frame in enumerate(np.concatenate([frames, frames])):
            session.push(frame, number / 4)
        assert len("".join(session.ask("what's in the video?", 8))) > 0
        assert session.stats().moves == 2


MOST = {"clips": (1, 4, 4), "patches": (1, 2, 2)}


@pytest.fixture(scope="module")
def with_merger(tiny_artifact, tmp_path_factory):
    """A package of an encoder with two outputs and of a merger, both traced from a tiny encoder; up to four clips."""
    encoder = load_artifact(tiny_artifact).encoder
    encoder = VideoEncoder(msgspec.structs.replace(encoder.config, merge_connector=True))
    folder = tmp_path_factory.mktemp("merger")
    graphs = {"encoder": trace_encoder(encoder, "plain"), "merger": trace_merger(encoder.merger, "plain")}
    engines = []
    for name, model in graphs.items():
        ir.save(model, folder / f"{name}.onnx")
        inputs, outputs = (
            [
                TensorSpec(
                    name=value.name,
                    dtype=str(value.dtype.numpy()),
                    shape=[size if isinstance(size, int) else size.value for size in value.shape],
                    profile=None
                    if all(isinstance(size, int) for size in value.shape)
                    else Profile(
                        **{
                            at: [size if isinstance(size, int) else MOST[size.value][place] for size in value.shape]
                            for place, at in enumerate(("min", "opt", "max"))
                        }
                    ),
                )
                for value in values
            ]
            for values in (model.graph.inputs, model.graph.outputs)
        )
        engines.append(
            Engine(
                name=name,
                dialect="plain",
                files=[describe_file(folder, folder / f"{name}.onnx")],
                inputs=inputs,
                outputs=outputs,
                precision=Precision(asked="fp32", found={}, kept=[]),
                compiler="tensorrt",
                compiler_version="10.3.0",
                capabilities=["8.7"],
                operators=None,
                parity=None,
            )
        )
    return Package(folder, types.SimpleNamespace(engines=engines))


def test_features_and_merged_tokens_are_those_of_onnx_runtime(with_merger, monkeypatch):
    cudart = Cudart()
    trt = stand_in(with_merger, cudart)
    import_in_executor(monkeypatch, lambda name: trt)
    cuda = Cuda(cudart)
    for_encoder, for_merger = with_merger.manifest.engines
    encoder = TrtEncoder(for_encoder, trt_engine.load(with_merger, for_encoder, cuda), cuda)
    merger = TrtMerger(for_merger, trt_engine.load(with_merger, for_merger, cuda), cuda)
    expected_encoder = OrtEncoder(with_merger.folder / "encoder.onnx")
    expected_merger = OrtMerger(with_merger.folder / "merger.onnx")
    key, query = None, embeddings(0, 1, 48)[0]
    for count in (4, 1, 4, 3, 4, 4):
        tokens, features = encoder.encode_with_features(clips(count, count))
        for got, expected in zip(
            (tokens, features), expected_encoder.encode_with_features(clips(count, count)), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(encoder.encode(clips(count, count)), tokens)
        merged = merger.merge(features, query, key, 0.8, 0.02 * count)
        np.testing.assert_array_equal(merged, expected_merger.merge(features, query, key, 0.8, 0.02 * count))
        assert merged.flags.owndata and merged.dtype == np.float32
        key = None if count == 3 else features[0]
    assert cudart.launches == 3 * 2  # of four full batches of each kind, the second is recorded
    np.testing.assert_array_equal(
        merger.merge(features[:, :1], query, None, 0.5, 0.1),
        expected_merger.merge(features[:, :1], query, None, 0.5, 0.1),
    )
    with pytest.raises(InputError, match="3 patches a clip, its engine takes 2"):
        merger.merge(np.zeros((1, 3, 48), np.float32), query, None, 1.0, 0.1)
    with pytest.raises(InputError, match="5 clips, its engine takes 4 at once"):
        merger.merge(np.zeros((5, 2, 48), np.float32), query, None, 1.0, 0.1)
    with pytest.raises(InputError, match=r"a query of shape \(3,\), expected \(48,\)"):
        merger.merge(features, query[:3], None, 1.0, 0.1)


def test_features_of_an_engine_with_one_output_are_the_tokens(opened):
    encoder, *_ = opened("fused")
    tokens, features = encoder.encode_with_features(clips(0, 2))
    assert features is tokens
    np.testing.assert_array_equal(tokens, encoder.encode(clips(0, 2)))


# -- frames on the GPU ------------------------------------------------------------------------------------------------


class OnDevice:
    """A frame in the stand-in's memory, with the CUDA array interface of a version."""

    def __init__(self, cudart, frame, version=3, **changes):
        _, address = cudart.cudaMalloc(frame.nbytes)
        ctypes.memmove(address, frame.ctypes.data, frame.nbytes)
        kind = {"shape": frame.shape, "typestr": frame.dtype.str, "strides": None}
        self.__cuda_array_interface__ = {**kind, "data": (address, False), "version": version, **changes}


@pytest.fixture
def on_gpu(bundle, opened, monkeypatch):
    encoder, decoder, cudart, _ = opened("fused")
    monkeypatch.setattr(session_module, "open_engines", lambda *_: (encoder, decoder))
    with VideoSession(package_of(bundle, "fused")) as session:
        yield session, cudart


def said(session, question="what's in the video?"):
    text = "".join(session.ask(question, 16))
    session.reset()
    return text


def test_frames_on_the_gpu_are_answered_about_without_a_way_over_the_host(on_gpu):
    session, cudart = on_gpu
    frames = clips(7, 3).reshape(-1, 56, 56, 3)
    for number, frame in enumerate(frames):
        session.push(frame, number / 4)
    expected = said(session)
    cudart.kinds.clear()
    for number, frame in enumerate(frames):
        session.push(OnDevice(cudart, frame, stream=42 if number else None), number / 4)
    assert said(session) == expected
    assert cudart.waited == [42] * 11
    assert (1, frames[:4].nbytes) not in cudart.kinds and cudart.kinds.count((3, frames[0].nbytes)) == 12


def test_a_clip_on_the_gpu_may_be_filled_and_the_next_may_come_from_the_host(on_gpu):
    session, cudart = on_gpu
    frames = clips(8, 2).reshape(-1, 56, 56, 3)
    for number, frame in enumerate(frames[[0, 1, 1, 1, 4, 5, 6, 7]]):
        session.push(frame, number / 4)
    expected = said(session)
    for number in range(2):
        session.push(OnDevice(cudart, frames[number], version=2), number / 4)
    with pytest.raises(InputError, match=r"lie all on the GPU or all on the host; flush\(\) in between"):
        session.push(frames[4], 1.0)
    session.flush()
    for number in range(4, 8):
        session.push(frames[number], float(number))
    assert said(session) == expected
    assert cudart.waited == [1, 1]  # which version 2 does not name


@pytest.mark.parametrize(
    ("frame", "changes", "message"),
    [
        (np.zeros((48, 56, 3), np.uint8), {}, r"is uint8 \(48, 56, 3\); there uint8 \(56, 56, 3\)"),
        (np.zeros((56, 56, 3), np.float32), {}, r"is float32 \(56, 56, 3\)"),
        (np.zeros((56, 56, 3), np.uint8), {"strides": (336, 6, 2)}, "not contiguous; there uint8"),
    ],
)
def test_a_frame_on_the_gpu_that_does_not_fit_is_not_taken(on_gpu, frame, changes, message):
    session, cudart = on_gpu
    with pytest.raises(InputError, match=message):
        session.push(OnDevice(cudart, frame, **changes), 0.0)
    assert session.stats().pushed == 0
    session.push(clips(1, 1)[0, 0], 0.1)


def test_frames_by_dlpack_are_read_by_cuda_core(on_gpu, monkeypatch):
    session, cudart = on_gpu
    frames = clips(9, 1)[0]
    for number, frame in enumerate(frames):
        session.push(frame, number / 4)
    expected = said(session)

    class Tensor:
        def __init__(self, frame):
            self.on_device = OnDevice(cudart, frame, version=2).__cuda_array_interface__

        def __dlpack__(self, stream=None):
            raise AssertionError("is cuda-core's to call")

        def __dlpack_device__(self):
            return (2, 0)

    class StridedMemoryView:
        @classmethod
        def from_dlpack(cls, tensor, stream_ptr):
            assert stream_ptr in cudart.handles
            found = tensor.on_device
            view = types.SimpleNamespace(ptr=found["data"][0], shape=found["shape"], strides=(168, 3, 1))
            view.dtype = np.dtype(found["typestr"])
            return view

    monkeypatch.setitem(sys.modules, "cuda.core.utils", types.SimpleNamespace(StridedMemoryView=StridedMemoryView))
    for number, frame in enumerate(frames):
        session.push(Tensor(frame), number / 4)
    assert said(session) == expected


def test_a_package_for_a_cpu_takes_no_frames_on_a_gpu(tiny_package):
    with (
        VideoSession(tiny_package, threads=1) as session,
        pytest.raises(InputError, match="a package for cpu takes it from the host; copy it"),
    ):
        session.push(OnDevice(Cudart(), clips(1, 1)[0, 0]), 0.0)


# -- buffers ---------------------------------------------------------------------------------------------------------


@both_dialects
def test_buffers_are_as_large_as_the_profile_and_caches_share_them_in_place(bundle, dialect):
    package = package_of(bundle, dialect)
    encoder, decoder = (plan(package.engine(name), package.manifest.model.capacity) for name in ("encoder", "decoder"))
    assert {name: tensor.shape for name, tensor in encoder.items()} == {
        "frames": (4, 4, 56, 56, 3),
        "visual_tokens": (4, 2, 24),
    }
    shapes = {name: tensor.shape for name, tensor in decoder.items() if "_cache_" not in name}
    assert shapes == {"inputs_embeds": (1, 512, 24), "write_index": (1,), "logits": (1, 340)}
    caches = [tensor for name, tensor in decoder.items() if "_cache_" in name]
    assert len(caches) == 8 and {cache.shape for cache in caches} == {(1, 2, 1280, 6)}
    assert all(cache.buffer == cache.name.removesuffix("_out") for cache in caches)
    assert caches[0].bytes == 2 * 1280 * 6 * 4


@both_dialects
def test_all_is_allocated_once_and_freed(opened, dialect):
    encoder, decoder, cudart, trt = opened(dialect)
    blocks, handles = len(cudart.blocks), len(cudart.handles)
    for number in range(3):
        encoder.encode(clips(number, 4))
        decoder.forward(embeddings(number, 100))
        decoder.rewind(50)
    assert len(cudart.blocks) == blocks
    assert len(cudart.handles) == handles + 1  # the recorded batch
    twin = decoder.twin()
    assert len(cudart.blocks) > blocks
    del twin, encoder, decoder
    trt.contexts.clear()
    gc.collect()
    assert not cudart.blocks and not cudart.handles and not cudart.graphs


def test_an_input_that_varies_without_a_profile_is_refused(bundle):
    engine = package_of(bundle, "fused").engine("encoder")
    specs = [msgspec.structs.replace(spec, profile=None) for spec in engine.inputs]
    with pytest.raises(InputError, match="input frames varies and has no profile"):
        plan(msgspec.structs.replace(engine, inputs=specs), 0)


def test_profile_tells_what_the_device_holds(on_gpu, monkeypatch):
    session, cudart = on_gpu
    monkeypatch.setattr(profile, "Cuda", lambda: Cuda(cudart))
    (row,) = profile.measure(session, [4], iterations=1, warmup=0)
    held = sum(len(block) for block in cudart.blocks.values()) / 2**20
    assert row["device_memory_mb"] >= held > 0.5  # a second cache, to run after the protocol, has gone again
    assert profile.columns_of([row])["device_memory_mb"] == "GPU MB" and "paper_ms" not in profile.columns_of([row])


# -- what is refused, and what fails ---------------------------------------------------------------------------------


@both_dialects
def test_what_the_engine_does_not_take_is_refused(opened, dialect):
    encoder, decoder, _, _ = opened(dialect)
    for frames, message in (
        (clips(0, 5), "5 clips, its engine takes 4 at once"),
        (clips(0, 0), "at least one clip"),
        (clips(0, 1).astype(np.int8), "was given int8"),
    ):
        with pytest.raises(InputError, match=message):
            encoder.encode(frames)
    decoder.forward(embeddings(0, 512))
    decoder.forward(embeddings(0, 512))
    for given_, message in (
        (embeddings(0, 513), "513 positions, its engine takes 512 at once"),
        (embeddings(0, 300), "1324 positions do not fit the KV cache of 1280"),
        (embeddings(0, 3, 8), r"expected \(positions, 24\)"),
        (embeddings(0, 0), "at least one position"),
    ):
        with pytest.raises(InputError, match=message):
            decoder.forward(given_)
    for position in (-1, 1025):
        with pytest.raises(InputError, match="cannot rewind"):
            decoder.rewind(position)


@both_dialects
@pytest.mark.parametrize("fails", ["cudaMemcpyAsync", "cudaEventSynchronize", "execute"])
def test_a_call_that_fails_leaves_the_cache_as_it_was(opened, dialect, fails):
    _, decoder, cudart, trt = opened(dialect)
    _, undisturbed, _, _ = opened(dialect)
    for each in (decoder, undisturbed):
        each.forward(embeddings(1, 10))
    trt.broken = fails == "execute"
    cudart.fail |= {fails} - {"execute"}
    with pytest.raises(EngineError, match=r"could not run the decoder|cuda\w+: 2"):
        decoder.forward(embeddings(2, 10))
    trt.broken = False
    cudart.fail.clear()
    assert decoder.position == 10
    np.testing.assert_array_equal(decoder.forward(embeddings(3, 10)), undisturbed.forward(embeddings(3, 10)))


def test_a_recording_that_fails_is_ended(opened):
    encoder, _, cudart, trt = opened("fused")
    encoder.encode(clips(1, 4))
    trt.broken = True
    with pytest.raises(EngineError, match="could not run the encoder"):
        encoder.encode(clips(1, 4))
    assert not cudart.captures and not cudart.graphs
    trt.broken = False
    assert encoder.encode(clips(1, 4)).shape == (4, 2, 24)


def test_a_gpu_without_memory_left_says_so(bundle, monkeypatch):
    package, cudart = package_of(bundle, "fused"), Cudart()
    trt = stand_in(package, cudart)
    import_in_executor(monkeypatch, lambda name: trt)
    trt.memory = False
    with pytest.raises(EngineError, match="no memory on the GPU left"):
        open_trt(package, cuda=Cuda(cudart))
    trt.memory = True
    cudart.fail.add("cudaMalloc")
    with pytest.raises(EngineError, match="cudaMalloc: 2"):
        open_trt(package, cuda=Cuda(cudart))


@pytest.mark.parametrize(
    ("version", "capability", "message"),
    [
        ("11.4.1", (8, 7), r"compiled by tensorrt 10\.3\.0, 11\.4\.1 is installed"),
        ("10.3.0", (8, 6), r"compiled for compute capability 8\.7, this GPU has 8\.6"),
    ],
)
def test_another_version_or_gpu_is_refused_before_anything_is_deserialised(
    bundle, monkeypatch, version, capability, message
):
    package, cudart = package_of(bundle, "fused"), Cudart(capability)
    trt = stand_in(package, cudart, version)
    trt.Runtime = None
    import_in_executor(monkeypatch, lambda name: trt)
    with pytest.raises(InputError, match=message):
        open_trt(package, cuda=Cuda(cudart))


def test_an_engine_that_tensorrt_refuses_is_named(bundle, monkeypatch):
    package, cudart = package_of(bundle, "fused"), Cudart()
    trt = stand_in(package, cudart)
    trt.Runtime.deserialize_cuda_engine = lambda self, content: None
    import_in_executor(monkeypatch, lambda name: trt)
    with pytest.raises(InputError, match=r"encoder\.fused\.onnx: tensorrt 10\.3\.0 refuses to load it"):
        open_trt(package, cuda=Cuda(cudart))


@pytest.fixture
def with_library(bundle, tmp_path, monkeypatch):
    """Opens a package whose encoder needs a library of plugins, on a TensorRT that says None of it, or takes it."""
    folder = tmp_path / "package"
    shutil.copytree(bundle.folder, folder)
    (folder / "libliteframe_plugins.so").write_bytes(b"a library")
    package = package_of(Package(folder, bundle.manifest), "fused")
    file = describe_file(folder, folder / "libliteframe_plugins.so")
    told = Operators(way="library", milliseconds={}, library=file)
    encoder, decoder = package.manifest.engines
    engines = [msgspec.structs.replace(encoder, operators=told), decoder]
    package = Package(folder, msgspec.structs.replace(package.manifest, engines=engines))
    cudart, events = Cudart(), []

    def open_on(answer, known=None):
        trt = stand_in(package, cudart)
        deserialize = trt.Runtime.deserialize_cuda_engine

        def deserialize_later(self, content):
            events.append("deserialised")
            return deserialize(self, content)

        def load_library(path):
            events.append(path)
            return answer

        trt.Runtime.deserialize_cuda_engine = deserialize_later
        trt.get_plugin_registry = lambda: types.SimpleNamespace(
            get_creator=lambda *names: known if names == ("DepthwiseTemporalConv", "1", "liteframe") else None,
            load_library=load_library,
        )
        import_in_executor(monkeypatch, lambda name: trt)
        open_trt(package, cuda=Cuda(cudart))

    return open_on, events, folder / "libliteframe_plugins.so"


def test_a_library_of_plugins_is_loaded_before_the_engine(with_library):
    open_on, events, library = with_library
    open_on(object())
    assert events == [str(library), "deserialised", "deserialised"]


def test_a_library_whose_plugins_are_known_is_not_loaded_again(with_library):
    open_on, events, _ = with_library
    open_on(None, known=object())
    assert events == ["deserialised"] * 2


def test_a_library_that_tensorrt_refuses_is_named(with_library):
    open_on, events, library = with_library
    with pytest.raises(InputError, match=r"libliteframe_plugins\.so: TensorRT 10\.3\.0 does not load this library"):
        open_on(None)
    assert events == [str(library)]


def test_without_tensorrt_it_says_which_is_wanted(bundle):
    with pytest.raises(
        InputError, match=r"compiled by tensorrt, which is not installed here; install version 10\.3\.0"
    ):
        open_trt(package_of(bundle, "fused"), cuda=Cuda(Cudart()))


def test_a_machine_without_a_gpu_says_so_in_one_sentence(bundle):
    with pytest.raises(InputError, match="the driver finds none"):
        Cuda(Cudart(devices=0))
    if importlib.util.find_spec("cuda") is None:
        expected = "cuda-python is not installed; run: pip install cuda-bindings"
    else:
        expected = "no NVIDIA GPU can be used here"
    if not find_gpus()[0]:
        with pytest.raises(InputError, match=expected):
            Cuda()


def test_a_driver_that_is_too_old_for_the_bindings_is_told_what_to_install():
    class TooOld(int):
        name = "cudaErrorInsufficientDriver"

    cudart = types.SimpleNamespace(cudaGetDeviceCount=lambda: (TooOld(35), 0))
    with pytest.raises(InputError, match="cudaErrorInsufficientDriver; for a driver of CUDA 12 run: pip install 'cuda"):
        Cuda(cudart)


# -- the self-test -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["10.3.0", "11.4.1"])
def test_the_self_test_compiles_runs_and_judges(monkeypatch, version):
    """With the stand-ins; an "engine" holds the path of its graph."""
    cudart = Cudart()
    graphs = {}

    def compile_graph(path, inputs, flavour, capabilities):
        assert (flavour, capabilities) == ("tensorrt", ["8.7"])
        graphs[str(path).encode()] = path
        return Compiled(engine=str(path).encode(), proof=types.SimpleNamespace(found={}), version=version)

    def compile_either_way(path, inputs, *others):
        assert others == ("8.7", None, "auto", None)
        compiled = compile_graph(path, inputs, "tensorrt", ["8.7"])
        return Chosen(compiled, "bodies", {"bodies": 2.0, "embedded": 3.0})

    def deserialize(self, content):
        bundle = open_package(graphs[content].parents[1])
        (graph,) = (g for g in bundle.manifest.graphs if bundle.path(g.files[0]) == graphs[content])
        session = ort.InferenceSession(graphs[content])
        return types.SimpleNamespace(create_execution_context=lambda: Context(trt, graph, session))

    trt = stand_in(types.SimpleNamespace(manifest=None), cudart, version)
    trt.Runtime.deserialize_cuda_engine = deserialize
    monkeypatch.setattr(self_test.compile_tensorrt, "load", lambda flavour: trt)
    monkeypatch.setattr(self_test.compile_tensorrt, "compile_graph", compile_graph)
    monkeypatch.setattr(self_test.operators, "compile_either_way", compile_either_way)
    monkeypatch.setattr(self_test.proof, "check", lambda name, precision, proof: None)
    monkeypatch.setattr(self_test, "find_gpus", lambda: ([Gpu("Orin", "8.7", 1)], ""))
    import_in_executor(monkeypatch, lambda name: trt)
    monkeypatch.setattr(trt_engine, "Cuda", lambda: Cuda(cudart))
    results = {result.what: result for result in self_test.try_executor("TensorRT")}
    assert results.keys() == {
        f"{precision}, {dialect}" for precision in ("fp32", "fp16") for dialect in ("fused", "plain")
    }
    taken = [result.passed for what, result in results.items() if "plain" in what or version == "11.4.1"]
    assert all(taken) and len(taken) == (4 if version == "11.4.1" else 2)
    told = "; custom operators: bodies (bodies 2.00 ms, embedded 3.00 ms)"
    assert all(result.detail.endswith(told) for result in results.values() if result.passed)
    if version == "10.3.0":
        assert results["fp16, fused"].detail == "TensorRT 10.3.0 does not take this dialect"
    else:
        assert cudart.launches > 10


# -- the real types --------------------------------------------------------------------------------------------------


def test_profiled_layers_are_told_and_nothing_is_recorded(opened):
    encoder, _, cudart, _ = opened("fused", profiling=True)
    for _ in range(3):
        encoder.encode(clips(1, 4))
    assert encoder.node_times() == [("backbone.blocks.0.attn/MatMul", 0.5)] * 3
    assert cudart.launches == 0


def test_tensorrt_rtx_has_what_is_called():
    trt = pytest.importorskip("tensorrt_rtx")
    for kind, names in (
        (trt.Runtime, ["deserialize_cuda_engine"]),
        (trt.ICudaEngine, ["create_execution_context"]),
        (trt.IExecutionContext, ["set_tensor_address", "set_input_shape", "execute_async_v3", "profiler"]),
        (trt.IProfiler, ["report_layer_time"]),
    ):
        assert all(hasattr(kind, name) for name in names)
    assert isinstance(trt_engine.Loaded(trt, None).profiler([]), trt.IProfiler)


def test_cuda_python_has_what_is_called():
    bindings = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in vars(Cudart) if name.startswith("cuda")]
    assert len(names) > 20 and all(hasattr(bindings, name) for name in names)
    assert bindings.cudaMemcpyKind(3).name == "cudaMemcpyDeviceToDevice"
    assert bindings.cudaDeviceAttr(76).name == "cudaDevAttrComputeCapabilityMinor"
    assert bindings.cudaStreamCaptureMode(1).name == "cudaStreamCaptureModeThreadLocal"
    assert (bindings.cudaStreamNonBlocking, bindings.cudaEventBlockingSync | bindings.cudaEventDisableTiming) == (1, 3)


def test_the_self_test_says_which_gpus_tensorrt_rtx_is_not_for(monkeypatch, tmp_path):
    hopper = Gpu(name="H200", capability="9.0", memory=1 << 37)
    monkeypatch.setattr(self_test, "find_gpus", lambda: ([hopper], ""))
    rtx = types.SimpleNamespace(__version__="1.7.1", ComputeCapability=types.SimpleNamespace(SM80=1))
    monkeypatch.setattr(self_test.compile_tensorrt, "load", lambda flavour: rtx)
    with pytest.raises(self_test.NotTaken, match=r"TensorRT-RTX 1\.7\.1 does not compile for compute capability 9\.0"):
        self_test.compile_here(None, "fused", "tensorrt-rtx", tmp_path)
