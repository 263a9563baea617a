"""Students with each way of mixing, from a LiteFrame folder to graphs of both dialects and an engine in FP16."""

import json
import shutil

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from liteframe.calib.clips import save_clips
from liteframe.engines import compile_tensorrt
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.package import Profile, TensorSpec
from liteframe.export.artifact import LiteFrameFolder, load_artifact
from liteframe.export.build_engine import build
from liteframe.export.check_plain import check_plain
from liteframe.export.models.encoder import VideoEncoder
from liteframe.export.models.liteframe import MIXERS
from liteframe.export.trace import WeightsFile, trace_encoder
from safetensors.torch import load_file, save_file

# LiteFrame's own is what every other test has; without a mixer there is nothing that it has not
OTHERS = [mixer for mixer in MIXERS if mixer not in ("dw_temp_conv", "none")]
DIALECTS, SOFTMAXES, CPU = ("fused", "plain"), ("Attention", "Softmax"), "CPUExecutionProvider"


@pytest.fixture(scope="module", params=OTHERS)
def artifact(request, tiny_artifact, tmp_path_factory):
    """The tiny artifact with another mixer, its parameters random."""
    folder = tmp_path_factory.mktemp(request.param) / "artifact"
    shutil.copytree(tiny_artifact, folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["backbone"]["mixer"] = request.param
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("encoder.")}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in VideoEncoder(msgspec.convert(config, LiteFrameFolder).encoder).named_parameters():
        tensors[f"encoder.{name}"] = torch.randn(parameter.shape, generator=generator) * 0.3
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def graphs(artifact, tmp_path_factory):
    """Encoder graph of each dialect."""
    folder, encoder = tmp_path_factory.mktemp("graphs"), load_artifact(artifact).encoder
    with WeightsFile(folder / "encoder.data") as weights:
        for dialect in DIALECTS:
            weights.save(trace_encoder(encoder, dialect), folder / f"{dialect}.onnx")
    return {dialect: folder / f"{dialect}.onnx" for dialect in DIALECTS}


def mixer_of(artifact):
    return json.loads((artifact / "config.json").read_text())["encoder"]["backbone"]["mixer"]


def test_both_dialects_give_the_modules_tokens_for_any_number_of_clips(artifact, graphs, tmp_path):
    encoder = load_artifact(artifact).encoder
    check_plain(graphs["plain"])
    for dialect, path in graphs.items():
        engine, _ = compile_graph(path, tmp_path / f"{dialect}.onnx", CPU)
        runs = [ort.InferenceSession(file, providers=[CPU]) for file in (path, engine)]
        for clips in (1, 3):
            frames = np.random.default_rng(clips).integers(0, 256, (clips, 4, 56, 56, 3), dtype=np.uint8)
            with torch.no_grad():
                expected = encoder(torch.from_numpy(frames)).numpy()
            for run in runs:
                (tokens,) = run.run(None, {"frames": frames})
                assert np.abs(tokens - expected).max() <= 1e-5 * np.abs(expected).max()


def test_attention_over_time_is_the_dialects(artifact, graphs):
    nodes = {dialect: onnx.load(path, load_external_data=False).graph.node for dialect, path in graphs.items()}
    over_time = {
        dialect: [n.op_type for n in found if ".temporal.block.attn/" in n.name and n.op_type in SOFTMAXES]
        for dialect, found in nodes.items()
    }
    mixed = mixer_of(artifact) == "temp_attn"
    assert over_time == {"fused": ["Attention"] * 2 * mixed, "plain": ["Softmax"] * 2 * mixed}


def test_tensorrt_takes_the_graph_for_sm80(graphs):
    shapes = Profile(*([clips, 4, 56, 56, 3] for clips in (1, 2, 4)))
    inputs = [TensorSpec(name="frames", dtype="uint8", shape=["clips", 4, 56, 56, 3], profile=shapes)]
    made = compile_tensorrt.compile_graph(graphs["fused"], inputs, "tensorrt-rtx", ["8.0"])
    assert len(made.engine) > 10_000 and set(made.proof.found) == {"fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["temp_attn"], indirect=True)  # the others have no layers that it has not
def test_a_build_in_fp16_keeps_its_norms_in_fp32(artifact, tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (6, 4, 56, 56, 3), dtype=np.uint8)
    save_clips(tmp_path / "clips.npy", clips)
    made = build(
        artifact, "a100", tmp_path / "package", 16, precision="fp16", calib=[tmp_path / "clips.npy"], allow_drift=True
    )
    graph = made.graph("encoder", "fused")
    kept = {kept.node for kept in graph.precision.kept if kept.reason == "norm" and ".temporal." in kept.node}
    assert kept == {
        f"backbone.vit.blocks.{block}.temporal.block.{norm}/LayerNormalization"
        for block in (0, 1)
        for norm in ("norm1", "norm2")
    }
    assert graph.parity["worst_cosine"] > 0.999
    assert made.engine("encoder").precision.found["fp16"] > made.engine("encoder").precision.found["fp32"]
