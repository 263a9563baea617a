"""What reducers have in common: the two places where they act, and the ratios that they admit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOPK_LIMIT = 3840


class GridReducer(nn.Module):
    """Cuts a clip's features into blocks of `window` = (time, height, width) tokens; subclasses reduce each to one.

    features (clips, T, 1 + H*W, C), CLS first -> (clips, T', H' * W', C)

    Raises:
        ValueError: `window` does not divide the grid.
    """

    def __init__(self, size: tuple[int, int, int], window: tuple[int, int, int]):
        super().__init__()
        if any(n % w for n, w in zip(size, window, strict=True)):
            raise ValueError(f"reducer window {list(window)} does not divide the clip's grid {list(size)}")
        (t, h, w), (a, b, c) = size, window
        self.blocks = (t // a, a, h // b, b, w // c, c)
        self.grid = (t // a, h // b, w // c)

    def cut(self, features: Tensor) -> Tensor:
        """features (clips, T, 1 + H*W, C) -> blocks (clips, T', t, H', h, W', w, C), without CLS"""
        return features[:, :, 1:].reshape(-1, *self.blocks, features.shape[-1])

    def flatten(self, reduced: Tensor) -> Tensor:
        """reduced (clips, T', H', W', C), in any shape that holds it -> (clips, T', H' * W', C)"""
        return reduced.reshape(-1, self.grid[0], self.grid[1] * self.grid[2], reduced.shape[-1])


class TokenReducer(nn.Module):
    """Chooses and merges tokens behind the pixel shuffle; what is left is no grid, but always of the same number.

    tokens (clips, T, N, s*s*C) and the last block's q, k -> (clips, tokens, s*s*C), in `units` parts in time order

    Args:
        frames: T of a clip.
        grid: rows and columns of tokens of a frame, behind the shuffle; N of them.
        shuffle: s.
        ratio: how many tokens become one.

    Raises:
        ValueError: the method does not admit the ratio; with the numbers that do not fit.
    """

    units: int
    tokens: int

    def __init__(self, frames: int, grid: tuple[int, int], shuffle: int, ratio: int):
        super().__init__()
        self.frames, self.grid, self.shuffle = frames, grid, shuffle
        self.per_frame = grid[0] * grid[1]

    def attend(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What the last block's CLS looks at, and its keys, by tokens behind the shuffle.

        Attention is softmax(q k^T / sqrt(C)) over CLS and patches, all heads as one. A token has the sum of its square
        of patches, and the mean of their keys; with a shuffle of 1 both are the patches' own.

        q (F, C), k (F, 1 + H*W, C) -> attention (F, N), keys (F, N, C)
        """
        scores = (k @ q.unsqueeze(2)).squeeze(2) * q.shape[1] ** -0.5
        attention = scores.softmax(-1)[:, 1:]
        (rows, columns), s = self.grid, self.shuffle
        attention = attention.reshape(-1, rows, s, columns, s).sum((2, 4))
        keys = k[:, 1:].reshape(-1, rows, s, columns, s, k.shape[2]).mean((2, 4))
        return attention.reshape(-1, self.per_frame), keys.reshape(-1, self.per_frame, k.shape[2])


def refuse_sorting(count: int) -> None:
    """Raises ValueError if so many tokens are more than TensorRT's TopK takes."""
    if count >= TOPK_LIMIT:
        raise ValueError(
            f"{count} tokens would be sorted at once, TensorRT sorts fewer than {TOPK_LIMIT}; expected shorter clips, "
            "smaller images or a greater pixel shuffle"
        )


def refuse_rest(tokens: int, ratio: int, of: str) -> None:
    """Raises ValueError if `ratio` does not divide a number of tokens."""
    if ratio < 1 or tokens % ratio:
        raise ValueError(f"ratio {ratio} does not divide the {tokens} tokens of a {of}; expected a divisor of {tokens}")


def window_of(ratio: int, size: tuple[int, int, int], shuffle: int = 1) -> tuple[int, int, int]:
    """The window (t, s, s) that makes one token of `ratio`.

    One rule, of which the paper's 4 = (1, 2, 2), 8 = (2, 2, 2) and 16 = (4, 2, 2) are cases: the smallest square s x s
    from 2 x 2 on that divides the grid and of which t = ratio / s^2 divides the clip's frames; without one, no square
    but t = ratio frames.

    Args:
        shuffle: must divide the grid that windows leave.

    Raises:
        ValueError: there is no such window; names the ratios that the grid admits.
    """
    frames, rows, columns = size
    sides = [s for s in range(1, min(rows, columns) + 1) if rows % (s * shuffle) == 0 and columns % (s * shuffle) == 0]
    if not sides:
        raise ValueError(f"pixel shuffle {shuffle} does not divide the grid {[rows, columns]}")
    windows: dict[int, tuple[int, int, int]] = {}
    for side in (*sides[1:], 1):
        for t in range(1, frames + 1):
            if frames % t == 0:
                windows.setdefault(t * side * side, (t, side, side))
    if ratio not in windows:
        left = f" that leave squares for a pixel shuffle of {shuffle}" if shuffle > 1 else ""
        raise ValueError(
            f"ratio {ratio} does not divide the clip's grid {list(size)} into windows of t frames and s x s "
            f"tokens{left}; expected one of {', '.join(map(str, sorted(windows)))}"
        )
    return windows[ratio]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens by number: x (B, N, C), index int64 (B, K) -> (B, K, C)"""
    rows = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.reshape(-1, x.shape[2]).index_select(0, (index + rows).reshape(-1)).reshape(-1, index.shape[1], x.shape[2])


def places(index: Tensor, size: int) -> Tensor:
    """index int64 (..., K) -> bool (..., K, size), true at the place of each"""
    return index.unsqueeze(-1) == torch.arange(size, device=index.device)


def mark(index: Tensor, size: int) -> Tensor:
    """index int64 (..., K) -> bool (..., size), true at the places of all"""
    return places(index, size).any(-2)
