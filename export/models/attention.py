"""Attention over whole sequences, and over a KV cache, in torch and in the two ONNX dialects.

`fused` is what compilers of TensorRT >= 10.15's generation take: Attention and TensorScatter of opset 24, the cache
updated in place in a buffer of fixed capacity. `plain` is what older ones take: matrix products and a softmax written
out, the cache grown by concatenation. In torch both dialects compute the same; they differ in the shape of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Dialect = Literal["fused", "plain"]
_dialect: Dialect = "fused"


@contextmanager
def use_dialect(dialect: Dialect) -> Iterator[None]:
    """What attention becomes, and how caches are shaped, inside this context."""
    global _dialect
    before, _dialect = _dialect, dialect
    try:
        yield
    finally:
        _dialect = before


def current_dialect() -> Dialect:
    return _dialect


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask. All (B, heads, N, D)."""
    if torch.compiler.is_exporting():
        if _dialect == "fused":
            return torch.onnx.ops.symbolic("Attention", (q, k, v), {}, dtype=q.dtype, shape=q.shape, version=24)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, write_index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention of S new positions over a cache; returns the output and the new caches.

    Args:
        q: (B, heads, S, D), rotated.
        k, v: (B, kv_heads, S, D), k rotated.
        k_cache, v_cache: `fused`: (B, kv_heads, capacity, D), valid below write_index; `plain`: (B, kv_heads, past, D),
            all of it valid.
        write_index: int64 (1,), positions already in the cache.
    """
    if _dialect == "fused":
        return _cached_attention_fused(q, k, v, k_cache, v_cache, write_index)
    return _cached_attention_plain(q, k, v, k_cache, v_cache)


def _cached_attention_fused(q, k, v, k_cache, v_cache, write_index):
    length = write_index + q.shape[2]
    if torch.compiler.is_exporting():
        symbolic = torch.onnx.ops.symbolic
        k_cache, v_cache = (
            symbolic(
                "TensorScatter", (cache, new, write_index), {"axis": 2}, dtype=q.dtype, shape=cache.shape, version=24
            )
            for cache, new in ((k_cache, k), (v_cache, v))
        )
        inputs = (q, k_cache, v_cache, None, None, None, length)
        out = symbolic("Attention", inputs, {"is_causal": 1}, dtype=q.dtype, shape=q.shape, version=24)
        return out, k_cache, v_cache
    start, end = int(write_index), int(length)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[:, :, start:end], v_cache[:, :, start:end] = k, v
    mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
    out = F.scaled_dot_product_attention(
        q, k_cache[:, :, :end], v_cache[:, :, :end], attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out, k_cache, v_cache


def _cached_attention_plain(q, k, v, k_cache, v_cache):
    k_cache, v_cache = torch.cat([k_cache, k], dim=2), torch.cat([v_cache, v], dim=2)
    (b, heads, s, d), kv_heads = q.shape, k.shape[1]
    # the query heads of a group become rows of one product with their shared key head
    grouped = q.reshape(b, kv_heads, heads // kv_heads, s, d)
    scores = grouped * d**-0.5 @ k_cache.unsqueeze(2).transpose(3, 4)  # (B, kv_heads, group, S, past+S)
    past = k_cache.shape[2] - s
    visible = torch.arange(k_cache.shape[2])[None, :] <= past + torch.arange(s)[:, None]
    scores = torch.where(visible, scores, torch.finfo(q.dtype).min)
    return (scores.softmax(-1) @ v_cache.unsqueeze(2)).reshape(b, heads, s, d), k_cache, v_cache
