"""ToMe (Bolya et al.): tokens at even places each look for their most similar one at an odd place; the most similar
pairs become one token, their mean by the number of patches inside.

    tokens of a clip, n --match, merge min(n - wanted, n // 2) pairs--> ... --> wanted

The original merges inside a ViT. Behind it, the metric is the tokens themselves, and matching is repeated until no more
are left than wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenReducer, places, refuse_rest, refuse_sorting, take


def match(metric: Tensor, pairs: int, class_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens merge: the even ones of the most similar pairs, each with its odd one.

    Args:
        metric: (B, N, C), compared by cosine.
        pairs: how many merge, at most half of the tokens (without CLS).
        class_token: whether the first token is CLS, which stays; others then keep their order.

    Returns:
        int64 `unmerged` (B, even - pairs) and `source` (B, pairs), which number even tokens, both by falling
        similarity, and `target` (B, pairs), which numbers odd ones.
    """
    metric = metric / (metric * metric).sum(-1, keepdim=True).sqrt()
    even, odd = metric[:, ::2], metric[:, 1::2]
    scores = even @ odd.transpose(1, 2)
    if class_token:
        first = torch.arange(scores.shape[1], device=scores.device)[:, None] == 0
        scores = torch.where(first, -torch.inf, scores)
    best, partner = scores.topk(1)  # of equals the first, as argmax
    order = best.squeeze(2).topk(even.shape[1])[1]
    source, unmerged = order[:, :pairs], order[:, pairs:]
    if class_token:
        unmerged = unmerged.sort()[0]
    return unmerged, source, partner.squeeze(2).gather(1, source)


def merge(x: Tensor, size: Tensor, matched: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One step of merging.

    Args:
        x: (B, N, C).
        size: (B, N, 1), how many patches each token holds.

    Returns:
        x and size (B, N - pairs, ...): unmerged even tokens in the order of `matched`, then all odd ones.
    """
    unmerged, source, target = matched
    even, odd = x[:, ::2], x[:, 1::2]
    even_size, odd_size = size[:, ::2], size[:, 1::2]
    # a product with ones where tokens merge, for sums into chosen places are beyond the plain dialect
    into = places(target, odd.shape[1]).to(x.dtype).transpose(1, 2)  # (B, odd, pairs)
    source_size = take(even_size, source)
    total = odd_size + into @ source_size
    merged = (odd * odd_size + into @ (take(even, source) * source_size)) / total
    if unmerged.shape[1] == 0:
        return merged, total
    return torch.cat([take(even, unmerged), merged], 1), torch.cat([take(even_size, unmerged), total], 1)


class ToMe(TokenReducer):
    """Over all tokens of a clip; its one unit has them in the order of their last odd place."""

    def __init__(self, frames: int, grid: tuple[int, int], shuffle: int, ratio: int):
        super().__init__(frames, grid, shuffle, ratio)
        refuse_rest(frames * self.per_frame, ratio, "clip")
        refuse_sorting(-(-frames * self.per_frame // 2))
        self.units, self.tokens = 1, frames * self.per_frame // ratio

    def forward(self, tokens: Tensor, q: Tensor, k: Tensor) -> Tensor:
        x = tokens.reshape(-1, self.frames * self.per_frame, tokens.shape[-1])
        size = torch.ones_like(x[:, :, :1])
        while (left := x.shape[1]) > self.tokens:
            x, size = merge(x, size, match(x, min(left - self.tokens, left // 2)))
        return x
