"""How published checkpoints name things: each layout's config becomes ours, and our parameter names become its own.

InternVL, original    vision_model.encoder.layers.0.attn.qkv.weight    mlp1.0.weight    language_model.model...
InternVL, -hf         vision_tower.encoder.layer.0.attention.q_proj... multi_modal_projector... language_model...
LiteFrame             encoder.backbone.vit.blocks.0.attn.qkv.weight    encoder.projector...     decoder.model...
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from .models.decoder import DecoderConfig
from .models.encoder import EncoderConfig
from .models.vit import ViTConfig

_Config = TypeVar("_Config", DecoderConfig, ViTConfig)

# what each family of language models fixes without saying so in config.json
DECODER_FAMILIES: dict[str, dict[str, bool]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "llama": {},
}
INTERNVL_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """From the config.json of a Qwen2/2.5, Qwen3, Llama or SmolLM2 checkpoint, of any transformers version.

    Raises:
        ValueError: an architecture or a feature that the decoder does not have.
        KeyError: a field is missing.
    """
    family = config.get("model_type")
    if family not in DECODER_FAMILIES:
        raise ValueError(f"language model {family!r} is not supported, expected one of {', '.join(DECODER_FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"language model activation {config['hidden_act']!r} is not supported, expected 'silu'")
    if config.get("use_sliding_window"):
        raise ValueError("sliding-window attention is not supported")
    size, heads = (_positive(config, name) for name in ("hidden_size", "num_attention_heads"))
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    features = DECODER_FAMILIES[family]
    attention_bias = bool(config.get("attention_bias", False))
    return _make(
        DecoderConfig,
        hidden_size=size,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or size // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=rope,
        qkv_bias=features.get("qkv_bias", attention_bias),
        output_bias=attention_bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=features.get("qk_norm", False),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _make(kind: type[_Config], **fields: Any) -> _Config:
    """Unlike the class itself, checks the fields' types. Raises ValueError that names the field."""
    return msgspec.convert(fields, kind)


def _positive(config: dict[str, Any], name: str) -> int:
    value = config[name]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")
    return value


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, expected an object")
    return value


def _size(config: dict[str, Any], name: str) -> tuple[int, int]:
    """Height and width, of one number or of two."""
    value = config[name]
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"{name} is {value!r}, expected an integer, or height and width")
    return sides[0], sides[1]


