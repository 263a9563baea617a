"""High resolution: a frame cut into tiles of the encoder's size, each a clip of its own through time.

    frame ──choose_grid, once a video──▶ rows x columns
          ──resized to the grid──▶ tiles, row by row ──┐
          ──resized to one tile──▶ thumbnail, last ────┴─▶ views, each encoded as if it were a video

Which grid: InternVL's rule (its dynamic resolution), in exact arithmetic. How many frames in how many tiles fit a
package's cache is counted by engines/package.py's Model.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..engines.package import QUESTION_POSITIONS, InputError, Model, views_of
from .clips import resize
from .video import Image


class Grid(NamedTuple):
    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        return self.rows * self.columns


def choose_grid(size: tuple[int, int], tile: tuple[int, int], tiles: int) -> Grid:
    """The grid whose picture has the aspect ratio closest to the frame's, among all of at most `tiles` tiles.

    Of grids that are equally close the frame gets the largest of which it would fill more than half, in pixels; if
    there is none, the smallest.

    Args:
        size: (height, width) of the frame.
        tile: (height, width) of a tile.

    Source: InternVL 1.5, section 3.3, and its published code, for grids that are equally close.
    """
    height, width = size
    aspect = Fraction(width * tile[0], height * tile[1])  # counted in tiles
    grids = [Grid(rows, columns) for rows in range(1, tiles + 1) for columns in range(1, tiles // rows + 1)]
    least = min(_distance(grid, aspect) for grid in grids)
    closest = sorted((grid for grid in grids if _distance(grid, aspect) == least), key=lambda grid: grid.tiles)
    filled = [grid for grid in closest if 2 * height * width > grid.tiles * tile[0] * tile[1]]
    return filled[-1] if filled else closest[0]


def _distance(grid: Grid, aspect: Fraction) -> Fraction:
    return abs(aspect - Fraction(grid.columns, grid.rows))


def split(frame: Image, grid: Grid, tile: tuple[int, int], thumbnail: bool) -> NDArray[np.uint8]:
    """A frame uint8 (H, W, 3) -> its views, uint8 (views, *tile, 3): tiles row by row, and where there are several and
    it is asked for, the whole frame behind them."""
    height, width = tile
    whole = resize(frame, (grid.rows * height, grid.columns * width))
    views = whole.reshape(grid.rows, height, grid.columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    if views_of(grid.tiles, thumbnail) > grid.tiles:
        views = np.concatenate([views, resize(frame, tile)[None]])
    return views


class Tiler:
    """Splits the frames of one video. The first decides on the grid, to which later ones of another shape are
    stretched.

    Args:
        tile: (height, width).
        tiles: of a frame, at most.

    Attributes:
        grid: None before the first frame.
    """

    def __init__(self, tile: tuple[int, int], tiles: int, thumbnail: bool):
        self._tile, self._tiles, self._thumbnail = tile, tiles, thumbnail
        self.grid: Grid | None = None

    def __call__(self, frame: Image) -> NDArray[np.uint8]:
        """See `split`."""
        if self.grid is None:
            self.grid = choose_grid((frame.shape[0], frame.shape[1]), self._tile, self._tiles)
        return split(frame, self.grid, self._tile, self._thumbnail)


def check_tiles(model: Model, tiles: int, thumbnail: bool) -> None:
    """Raises InputError when there are no tiles, or more than the cache has room for in a single clip."""
    if tiles < 1:
        raise InputError(f"tiles is {tiles}, expected 1 or more")
    most = max(1, model.most_tiles(model.clip_length, thumbnail))
    if tiles > most:
        raise InputError(
            f"tiles is {tiles}; of a single clip, {model.clip_length} frames, at most {most} fit the KV cache of "
            f"{model.capacity} positions; use fewer, or build with --tiles {tiles}"
        )


def check_budget(model: Model, frames: int, grid: Grid, thumbnail: bool) -> None:
    """Raises InputError when so many frames, each in the tiles of a grid, do not fit the cache with their text and a
    question; says what does. In one tile they do, see `VideoSession.check_frames`."""
    views = views_of(grid.tiles, thumbnail)
    needed = model.positions(frames, views)
    if grid.tiles == 1 or needed <= model.capacity:
        return
    most, tiles = model.most_frames(views), model.most_tiles(frames, thumbnail)
    fewer = [f"at most {most} frames"] if most else []
    fewer += [f"at most {tiles} {'tile' if tiles == 1 else 'tiles'}"] if tiles else []
    instead = f"use {' or '.join(fewer)}, or " if fewer else ""
    raise InputError(
        f"{frames} frames in {grid.rows} x {grid.columns} tiles{' and a thumbnail' if views > grid.tiles else ''} take "
        f"{needed} positions, {QUESTION_POSITIONS} for a question among them; the KV cache holds {model.capacity}; "
        f"{instead}build with --frames {frames} --tiles {grid.tiles}"
    )
