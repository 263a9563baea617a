"""Engines on ONNX Runtime against the torch modules they were traced from, in both dialects."""

import re

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.engines.device import find_gpus
from liteframe.engines.package import InputError, Package
from liteframe.export.artifact import load_artifact
from liteframe.export.models.attention import use_dialect
from liteframe.export.trace import WeightsFile, trace_decoder, trace_encoder
from liteframe.runtime import VideoSession, ort_engine
from liteframe.runtime.ort_engine import OrtDecoder, OrtEncoder

# name: (dialect, capacity that the graph fixes)
GRAPHS = {"fused": ("fused", None), "fused-fixed": ("fused", 48), "plain": ("plain", None)}
CAPACITY = 48
every_graph = pytest.mark.parametrize("graph", GRAPHS)


@pytest.fixture(scope="module")
def artifact(tiny_artifact):
    return load_artifact(tiny_artifact)


@pytest.fixture(scope="module")
def graphs(artifact, tmp_path_factory):
    """Paths of the decoder's graphs by GRAPHS' names, and of the encoder's by dialect."""
    folder, paths = tmp_path_factory.mktemp("graphs"), {}
    with WeightsFile(folder / "weights.data") as weights:
        for name, (dialect, capacity) in GRAPHS.items():
            paths[name] = folder / f"decoder.{name}.onnx"
            weights.save(trace_decoder(artifact.decoder, dialect, capacity), paths[name])
        for dialect in ("fused", "plain"):
            paths[f"encoder-{dialect}"] = folder / f"encoder.{dialect}.onnx"
            weights.save(trace_encoder(artifact.encoder, dialect), paths[f"encoder-{dialect}"])
    return paths


@pytest.fixture(scope="module")
def decoders(graphs):
    """One decoder for each graph, rewound by `decoder` before it is used again: loading takes longer than a test."""
    return {name: OrtDecoder(graphs[name], capacity=CAPACITY, threads=1) for name in GRAPHS}


@pytest.fixture
def decoder(decoders, graph):
    decoders[graph].rewind(0)
    return decoders[graph]


@pytest.fixture(scope="module")
def expected(artifact):
    """Logits (positions, vocabulary) that torch computes in one pass without a cache of ours, for EMBEDDINGS."""
    with torch.no_grad(), use_dialect("plain"):
        caches = artifact.decoder.empty_caches(0)
        hidden, _ = artifact.decoder.model(torch.from_numpy(EMBEDDINGS)[None], torch.tensor([0]), caches)
        return artifact.decoder.lm_head(hidden)[0].numpy()


EMBEDDINGS = np.random.default_rng(0).standard_normal((CAPACITY, 24), dtype=np.float32)


def assert_close(got, expected):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# -- encoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fused", "plain"])
@pytest.mark.parametrize("clips", [1, 2, 5])
def test_encoder_equals_its_module(artifact, graphs, dialect, clips):
    frames = np.random.default_rng(clips).integers(0, 256, (clips, 4, 56, 56, 3), dtype=np.uint8)
    with torch.no_grad():
        tokens = artifact.encoder(torch.from_numpy(frames)).numpy()
    assert np.ptp(tokens) > 0.1
    assert_close(OrtEncoder(graphs[f"encoder-{dialect}"], threads=1).encode(frames), tokens)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (np.float32, (1, 4, 56, 56, 3)),
        (np.int8, (1, 4, 56, 56, 3)),
        (np.uint8, (4, 56, 56, 3)),
        (np.uint8, (1, 4, 3, 56, 56)),
        (np.uint8, (1, 8, 56, 56, 3)),
        (np.uint8, (1, 4, 56, 70, 3)),
        (np.uint8, (0, 4, 56, 56, 3)),
        (np.uint8, ()),
    ],
)
def test_encoder_says_what_it_was_given_and_what_it_takes(graphs, dtype, shape):
    with pytest.raises(InputError) as refused:
        OrtEncoder(graphs["encoder-fused"], threads=1).encode(np.zeros(shape, dtype))
    assert f"given {np.dtype(dtype)} {shape}, expected uint8 (clips, 4, 56, 56, 3)" in str(refused.value)


