"""Calibration clips: what the network sees while its ranges are observed.

    files, folders, saved clips ──_videos──▶ videos ──_shares──▶ how many clips of each ──read_clips──▶ unlike clips

Frames are sampled and resized as they are when a question is answered. A video is read forward once, and nothing but
the clips kept is held of it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError
from ..runtime.clips import read_clips
from ..runtime.video import IMAGE_SUFFIXES, Frame, Image, VideoSource, open_video

VIDEO_SUFFIXES = set(".3gp .avi .flv .m2ts .m4v .mjpg .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())

# Two clips are alike if their thumbnails, 16 x 16 cells of grey averaged over a clip's frames, differ by less than this
# many of 255 grey levels, on average over the cells. A camera's noise averages out to about 0.1; what makes 1.0 is, for
# example, a thing that has moved, takes 1 % of the picture and differs by 50 levels from what it covers.
SAME_BELOW = 1.0
_THUMBNAIL = (16, 16)


def read_calibration_clips(
    sources: Sequence[Path],
    clip_length: int,
    size: tuple[int, int],
    limit: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.uint8]:
    """Clips spread evenly over videos and over the length of each.

    Returns uint8 (n, clip_length, H, W, 3), RGB, with 1 <= n <= limit.

    Args:
        sources: each a video file, a folder, or a .npy file that `save_clips` wrote. Of a folder and all below it,
            every video file is a video, and so is every folder of images without one, its images in natural order.
            Images beside video files (thumbnails), other and hidden files are ignored; what is named twice counts once.
        clip_length: frames a clip, T.
        size: (H, W) in pixels.
        limit: the most clips. They are handed out one a video in turn, so that a long video does not crowd out short
            ones; a video with none left to give is passed over.
        seed: chooses the videos where there are more than `limit`, and which come first in the turns.
        progress: called with the number of clips read so far, at most `limit`.

    A clip like one already kept (see SAME_BELOW) is dropped: a static camera gives few. The same sources and seed give
    the same bytes, in the order of the sources and, within a folder, of the sorted names.

    Raises:
        InputError: no sources; a folder without videos or images; a video or image that can't be read; frames lower or
            narrower than `size`; saved clips that are damaged or of another shape or type.
    """
    if not sources or limit < 1:
        raise InputError(
            f"{limit} calibration clips from {len(sources)} sources were asked for; one or more of both were expected: "
            "videos like those the model will see."
        )
    videos = [*{os.path.realpath(video): video for source in sources for video in find_videos(source)}.values()]
    turns = np.random.default_rng(seed).permutation(len(videos))[:limit].tolist()
    shares = _shares({index: _available(videos[index], clip_length, size) for index in turns}, limit)

    clips = np.empty((sum(shares.values()), clip_length, *size, 3), np.uint8)  # not written to, it takes no memory
    thumbnails = np.empty((len(clips), *_THUMBNAIL), np.float32)
    read = kept = 0
    for index in sorted(shares):
        for clip in _read(videos[index], shares[index], clip_length, size):
            thumbnail = _thumbnail(clip)
            if not np.any(np.abs(thumbnails[:kept] - thumbnail).mean(axis=(1, 2)) < SAME_BELOW):
                clips[kept], thumbnails[kept] = clip, thumbnail
                kept += 1
            read += 1
            if progress:
                progress(read)
    return clips[:kept]


def save_clips(path: Path, clips: NDArray[np.uint8]) -> None:
    """Writes uint8 clips (n, T, H, W, 3) as a .npy file, complete or not at all; InputError if it can't be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, clips, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or choose another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def find_videos(source: Path) -> list[Path]:
    """Video files, folders of images and saved clips, in an order that does not depend on the file system."""
    if not source.is_dir():
        return [source]
    videos: list[Path] = []
    for folder, folders, files in os.walk(source, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
        beside = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
        if not beside and any(path.suffix.lower() in IMAGE_SUFFIXES for path in paths):
            beside = [Path(folder)]
        videos += beside
    if not videos:
        raise InputError(
            f"The folder {source} holds no videos and no images, nor do the folders in it; files such as .mp4 or .png "
            "were expected."
        )
    return videos


def _unreadable(error: OSError) -> None:
    raise InputError(f"The folder {error.filename} can't be read: {error.strerror}. Check its permissions.") from error


def _shares(available: dict[int, int], limit: int) -> Counter[int]:
    """How many clips of each video, one in turn until there are `limit` or all."""
    turns = ((turn, place) for place, count in enumerate(available.values()) for turn in range(min(count, limit)))
    return Counter([*available][place] for _, place in sorted(turns)[:limit])


def _available(video: Path, clip_length: int, size: tuple[int, int]) -> int:
    """How many clips there are, after a look at the first frame: what is wrong shows before hours are read."""
    if video.suffix.lower() == ".npy":
        return len(_saved_clips(video, clip_length, size))
    with _LargeEnough(video, size) as source:
        for _, decode in source.frames():
            decode()
            break
        return math.ceil((source.frame_count or 0) / clip_length)


def _read(video: Path, count: int, clip_length: int, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    if video.suffix.lower() == ".npy":
        saved = _saved_clips(video, clip_length, size)
        yield from (saved[(2 * k + 1) * len(saved) // (2 * count)] for k in range(count))
    else:
        yield from (
            clip.frames for clip in read_clips(_LargeEnough(video, size), count * clip_length, clip_length, size)
        )


def _saved_clips(path: Path, clip_length: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Memory-mapped, so that only the clips chosen are read."""
    try:
        clips = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy's reader of headers raises whatever a damaged one makes it stumble over
        raise InputError(f"{path}: not saved clips ({error}); save them again, or give the videos") from None
    expected = (clip_length, *size, 3)
    if clips.dtype != np.uint8 or clips.shape[1:] != expected or not len(clips):
        raise InputError(
            f"{path}: holds {clips.dtype} {clips.shape}, not one or more clips of uint8 {expected} as this model takes "
            "them; give the videos they were made of"
        )
    return clips


class _LargeEnough(VideoSource):
    """A video file or folder of images; a frame of it that is lower or narrower than `size` is refused."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self._source, self._size = open_video(path), size
        self.name, self.fps, self.frame_count = self._source.name, self._source.fps, self._source.frame_count

    def frames(self) -> Iterator[Frame]:
        for seconds, decode in self._source.frames():
            yield seconds, partial(self._decoded, decode)

    def _decoded(self, decode: Callable[[], Image]) -> Image:
        image = decode()
        (height, width), (wanted_height, wanted_width) = image.shape[:2], self._size
        if height < wanted_height or width < wanted_width:
            raise InputError(
                f"{self.name}: clips smaller than the input size: its frames have {width} x {height} pixels, the model "
                f"takes {wanted_width} x {wanted_height}, and enlarged they would calibrate it on blur; give videos at "
                "least as large"
            )
        return image

    def close(self) -> None:
        self._source.close()


def _thumbnail(clip: NDArray[np.uint8]) -> NDArray[np.float32]:
    mean = clip.mean(axis=0, dtype=np.float32)  # (H, W, 3)
    return cv2.cvtColor(cv2.resize(mean, _THUMBNAIL, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
