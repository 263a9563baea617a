"""Artifacts with a query encoder and a second connector: loaded, built, and asked about a long video."""

import json
import shutil

import msgspec
import numpy as np
import onnx
import pytest
import torch
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import build
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.runtime import VideoSession
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

WIDTH = 48  # of the features before the projector's MLP: 12 channels, 2 x 2 of them
QUESTION = "what's in the video?"


def text_encoder(width, table=None, tokens="tokens", names=("input_ids", "query"), batch=(1, 1), types=None, most=None):
    """The mean of learned vectors, as ONNX; `most`: how many tokens it has position embeddings for."""
    if table is None:
        table = np.random.default_rng(0).normal(size=(340, width)).astype(np.float32)
    ids, query = names
    taken, made = types or (TensorProto.INT64, TensorProto.FLOAT)
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axes")]
    nodes = [
        helper.make_node("Gather", ["table", ids], ["vectors"], axis=0),
        helper.make_node("ReduceMean", ["vectors", "axes"], ["mean"], keepdims=0),
        helper.make_node("Cast", ["mean"], [query], to=made),
    ]
    if most is not None:  # fails where there are more
        nodes.insert(0, helper.make_node("Shape", [ids], ["count"], start=1))
        nodes.insert(1, helper.make_node("Sub", ["count", "one"], ["last"]))
        nodes.insert(2, helper.make_node("Gather", ["places", "last"], ["place"]))
        nodes.insert(4, helper.make_node("Add", ["vectors", "place"], ["placed"]))
        nodes[5].input[0] = "placed"
        weights += [
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(np.zeros((most, 1), np.float32), "places"),
        ]
    graph = helper.make_graph(
        nodes,
        "query_encoder",
        [helper.make_tensor_value_info(ids, taken, [batch[0], tokens])],
        [helper.make_tensor_value_info(query, made, [batch[1], width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def artifact(tiny_artifact, tmp_path):
    """With a query encoder as wide as visual tokens."""
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "query_encoder").mkdir()
    shutil.copy(folder / "tokenizer.json", folder / "query_encoder")
    onnx.save(text_encoder(24), folder / "query_encoder" / "model.onnx")
    return folder


def connect(folder):
    """Gives an artifact a second connector, of random weights."""
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["merge_connector"] = True
    (folder / "config.json").write_text(json.dumps(config))
    changed = msgspec.convert(config["encoder"], EncoderConfig)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in VideoEncoder(changed).named_parameters():
        if name.startswith("merger.connector."):
            stored = name.replace("merger.connector.", "encoder.merge_connector.")
            tensors[stored] = torch.randn(parameter.shape, generator=generator) * 0.3
    save_file(tensors, folder / "model.safetensors")
    onnx.save(text_encoder(WIDTH), folder / "query_encoder" / "model.onnx")


def footage(frames=48):
    return np.random.default_rng(3).integers(0, 256, (frames, 56, 56, 3), dtype=np.uint8)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def test_a_query_encoders_vector_is_what_a_long_video_is_searched_for(artifact, tmp_path):
    package = build(artifact, "cpu", tmp_path / "package", frames=16, long_video=48, keyframes=2)
    assert {engine.name for engine in package.manifest.engines} == {"encoder", "decoder", "merger", "query"}
    with VideoSession(package) as session:
        session.watch(footage(), long_video="hybrid", query=QUESTION)
        query = session._searcher.query(QUESTION)
    loaded = load_artifact(artifact)
    table = numpy_helper.to_array(onnx.load(artifact / "query_encoder" / "model.onnx").graph.initializer[0])
    ids = loaded.query_encoder.tokenizer.encode(QUESTION).ids
    np.testing.assert_allclose(query.vector, table[ids].mean(0), atol=1e-6)
    assert query.parts.shape == (1, 24)


def test_with_a_second_connector_features_are_merged_and_connected(artifact, tmp_path):
    connect(artifact)
    package = build(artifact, "cpu", tmp_path / "package", frames=16, long_video=48, keyframes=1)
    frames = footage()
    with VideoSession(package) as session:
        session.watch(frames, long_video="hybrid", query=QUESTION)
        entries = session._pipeline.conversation.entries
        vector = session._searcher.query(QUESTION).vector.astype(np.float64)
    encoder = load_artifact(artifact).encoder
    with torch.no_grad():
        tokens, features = encoder.with_features(torch.from_numpy(frames.reshape(-1, 4, 56, 56, 3)))
    features = features.numpy().astype(np.float64)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    relevance = (unit @ (vector / np.linalg.norm(vector))).max(1)
    key = int(relevance.argmax())
    shown = np.concatenate([entry.tokens for entry in entries if 4 * key < entry.last <= 4 * key + 4])
    np.testing.assert_allclose(shown, tokens[key].numpy(), atol=1e-5)
    behind = next(entry for entry in entries if entry.first == 4 * key + 5)
    expected = []
    for number in range(key + 1, len(features)):
        scores = unit[number] @ (vector / np.linalg.norm(vector)) - (unit[number] * unit[key]).sum(-1)
        merged = softmax(scores / 0.01) @ features[number]
        with torch.no_grad():
            expected.append(encoder.merger.connector(torch.tensor(merged).float()[None])[0].numpy())
    np.testing.assert_allclose(behind.tokens, expected, atol=1e-4)


def test_merged_features_need_a_query_as_wide(artifact, tmp_path):
    connect(artifact)
    shutil.rmtree(artifact / "query_encoder")
    with pytest.raises(InputError, match=r"features 48 wide.*query_encoder"):
        build(artifact, "cpu", tmp_path / "package", frames=16, long_video=48, keyframes=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (text_encoder(25), r"query of shape \['1', '25'\], the video's features are 24 wide"),
        (text_encoder(24, tokens=77), r"input_ids \['1', '77'\].*left open"),
        (text_encoder(24, names=("ids", "query")), "inputs .*ids.*expected input_ids and query"),
        (text_encoder(24, names=("input_ids", "text")), "outputs .*text"),
        (text_encoder(24, types=(TensorProto.INT32, TensorProto.FLOAT)), "input_ids is INT32, expected INT64"),
        (text_encoder(24, types=(TensorProto.INT64, TensorProto.FLOAT16)), "query is FLOAT16, expected FLOAT"),
        (text_encoder(24, batch=(2, 1)), r"input_ids \['2', 'tokens'\]"),
        (text_encoder(24, batch=(1, 2)), r"query of shape \['2', '24'\]"),
        (text_encoder(24, np.zeros((2, 24), np.float32)), r"fails on 'Where.*tokens"),
        (text_encoder(24, np.full((340, 24), np.nan, np.float32)), "makes NaN or infinity"),
    ],
)
def test_a_query_encoder_that_does_not_fit_is_refused_with_what_was_found(artifact, model, message):
    onnx.save(model, artifact / "query_encoder" / "model.onnx")
    with pytest.raises(InputError, match=message):
        load_artifact(artifact)


def test_a_batch_of_any_size_is_taken_as_one(artifact):
    onnx.save(text_encoder(24, batch=("n", "n")), artifact / "query_encoder" / "model.onnx")
    graph = load_artifact(artifact).query_encoder.graph.graph
    assert (graph.inputs[0].shape[0], graph.outputs[0].shape[0]) == (1, 1)


def test_a_question_that_the_query_encoder_cannot_take_is_bad_input(artifact, tmp_path, capfd):
    onnx.save(text_encoder(24, most=60), artifact / "query_encoder" / "model.onnx")
    package = build(artifact, "cpu", tmp_path / "package", frames=16, long_video=48, keyframes=2)
    long = "the cat sat " * 20
    tokens = len(load_artifact(artifact).query_encoder.tokenizer.encode(long).ids)
    with VideoSession(package) as session:
        session.watch(footage(), long_video="hybrid", query=QUESTION)
        capfd.readouterr()
        for query, message in (
            (long, f"query encoder failed on a question of {tokens} tokens"),
            ("caf\udce9", "not valid Unicode"),
            ("<|im_end|>", "control token"),
        ):
            with pytest.raises(InputError, match=message):
                session.watch(footage(), long_video="hybrid", query=query)
            assert capfd.readouterr().err == ""
        assert session.stats().frames == 48


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_file_that_is_missing_or_damaged_is_named(artifact, name):
    path = artifact / "query_encoder" / name
    path.write_bytes(b"\x00 no such thing")
    with pytest.raises(InputError, match=name):
        load_artifact(artifact)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}: missing"):
        load_artifact(artifact)


def test_a_tokenizer_that_cannot_encode_is_named(artifact):
    words = Tokenizer(models.WordLevel({"nothing": 0}, unk_token="[UNK]"))
    words.save(str(artifact / "query_encoder" / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer\.json: can't encode"):
        load_artifact(artifact)


def test_it_is_part_of_what_the_artifact_is(artifact):
    before = load_artifact(artifact).sha256
    onnx.save(text_encoder(24, np.ones((340, 24), np.float32)), artifact / "query_encoder" / "model.onnx")
    assert load_artifact(artifact).sha256 != before
