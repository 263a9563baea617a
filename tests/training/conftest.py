import json
import shutil
from dataclasses import replace

import cv2
import msgspec
import numpy as np
import pytest
import torch
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.vit import ViTConfig
from liteframe.training.backgrounds import Backgrounds
from liteframe.training.loop import Recipe
from safetensors.torch import load_file, save_file
from train_demo import SMOKE, Stages


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


@pytest.fixture(scope="session")
def plan():
    return replace(
        SMOKE,
        width=8,
        heads=1,
        tested=3,
        distil=Recipe(steps=6, batch=8, peak_lr=1e-3, warmup=2, save_every=2),
        ground=Recipe(steps=4, batch=4, peak_lr=1e-3, warmup=1, save_every=2),
        align=Recipe(steps=4, batch=2, peak_lr=1e-3, warmup=1, save_every=2),
    )


@pytest.fixture(scope="session")
def footage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("a", "b", "c")):
        photo = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        cv2.imwrite(str(folder / f"{name}.png"), cv2.resize(photo, (80, 60)))
    return lambda split: Backgrounds([folder / f"{'abc'[len(split) % 3]}.png"])


@pytest.fixture(scope="session")
def trained(base, plan, footage, tmp_path_factory):
    """The folder of the demo's training, run to its end."""
    folder = tmp_path_factory.mktemp("trained")
    assert Stages(base, folder, plan, footage, minutes=10).run()
    return folder
