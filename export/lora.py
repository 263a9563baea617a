"""LoRA adapters in PEFT's format, merged into the decoder: W + scale * B A (Hu et al. 2021, equation 3)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.package import InputError
from .checkpoint import Checkpoint

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight$")
# features of PEFT that change what a merge computes, with the values that mean they are off
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
}


def merge_adapter(decoder: nn.Module, folder: Path) -> list[Path]:
    """Merges the adapter in `folder` into the decoder's weights in place; returns the files it read.

    Raises:
        InputError: not a LoRA adapter, a feature that is not supported, or tensors that do not fit the decoder.
    """
    config_path = folder / "adapter_config.json"
    try:
        config = json.loads(config_path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{config_path}: cannot be read as JSON ({error}); expected PEFT's adapter config") from None
    if config.get("peft_type") != "LORA":
        raise InputError(f"{config_path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for field, off in _UNSUPPORTED.items():
        if config.get(field, off[0]) not in off:
            raise InputError(
                f"{config_path}: {field} = {config[field]!r} is not supported; merge the adapter with peft"
            )
    checkpoint = Checkpoint(folder, stem="adapter_model")
    weights = {name: tensor for name, tensor in decoder.state_dict().items() if name.endswith(".weight")}
    halves: dict[str, dict[str, Tensor]] = {}
    for key in sorted(checkpoint.files):
        match = _KEY.match(key)
        target = _target(match["module"], weights) if match else None
        if match is None or target is None:
            raise InputError(f"{checkpoint.files[key]}: tensor {key} matches no weight of the decoder")
        halves.setdefault(target, {})[match["half"]] = checkpoint.read(key)
    if not halves:
        raise InputError(f"{checkpoint.source}: holds no LoRA tensors")
    for target, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{checkpoint.source}: {target} has only one of lora_A and lora_B")
        _merge(weights[target], pair["A"], pair["B"], config, target, checkpoint.source)
    return [config_path, *sorted(set(checkpoint.files.values()))]


def _target(module: str, weights: dict[str, Tensor]) -> str | None:
    """Adapters are trained on the language model alone or on the whole video model; both name it by its end."""
    for prefix in ("", "language_model.", "decoder."):
        name = module.removeprefix(prefix) + ".weight"
        if name in weights:
            return name
    nested = module.replace("model.language_model.", "model.", 1) + ".weight"
    return nested if nested in weights else None


def _merge(weight: Tensor, a: Tensor, b: Tensor, config: dict[str, Any], target: str, source: Path) -> None:
    rank = a.shape[0]
    alpha = _by_pattern(config.get("alpha_pattern"), target, config.get("lora_alpha", 8))
    declared = _by_pattern(config.get("rank_pattern"), target, config.get("r", rank))
    if declared != rank or b.shape[1] != rank:
        raise InputError(f"{source}: {target} has LoRA rank {rank}, the adapter's config says {declared}")
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise InputError(
            f"{source}: the LoRA update of {target} has shape {[b.shape[0], a.shape[1]]}, expected {list(weight.shape)}"
        )
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    with torch.no_grad():
        weight.add_(b @ a * scale)


def _by_pattern(patterns: dict[str, Any] | None, target: str, default: Any) -> Any:
    """PEFT's per-module values: a key is a regular expression for the end of the module's path."""
    module = target.removesuffix(".weight")
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
