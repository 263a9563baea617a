"""Writes what was trained as an artifact folder that `export/build_engine.py` takes as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..engines.package import InputError, new_folder
from ..export.artifact import Artifact
from ..export.checkpoint import Checkpoint
from ..export.layouts import HfNames, LiteFrameNames, OriginalNames
from ..export.models.decoder import Decoder
from ..export.models.encoder import VideoEncoder

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def check_base(base: Path) -> None:
    """Raises InputError when the artifact has an adapter already, beside which no other could be put."""
    if (base / "adapter").exists():
        raise InputError(f"{base / 'adapter'}: there is an adapter already; merge it into the language model first")


def save_adapter(lora: peft.LoraModel, folder: Path) -> None:
    """In PEFT's format, in FP16: adapter_config.json and adapter_model.safetensors."""
    state = peft.get_peft_model_state_dict(lora)
    folder.mkdir()
    lora.peft_config["default"].save_pretrained(str(folder))
    tensors = {f"base_model.{name}": value.half().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def load_adapter(lora: peft.LoraModel, folder: Path) -> None:
    """What `save_adapter` wrote. Raises InputError when it is of another language model."""
    path = folder / "adapter_model.safetensors"
    try:
        state = {name.removeprefix("base_model."): value for name, value in load_file(path).items()}
        if state.keys() != peft.get_peft_model_state_dict(lora).keys():
            raise InputError(f"{path}: adapts other layers than this language model's")
        peft.set_peft_model_state_dict(lora, state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: can't be put on this language model ({error})") from None


def write_artifact(base: Path, artifact: Artifact, lora: peft.LoraModel | None, output: Path, notice: str = "") -> None:
    """A LiteFrame folder: the base's language model and tokenizer, this encoder in FP16, this adapter.

    Args:
        base: where the artifact was loaded from; its own encoder is left out.

    Raises:
        InputError: see `check_base`; or `output` exists.
    """
    check_base(base)
    config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    with new_folder(output) as folder:
        for path in sorted(base.iterdir()):
            if path.is_file() and ".safetensors" not in path.name and path.name != CONFIG:
                shutil.copyfile(path, folder / path.name)
        ours = {**_liteframe(config), "encoder": _as_trained(artifact.encoder), "notice": notice}
        (folder / CONFIG).write_text(json.dumps(ours, indent=1), encoding="utf-8")
        tensors = _decoder(base, config["model_type"], artifact.decoder)
        for parameter, value in artifact.encoder.named_parameters():
            (stored,) = LiteFrameNames().encoder(parameter)
            tensors[stored] = value.detach().half().cpu()
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
        if lora is not None:
            save_adapter(lora, folder / "adapter")


def _liteframe(config: dict[str, Any]) -> dict[str, Any]:
    """What an artifact's config says of all but its encoder, as a LiteFrame folder says it."""
    if config["model_type"] == "liteframe":
        return config
    text = config["text_config" if config["model_type"] == "internvl" else "llm_config"]
    tied = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    return {"model_type": "liteframe", "version": 1, "decoder": {**text, "tie_word_embeddings": tied}}


def _as_trained(encoder: VideoEncoder) -> Any:
    """Its config; position embeddings are those of the size it runs at."""
    config = msgspec.to_builtins(encoder.config)
    backbone = config["backbone"]
    backbone.get("vit", backbone)["pretrained_image_size"] = None
    return config


def _decoder(base: Path, model_type: str, decoder: Decoder) -> dict[str, torch.Tensor]:
    """The language model's tensors as the base stores them; of a GGUF file none, which is a file of its own."""
    checkpoint = Checkpoint(base)
    names: LiteFrameNames | OriginalNames | HfNames = OriginalNames()
    if model_type != "internvl_chat":
        names = LiteFrameNames() if model_type == "liteframe" else HfNames(checkpoint.files)
    out = {}
    for parameter in (n.replace(".base_layer", "") for n, _ in decoder.named_parameters() if ".lora_" not in n):
        (stored,) = names.decoder(parameter)
        if stored in checkpoint:
            out[f"decoder.{parameter}"] = checkpoint.stored(stored)
    return out
