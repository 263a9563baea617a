"""LoRA adapters in PEFT's format, merged into the decoder: W + scale * B A (Hu et al. 2021, equation 3)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from ..engines.package import InputError
from .checkpoint import Checkpoint

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight$")
# weights that PEFT saves whole beside the adapter: the head or the embedding where one of them is adapted
_WHOLE = re.compile(r"^base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight$")
# features of PEFT that change what a merge computes, with the values that mean they are off
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "kasa_config": (None,),
}
# initialisations of PEFT that change the base weights too, so that the update alone is not the whole adapter
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

_Value = TypeVar("_Value", int, float)
_Rank = Annotated[int, msgspec.Meta(ge=1)]


class _Scaling(msgspec.Struct):
    """What a merge needs of PEFT's config; its defaults are PEFT's."""

    r: _Rank = 8
    lora_alpha: float = 8.0
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    init_lora_weights: bool | str | None = True


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
    if not isinstance(config, dict):
        raise InputError(f"{config_path}: expected a JSON object, PEFT's adapter config")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{config_path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for field, off in _UNSUPPORTED.items():
        if config.get(field, off[0]) not in off:
            raise InputError(
                f"{config_path}: {field} = {config[field]!r} is not supported; merge the adapter with peft"
            )
    try:
        scaling = msgspec.convert(config, _Scaling)
        for pattern in (*(scaling.rank_pattern or ()), *(scaling.alpha_pattern or ())):
            re.compile(pattern)
    except (ValueError, re.error) as error:
        raise InputError(f"{config_path}: {error}; expected PEFT's adapter config") from None
    initial = scaling.init_lora_weights
    if isinstance(initial, str) and initial.lower().startswith(_BASE_CHANGING):
        raise InputError(
            f"{config_path}: init_lora_weights = {initial!r} is not supported, it changed the base weights; "
            "merge the adapter with peft"
        )
    checkpoint = Checkpoint(folder, stem="adapter_model")
    weights = {name: tensor for name, tensor in decoder.state_dict().items() if tensor.ndim == 2}
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}  # (the adapter's module, our weight): A and B
    for key in sorted(checkpoint.files):
        match = _KEY.match(key) or _WHOLE.match(key)
        target = _target(match["module"], weights) if match else None
        if match is None or target is None:
            raise InputError(f"{checkpoint.files[key]}: tensor {key} matches no weight of the decoder")
        if match.re is _KEY:
            halves.setdefault((match["module"], target), {})[match["half"]] = checkpoint.read(key)
        else:
            _check_shape(checkpoint.files[key], key, checkpoint.read(key), list(weights[target].shape))
            weights[target].copy_(checkpoint.read(key))
    if not halves:
        raise InputError(f"{checkpoint.source}: holds no LoRA tensors")
    for (module, target), pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{checkpoint.source}: {module} has only one of lora_A and lora_B")
        _merge(weights[target], pair["A"], pair["B"], scaling, module, checkpoint.source)
    return [config_path, *sorted(set(checkpoint.files.values()))]


def _target(module: str, weights: dict[str, Tensor]) -> str | None:
    """Adapters are trained on the language model alone or on the whole video model; both name it by its end."""
    for prefix in ("", "language_model.", "decoder."):
        name = module.removeprefix(prefix) + ".weight"
        if name in weights:
            return name
    nested = module.replace("model.language_model.", "model.", 1) + ".weight"
    return nested if nested in weights else None


def _merge(weight: Tensor, a: Tensor, b: Tensor, scaling: _Scaling, module: str, source: Path) -> None:
    alpha = _by_pattern(scaling.alpha_pattern, module, scaling.lora_alpha)
    rank = _by_pattern(scaling.rank_pattern, module, scaling.r)
    rows, columns = weight.shape
    for half, tensor, wanted in (("A", a, [rank, columns]), ("B", b, [rows, rank])):
        _check_shape(source, f"lora_{half} of {module}", tensor, wanted)
    scale = alpha / rank**0.5 if scaling.use_rslora else alpha / rank
    with torch.no_grad():
        weight.add_(b @ a * scale)


def _check_shape(source: Path, name: str, tensor: Tensor, wanted: list[int]) -> None:
    if list(tensor.shape) != wanted:
        raise InputError(
            f"{source}: {name} has shape {list(tensor.shape)}, expected {wanted} by adapter_config.json and the decoder"
        )


def _by_pattern(patterns: dict[str, _Value] | None, module: str, default: _Value) -> _Value:
    """PEFT's value for one module of the trained model: a key is a regular expression for the end of its path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
