"""Both graphs in both dialects: their contract, their form, and what they compute for any number of clips and any
division of a prompt into chunks."""

import filecmp

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.engines.targets import PLAIN_OPSET, PLAIN_TYPES
from liteframe.export.artifact import load_artifact
from liteframe.export.check_plain import check_plain
from liteframe.export.models.attention import use_dialect
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from liteframe.export.trace import OPSETS, WeightsFile, cache_names, trace_decoder, trace_encoder

DIALECTS = ("fused", "plain")
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture(scope="module")
def artifact(tiny_artifact):
    return load_artifact(tiny_artifact)


def wap_encoder():
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=(56, 56), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    encoder = VideoEncoder(EncoderConfig(backbone=vit, output_size=24, reducer="wap")).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture(scope="module")
def folder(artifact, tmp_path_factory):
    """{encoder,wap,decoder}.{fused,plain}.onnx, the dialects of each sharing one file of weights."""
    folder = tmp_path_factory.mktemp("graphs")
    for name, trace in {
        "encoder": lambda dialect: trace_encoder(artifact.encoder, dialect),
        "wap": lambda dialect: trace_encoder(wap_encoder(), dialect),
        "decoder": lambda dialect: trace_decoder(artifact.decoder, dialect),
    }.items():
        with WeightsFile(folder / f"{name}.data") as weights:
            for dialect in DIALECTS:
                weights.save(trace(dialect), folder / f"{name}.{dialect}.onnx")
    return folder


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


# form


