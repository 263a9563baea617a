"""Writes what was trained as an artifact folder that `export/build_engine.py` takes as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import peft
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..engines.package import InputError, new_folder
from ..export.models.encoder import VideoEncoder
from .align import save_adapter

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_artifact(
    base: Path, encoder: VideoEncoder, lora: peft.LoraModel | None, output: Path, notice: str = ""
) -> None:
    """The base's language model, with this encoder in FP16, and this adapter.

    Args:
        base: a LiteFrame folder; its encoder and adapter are left out.

    Raises:
        InputError: `base` is none, or `output` exists.
    """
    try:
        config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{base / CONFIG}: cannot be read as JSON ({error}); expected a LiteFrame folder") from None
    if config.get("model_type") != "liteframe":
        raise InputError(f"{base / CONFIG}: model_type is {config.get('model_type')!r}, expected liteframe")
    with new_folder(output) as folder:
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix not in (".safetensors",) and path.name != CONFIG:
                shutil.copyfile(path, folder / path.name)
        config |= {"encoder": msgspec.to_builtins(encoder.config), "notice": notice}
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        tensors = {f"encoder.{name}": value.detach().half() for name, value in encoder.named_parameters()}
        save_file({name: value.contiguous() for name, value in {**_decoder(base), **tensors}.items()}, folder / WEIGHTS)
        if lora is not None:
            save_adapter(lora, folder / "adapter")


def _decoder(base: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys() if name.startswith("decoder.")}  # noqa: SIM118
    return out
