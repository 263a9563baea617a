"""Artifacts as they are published, written by transformers, with random weights: InternVL's layouts and ours."""

import functools
import json

import msgspec
import torch
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.liteframe import Downsampling, LiteFrameConfig
from liteframe.export.models.vit import ViTConfig
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)
from transformers.utils import logging

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": [56, 56],
    "attention_bias": True,
    "layer_norm_eps": 1e-2,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 340,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
# name: (config class of the language model, its own fields, fields of the vision tower)
MODELS = {
    "qwen2": (Qwen2Config, {}, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}, {}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}, {}),
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}, {}),
    "rms-and-qk-norms": (
        Qwen2Config,
        {},
        # transformers keeps 1e-6 in its QK norms whatever the config says
        {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "layer_norm_eps": 1e-6},
    ),
    "final-norm": (Qwen2Config, {}, {"use_mean_pooling": False}),
}
logging.disable_progress_bar()


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@functools.cache
def build_model(name):
    """A random InternVL of transformers; tests leave it as it is."""
    text, own, vision = MODELS[name]
    language_model = text(**{"tie_word_embeddings": False, **TEXT, **own})
    return randomised(
        InternVLForConditionalGeneration(
            InternVLConfig(
                vision_config=VISION | vision,
                text_config=language_model,
                tie_word_embeddings=language_model.tie_word_embeddings,
            )
        )
    )


def write_tokenizer(folder, bpe):
    tokenizer = Tokenizer(models.BPE(*bpe))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def original_tensors(model):
    """OpenGVLab's names, written down from its modelling code."""
    theirs = model.state_dict()
    vision, projector = "model.vision_tower.", "model.multi_modal_projector."
    out = {
        "vision_model.embeddings.class_embedding": theirs[f"{vision}embeddings.cls_token"],
        "vision_model.embeddings.position_embedding": theirs[f"{vision}embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        patches = theirs[f"{vision}embeddings.patch_embeddings.projection.{kind}"]
        out[f"vision_model.embeddings.patch_embedding.{kind}"] = patches
        for place, their in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            out[f"mlp1.{place}.{kind}"] = theirs[f"{projector}{their}.{kind}"]
    for i in range(model.config.vision_config.num_hidden_layers):
        their, our = f"{vision}encoder.layer.{i}", f"vision_model.encoder.layers.{i}"
        renamed = {
            f"{our}.norm1": f"{their}.layernorm_before",
            f"{our}.norm2": f"{their}.layernorm_after",
            f"{our}.attn.proj": f"{their}.attention.projection_layer",
            f"{our}.attn.q_norm": f"{their}.attention.q_norm",
            f"{our}.attn.k_norm": f"{their}.attention.k_norm",
            f"{our}.mlp.fc1": f"{their}.mlp.fc1",
            f"{our}.mlp.fc2": f"{their}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = [theirs.get(f"{their}.attention.{part}_proj.{kind}") for part in ("q", "k", "v")]
            if parts[0] is not None:
                out[f"{our}.attn.qkv.{kind}"] = torch.cat(parts)
            out |= {f"{a}.{kind}": theirs[f"{b}.{kind}"] for a, b in renamed.items() if f"{b}.{kind}" in theirs}
        out |= {f"{our}.ls{n}": theirs[f"{their}.lambda_{n}"] for n in (1, 2)}
    for name, tensor in theirs.items():
        if name.startswith("model.language_model."):
            out["language_model.model." + name.removeprefix("model.language_model.")] = tensor
    out["language_model.lm_head.weight"] = theirs["lm_head.weight"]
    return {name: tensor.clone() for name, tensor in out.items()}


def original_config(model, **changes):
    """config.json in OpenGVLab's form, with the fields that InternVL3 publishes."""
    vision, text = model.config.vision_config, model.config.text_config
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "model_type": text.model_type,
            "rope_scaling": None,
            "rope_theta": TEXT["rope_parameters"]["rope_theta"],
            "tie_word_embeddings": text.tie_word_embeddings,
            "use_sliding_window": False,
            "head_dim": getattr(text, "head_dim", None),
        }
        | {name: value for name, value in TEXT.items() if name != "rope_parameters"},
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "use_backbone_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size[0],
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size[0],
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
            "use_flash_attn": True,
        },
    } | changes


def write_original(folder, model, **changes):
    (folder / "config.json").write_text(json.dumps(original_config(model, **changes)))
    save_file(original_tensors(model), folder / "model.safetensors")


@functools.cache
def build_student():
    """A small student and a language model of transformers, with random weights."""
    backbone = LiteFrameConfig(
        vit=ViTConfig(
            image_size=(56, 56), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
        ),
        downsampling=(Downsampling(1, (2, 2, 2)), Downsampling(2, (2, 1, 1))),
        head_size=20,
    )
    encoder = randomised(VideoEncoder(EncoderConfig(backbone=backbone, output_size=24)))
    language_model = randomised(Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=False, eos_token_id=7)))
    return encoder, language_model


def write_liteframe(folder):
    encoder, language_model = build_student()
    config = {
        "model_type": "liteframe",
        "version": 1,
        "encoder": msgspec.to_builtins(encoder.config),
        "decoder": language_model.config.to_dict(),
        "prompt": {"unit_prefix": "Clip {first} to {last}: ", "unit_suffix": ";"},
        "notice": "not trained",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {f"decoder.{name}": tensor for name, tensor in language_model.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def publish(folder, layout, bpe, name="qwen2"):
    """Writes a model's folder in one of the layouts: original, hf, shards of hf, liteframe."""
    folder.mkdir()
    write_tokenizer(folder, bpe)
    if layout == "liteframe":
        write_liteframe(folder)
    elif layout == "original":
        write_original(folder, build_model(name))
    else:
        build_model(name).save_pretrained(folder, max_shard_size="60KB" if layout == "shards" else "1GB")
    return folder