def signature(values):
    return [
        (
            value.name,
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


@every_dialect
def test_the_encoders_inputs_and_outputs_are_the_contracts(folder, dialect):
    graph = onnx.load(folder / f"encoder.{dialect}.onnx").graph
    assert signature(graph.input) == [("frames", "uint8", ["clips", 4, 56, 56, 3])]
    assert signature(graph.output) == [("visual_tokens", "float32", ["clips", 2, 24])]


@every_dialect
def test_the_decoders_inputs_and_outputs_are_the_contracts(folder, dialect):
    graph = onnx.load(folder / f"decoder.{dialect}.onnx").graph
    length = {"fused": "capacity", "plain": "past"}[dialect]
    caches = ["k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"]
    assert cache_names(2) == caches
    assert signature(graph.input) == [
        ("inputs_embeds", "float32", [1, "sequence", 24]),
        ("write_index", "int64", [1]),
        *((name, "float32", [1, 2, length, 6]) for name in caches),
    ]
    assert [value[:2] for value in signature(graph.output)] == [
        ("logits", "float32"),
        *((f"{name}_out", "float32") for name in caches),
    ]
    assert signature(graph.output)[0][2] == [1, 340]


def test_the_capacity_is_fixed_where_asked(artifact):
    model = trace_decoder(artifact.decoder, "fused", capacity=96)
    shapes = [value.shape.dims for value in (*model.graph.inputs[2:], *model.graph.outputs[1:])]
    assert all(tuple(shape) == (1, 2, 96, 6) for shape in shapes)


@every_dialect
@pytest.mark.parametrize("name", ["encoder", "wap", "decoder"])
def test_graphs_are_valid_and_keep_their_dialect(folder, name, dialect):
    path = folder / f"{name}.{dialect}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    assert opset == OPSETS[dialect]
    found = {node.op_type for node in model.graph.node} | {n.op_type for f in model.functions for n in f.node}
    custom = {"encoder": {"DepthwiseTemporalConv"}, "wap": {"WeightedAveragePool"}, "decoder": set()}[name]
    assert {function.name for function in model.functions} == custom
    if dialect == "plain":
        assert opset <= PLAIN_OPSET
        assert found - custom <= PLAIN_TYPES.keys()
        check_plain(path)
    elif name == "decoder":
        assert {"Attention", "TensorScatter", "RMSNormalization"} <= found
    else:
        assert "Attention" in found


@every_dialect
@pytest.mark.parametrize("name", ["encoder", "wap"])
def test_custom_operators_are_nodes_with_a_body_and_a_plugins_namespace(folder, name, dialect):
    model = onnx.load(folder / f"{name}.{dialect}.onnx", load_external_data=False)
    custom = [node for node in model.graph.node if node.domain == "liteframe"]
    assert custom
    bodies = {(function.domain, function.name) for function in model.functions}
    for node in custom:
        assert (node.domain, node.op_type) in bodies
        assert {a.name: a.s for a in node.attribute if a.name == "plugin_namespace"} == {
            "plugin_namespace": b"liteframe"
        }


@every_dialect
def test_nodes_are_named_after_modules(folder, artifact, dialect):
    modules = {"encoder": artifact.encoder, "decoder": artifact.decoder}
    for name, module in modules.items():
        nodes = onnx.load(folder / f"{name}.{dialect}.onnx", load_external_data=False).graph.node
        names = [node.name for node in nodes]
        assert len(names) == len(set(names))
        known = {"graph", *(path for path, _ in module.named_modules())}
        for node in nodes:
            path, operator = node.name.rsplit("/", 1)
            assert path in known, node.name
            assert operator.split("_")[0] == node.op_type
    linear = "model.layers.1.self_attn.o_proj/MatMul"
    assert linear in {node.name for node in onnx.load(folder / f"decoder.{dialect}.onnx").graph.node}


def test_dialects_share_their_weights(folder, artifact):
    parameters = {p.data_ptr(): p.numel() * 4 for p in artifact.decoder.parameters()}
    large = sum(size for size in parameters.values() if size > WeightsFile.INLINE_BYTES)
    pieces = {}
    for dialect in DIALECTS:
        pieces[dialect] = set()
        for tensor in onnx.load(folder / f"decoder.{dialect}.onnx", load_external_data=False).graph.initializer:
            if entries := {entry.key: entry.value for entry in tensor.external_data}:
                assert entries["location"] == "decoder.data"
                assert int(entries["offset"]) % WeightsFile.ALIGNMENT == 0
                pieces[dialect].add((int(entries["offset"]), int(entries["length"])))
            else:
                assert len(tensor.raw_data) <= WeightsFile.INLINE_BYTES
    assert pieces["fused"] == pieces["plain"]
    assert sum(length for _, length in pieces["fused"]) == large
    end = max(offset + length for offset, length in pieces["fused"])
    assert (folder / "decoder.data").stat().st_size == end


def test_the_same_weights_make_the_same_bytes(folder, artifact, exported_anew, tmp_path):
    with WeightsFile(tmp_path / "encoder.data") as weights:
        for dialect in DIALECTS:
            weights.save(trace_encoder(artifact.encoder, dialect), tmp_path / f"encoder.{dialect}.onnx")
    with WeightsFile(tmp_path / "decoder.data") as weights:
        for dialect in DIALECTS:
            weights.save(trace_decoder(artifact.decoder, dialect), tmp_path / f"decoder.{dialect}.onnx")
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert len(names) == 6
    assert filecmp.cmpfiles(folder, tmp_path, names, shallow=False) == (names, [], [])


# what they compute


@every_dialect
@pytest.mark.parametrize("clips", [1, 2, 5])
@pytest.mark.parametrize("name", ["encoder", "wap"])
def test_any_number_of_clips_gives_the_modules_tokens(folder, artifact, name, clips, dialect):
    frames = np.random.default_rng(clips).integers(0, 256, (clips, 4, 56, 56, 3), dtype=np.uint8)
    (tokens,) = session(folder / f"{name}.{dialect}.onnx").run(None, {"frames": frames})
    with torch.no_grad():
        expected = (artifact.encoder if name == "encoder" else wap_encoder())(torch.from_numpy(frames)).numpy()
    assert tokens.shape == expected.shape
    assert np.abs(tokens - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def decoders(folder):
    return {dialect: session(folder / f"decoder.{dialect}.onnx") for dialect in DIALECTS}


def run_chunks(decoder, dialect, embeddings, sizes, capacity=40):
    """Logits after the last chunk, and the caches, with the buffers of the caller's making."""
    caches = {name: np.zeros((1, 2, capacity if dialect == "fused" else 0, 6), np.float32) for name in cache_names(2)}
    start = 0
    for size in sizes:
        feed = {"inputs_embeds": embeddings[:, start : start + size], "write_index": np.array([start])}
        logits, *updated = decoder.run(None, feed | caches)
        caches = dict(zip(caches, updated, strict=True))
        start += size
    return logits, [cache[:, :, :start] for cache in caches.values()]


@every_dialect
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_any_chunks_give_the_modules_logits_and_caches(decoders, artifact, dialect, sizes, seed):
    total = sum(sizes)
    embeddings = np.random.default_rng(seed).standard_normal((1, total, 24)).astype(np.float32)
    logits, caches = run_chunks(decoders[dialect], dialect, embeddings, sizes, capacity=total + 3)
    with torch.no_grad(), use_dialect("plain"):
        expected, expected_caches = artifact.decoder(
            torch.from_numpy(embeddings), torch.tensor([0]), artifact.decoder.empty_caches(0)
        )
    assert np.abs(logits - expected.numpy()).max() <= 1e-4 * np.abs(expected.numpy()).max()
    for cache, theirs in zip(caches, expected_caches, strict=True):
        np.testing.assert_allclose(cache, theirs.numpy(), rtol=0, atol=1e-4 * np.abs(theirs.numpy()).max())


def test_stale_positions_behind_the_write_index_are_not_attended_to(decoders):
    """A cache that was rewound holds old keys beyond its end."""
    embeddings = np.random.default_rng(0).standard_normal((1, 9, 24)).astype(np.float32)
    expected, _ = run_chunks(decoders["fused"], "fused", embeddings, [9])
    caches = {name: np.full((1, 2, 40, 6), 1e4, np.float32) for name in cache_names(2)}
    logits, *_ = decoders["fused"].run(None, {"inputs_embeds": embeddings, "write_index": np.array([0])} | caches)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
