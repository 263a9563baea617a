"""PruMerge (Shang et al.): the patches that CLS looks at most stay, and take in the patches whose keys are like theirs.

    kept_i + sum over its 32 nearest of attention_j x_j          kept tokens, by falling attention
    sum over all that are not kept of attention_j x_j            one more

As the original's code does: nearest are sought among all tokens, kept ones included, and sums are not normalised, where
the paper has weighted means of pruned tokens. Graphs have a fixed number of tokens; the adaptive choices are for torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenReducer, mark, places, refuse_rest, refuse_sorting, take

NEIGHBOURS = 32


def merge(tokens: Tensor, attention: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
    """The kept tokens with what they take in, and the one that takes in the rest.

    tokens (B, N, C), attention (B, N), keys (B, N, C'), kept int64 (B, S) -> (B, S + 1, C)
    """
    count = tokens.shape[1]
    weighted = attention.unsqueeze(2) * tokens
    near = torch.zeros_like(attention[:, None]).expand(-1, kept.shape[1], -1).scatter(2, nearest(keys, kept), 1.0)
    rest = (~mark(kept, count)).to(tokens.dtype).unsqueeze(1)
    return torch.cat([take(tokens, kept) + near @ weighted, rest @ weighted], 1)


def nearest(keys: Tensor, kept: Tensor) -> Tensor:
    """The other tokens whose keys are most like a kept one's, by cosine.
    keys (B, N, C), kept int64 (B, S) -> int64 (B, S, NEIGHBOURS), or all there are"""
    keys = keys / (keys * keys).sum(-1, keepdim=True).sqrt()
    similarity = take(keys, kept) @ keys.transpose(1, 2)  # (B, S, N)
    return torch.where(places(kept, keys.shape[1]), -2.0, similarity).topk(min(NEIGHBOURS, keys.shape[1] - 1))[1]


def most_attended(attention: Tensor, count: int) -> Tensor:
    """attention (B, N) -> int64 (B, count), by falling attention"""
    return attention.topk(count)[1]


def outlier_ratio(attention: Tensor) -> float:
    """How much of attention (B, N) lies above its third quartile by more than 1.5 interquartile ranges, over all B."""
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return float((attention > high + 1.5 * (high - low)).double().mean())


def adaptive(attention: Tensor) -> Tensor:
    """PruMerge's own choice: as many tokens as are outliers. attention (B, N) -> int64 (B, S)

    Raises:
        ValueError: no token is an outlier.
    """
    count = int(attention.shape[1] * outlier_ratio(attention))
    if count == 0:
        raise ValueError(
            f"none of {attention.shape[1]} attention weights is an outlier; choose a fixed number of tokens"
        )
    return most_attended(attention, count)


def adaptive_plus(attention: Tensor) -> Tensor:
    """PruMerge+: the outliers, then every s-th token that is not one of them, three times as many at most.
    attention (1, N) -> int64 (1, S)

    Raises:
        ValueError: there is more than one image, no outlier, or more than a third of the tokens are.
    """
    count = attention.shape[1]
    ratio = outlier_ratio(attention)
    step = int(int(1 / ratio) / 3) if ratio else 0
    if len(attention) != 1 or step == 0:
        raise ValueError(
            f"{ratio:.3g} of {[*attention.shape]} attention weights are outliers; expected some, at most a third, "
            "of one image's"
        )
    kept = adaptive(attention)
    steps = torch.arange(0, count - 1, step, device=kept.device)
    return torch.cat([kept, steps[~mark(kept[0], count)[steps]][None]], 1)


class PruMerge(TokenReducer):
    """Frame by frame, each a unit, with a fixed number of tokens: one of them for what is not kept.

    Tokens are what comes out of the tower; the original has the last block but one.
    """

    def __init__(self, frames: int, grid: tuple[int, int], shuffle: int, ratio: int):
        super().__init__(frames, grid, shuffle, ratio)
        refuse_rest(self.per_frame, ratio, "frame")
        if self.per_frame // ratio < 2:
            raise ValueError(
                f"ratio {ratio} leaves one of the {self.per_frame} tokens of a frame; PruMerge needs two, one of them "
                "for what is not kept"
            )
        refuse_sorting(self.per_frame // ratio)
        self.units, self.tokens = frames, frames * self.per_frame // ratio

    def forward(self, tokens: Tensor, q: Tensor, k: Tensor) -> Tensor:
        attention, keys = self.attend(q, k)
        frames = tokens.reshape(-1, self.per_frame, tokens.shape[-1])
        kept = most_attended(attention, self.tokens // self.units - 1)
        return merge(frames, attention, keys, kept).reshape(-1, self.tokens, tokens.shape[-1])
