"""FastVID (Shen et al.): of each frame the tokens that CLS looks at most stay as they are; a few anchors, dense among
their like and far from anything denser, take in the others of their segment.

    salient   R - q tokens of a frame by attention      R = N / ratio, q = int(0.4 R)
    anchors   in every fourth frame, the last one first, by density x distance: so many that q a frame are left
    merged    each token that is not salient goes to the anchor most like it: w anchor + (1 - w) mean of those

Here a clip is one segment, as for the original's LLaVA-OneVision; whole videos, cut into segments, are for torch only:
fastvid_videos.py. The original adds noise of 1e-6 to densities, lest they tie; this has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TokenReducer, mark, places, refuse_rest, refuse_sorting, take

CONTEXT = 0.4  # d: share of what is kept that is anchors
ANCHOR_EVERY = 4  # p: frames
ANCHOR_WEIGHT = 0.6  # beta
DENSITY_NEIGHBOURS = 4


def density_and_score(tokens: Tensor, salient: Tensor) -> tuple[Tensor, Tensor]:
    """How many like it a token has in its frame, and its score: that times the distance to the nearest denser token.

    tokens (F, N, C), salient bool (F, N), which take no part -> density, score (F, N); a salient token's score is -1
    """
    squares = (tokens * tokens).sum(-1)
    products = tokens @ tokens.transpose(1, 2)
    distance = (squares[:, :, None] + squares[:, None] - 2 * products).clamp(min=0).sqrt() * tokens.shape[2] ** -0.5
    apart = salient[:, :, None] | salient[:, None]
    farthest = torch.where(apart, 0.0, distance).amax((1, 2), keepdim=True)
    distance = torch.where(apart, 2 * farthest, distance)
    nearest = distance.topk(DENSITY_NEIGHBOURS, largest=False)[0]
    density = (-(nearest * nearest).mean(-1)).exp()
    denser = (density[:, None] > density[:, :, None]) & ~apart
    reach = torch.where(denser, distance, farthest).amin(-1)
    return density, torch.where(salient, -1.0, density * reach)


def merge(tokens: Tensor, mergeable: Tensor, anchors: Tensor) -> Tensor:
    """Anchors with the tokens that are most like them by cosine.

    tokens (B, N, C), mergeable bool (B, N), anchors int64 (B, K) -> (B, K, C)
    """
    unit = tokens / (tokens * tokens).sum(-1, keepdim=True).sqrt()
    owner = (unit @ take(unit, anchors).transpose(1, 2)).topk(1)[1].squeeze(2)
    owned = places(owner, anchors.shape[1]) & mergeable.unsqueeze(2)
    owned = owned.to(tokens.dtype).transpose(1, 2)  # (B, K, N)
    count = owned.sum(-1, keepdim=True)
    mean = owned @ tokens / count.clamp(min=1)
    weight = (torch.ones_like(count) / (count + 1)).clamp(min=ANCHOR_WEIGHT)
    return weight * take(tokens, anchors) + (1 - weight) * mean


def anchor_frames(frames: int) -> list[int]:
    """Of a segment, in time order."""
    return [*range(frames - 1, -1, -ANCHOR_EVERY)][::-1]


def anchors_each(context: int, frames: int) -> int:
    """Anchors that each of `anchor_frames` has, of `context` a frame; what they can't share evenly is left out."""
    return context * frames // len(anchor_frames(frames))


def in_order(index: Tensor) -> Tensor:
    """Where to take from to have index int64 (B, K) rise; TensorRT 10's first parsers document TopK of floats only."""
    return index.to(torch.float32).topk(index.shape[1], largest=False)[1]


def reduce_segment(tokens: Tensor, attention: Tensor, salient: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Salient tokens and anchors of segments of one length, by their place.

    Args:
        tokens: (B, T, N, C).
        attention: (B, T, N).
        salient: tokens that each frame keeps as they are.
        context: anchors, a frame; see `anchors_each`.

    Returns:
        tokens (B, K, C); place int64 (B, K), rising, t * N + n; whether it is an anchor, bool (B, K).
    """
    frames, count, size = tokens.shape[1:]
    flat = tokens.reshape(-1, frames * count, size)
    chosen = attention.topk(salient)[1]  # (B, T, salient)
    is_salient = mark(chosen, count)
    index = [(chosen + torch.arange(frames, device=chosen.device)[:, None] * count).reshape(-1, frames * salient)]
    kept = [take(flat, index[0])]
    if anchors := anchors_each(context, frames):
        for frame in anchor_frames(frames):
            score = density_and_score(tokens[:, frame], is_salient[:, frame])[1]
            index.append(score.topk(anchors)[1] + frame * count)
            kept.append(merge(flat, ~is_salient.reshape(-1, frames * count), index[-1]))
    place = torch.cat(index, 1)
    order = in_order(place)
    return take(torch.cat(kept, 1), order), place.gather(1, order), order >= frames * salient


class FastVID(TokenReducer):
    """A clip is one segment and one unit. Attention is that of the last block's CLS; the original has SigLIP's pooling
    head."""

    def __init__(self, frames: int, grid: tuple[int, int], shuffle: int, ratio: int):
        super().__init__(frames, grid, shuffle, ratio)
        refuse_rest(self.per_frame, ratio, "frame")
        kept = self.per_frame // ratio
        self.context = int(kept * CONTEXT)
        self.salient = kept - self.context
        anchors = anchors_each(self.context, frames)
        others, needed = self.per_frame - self.salient, max(anchors, DENSITY_NEIGHBOURS)
        if anchors and needed > others:
            raise ValueError(
                f"ratio {ratio} leaves {others} of the {self.per_frame} tokens of a frame that are not salient, "
                f"{needed} are needed to have {anchors} anchors; expected a higher ratio"
            )
        self.units, self.tokens = 1, frames * self.salient + len(anchor_frames(frames)) * anchors
        refuse_sorting(self.tokens)

    def forward(self, tokens: Tensor, q: Tensor, k: Tensor) -> Tensor:
        attention, _ = self.attend(q, k)
        return reduce_segment(tokens, attention.reshape(tokens.shape[:3]), self.salient, self.context)[0]
