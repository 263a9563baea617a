"""The gates: figures agree with what NumPy says, and a graph that computes something else does not pass."""

import numpy as np
import onnx
import pytest
import torch
from liteframe.engines.package import GateError
from liteframe.export.artifact import load_artifact
from liteframe.export.trace import WeightsFile, trace_decoder, trace_encoder
from liteframe.export.verify import CHUNKED_DIFFERENCE, COSINE, Verifier, cosine, relative_difference, sample_clips
from onnx import numpy_helper


@pytest.fixture(scope="module")
def artifact(tiny_artifact):
    return load_artifact(tiny_artifact)


@pytest.fixture(scope="module")
def verifier(artifact):
    return Verifier(artifact.encoder, artifact.decoder)


@pytest.fixture(scope="module")
def graphs(artifact, tmp_path_factory):
    """Both graphs, fused, as protobufs with their weights inside."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {}
    for name, model in {
        "encoder": trace_encoder(artifact.encoder, "fused"),
        "decoder": trace_decoder(artifact.decoder, "fused"),
    }.items():
        with WeightsFile(folder / f"{name}.data") as weights:
            weights.save(model, folder / f"{name}.onnx")
        made[name] = onnx.load(folder / f"{name}.onnx")
    return made


def changed(model, tmp_path, name, change):
    """The model with one weight replaced, in a file."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (tensor,) = (t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), name))
    onnx.save(copy, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def saved(model, tmp_path):
    onnx.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


# figures


def test_the_cosine_is_the_smallest_over_the_last_axis():
    a = np.array([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [1.0, -1.0]]])
    b = np.array([[[5.0, 0.0], [1.0, 0.0]], [[0.0, 9.0], [-1.0, 1.0]]])
    assert cosine(a, b) == pytest.approx(-1)
    assert cosine(a[:1], b[:1]) == pytest.approx(2**-0.5)
    assert cosine(a[:1, :1], b[:1, :1]) == pytest.approx(1)


def test_a_cosine_to_nothing_is_no_agreement():
    assert cosine(np.ones((1, 4)), np.zeros((1, 4))) == 0


def test_the_difference_is_relative_to_the_references_scale():
    assert relative_difference(np.array([1.0, -3.5]), np.array([1.0, -4.0])) == pytest.approx(0.125)


def test_sample_clips_are_two_and_unlike(artifact):
    clips = sample_clips(artifact.encoder)
    assert (clips.shape, clips.dtype) == ((2, 4, 56, 56, 3), np.uint8)
    noise, pattern = clips.astype(float)
    assert abs(np.diff(noise, axis=2)).mean() > 3 * abs(np.diff(pattern, axis=2)).mean()
    assert all(abs(pattern[t] - pattern[t + 1]).max() > 50 for t in range(3))  # it moves


# gates


def test_whole_graphs_pass_with_figures_at_rounding(verifier, graphs, tmp_path):
    figures = verifier.encoder(saved(graphs["encoder"], tmp_path))
    assert figures.keys() == {"cosine", "relative_difference"}
    assert figures["cosine"] >= COSINE and figures["relative_difference"] < 1e-5
    figures = verifier.decoder(saved(graphs["decoder"], tmp_path))
    assert figures["cosine"] >= COSINE and figures["chunked_difference"] <= CHUNKED_DIFFERENCE
    assert figures["greedy_tokens_equal"] == 16


@pytest.mark.parametrize(
    ("weight", "change"),
    [
        ("projector.fc1.bias", lambda w: w + 0.05),
        ("backbone.vit.blocks.1.temporal.weight", lambda w: w * 0),
        ("std", lambda w: w[::-1]),
    ],
)
def test_an_encoder_that_computes_something_else_fails(verifier, graphs, tmp_path, weight, change):
    with pytest.raises(GateError, match=r"changed\.onnx: cosine .* the gate is 0\.99999"):
        verifier.encoder(changed(graphs["encoder"], tmp_path, weight, change))


def test_a_decoder_that_computes_something_else_fails(verifier, graphs, tmp_path):
    path = changed(graphs["decoder"], tmp_path, "model.norm.weight", lambda w: w * np.linspace(0.9, 1.1, len(w)))
    with pytest.raises(GateError, match=r"changed\.onnx: cosine .* the gate is 0\.99999"):
        verifier.decoder(path)


def test_a_decoder_that_is_right_in_one_piece_and_wrong_in_chunks_fails(verifier, graphs, tmp_path):
    """One that takes its positions for granted: every chunk is rotated as if it were the first."""
    model = onnx.ModelProto()
    model.CopyFrom(graphs["decoder"])
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "always_zero"))
    for node in model.graph.node:
        if node.op_type not in ("TensorScatter", "Attention") and "write_index" in node.input:
            node.input[list(node.input).index("write_index")] = "always_zero"
    with pytest.raises(GateError, match=r"graph\.onnx: chunked prefill differs"):
        verifier.decoder(saved(model, tmp_path))


def test_a_decoder_whose_tokens_differ_fails_whatever_its_cosine(artifact, graphs, tmp_path):
    """The comparison of texts is a gate of its own."""
    verifier = Verifier(artifact.encoder, artifact.decoder)
    verifier._greedy = [verifier._greedy[0] ^ 1, *verifier._greedy[1:]]
    with pytest.raises(GateError, match=r"greedy tokens .* differ from the torch module's"):
        verifier.decoder(saved(graphs["decoder"], tmp_path))


def test_not_a_number_does_not_pass(verifier, graphs, tmp_path):
    with pytest.raises(GateError, match="cosine nan"):
        verifier.encoder(changed(graphs["encoder"], tmp_path, "projector.fc2.bias", lambda w: w * np.nan))


def test_the_module_is_back_in_its_own_dialect_afterwards(artifact, verifier):
    """The verifier must not leave a dialect behind."""
    with torch.no_grad():
        caches = artifact.decoder.empty_caches(8)
        _, updated = artifact.decoder(torch.zeros(1, 3, 24), torch.tensor([2]), caches)
    assert all(cache.shape[2] == 8 for cache in updated)