# -- decoder ---------------------------------------------------------------------------------------------------------


@every_graph
def test_decoder_equals_its_module_at_every_position(decoder, expected):
    got = np.stack([decoder.forward(embedding[None]) for embedding in EMBEDDINGS])
    assert_close(got, expected)


@every_graph
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_split_into_chunks_gives_the_same_logits(decoders, expected, graph, data):
    decoder = decoders[graph]
    decoder.rewind(0)
    while decoder.position < CAPACITY:
        start = decoder.position
        end = data.draw(st.integers(start + 1, CAPACITY))
        assert_close(decoder.forward(EMBEDDINGS[start:end]), expected[end - 1])
        assert decoder.position == end


@every_graph
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_follows_a_rewind_does_not_see_what_was_forgotten(decoders, expected, graph, data):
    decoder = decoders[graph]
    decoder.rewind(0)
    end = data.draw(st.integers(1, CAPACITY))
    decoder.forward(EMBEDDINGS[:end])
    kept = data.draw(st.integers(0, end))
    decoder.rewind(kept)
    noise = data.draw(st.integers(0, CAPACITY - kept))
    if noise:
        decoder.forward(np.full((noise, 24), 9, np.float32))
        decoder.rewind(kept)
    if kept < CAPACITY:
        assert_close(decoder.forward(EMBEDDINGS[kept:]), expected[-1])


@every_graph
@pytest.mark.parametrize("position", [-1, 6, CAPACITY])
def test_a_rewind_beyond_what_is_held_is_refused(decoder, position):
    decoder.forward(EMBEDDINGS[:5])
    with pytest.raises(InputError, match=f"rewind the KV cache to {position}, it holds 5"):
        decoder.rewind(position)
    assert decoder.position == 5


@every_graph
def test_the_cache_takes_its_capacity_and_no_position_more(decoder, expected):
    decoder.forward(EMBEDDINGS[:-1])
    with pytest.raises(InputError, match=f"{CAPACITY + 1} positions do not fit the KV cache of {CAPACITY}"):
        decoder.forward(EMBEDDINGS[:2])
    assert decoder.position == CAPACITY - 1
    assert_close(decoder.forward(EMBEDDINGS[-1:]), expected[-1])
    with pytest.raises(InputError, match="do not fit the KV cache"):
        decoder.forward(EMBEDDINGS[:1])


@every_graph
def test_decoders_of_one_graph_do_not_share_their_caches(graphs, graph, expected):
    one, other = (OrtDecoder(graphs[graph], capacity=CAPACITY, threads=1) for _ in range(2))
    one.forward(EMBEDDINGS[:20])
    other.forward(EMBEDDINGS[5:40])
    assert_close(one.forward(EMBEDDINGS[20:21]), expected[20])


@every_graph
def test_logits_outlive_the_next_call(decoder):
    first = decoder.forward(EMBEDDINGS[:3])
    copy = first.copy()
    decoder.forward(EMBEDDINGS[3:6])
    np.testing.assert_array_equal(first, copy)


@every_graph
@pytest.mark.parametrize("embeddings", [EMBEDDINGS.astype(np.float64), EMBEDDINGS[:, ::-1][:, ::-1], EMBEDDINGS.T.T])
def test_other_precisions_and_strides_are_taken(decoder, expected, embeddings):
    assert_close(decoder.forward(embeddings), expected[-1])


@every_graph
@pytest.mark.parametrize("shape", [(3, 23), (3, 25), (0, 24), (24,), (1, 3, 24), ()])
def test_embeddings_of_another_shape_are_refused(decoder, shape):
    with pytest.raises(InputError, match=r"expected \(positions, 24\)") as refused:
        decoder.forward(np.zeros(shape, np.float32))
    assert str(shape) in str(refused.value)
    assert decoder.position == 0


def lengths(decoder):
    return {buffer.shape()[2] for buffer in decoder._buffers.values()}


