"""Rotary position embedding with the published scalings of its frequencies.

`default` (Su et al. 2021), `linear` (Chen et al. 2023), `llama3` (Llama 3.1's model card), `yarn` (Peng et al. 2023),
and `dynamic` NTK, which within the length that the model was trained for is the default.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def inverse_frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels (head_dim / 2,), float32, and the factor on cos and sin.

    Args:
        theta: base of the geometric series.
        scaling: a checkpoint's `rope_scaling` / `rope_parameters`; an empty one is the default.
        max_positions: the checkpoint's `max_position_embeddings`.

    Raises:
        ValueError: the scaling's type is not one of TYPES, or one of its parameters is missing.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    for parameter, ignored in (("mscale", None), ("mscale_all_dim", None), ("partial_rotary_factor", 1.0)):
        if scaling.get(parameter, ignored) not in (ignored, None):
            raise ValueError(f"RoPE scaling with {parameter} is not supported")
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    try:
        if kind in ("default", "dynamic"):
            return frequency, 1.0
        if kind == "linear":
            return frequency / scaling["factor"], 1.0
        if kind == "llama3":
            return _llama3(frequency, scaling), 1.0
        if kind == "yarn":
            return _yarn(frequency, head_dim, theta, scaling, max_positions)
    except KeyError as missing:
        raise ValueError(f"RoPE scaling {kind!r} lacks the parameter {missing}") from None
    raise ValueError(f"RoPE scaling {kind!r} is not supported, expected one of {', '.join(TYPES)}")


def _llama3(frequency: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    original = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    turns = original * frequency / (2 * math.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


def _yarn(
    frequency: Tensor, head_dim: int, theta: float, scaling: dict[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """Channels that turn more than beta_fast times within the original context are kept, those that turn less than
    beta_slow times are interpolated, with a linear ramp over channel numbers between (Peng et al. §3.2, §3.4)."""
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or max_positions
    half = head_dim // 2

    def channel(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return frequency / factor * ramp + frequency * (1 - ramp), float(attention)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (1, heads, S, D), cos and sin (1, 1, S, D); pairs are channels i and i + D/2."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
