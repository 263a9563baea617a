"""Encoders with each reducer as graphs: what they compute in both dialects, what compiles, what stays FP32."""

import math

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from liteframe.calib.placement import plan
from liteframe.engines.compile_tensorrt import compile_graph
from liteframe.engines.package import Profile, TensorSpec
from liteframe.export.check_plain import check_plain
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.reducers import REDUCERS, TOKEN_REDUCERS
from liteframe.export.models.vit import ViTConfig
from liteframe.export.trace import WeightsFile, trace_encoder

DIALECTS = ("fused", "plain")
OTHERS = [name for name in REDUCERS if name not in ("wap", "none")]  # these have tests of their own
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def make_encoder(name, side=112, size=16, shuffle=2, ratio=None):
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=(side, side),
        hidden_size=size,
        num_hidden_layers=2,
        num_attention_heads=size // 8 if size < 64 else size // 64,
        intermediate_size=size * 2,
    )
    config = EncoderConfig(backbone=vit, output_size=24, reducer=name, window=(1, 2, 2), ratio=ratio, shuffle=shuffle)
    encoder = VideoEncoder(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if size < 64 else size**-0.5)
    return encoder


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Encoders' graphs by name of the reducer and dialect, each exported once."""
    folder, made = tmp_path_factory.mktemp("reducers"), {}

    def get(name, dialect, **size):
        path = folder / f"{name}.{dialect}.{'.'.join(map(str, size.values()))}.onnx"
        if path not in made:
            with WeightsFile(path.with_suffix(".data")) as weights:
                weights.save(trace_encoder(make_encoder(name, **size), dialect), path)
            made[path] = path
        return path

    return get


@every_dialect
@pytest.mark.parametrize("name", OTHERS)
def test_onnx_runtime_computes_what_torch_does(graph, name, dialect):
    path, encoder = graph(name, dialect), make_encoder(name)
    if dialect == "plain":
        check_plain(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for clips in (1, 3):
        frames = np.random.default_rng(clips).integers(0, 256, (clips, 4, 112, 112, 3), dtype=np.uint8)
        (tokens,) = session.run(None, {"frames": frames})
        with torch.no_grad():
            expected = encoder(torch.from_numpy(frames)).numpy()
        assert tokens.shape == (clips, 4 * 16 // 4, 24)
        assert np.abs(tokens - expected).max() <= 1e-5 * np.abs(expected).max()


@every_dialect
@pytest.mark.parametrize("name", TOKEN_REDUCERS)
def test_onnx_runtime_chooses_the_tokens_that_torch_does(graph, name, dialect):
    """144 tokens a frame: more than PruMerge has neighbours, and 9 of them become one, which is not by halving only."""
    size = {"side": 168, "shuffle": 1, "ratio": 9}
    session = ort.InferenceSession(graph(name, dialect, **size), providers=["CPUExecutionProvider"])
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 168, 168, 3), dtype=np.uint8)
    (tokens,) = session.run(None, {"frames": frames})
    with torch.no_grad():
        expected = make_encoder(name, **size)(torch.from_numpy(frames)).numpy()
    assert tokens.shape == (2, 4 * 144 // 9, 24)
    assert np.abs(tokens - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", TOKEN_REDUCERS)
def test_the_number_of_tokens_is_fixed(graph, name):
    for dialect in DIALECTS:
        (tokens,) = ir.load(graph(name, dialect)).graph.outputs
        assert [getattr(size, "value", size) for size in tokens.shape] == ["clips", 16, 24]


@pytest.mark.parametrize("name", TOKEN_REDUCERS)
def test_in_fp16_the_reducer_stays_fp32_and_nothing_else_does_for_it(graph, name):
    model = ir.load(graph(name, "fused"))
    made = plan(model, "fp16", "fp16", {})
    reducer = [str(node.name) for node in model.graph if str(node.name).startswith("reducer/")]
    assert {made.types.get(node, "fp32") for node in reducer} == {"fp32"}
    assert {node.rpartition("/")[0] for node, why in made.islands.items() if why == "selection"} == {"reducer"}
    assert made.types["projector.fc1/MatMul"] == "fp16"


def compiled(path, side):
    shape = [4, side, side, 3]
    profile = Profile(min=[1, *shape], opt=[1, *shape], max=[2, *shape])
    spec = TensorSpec(name="frames", dtype="uint8", shape=["clips", *shape], profile=profile)
    return compile_graph(path, [spec], "tensorrt-rtx", ["8.0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in TOKEN_REDUCERS])
def test_tensorrt_compiles_it(graph, name):
    assert compiled(graph(name, "fused"), 112).proof.found.keys() == {"fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKEN_REDUCERS)
def test_tensorrt_compiles_it_at_the_teachers_grid(graph, name):
    path = graph(name, "fused", side=448, size=256)
    assert compiled(path, 448).proof.found.keys() == {"fp32"}
    assert ir.load(path).graph.outputs[0].shape[1] == math.prod((4, 16, 16)) // 4
