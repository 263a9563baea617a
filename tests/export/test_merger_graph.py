"""The merger's graph and the encoder's second output: their contract, what they compute, gates, compilers, errors."""

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from liteframe.calib.placement import plan
from liteframe.calib.rewrite import apply
from liteframe.engines.compile_tensorrt import compile_graph
from liteframe.engines.package import GateError, InputError, Profile, TensorSpec
from liteframe.export.artifact import load_artifact
from liteframe.export.check_plain import check_plain
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.trace import OPSETS, WeightsFile, trace_encoder, trace_merger
from liteframe.export.verify import COSINE, Verifier, cosine
from liteframe.runtime.ort_engine import OrtEncoder, OrtMerger
from onnx import numpy_helper

DIALECTS = ("fused", "plain")
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)
every_merger = pytest.mark.parametrize("merger", ["connected", "bare"])
P, D = 2, 24  # of the tiny artifact
WIDTHS = {"connected": 48, "bare": 24}


@pytest.fixture(scope="module")
def artifact(tiny_artifact):
    """The tiny one with a second connector."""
    artifact = load_artifact(tiny_artifact)
    config: EncoderConfig = msgspec.structs.replace(artifact.encoder.config, merge_connector=True)
    encoder = VideoEncoder(config).eval()
    encoder.load_state_dict(artifact.encoder.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.merger.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    artifact.encoder = encoder
    return artifact


@pytest.fixture(scope="module")
def mergers(artifact, tiny_artifact):
    return {"connected": artifact.encoder.merger, "bare": load_artifact(tiny_artifact).encoder.merger}


@pytest.fixture(scope="module")
def folder(artifact, mergers, tmp_path_factory):
    """{connected,bare,encoder}.{fused,plain}.onnx, the dialects of each sharing one file of weights."""
    folder = tmp_path_factory.mktemp("mergers")
    for name in (*mergers, "encoder"):
        with WeightsFile(folder / f"{name}.data") as weights:
            for dialect in DIALECTS:
                traced = (
                    trace_encoder(artifact.encoder, dialect)
                    if name == "encoder"
                    else trace_merger(mergers[name], dialect)
                )
                weights.save(traced, folder / f"{name}.{dialect}.onnx")
    return folder


def random_frames(clips):
    return np.random.default_rng(clips).integers(0, 256, (clips, 4, 56, 56, 3), dtype=np.uint8)


def random_case(width, clips=3, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape, np.float32) for shape in ((clips, P, width), (width,), (P, width)))


def signature(values):
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


# form


@every_dialect
@every_merger
def test_the_mergers_inputs_and_outputs_are_the_contracts(folder, merger, dialect):
    path, width, kind = folder / f"{merger}.{dialect}.onnx", WIDTHS[merger], onnx.TensorProto.FLOAT
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert signature(model.graph.input) == [
        ("features", kind, ["clips", "patches", width]),
        ("query", kind, [1, width]),
        ("key_features", kind, [1, "patches", width]),
        ("redundancy_weight", kind, [1]),
        ("temperature", kind, [1]),
    ]
    assert signature(model.graph.output) == [("merged_tokens", kind, ["clips", D])]
    assert [entry.version for entry in model.opset_import if not entry.domain] == [OPSETS[dialect]]
    assert len(model.graph.initializer) < 12 and not model.functions
    if dialect == "plain":
        check_plain(path)


@every_dialect
def test_the_encoder_has_its_features_as_a_second_output(folder, artifact, dialect):
    path = folder / f"encoder.{dialect}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    kind = onnx.TensorProto.FLOAT
    outputs = [("visual_tokens", kind, ["clips", P, D]), ("features", kind, ["clips", P, 48])]
    assert signature(model.graph.output) == outputs
    assert not [weight.name for weight in model.graph.initializer if weight.name.startswith("merger")]
    assert "projector.fc2/MatMul" in {node.name for node in model.graph.node}
    if dialect == "plain":
        check_plain(path)


# what they compute


@every_dialect
@every_merger
@pytest.mark.parametrize("has_key", [True, False])
@pytest.mark.parametrize("clips", [1, 2, 5])
def test_onnx_runtime_merges_as_torch_does(folder, mergers, merger, dialect, clips, has_key):
    features, query, key = random_case(WIDTHS[merger], clips)
    got = OrtMerger(folder / f"{merger}.{dialect}.onnx", threads=1).merge(
        features, query, key if has_key else None, 0.7, 0.01
    )
    key = key if has_key else np.zeros_like(key)
    arrays = features, query[None], key[None], np.float32([0.7]), np.float32([0.01])
    with torch.no_grad():
        expected = mergers[merger](*map(torch.from_numpy, arrays)).numpy()
    assert got.dtype == np.float32 and got.shape == (clips, D)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@every_dialect
def test_onnx_runtime_gives_tokens_and_features(folder, artifact, dialect):
    engine, frames = OrtEncoder(folder / f"encoder.{dialect}.onnx", threads=1), random_frames(3)
    with torch.no_grad():
        expected = artifact.encoder.with_features(torch.from_numpy(frames))
    got = engine.encode_with_features(frames)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5 * theirs.abs().max())
    np.testing.assert_array_equal(engine.encode(frames), got[0])
    with pytest.raises(InputError, match="given uint8"):
        engine.encode_with_features(frames[:0])


def test_features_of_a_graph_with_one_output_are_the_tokens(tiny_artifact, tmp_path):
    with WeightsFile(tmp_path / "encoder.data") as weights:
        weights.save(trace_encoder(load_artifact(tiny_artifact).encoder, "fused"), tmp_path / "encoder.onnx")
    engine = OrtEncoder(tmp_path / "encoder.onnx", threads=1)
    tokens, features = engine.encode_with_features(random_frames(2))
    assert features is tokens
    np.testing.assert_array_equal(tokens, engine.encode(random_frames(2)))