def internvl_encoder_config(config: dict[str, Any], hf: bool) -> EncoderConfig:
    """From the config.json of an InternVL checkpoint, with WAP 16x behind the tower.

    Raises:
        ValueError: a feature that the encoder does not have.
        KeyError: a field is missing.
    """
    vision = _section(config, "vision_config")
    layer = config.get("vision_feature_layer" if hf else "select_layer", -1)
    if layer != -1:
        raise ValueError(f"features of vision layer {layer} are not supported, expected the last layer, -1")
    if not hf and config.get("ps_version", "v1") != "v2":  # v1 is the default of OpenGVLab's own code
        raise ValueError(f"pixel shuffle ps_version {config.get('ps_version', 'v1')!r} is not supported, expected 'v2'")
    if hf and config.get("vision_feature_select_strategy", "default") != "default":
        raise ValueError("a vision_feature_select_strategy other than 'default' is not supported")
    if hf and config.get("projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"projector activation {config['projector_hidden_act']!r} is not supported, expected 'gelu'")
    if hf and not vision.get("use_absolute_position_embeddings", True):
        raise ValueError("a vision tower without absolute position embeddings is not supported")
    activation = vision.get("hidden_act", "gelu")
    if activation not in INTERNVL_ACTIVATIONS:
        raise ValueError(f"vision activation {activation!r} is not supported")
    stored = _size(vision, "image_size")
    run = _size(config, "force_image_size") if config.get("force_image_size") else stored
    ratio = config.get("downsample_ratio", 0.5)
    if ratio not in (1, 1 / 2, 1 / 4):
        raise ValueError(f"downsample_ratio {ratio!r} is not supported, expected 1, 0.5 or 0.25")
    vit = _make(
        ViTConfig,
        image_size=run,
        pretrained_image_size=stored if stored != run else None,
        patch_size=_size(vision, "patch_size")[0],
        hidden_size=vision["hidden_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        intermediate_size=vision["intermediate_size"],
        activation=INTERNVL_ACTIVATIONS[activation],
        norm=vision.get("norm_type", "layer_norm" if hf else "rms_norm"),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        qkv_bias=vision.get("attention_bias" if hf else "qkv_bias", False),
        qk_norm=vision.get("use_qk_norm" if hf else "qk_normalization", False),
        final_norm=hf and not vision.get("use_mean_pooling", True),
    )
    text = _section(config, "text_config" if hf else "llm_config")
    return EncoderConfig(backbone=vit, output_size=_positive(text, "hidden_size"), shuffle=round(1 / ratio))


def internvl_decoder_config(config: dict[str, Any], hf: bool) -> DecoderConfig:
    """The language model's part of an InternVL config; raises as `decoder_config`."""
    made = decoder_config(_section(config, "text_config" if hf else "llm_config"))
    return msgspec.structs.replace(
        made, tie_word_embeddings=made.tie_word_embeddings or bool(config.get("tie_word_embeddings"))
    )


def _rename(rules: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    raise AssertionError(f"no rule for parameter {name}")


_ORIGINAL = (
    (r"^backbone\.class_token$", "vision_model.embeddings.class_embedding"),
    (r"^backbone\.position_embedding$", "vision_model.embeddings.position_embedding"),
    (r"^backbone\.patch_embedding\.", "vision_model.embeddings.patch_embedding."),
    (r"^backbone\.blocks\.(\d+)\.ls([12])\.weight$", r"vision_model.encoder.layers.\1.ls\2"),
    (r"^backbone\.blocks\.", "vision_model.encoder.layers."),
    (r"^projector\.norm\.", "mlp1.0."),
    (r"^projector\.fc1\.", "mlp1.1."),
    (r"^projector\.fc2\.", "mlp1.3."),
)

_HF = (
    (r"^backbone\.class_token$", "vision_tower.embeddings.cls_token"),
    (r"^backbone\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
    (r"^backbone\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
    (r"^backbone\.blocks\.(\d+)\.ls([12])\.weight$", r"vision_tower.encoder.layer.\1.lambda_\2"),
    (r"^backbone\.blocks\.(\d+)\.norm1\.", r"vision_tower.encoder.layer.\1.layernorm_before."),
    (r"^backbone\.blocks\.(\d+)\.norm2\.", r"vision_tower.encoder.layer.\1.layernorm_after."),
    (r"^backbone\.blocks\.(\d+)\.attn\.proj\.", r"vision_tower.encoder.layer.\1.attention.projection_layer."),
    (r"^backbone\.blocks\.(\d+)\.attn\.", r"vision_tower.encoder.layer.\1.attention."),
    (r"^backbone\.blocks\.", "vision_tower.encoder.layer."),
    (r"^backbone\.final_norm\.", "vision_tower.layernorm."),
    (r"^projector\.norm\.", "multi_modal_projector.layer_norm."),
    (r"^projector\.fc1\.", "multi_modal_projector.linear_1."),
    (r"^projector\.fc2\.", "multi_modal_projector.linear_2."),
)


class LiteFrameNames:
    def encoder(self, name: str) -> list[str]:
        return ["encoder." + re.sub(r"^merger\.connector\.", "merge_connector.", name)]

    def decoder(self, name: str) -> list[str]:
        return [f"decoder.{name}"]


class OriginalNames:
    def encoder(self, name: str) -> list[str]:
        return [_rename(_ORIGINAL, name)]

    def decoder(self, name: str) -> list[str]:
        return [f"language_model.{name}"]


class HfNames:
    """-hf checkpoints: published ones, and those whose keys were saved under one more `model.` prefix."""

    def __init__(self, names: Iterable[str]):
        self.nested = any(name.startswith("model.vision_tower.") for name in names)

    def encoder(self, name: str) -> list[str]:
        theirs = ("model." if self.nested else "") + _rename(_HF, name)
        if ".qkv." in theirs:
            return [theirs.replace(".qkv.", f".{part}_proj.") for part in "qkv"]
        return [theirs]

    def decoder(self, name: str) -> list[str]:
        if self.nested:
            return [re.sub(r"^model\.", "model.language_model.", name)]
        return [f"language_model.{name}"]
