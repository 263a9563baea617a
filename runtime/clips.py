"""Dense clip sampling (LiteFrame, Appendix A): clips of consecutive frames, spread uniformly over the video.

    VideoSource ──sample_indices──▶ frames wanted ──decode, resize──▶ Clip, Clip, ...

Clips are yielded as they are read, and one is held at a time.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import cv2
import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError
from .video import Image, VideoSource


@dataclass(frozen=True, eq=False)
class Clip:
    """What the encoder sees at once.

    frames: uint8 (T, H, W, 3), RGB; where frames were split into views, (views, T, H, W, 3).
    timestamps: float64 (T,), seconds since the first frame of the video.
    """

    frames: NDArray[np.uint8]
    timestamps: NDArray[np.float64]


class VideoEndedEarly(UserWarning):
    """A file ended before the last of the frames that its header promises and that were wanted."""


def sample_indices(
    frame_count: int, fps: float, frames: int, clip_length: int, min_fps: float = 1.0
) -> NDArray[np.int64]:
    """Which frames of a video to look at: int64 (clips, clip_length), increasing from each to the next.

    frame_count, fps: the video's length in frames, and its frames a second.
    frames: how many are wanted, N; a multiple of clip_length, T.
    min_fps: frames a second, the least within a clip.

    With D seconds of video, clip k of the N / T is centred in the k-th of as many equal segments of [0, D). Its frames
    lie min(1 / min_fps, D / N) seconds apart, though never closer than they were taken, and each is the one shown at
    its time. No frame is sampled twice.

    A video of fewer than N frames gives all of them, in ceil(frame_count / T) clips; where the last clip is not full,
    the last frame is repeated to fill it.

    Errors: InputError if an argument is not positive, or N not a multiple of T.
    Source: LiteFrame, Appendix A; what it leaves open is decided here.
    """
    _check(frames, clip_length)
    if frame_count < 1 or not fps > 0 or not min_fps > 0:
        raise InputError(
            f"A video of {frame_count} frames at {fps} frames a second can't be sampled at {min_fps} a second or more; "
            "positive numbers were expected."
        )
    if frame_count < frames:
        clips = -(-frame_count // clip_length)
        return np.minimum(np.arange(clips * clip_length), frame_count - 1).reshape(clips, clip_length)
    clips = frames // clip_length
    step = max(1.0, min(fps / min_fps, frame_count / frames))  # between the frames of a clip; the unit is the frame
    centres = (np.arange(clips) + 0.5) * (frame_count / clips)
    offsets = (np.arange(clip_length) - (clip_length - 1) / 2) * step
    # floating point may put the start of a frame an ulp before it, and floor() would then give the frame before
    return np.floor(np.round(centres[:, None] + offsets, 6)).astype(np.int64)


def read_clips(
    source: VideoSource,
    frames: int,
    clip_length: int,
    size: tuple[int, int],
    split: Callable[[Image], NDArray[np.uint8]] | None = None,
) -> Iterator[Clip]:
    """Samples a video and yields its clips in order, each as soon as it is read. The source is closed at the end.

    frames: how many are wanted; a multiple of clip_length.
    size: (H, W) in pixels, to which every whole frame is stretched, as InternVL does: by pixel area where it shrinks,
        bicubically where it grows.
    split: makes views of each frame instead, uint8 (views, H, W, 3); see tiles.py.

    Which frames: see sample_indices. From a camera: the frames nearest to 0, 1, 2, ... seconds, until there are enough.

    A file that ends before the last frame wanted warns VideoEndedEarly; the clip it ends in is filled by repeating its
    last frame sampled, and clips after that are left out.

    Errors: InputError at the call if the numbers don't fit; while reading, what VideoSource.frames raises, and if a
    file ends before the first frame wanted.
    """
    if min(size) < 1:
        raise InputError(f"Frames of {size} pixels were asked for; a positive height and width were expected.")
    fit = split or partial(resize, size=size)
    if source.frame_count is None:
        _check(frames, clip_length)
        chosen = _once_a_second(source, frames, fit)
    else:
        indices = sample_indices(source.frame_count, source.fps, frames, clip_length)
        chosen = _at(np.unique(indices).tolist(), source, fit)
    return _clips(chosen, clip_length)


def _check(frames: int, clip_length: int) -> None:
    if clip_length < 1 or frames < 1 or frames % clip_length:
        raise InputError(
            f"{frames} frames in clips of {clip_length} were asked for; a positive number of frames that is a multiple "
            "of a positive clip length was expected."
        )


def _clips(chosen: Iterator[tuple[float, Image]], clip_length: int) -> Iterator[Clip]:
    while clip := list(islice(chosen, clip_length)):
        clip += [clip[-1]] * (clip_length - len(clip))
        seconds, images = zip(*clip, strict=True)
        yield Clip(np.stack(images, axis=-4), np.array(seconds, np.float64))


def _at(indices: list[int], source: VideoSource, fit: Callable[[Image], Image]) -> Iterator[tuple[float, Image]]:
    read = taken = 0
    for read, (seconds, decode) in enumerate(source.frames(), start=1):
        if read - 1 == indices[taken]:
            yield seconds, fit(decode())
            taken += 1
            if taken == len(indices):
                return
    ended = f"{source.name} ended early: {read} of the {source.frame_count} frames its header promises can be read"
    if taken == 0:
        raise InputError(f"{ended}, and the first to be sampled is number {indices[0] + 1}. Copy or record it again.")
    warnings.warn(
        f"{ended}. {taken} of {len(indices)} frames were sampled; what comes after is not seen.",
        VideoEndedEarly,
        stacklevel=3,
    )


def _once_a_second(source: VideoSource, frames: int, fit: Callable[[Image], Image]) -> Iterator[tuple[float, Image]]:
    taken, due, previous = 0, 0.0, 0.0
    for seconds, decode in source.frames():
        # a frame can't be fetched back, so the next is assumed to come as long after this one as this after the last
        if seconds + (seconds - previous) / 2 >= due:
            yield seconds, fit(decode())
            taken += 1
            if taken == frames:
                return
            due = round(seconds) + 1.0
        previous = seconds


def resize(image: Image, size: tuple[int, int]) -> Image:
    """Stretches uint8 (H, W, 3) to (height, width): by pixel area where it shrinks, bicubically where it grows."""
    height, width = size
    how = cv2.INTER_AREA if height * width < image.shape[0] * image.shape[1] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)
