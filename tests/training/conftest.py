import json
import shutil

import msgspec
import pytest
import torch
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def base(tiny_artifact, tmp_path_factory):
    """A frame-wise tower of 24 wide with WAP, before the tiny artifact's language model."""
    folder = tmp_path_factory.mktemp("train") / "base"
    shutil.copytree(tiny_artifact, folder)
    vit = ViTConfig(
        image_size=(32, 32),
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=8,
        num_attention_heads=3,
        intermediate_size=32,
        layer_scale=False,
    )
    torch.manual_seed(0)
    encoder = VideoEncoder(EncoderConfig(backbone=vit, output_size=24, shuffle=1))
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.startswith("decoder.")}
    tensors |= {f"encoder.{name}": value.detach().clone() for name, value in encoder.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"encoder": msgspec.to_builtins(encoder.config)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
