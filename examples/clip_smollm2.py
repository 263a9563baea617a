"""Assembles an artifact from real, published weights: CLIP ViT-B/16 + WAP 16x + SmolLM2-135M-Instruct.

    python examples/clip_smollm2.py OUTPUT

    CLIP's tower, dequantised          -> encoder.backbone.*      224 px, 14 x 14 patches, WAP 16x: 49 tokens a clip
    a seeded, untrained projector      -> encoder.projector.*     768 -> 576
    SmolLM2's GGUF file, as it is      -> decoder

The projector between the two is not trained yet, so answers can't be about the picture.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import torch
from assets import fetch
from liteframe.engines.package import new_folder
from liteframe.export.artifact import LiteFrameFolder
from liteframe.export.gguf_decoder import GGUFFile
from liteframe.export.models.encoder import VideoEncoder
from liteframe.runtime.cli import guard
from onnx import numpy_helper
from safetensors.torch import save_file

CLIP_BLOCKS = 12
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOTICE = "the projector between CLIP and SmolLM2 is not trained yet: the answer is not about this video"


def clip_parameters(path: Path) -> dict[str, torch.Tensor]:
    """CLIP's image tower in float32, by transformers' names: per-channel int8 weights become (q - zero) * scale."""
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tower = {n.removeprefix("vision_model."): v for n, v in stored.items() if n.startswith("vision_model.")}
    for node in graph.node:
        match = re.match(r"/vision_model/(encoder/layers\.\d+/\w+/\w+)/MatMul", node.name)
        if node.op_type != "MatMulInteger" or match is None:
            continue
        base = node.input[1].removesuffix("_quantized")
        quantised, zero = stored[node.input[1]].astype(np.float32), stored[f"{base}_zero_point"].astype(np.float32)
        weight = (quantised - zero) * stored[f"{base}_scale"]
        tower[match[1].replace("/", ".") + ".weight"] = weight.T
    return {name: torch.from_numpy(np.array(value, np.float32)) for name, value in tower.items()}


def encoder_parameters(clip: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """CLIP's parameters up to a block, by this project's names."""
    backbone = {
        "class_token": clip["embeddings.class_embedding"],
        "position_embedding": clip["embeddings.position_embedding.weight"],
        "patch_embedding.weight": clip["embeddings.patch_embedding.weight"],
        "pre_norm.weight": clip["pre_layrnorm.weight"],
        "pre_norm.bias": clip["pre_layrnorm.bias"],
    }
    for layer in range(blocks):
        theirs, ours = f"encoder.layers.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            backbone[f"{ours}.attn.qkv.{kind}"] = torch.cat(
                [clip[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for a, b in (
                ("attn.proj", "self_attn.out_proj"),
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                backbone[f"{ours}.{a}.{kind}"] = clip[f"{theirs}.{b}.{kind}"]
    return {f"backbone.{name}": value for name, value in backbone.items()}


def assemble(output: Path, blocks: int = CLIP_BLOCKS) -> None:
    """Writes the artifact's folder, with so many of the tower's blocks.

    Raises:
        AssetError: the weights can't be fetched.
    """
    language_model = fetch("smollm2")
    gguf = GGUFFile(language_model)
    config = {
        "model_type": "liteframe",
        "version": 1,
        "encoder": {
            "backbone": {
                "type": "vit",
                "image_size": [224, 224],
                "patch_size": 16,
                "hidden_size": 768,
                "num_hidden_layers": blocks,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "activation": "quick_gelu",
                "norm_eps": 1e-5,
                "patch_bias": False,
                "layer_scale": False,
                "pre_norm": True,
            },
            "output_size": gguf.config().hidden_size,
            "reducer": "wap",
            "window": [4, 2, 2],
            "shuffle": 1,
            "mean": CLIP_MEAN,
            "std": CLIP_STD,
        },
        "decoder": {"gguf": language_model.name},
        "prompt": {"unit_prefix": "Frames {first}-{last}: ", "unit_suffix": "\n"},
        "notice": NOTICE,
    }
    encoder = VideoEncoder(msgspec.convert(config, LiteFrameFolder).encoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.projector.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        for layer in (encoder.projector.fc1, encoder.projector.fc2):
            layer.bias.zero_()
        encoder.projector.fc2.weight.mul_(0.1)  # about the size of SmolLM2's token embeddings
    state = {name: value for name, value in encoder.state_dict().items() if name.startswith("projector.")}
    state |= encoder_parameters(clip_parameters(fetch("clip")), blocks)
    with new_folder(output) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        tensors = {f"encoder.{name}": value.contiguous() for name, value in state.items()}
        save_file(tensors, folder / "model.safetensors")
        shutil.copyfile(language_model, folder / language_model.name)


def main(arguments: list[str]) -> int:
    assemble(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
