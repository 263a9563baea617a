"""Writes what was trained as an artifact folder that `export/build_engine.py` takes as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import peft
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..engines.package import InputError, new_folder
from ..export.models.encoder import VideoEncoder

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def check_base(base: Path) -> dict[str, Any]:
    """The config of an artifact that another encoder and a LoRA may be put into.

    Raises:
        InputError: not a LiteFrame folder, or one that has an adapter already.
    """
    path = base / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); expected a LiteFrame folder") from None
    if not isinstance(config, dict) or config.get("model_type") != "liteframe":
        raise InputError(f"{path}: not the config of a LiteFrame folder, which training takes; see docs/artifact.md")
    if (base / "adapter").exists():
        raise InputError(f"{base / 'adapter'}: there is an adapter already; merge it into the language model first")
    return config


def save_adapter(lora: peft.LoraModel, folder: Path) -> None:
    """In PEFT's format, in FP16: adapter_config.json and adapter_model.safetensors."""
    state = peft.get_peft_model_state_dict(lora)
    folder.mkdir()
    lora.peft_config["default"].save_pretrained(str(folder))
    tensors = {f"base_model.{name}": value.half().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def write_artifact(
    base: Path, encoder: VideoEncoder, lora: peft.LoraModel | None, output: Path, notice: str = ""
) -> None:
    """The base's language model, with this encoder in FP16, and this adapter.

    Args:
        base: a LiteFrame folder; its encoder and adapter are left out.

    Raises:
        InputError: see `check_base`; or `output` exists.
    """
    config = check_base(base)
    with new_folder(output) as folder:
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name != CONFIG:
                shutil.copyfile(path, folder / path.name)
        config |= {"encoder": msgspec.to_builtins(encoder.config), "notice": notice}
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        tensors = {f"encoder.{name}": value.detach().half().cpu() for name, value in encoder.named_parameters()}
        save_file({name: value.contiguous() for name, value in {**_decoder(base), **tensors}.items()}, folder / WEIGHTS)
        if lora is not None:
            save_adapter(lora, folder / "adapter")


def _decoder(base: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys() if name.startswith("decoder.")}  # noqa: SIM118
    return out
