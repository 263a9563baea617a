"""One decoder for Qwen2/2.5, Qwen3 and Llama/SmolLM2, with an explicit KV cache.

    inputs_embeds (1, S, D) --layers, each writing S keys and values at write_index--> norm --last position--> logits

Parameter names are those of the published checkpoints (`model.layers.0.self_attn.q_proj.weight`, ...), which are also
the names LoRA adapters use. The same graph prefills chunks and decodes single tokens.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import cached_attention
from .rope import inverse_frequencies, rotate


class DecoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fields and their names are those of the checkpoints' config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] = msgspec.field(default_factory=dict)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, C) -> rotated queries (B, heads, S, D), rotated keys and values (B, kv_heads, S, D)"""
        b, s = x.shape[:2]
        q, k, v = (p(x).reshape(b, s, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin, k_cache, v_cache, write_index):
        out, k_cache, v_cache = cached_attention(*self.project(x, cos, sin), k_cache, v_cache, write_index)
        return self.o_proj(out.transpose(1, 2).flatten(2)), k_cache, v_cache


class GatedMLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x, cos, sin, k_cache, v_cache, write_index):
        attention, k_cache, v_cache = self.self_attn(self.input_layernorm(x), cos, sin, k_cache, v_cache, write_index)
        x = x + attention
        return x + self.mlp(self.post_attention_layernorm(x)), k_cache, v_cache


class DecoderModel(nn.Module):
    inverse_frequency: Tensor

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        frequency, self.rope_factor = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings
        )
        self.register_buffer("inverse_frequency", frequency, persistent=False)

    def rotation(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions (B, S) -> cosines and sines (B, 1, S, D)"""
        angle = position[:, None, :, None].float() * self.inverse_frequency
        angle = torch.cat([angle, angle], dim=-1)
        cos, sin = angle.cos() * self.rope_factor, angle.sin() * self.rope_factor
        return cos.to(dtype), sin.to(dtype)

    def forward(self, x: Tensor, write_index: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cos, sin = self.rotation(write_index[:, None] + torch.arange(x.shape[1])[None], x.dtype)
        updated = []
        for i, layer in enumerate(self.layers):
            x, k_cache, v_cache = layer(x, cos, sin, *caches[2 * i : 2 * i + 2], write_index)
            updated += [k_cache, v_cache]
        return self.norm(x), updated


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, inputs_embeds: Tensor, write_index: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, vocab) of the last of S positions, and the updated caches. Graphs have B = 1.

        Args:
            inputs_embeds: (B, S, D).
            write_index: int64 (1,), how many positions the caches already hold.
            caches: k and v of each layer in turn; their shape depends on the dialect (`attention.cached_attention`).
        """
        x, updated = self.model(inputs_embeds, write_index, caches)
        return self.lm_head(x[:, -1]), updated

    def empty_caches(self, length: int, batch: int = 1) -> list[Tensor]:
        """Zeroed caches of `length` positions: the capacity in the `fused` dialect, 0 at the start in `plain`."""
        c = self.config
        shape = (batch, c.num_key_value_heads, length, c.head_dim)
        return [torch.zeros(shape, dtype=self.lm_head.weight.dtype) for _ in range(2 * c.num_hidden_layers)]