def test_caches_grow_in_steps_up_to_the_capacity_and_keep_what_they_hold(artifact, graphs, monkeypatch):
    monkeypatch.setattr(ort_engine, "GROWTH", 16)
    decoder = OrtDecoder(graphs["fused"], capacity=40, threads=1)
    seen = []
    for embedding in EMBEDDINGS[:40]:
        logits = decoder.forward(embedding[None])
        seen.append(lengths(decoder))
    assert seen == [{16}] * 16 + [{32}] * 16 + [{40}] * 8
    with torch.no_grad(), use_dialect("plain"):
        caches = artifact.decoder.empty_caches(0)
        whole, _ = artifact.decoder(torch.from_numpy(EMBEDDINGS[:40])[None], torch.tensor([0]), caches)
    assert_close(logits, whole[0].numpy())


def test_a_graph_with_fixed_caches_overrules_the_capacity(graphs):
    decoder = OrtDecoder(graphs["fused-fixed"], capacity=7, threads=1)
    assert decoder.capacity == 48
    assert lengths(decoder) == {48}


def test_plain_caches_hold_exactly_what_was_written(decoders):
    decoder = decoders["plain"]
    decoder.rewind(0)
    for end in (5, 6, 20):
        decoder.forward(EMBEDDINGS[decoder.position : end])
        assert lengths(decoder) == {end}
    decoder.rewind(4)
    assert lengths(decoder) == {4}


# -- opening ---------------------------------------------------------------------------------------------------------


def edited(package: Package, **changes) -> Package:
    return Package(folder=package.folder, manifest=msgspec.structs.replace(package.manifest, **changes))


@pytest.mark.parametrize("kind", [OrtEncoder, OrtDecoder])
def test_a_provider_that_is_not_there_is_an_error_and_not_a_fallback(graphs, monkeypatch, kind):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="CUDAExecutionProvider, which is not there; install onnxruntime-gpu"):
        kind(graphs["fused"], "CUDAExecutionProvider")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_a_provider_that_gives_up_while_loading_is_an_error(graphs, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(InputError, match="CUDAExecutionProvider") as refused:
        OrtEncoder(graphs["encoder-fused"], "CUDAExecutionProvider")
    assert str(graphs["encoder-fused"]) in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a"])
def test_a_file_that_is_no_graph_is_named(tmp_path, content):
    path = tmp_path / "decoder.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot load it") as refused:
        OrtDecoder(path)
    assert str(refused.value).startswith(f"{path}: ONNX Runtime {onnxruntime.__version__}")


@pytest.mark.parametrize(("made", "taken"), [("1.0.0", True), ("1.31.9", True), ("1.32.0", False), ("2.0.0", False)])
def test_an_engine_of_a_later_onnx_runtime_is_refused(tiny_package, monkeypatch, made, taken):
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    engines = [msgspec.structs.replace(e, compiler_version=made) for e in tiny_package.manifest.engines]
    package = edited(tiny_package, engines=engines)
    if taken:
        VideoSession(package, threads=1)
    else:
        with pytest.raises(InputError, match=rf"1\.31\.1 is installed; run: pip install onnxruntime=={made}"):
            VideoSession(package, threads=1)


def test_a_bundle_names_the_command_that_finishes_it(tiny_package):
    with pytest.raises(InputError, match=re.escape(f"run: liteframe compile {tiny_package.folder}")):
        VideoSession(edited(tiny_package, target="jetson-orin", engines=[]))


@pytest.mark.skipif(bool(find_gpus()[0]), reason="there is a GPU")
def test_tensorrt_engines_need_a_gpu(tiny_package):
    why = "no NVIDIA GPU can be used here: |cuda-python is not installed"
    with pytest.raises(InputError, match=f"TensorRT engines for a100; ({why}).*; for this machine's CPU, build with"):
        VideoSession(edited(tiny_package, target="a100"))


def test_fp32_is_not_rounded_to_tf32_on_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(ort_engine.ort, "InferenceSession", lambda *_, providers: asked.append(providers))
    ort_engine.open_session(b"", ort_engine.ort.SessionOptions(), "CUDAExecutionProvider")
    assert asked == [[("CUDAExecutionProvider", {"use_tf32": "0"})]]
