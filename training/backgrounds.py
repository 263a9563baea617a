"""Natural backgrounds: photos that a camera pans over, and stretches of real video.

photos, videos ──Backgrounds──▶ frames (N, H, W, 3) at a rate of 1 to 4 a second
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError
from ..runtime.video import open_video

PHOTO_SIDE, VIDEO_SIDE = 1024, 432  # pixels of the shorter side, at most, that sources are kept at
KEPT_FPS = 4.0  # frames of a video that are kept, a second
PAN = 0.12  # of the picture, at most, in a clip or video
CLOSEST = 160  # pixels of a source across a cut, or 0.3 of its shorter side if that is less
OTHERS = (0, 0, 1, 2, 3)  # sources that cover parts of a sample
TINT, GAMMA = 0.2, 0.3  # standard deviations of the logarithms


class Backgrounds:
    """
    Args:
        photos, videos: files that OpenCV reads.

    Raises:
        InputError: there are none, or one can't be read.
    """

    def __init__(self, photos: Sequence[Path], videos: Sequence[Path] = ()):
        if not photos and not videos:
            raise InputError("no backgrounds: at least one photo or video is needed")
        self._photos = [_photo(path) for path in photos]
        self._videos = [_video(path) for path in videos]

    @property
    def seconds(self) -> float:
        """Of video, in all."""
        return sum(map(len, self._videos)) / KEPT_FPS

    def sample(
        self,
        random: np.random.Generator,
        frames: int,
        fps: float,
        size: int,
        video_share: float,
        varied: bool = False,
    ) -> NDArray[np.uint8]:
        """A random stretch, cut out and mirrored at random: uint8 (frames, size, size, 3), RGB.

        Args:
            fps: 4, 2 or 1 for videos.
            video_share: how often it is from a video, if one is long enough; otherwise a photo, still or panned over.
            varied: recoloured, and other stretches may cover parts of it: of few sources more that is new.
        """
        out = self._stretch(random, frames, fps, size, video_share)
        if not varied:
            return out
        for _ in range(random.choice(OTHERS)):
            other = self._stretch(random, frames, fps, size, video_share)
            out = np.where(_part(random, size)[:, :, None], other, out)
        return _recoloured(out, random)

    def _stretch(
        self, random: np.random.Generator, frames: int, fps: float, size: int, video_share: float
    ) -> NDArray[np.uint8]:
        step = round(KEPT_FPS / fps)
        long_enough = [video for video in self._videos if len(video) > (frames - 1) * step]
        if long_enough and (random.random() < video_share or not self._photos):
            weights = np.array([len(video) for video in long_enough], float)
            video = long_enough[random.choice(len(long_enough), p=weights / weights.sum())]
            start = random.integers(len(video) - (frames - 1) * step)
            return _cut(video[start : start + (frames - 1) * step + 1 : step], random, size, 0.0)
        image = self._photos[random.integers(len(self._photos))]
        pan = PAN * random.random() if random.random() < 0.5 else 0.0
        return _cut(np.broadcast_to(image, (frames, *image.shape)), random, size, pan)


def _cut(images: NDArray[np.uint8], random: np.random.Generator, size: int, pan: float) -> NDArray[np.uint8]:
    """The same square of each picture, moving by `pan` of it from the first to the last, mirrored every other time;
    small squares as often as large ones."""
    height, width = images.shape[1:3]
    shorter = min(height, width)
    side = round(math.exp(random.uniform(math.log(min(CLOSEST, 0.3 * shorter)), math.log(shorter))))
    room = np.array([width - side, height - side])
    first = random.random(2) * room
    last = np.clip(first + pan * side * _direction(random), 0, room)
    corners = np.round(np.linspace(first, last, len(images))).astype(int)
    cuts = [image[y : y + side, x : x + side] for image, (x, y) in zip(images, corners, strict=True)]
    out = np.stack([_resized(cut, (size, size)) for cut in cuts])
    return out[:, :, ::-1] if random.random() < 0.5 else out


def _part(random: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """What lies on one side of a line through the picture, or in an ellipse: (size, size)."""
    rows, columns = np.mgrid[:size, :size] / size - random.uniform(0.2, 0.8, 2)[:, None, None]
    x, y = _direction(random)
    along, across = columns * x + rows * y, columns * y - rows * x
    if random.random() < 0.5:
        return along > 0
    long, wide = random.uniform(0.1, 0.4, 2)
    return (along / long) ** 2 + (across / wide) ** 2 < 1


def _recoloured(frames: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Each channel by a factor of its own, all by another exponent."""
    factors, exponent = np.exp(random.normal(0, TINT, 3)), np.exp(random.normal(0, GAMMA))
    table = 255 * np.minimum(np.linspace(0, 1, 256)[:, None] ** exponent * factors, 1)
    tables = np.round(table).astype(np.uint8)
    return np.stack([tables[frames[..., channel], channel] for channel in range(3)], -1)


def _direction(random: np.random.Generator) -> NDArray[np.float64]:
    angle = random.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def _shrunk(image: NDArray[np.uint8], shorter: int) -> NDArray[np.uint8]:
    """So that its shorter side has so many pixels at most."""
    scale = min(1.0, shorter / min(image.shape[:2]))
    return _resized(image, (round(image.shape[1] * scale), round(image.shape[0] * scale)))


def _resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    interpolation = cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)


@lru_cache(256)
def _photo(path: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(path))
    if image is None:
        raise InputError(f"{path}: can't be read as a picture")
    return _shrunk(np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8), PHOTO_SIDE)


@lru_cache(32)
def _video(path: Path) -> NDArray[np.uint8]:
    kept: list[NDArray[np.uint8]] = []
    with open_video(path) as video:
        for seconds, decode in video.frames():
            if seconds * KEPT_FPS >= len(kept) - 1e-6:
                kept.append(_shrunk(decode(), VIDEO_SIDE))
    return np.stack(kept)
