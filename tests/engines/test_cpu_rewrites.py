"""The CPU's rewrites apply to every attention of a ViT that they fit, and change nothing of what it computes."""

from collections import Counter

import msgspec
import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.cpu_rewrites import rewrite_for_cpu
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from liteframe.export.trace import WeightsFile, trace_decoder, trace_encoder
from onnx import numpy_helper

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


def test_attention_whose_sequences_are_joined_on_the_way_is_left_alone():
    """The products are of 5 tokens, the attention over 10: MultiHeadAttention would see 5."""

    def reshape(x, shape):
        return oh.make_node("Reshape", [x, shape], [f"{x}_{shape}"])

    def model_of(joined):
        nodes = [reshape(name, "apart") for name in "qkv"]
        nodes += [oh.make_node("Transpose", [f"{x}_apart"], [f"{x}_heads"], perm=[0, 2, 1, 3]) for x in "qkv"]
        nodes.append(oh.make_node("Attention", [f"{x}_heads" for x in "qkv"], ["attended"], name="attn/Attention"))
        nodes.append(oh.make_node("Transpose", ["attended"], ["last"], perm=[0, 2, 1, 3]))
        nodes.append(oh.make_node("Reshape", ["last", "together"], ["out"]))
        shapes = {"apart": [-1, joined, 2, 4], "together": [-1, 5, 8]}
        graph = oh.make_graph(
            nodes,
            "attention",
            [oh.make_tensor_value_info(x, onnx.TensorProto.FLOAT, ["frames", 5, 8]) for x in "qkv"],
            [oh.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["frames", 5, 8])],
            [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()],
        )
        return ir.serde.deserialize_model(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 24)]))

    assert [rewrite_for_cpu(model_of(joined)) for joined in (5, 10)] == [1, 0]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"rope_scaling": YARN}, {"num_key_value_heads": 4}], ids=str
)
def test_attention_over_a_cache_becomes_group_query_attention_and_logits_and_caches_stay(
    tmp_path, small_decoder, options
):
    decoder = small_decoder(**options)
    graph = write(tmp_path, trace_decoder(decoder, "fused"))
    model = ir.load(graph)
    assert rewrite_for_cpu(model) == LAYERS
    compiled, _ = compile_graph(graph, tmp_path / "engine.onnx", "CPUExecutionProvider")
    found = operators(compiled)
    assert (found["GroupQueryAttention"], found["RotaryEmbedding"]) == (LAYERS, 2 * LAYERS)
    assert not {"Attention", "TensorScatter", "Transpose", "Neg"} & found.keys()
    engine, capacity = ort.InferenceSession(compiled), 24
    caches, position = decoder.empty_caches(capacity), 0
    names = [value.name for value in engine.get_inputs()][2:]
    ours = {name: cache.numpy() for name, cache in zip(names, caches, strict=True)}
    for length in (7, 1, 5, 1, 10):  # up to the last position
        embeddings, index = torch.randn(1, length, 64), torch.tensor([position])
        with torch.no_grad():
            expected, caches = decoder(embeddings, index, caches)
        logits, *updated = engine.run(None, {"inputs_embeds": embeddings.numpy(), "write_index": index.numpy()} | ours)
        ours, position = dict(zip(names, updated, strict=True)), position + length
        assert np.abs(logits - expected.numpy()).max() <= 1e-5 * expected.abs().max()
        for cache, (name, updated_cache) in zip(caches, ours.items(), strict=True):
            assert updated_cache.shape[2] == capacity, name
            assert np.abs(updated_cache - cache.numpy())[:, :, :position].max() <= 1e-5 * cache.abs().max(), name


def test_attention_that_is_written_otherwise_is_left_alone(tmp_path, small_decoder):
    """A cosine that is not the same for both channels of a pair, another scale, no causal mask."""
    graph = write(tmp_path, trace_decoder(small_decoder(), "fused"))

    def twist_angles(model):
        concat = next(node for node in model.graph if node.op_type == "Concat" and node.name.startswith("model/"))
        doubled = ir.node("Add", [concat.inputs[0], concat.inputs[0]], name="twice")
        doubled.outputs[0].dtype, doubled.outputs[0].shape = concat.inputs[0].dtype, concat.inputs[0].shape
        model.graph.insert_before(concat, doubled)
        concat.replace_input_with(1, doubled.outputs[0])

    def for_each_attention(change):
        return lambda model: [change(node.attributes) for node in model.graph if node.op_type == "Attention"]

    changes = {
        "angles": twist_angles,
        "scale": for_each_attention(lambda attributes: attributes.add(ir.AttrFloat32("scale", 0.5))),
        "not causal": for_each_attention(lambda attributes: attributes.add(ir.AttrInt64("is_causal", 0))),
    }
    for name, change in changes.items():
        model = ir.load(graph)
        change(model)
        before = Counter(node.op_type for node in model.graph)
        assert rewrite_for_cpu(model) == 0, name
        assert Counter(node.op_type for node in model.graph) == before, name


def test_heads_of_a_size_that_the_kernel_refuses_stay_in_attention(tmp_path, small_decoder):
    graph = write(tmp_path, trace_decoder(small_decoder(head_dim=6), "fused"))
    assert rewrite_for_cpu(ir.load(graph)) == 0


def test_the_cuda_provider_gets_no_operators_of_the_cpus(tmp_path):
    vit = ViTConfig(
        image_size=(28, 28), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    encoder = VideoEncoder(EncoderConfig(backbone=vit, output_size=24, reducer="none")).eval()
    graph = write(tmp_path, trace_encoder(encoder, "fused"))
    compiled, _ = compile_graph(graph, tmp_path / "engine.onnx", "CUDAExecutionProvider")
    assert all(node.domain in ("", "ai.onnx") for node in ir.load(compiled).graph)
