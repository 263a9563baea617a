"""FastVID over whole videos: cut into segments where frames change, so the number of tokens depends on the video.

For torch only; engines have fastvid.py's fixed form. Three variants, as the original has for three models; they differ
in where segments' budgets go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import mark
from .fastvid import CONTEXT, anchor_frames, density_and_score, in_order, merge, reduce_segment

# tokens (K, C); place int64 (K,), rising, in the flattened input; whether it is an anchor, bool (K,)
Kept = tuple[Tensor, Tensor, Tensor]


def similarities(frames: Tensor) -> Tensor:
    """Cosine of each frame to the next. frames (T, C) -> (T - 1,)"""
    return torch.cosine_similarity(frames[:-1], frames[1:], dim=1)


def segments(frames: Tensor, fewest: int, threshold: float) -> list[slice]:
    """Frames of each segment of a video: cut at its `fewest` - 1 greatest changes (at all, if it has fewer), and
    wherever the cosine of neighbouring frames is below `threshold`.

    Args:
        frames: (T, C), one feature for each.
    """
    similarity = similarities(frames)
    greatest = similarity.topk(min(fewest - 1, len(similarity)), largest=False)[1]
    cuts = mark(greatest, len(similarity)) | (similarity < threshold)
    starts = [0, *(cuts.nonzero()[:, 0] + 1).tolist()]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(frames)], strict=True)]


def onevision(
    tokens: Tensor,
    attention: Tensor,
    frames: Tensor,
    retention: float = 0.1,
    fewest: int = 8,
    threshold: float = 0.9,
    share: float = CONTEXT,
) -> Kept:
    """For LLaVA-OneVision: each frame has the same budget.

    Args:
        tokens: (T, N, C).
        attention: (T, N).
        frames: (T, C'), global features.
        retention: share of tokens that is kept.
        fewest, threshold: see `segments`.
        share: of what is kept, that is anchors.

    Raises:
        ValueError: `retention` keeps no token of a frame; so in the other variants.
    """
    count = tokens.shape[1]
    kept = _kept(count, retention)
    context = int(kept * share)
    out = []
    for part in segments(frames, fewest, threshold):
        x, place, anchor = reduce_segment(tokens[None, part], attention[None, part], kept - context, context)
        out.append((x[0], place[0] + part.start * count, anchor[0]))
    return _joined(out)


def llava_video(
    tokens: Tensor,
    attention: Tensor,
    frames: Tensor,
    retention: float = 0.1,
    fewest: int = 8,
    threshold: float = 0.9,
    share: float = CONTEXT,
) -> Kept:
    """For LLaVA-Video: each segment has a budget, and each row of tokens ends in a newline, which stays if any of its
    row does.

    Args:
        tokens: (T, H, W + 1, C), newlines last.
        attention: (T, H * W).
        frames, retention, fewest, threshold, share: see `onevision`.
    """
    rows, columns = tokens.shape[1], tokens.shape[2] - 1
    patches = tokens[:, :, :-1].flatten(1, 2)
    kept = _kept(rows * columns, retention)
    out = []
    for part in segments(frames, fewest, threshold):
        length = part.stop - part.start
        context = int(kept * length * share)
        holders = anchor_frames(length)
        x, place, anchor = _reduce(
            patches[part],
            attention[part],
            dict(enumerate(_shares(kept * length - context, length))),
            dict(zip(holders, _shares(context, len(holders))[::-1], strict=True)),
        )
        out.append((x, place + part.start * rows * columns, anchor))
    x, place, anchor = _joined(out)
    row = place // columns
    newlines = row.unique()
    place = torch.cat([place + row, newlines * (columns + 1) + columns])
    x = torch.cat([x, tokens[:, :, -1].flatten(0, 1)[newlines]])
    order = place.argsort()
    return x[order], place[order], torch.cat([anchor, torch.zeros_like(newlines, dtype=torch.bool)])[order]


def qwen(
    tokens: Tensor,
    attention: Tensor,
    frames: Tensor,
    retention: float = 0.27,
    fewest: int = 8,
    threshold: float = 0.84,
    same: float = 0.95,
    share: float = CONTEXT,
) -> Kept:
    """For Qwen2.5-VL: each segment has a budget, which only the last of frames that hardly differ takes part in.

    Args:
        tokens: (T, N, C).
        attention: (T, N).
        frames, retention, fewest, threshold, share: see `onevision`.
        same: frames whose cosine to the next reaches this are followed by one that hardly differs.
    """
    count = tokens.shape[1]
    kept = _kept(count, retention)
    similarity = similarities(frames)
    out = []
    for part in segments(frames, fewest, threshold):
        length = part.stop - part.start
        context = max(int(kept * length * share), 1)
        last = [i for i in range(length) if i == length - 1 or similarity[part.start + i] < same]
        holders = [last[i] for i in anchor_frames(len(last))]
        anchors = [min(n, count // 2) for n in _shares(context, len(holders))[::-1]]
        anchors_of = dict(zip(holders, anchors, strict=True))
        salient = _shares(kept * length - context, len(last))
        salient_of = {i: min(n, count - anchors_of.get(i, 0)) for i, n in zip(last, salient, strict=True)}
        x, place, anchor = _reduce(tokens[part], attention[part], salient_of, anchors_of)
        out.append((x, place + part.start * count, anchor))
    return _joined(out)


def _kept(count: int, retention: float) -> int:
    kept = int(count * retention)
    if kept < 1:
        raise ValueError(
            f"retention {retention} keeps none of the {count} tokens of a frame; expected {1 / count:.3g} or more"
        )
    return kept


def _shares(total: int, parts: int) -> list[int]:
    """A total in whole shares, the first ones greater by one where it does not divide."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _reduce(tokens: Tensor, attention: Tensor, salient_of: dict[int, int], anchors_of: dict[int, int]) -> Kept:
    """A segment (T, N, C) whose frames keep numbers of their own. Anchors take in what is neither salient nor an anchor
    of their own frame."""
    count = tokens.shape[1]
    salient = torch.zeros_like(attention, dtype=torch.bool)
    for frame, number in salient_of.items():
        salient[frame] = mark(attention[frame].topk(number)[1], count)
    flat = tokens.flatten(0, 1)[None]
    index, kept = [salient.flatten().nonzero()[:, 0]], [tokens[salient]]
    for frame, number in anchors_of.items():
        if number == 0:
            continue
        score = density_and_score(tokens[frame][None], salient[frame][None])[1]
        anchors = score.topk(number)[1] + frame * count
        mergeable = ~salient.flatten() & ~mark(anchors[0], flat.shape[1])
        index.append(anchors[0])
        kept.append(merge(flat, mergeable[None], anchors)[0])
    place = torch.cat(index)
    order = in_order(place[None])[0]
    return torch.cat(kept)[order], place[order], order >= len(index[0])


def _joined(parts: list[Kept]) -> Kept:
    x, place, anchor = (torch.cat(values) for values in zip(*parts, strict=True))
    return x, place, anchor
