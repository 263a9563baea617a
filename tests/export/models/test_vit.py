"""VisionTransformer against the vision towers of transformers, on small random checkpoints."""

import pytest
import torch
from liteframe.export.models.vit import VisionTransformer, ViTConfig, interpolate_position_embedding
from published import randomised
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    InternVLVisionConfig,
    InternVLVisionModel,
)

LAYERS = 2
SMALL = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
# where our parameters lie in each checkpoint: those outside the blocks, then those of block {i}
INTERNVL = (
    {
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "class_token": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
    },
    {
        "norm1": "encoder.layer.{i}.layernorm_before",
        "attn.qkv": "encoder.layer.{i}.attention.{qkv}_proj",
        "attn.q_norm": "encoder.layer.{i}.attention.q_norm",
        "attn.k_norm": "encoder.layer.{i}.attention.k_norm",
        "attn.proj": "encoder.layer.{i}.attention.projection_layer",
        "ls1.weight": "encoder.layer.{i}.lambda_1",
        "norm2": "encoder.layer.{i}.layernorm_after",
        "mlp": "encoder.layer.{i}.mlp",
        "ls2.weight": "encoder.layer.{i}.lambda_2",
    },
)
CLIP = (
    {
        "patch_embedding": "embeddings.patch_embedding",
        "class_token": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",
    },
    {
        "norm1": "encoder.layers.{i}.layer_norm1",
        "attn.qkv": "encoder.layers.{i}.self_attn.{qkv}_proj",
        "attn.proj": "encoder.layers.{i}.self_attn.out_proj",
        "norm2": "encoder.layers.{i}.layer_norm2",
        "mlp": "encoder.layers.{i}.mlp",
    },
)
DINOV2 = (
    {
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "class_token": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
        "final_norm": "layernorm",
    },
    {
        "norm1": "encoder.layer.{i}.norm1",
        "attn.qkv": "encoder.layer.{i}.attention.{qkv}_proj",
        "attn.proj": "encoder.layer.{i}.attention.o_proj",
        "ls1.weight": "encoder.layer.{i}.layer_scale1.lambda1",
        "norm2": "encoder.layer.{i}.norm2",
        "mlp": "encoder.layer.{i}.mlp",
        "ls2.weight": "encoder.layer.{i}.layer_scale2.lambda1",
    },
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors this small, and for long when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(ours, theirs, layout):
    """Copies every parameter of `ours` from where it lies in `theirs`."""
    outside, inside = layout
    places = outside | {
        f"blocks.{i}.{our}": their.replace("{i}", str(i)) for i in range(LAYERS) for our, their in inside.items()
    }
    theirs, weights = theirs.state_dict(), {}
    for name, parameter in ours.state_dict().items():
        our = next(place for place in places if name == place or name.startswith(f"{place}."))
        their = places[our] + name.removeprefix(our)
        parts = [theirs[their.replace("{qkv}", letter)] for letter in "qkv"] if "{qkv}" in their else [theirs[their]]
        weights[name] = torch.cat(parts).reshape(parameter.shape)
    ours.load_state_dict(weights)
    return ours.eval()


def random_frames(height, width):
    return torch.randn(2, height, width, 3, generator=torch.Generator().manual_seed(1))


def assert_equal_outputs(ours, theirs, frames, tolerance=1e-4):
    with torch.no_grad():
        got, expected = ours(frames), theirs(frames.permute(0, 3, 1, 2)).last_hidden_state
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def build_internvl(image_size=(56, 56), **changes):
    config = InternVLVisionConfig(
        **SMALL, **({"intermediate_size": 48, "image_size": image_size, "attention_bias": True} | changes)
    )
    return randomised(InternVLVisionModel(config))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_internvit_with_every_norm(norm, qk_norm):
    # transformers keeps 1e-6 in its QK norms whatever the config says; elsewhere a large epsilon shows where it goes
    eps = 1e-6 if qk_norm else 1e-2
    theirs = build_internvl(norm_type=norm, use_qk_norm=qk_norm, attention_bias=not qk_norm, layer_norm_eps=eps)
    config = ViTConfig(
        **SMALL,
        image_size=(56, 56),
        intermediate_size=48,
        norm=norm,
        norm_eps=eps,
        qkv_bias=not qk_norm,
        qk_norm=qk_norm,
    )
    assert_equal_outputs(load(VisionTransformer(config), theirs, INTERNVL), theirs, random_frames(56, 56))


@pytest.mark.parametrize(("ours", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_tells_the_two_gelus_apart_in_double_precision(ours, theirs):
    model = build_internvl(hidden_act=theirs).double()
    config = ViTConfig(**SMALL, image_size=(56, 56), intermediate_size=48, activation=ours)
    vit = load(VisionTransformer(config).double(), model, INTERNVL)
    assert_equal_outputs(vit, model, random_frames(56, 56).double(), tolerance=1e-10)


@pytest.mark.parametrize("image_size", [(28, 28), (84, 84), (42, 70), (70, 28)])
def test_equals_internvit_at_another_image_size(image_size):
    theirs = build_internvl(image_size=(56, 56))
    pretrained = ViTConfig(**SMALL, image_size=(56, 56), intermediate_size=48)
    config = ViTConfig(**SMALL, image_size=image_size, intermediate_size=48, pretrained_image_size=(56, 56))
    weights = load(VisionTransformer(pretrained), theirs, INTERNVL).state_dict()
    weights["position_embedding"] = interpolate_position_embedding(
        weights["position_embedding"], pretrained.grid, config.grid
    )
    ours = VisionTransformer(config).eval()
    ours.load_state_dict(weights)
    assert_equal_outputs(ours, theirs, random_frames(*image_size))


def test_interpolating_to_the_same_oblong_grid_changes_nothing():
    embedding = torch.randn(1 + 2 * 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpolate_position_embedding(embedding, (2, 3), (2, 3)), embedding)


def test_equals_clip():
    theirs = randomised(
        CLIPVisionModel(
            CLIPVisionConfig(**SMALL, intermediate_size=48, image_size=64, patch_size=16, layer_norm_eps=1e-2)
        )
    )
    assert theirs.config.hidden_act == "quick_gelu"
    config = ViTConfig(
        **SMALL,
        image_size=(64, 64),
        patch_size=16,
        intermediate_size=48,
        activation="quick_gelu",
        norm_eps=1e-2,
        patch_bias=False,
        layer_scale=False,
        pre_norm=True,
    )
    assert_equal_outputs(load(VisionTransformer(config), theirs, CLIP), theirs, random_frames(64, 64))


def test_equals_dinov2():
    theirs = randomised(Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, image_size=56, layer_norm_eps=1e-2)))
    config = ViTConfig(**SMALL, image_size=(56, 56), intermediate_size=64, norm_eps=1e-2, final_norm=True)
    assert_equal_outputs(load(VisionTransformer(config), theirs, DINOV2), theirs, random_frames(56, 56))
