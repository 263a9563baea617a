"""The CPU's rewrites apply to every attention of a ViT that they fit, and change nothing of what it computes."""

from collections import Counter

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.cpu_rewrites import rewrite_for_cpu
from liteframe.export.models.decoder import Decoder, DecoderConfig
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from liteframe.export.trace import WeightsFile, trace_decoder, trace_encoder

LAYERS = 2


def write(tmp_path, model):
    with WeightsFile(tmp_path / "graph.data") as weights:
        weights.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def operators(path):
    return Counter(node.op_type for node in ir.load(path).graph)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": True}, {"norm": "rms_norm"}], ids=str)
def test_every_attention_becomes_multi_head_attention_and_the_tokens_stay(tmp_path, options):
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=(56, 28), hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48
    )
    backbone = msgspec.structs.replace(vit, **options)
    encoder = VideoEncoder(EncoderConfig(backbone=backbone, output_size=24, reducer="none")).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    graph = write(tmp_path, trace_encoder(encoder, "fused"))
    model = ir.load(graph)
    cut = options.get("qkv_bias", True)
    assert rewrite_for_cpu(model) == (2 if cut else 1) * LAYERS
    compiled, _ = compile_graph(graph, tmp_path / "engine.onnx", "CPUExecutionProvider")
    assert not list(tmp_path.glob(".*"))
    found = operators(compiled)
    assert found["MultiHeadAttention"] == LAYERS
    assert not found["Attention"]
    assert found["Split"] == (0 if cut else LAYERS)
    names = {node.name for node in ir.load(compiled).graph}
    for layer in range(LAYERS):
        assert f"backbone.blocks.{layer}.attn/MultiHeadAttention" in names
        assert all((f"backbone.blocks.{layer}.attn.qkv/MatMul_{part}" in names) == cut for part in "qkv")
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 56, 28, 3), dtype=np.uint8)
    (tokens,) = ort.InferenceSession(compiled).run(None, {"frames": frames})
    with torch.no_grad():
        expected = encoder(torch.from_numpy(frames)).numpy()
    assert np.abs(tokens - expected).max() <= 1e-5 * np.abs(expected).max()


def test_causal_attention_over_a_cache_is_left_alone(tmp_path):
    config = DecoderConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=64,
    )
    graph = write(tmp_path, trace_decoder(Decoder(config).eval(), "fused"))
    before = operators(graph)
    model = ir.load(graph)
    assert rewrite_for_cpu(model) == 0
    assert Counter(node.op_type for node in model.graph) == before


def test_the_cuda_provider_gets_no_operators_of_the_cpus(tmp_path):
    vit = ViTConfig(
        image_size=(28, 28), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    encoder = VideoEncoder(EncoderConfig(backbone=vit, output_size=24, reducer="none")).eval()
    graph = write(tmp_path, trace_encoder(encoder, "fused"))
    compiled, _ = compile_graph(graph, tmp_path / "engine.onnx", "CUDAExecutionProvider")
    assert all(node.domain in ("", "ai.onnx") for node in ir.load(compiled).graph)