@every_dialect
def test_features_stay_fp32_where_the_encoder_is_lowered_to_fp16(folder, artifact, dialect, tmp_path):
    model = trace_encoder(artifact.encoder, dialect)
    apply(model, plan(model, "fp16", "fp16", {}), {}, True)
    ir.save(model, tmp_path / "half.onnx")
    assert signature(onnx.load(tmp_path / "half.onnx").graph.output)[1] == (
        "features",
        onnx.TensorProto.FLOAT,
        ["clips", P, 48],
    )
    frames = random_frames(2)
    got = OrtEncoder(tmp_path / "half.onnx", threads=1).encode_with_features(frames)
    exact = OrtEncoder(folder / f"encoder.{dialect}.onnx", threads=1).encode_with_features(frames)
    assert all(cosine(*pair) >= 0.9995 for pair in zip(got, exact, strict=True))


# gates


@pytest.fixture(scope="module")
def verifiers(artifact, tiny_artifact):
    plain = load_artifact(tiny_artifact)
    return {
        "connected": Verifier(artifact.encoder, artifact.decoder),
        "bare": Verifier(plain.encoder, plain.decoder),
    }


@every_dialect
@every_merger
def test_right_graphs_pass_with_figures_at_rounding(verifiers, folder, merger, dialect):
    figures = verifiers[merger].merger(folder / f"{merger}.{dialect}.onnx")
    assert figures.keys() == {"cosine", "relative_difference"}
    assert figures["cosine"] >= COSINE and figures["relative_difference"] < 1e-4
    if merger == "connected":
        assert verifiers[merger].encoder(folder / f"encoder.{dialect}.onnx")["cosine"] >= COSINE


def changed(path, tmp_path, change):
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def scale_weights(name, factor):
    def change(graph):
        (tensor,) = (t for t in graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor)
        factors = np.linspace(1, factor, values.size).reshape(values.shape)
        tensor.CopyFrom(numpy_helper.from_array((values * factors).astype(np.float32), name))

    return change


def forget_redundancy(graph):
    (node,) = (node for node in graph.node if node.op_type == "Sub")
    node.op_type = "Add"


@pytest.mark.parametrize("change", [forget_redundancy, scale_weights("connector.fc1.bias", 1.2)])
def test_a_merger_that_computes_something_else_fails(verifiers, folder, tmp_path, change):
    path = changed(folder / "connected.fused.onnx", tmp_path, change)
    with pytest.raises(GateError, match=r"changed\.onnx: cosine .* the gate is 0\.99999"):
        verifiers["connected"].merger(path)


@pytest.mark.parametrize("factor", [3, np.nan])
def test_an_encoder_whose_features_differ_fails(verifiers, folder, tmp_path, factor):
    """Tokens that are right do not excuse them."""

    def change(graph):
        (node,) = (node for node in graph.node if "features" in node.output)
        node.output[0] = "right"
        for reader in graph.node:
            reader.input[:] = ["right" if name == "features" else name for name in reader.input]
        graph.initializer.append(numpy_helper.from_array(np.linspace(1, factor, 48, dtype=np.float32), "factors"))
        graph.node.append(onnx.helper.make_node("Mul", ["right", "factors"], ["features"]))

    path = changed(folder / "encoder.fused.onnx", tmp_path, change)
    with pytest.raises(GateError, match=r"changed\.onnx: cosine"):
        verifiers["connected"].encoder(path)


# compilers


@every_merger
def test_tensorrt_rtx_compiles_it(folder, merger):
    width = WIDTHS[merger]
    shapes = {"query": [1, width], "redundancy_weight": [1], "temperature": [1]}
    inputs = [TensorSpec(name=name, dtype="float32", shape=shape, profile=None) for name, shape in shapes.items()]
    for name, clips, most in (("features", "clips", 16), ("key_features", 1, 1)):
        profile = Profile(min=[1, 1, width], opt=[most, P, width], max=[most, P, width])
        inputs.append(TensorSpec(name=name, dtype="float32", shape=[clips, "patches", width], profile=profile))
    made = compile_graph(folder / f"{merger}.fused.onnx", inputs, "tensorrt-rtx", ["8.0"])
    assert len(made.engine) > 10_000
    assert set(made.proof.found) == {"fp32"}


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((2, P, 25))}, r"features of shape \(2, 2, 25\), expected \(clips, patches, 24\)"),
        ({"features": np.zeros((P, 24))}, r"features of shape \(2, 24\), expected \(clips, patches, 24\)"),
        ({"features": np.zeros((0, P, 24))}, "at least one clip"),
        ({"query": np.zeros((1, 24))}, r"a query of shape \(1, 24\), expected \(24,\)"),
        ({"key_features": np.zeros((1, P, 24))}, r"keyframe's features of shape \(1, 2, 24\), expected \(2, 24\)"),
        ({"temperature": 0.0}, "a temperature of 0.0"),
        ({"temperature": float("nan")}, "a temperature of nan"),
        ({"redundancy_weight": float("inf")}, "a redundancy weight of inf"),
    ],
)
def test_what_does_not_fit_is_named(folder, change, message):
    features, query, key = random_case(24)
    arguments = {"features": features, "query": query, "key_features": key}
    arguments |= {"redundancy_weight": 1.0, "temperature": 0.1} | change
    with pytest.raises(InputError, match=message):
        OrtMerger(folder / "bare.fused.onnx", threads=1).merge(**arguments)
