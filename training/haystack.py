"""A needle in a haystack: a short clip hidden in thousands of frames of other footage.

footage ──over and over──▶ hay ──the needle's frames in place of hay's──▶ Haystack, a source of frames like a file
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError
from ..runtime.clips import resize
from ..runtime.video import Frame, Image, VideoSource, open_video


class Haystack(VideoSource):
    """A frame a second. Nothing of it is in memory but the needle.

    Args:
        footage: video files, shown one after the other, and from the first again.
        needle: uint8 (n, H, W, 3), RGB; hay is resized to its size.
        frames: of the whole.
        depth: where the needle begins: 0 at the beginning, 1 so that it ends with the last frame.

    Attributes:
        first: number of the needle's first frame, from 0.

    Raises:
        InputError: no footage, a file that can't be read, a depth outside 0 to 1, or a needle that is not shorter than
            the whole.
    """

    def __init__(self, footage: Sequence[Path], needle: NDArray[np.uint8], frames: int, depth: float):
        if not footage:
            raise InputError("a haystack needs footage; name at least one video")
        if not 0 <= depth <= 1:
            raise InputError(f"the needle's depth is {depth}, expected 0 (the beginning) to 1 (the end)")
        if not 0 < len(needle) < frames:
            raise InputError(f"a needle of {len(needle)} frames does not fit a haystack of {frames}; make that longer")
        for path in footage:
            open_video(path).close()
        self.name, self.fps, self.frame_count = f"a haystack of {frames} frames", 1.0, frames
        self._footage, self._needle = footage, needle
        self.first = round(depth * (frames - len(needle)))

    def frames(self) -> Iterator[Frame]:
        hay, size = self._hay(), (self._needle.shape[1], self._needle.shape[2])
        assert self.frame_count is not None
        for number in range(self.frame_count):
            decode = next(hay)
            inside = number - self.first
            if 0 <= inside < len(self._needle):
                yield float(number), partial(self._needle.__getitem__, inside)
            else:
                yield float(number), partial(_resized, decode, size)

    def _hay(self) -> Iterator[Callable[[], Image]]:
        while True:
            for path in self._footage:
                with open_video(path) as video:
                    for _, decode in video.frames():
                        yield decode


def _resized(decode: Callable[[], Image], size: tuple[int, int]) -> Image:
    return resize(decode(), size)
