"""Frames from where they are: a video file, a folder of images, an array, a camera.

    file, folder, array, camera ──open_video──▶ VideoSource ──frames──▶ (seconds, decode), (seconds, decode), ...

A source is read forward, once. Nothing seeks: in many files a seek lands on another frame than the one asked for.
Only frames whose `decode` is called cost a conversion to RGB.
"""

import itertools
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError

# A bad file is reported once, by us. FFmpeg's level is read when the first video is opened: -8 is its "quiet".
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

Image: TypeAlias = NDArray[np.uint8]  # (H, W, 3), RGB
Frame: TypeAlias = tuple[float, Callable[[], Image]]  # seconds since the first frame, and what decodes it

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}

# Above this, what a container calls its frame rate is the tick of its clock: 1000 in recordings made by browsers.
HIGHEST_PLAUSIBLE_FPS = 240.0


class VideoSource(ABC):
    """A video that can be read once, from its first frame on. A context manager: leaving it closes the source.

    name: what messages call it.
    fps: frames a second; of a file, the average. 0.0 for a camera that does not tell.
    frame_count: how many frames there are, or as many as the file's header promises. None for a camera.
    """

    name: str
    fps: float
    frame_count: int | None

    @property
    def duration(self) -> float | None:
        """Length in seconds, frame_count / fps; None for a camera."""
        return None if self.frame_count is None else self.frame_count / self.fps

    @abstractmethod
    def frames(self) -> Iterator[Frame]:
        """Yields every frame as (seconds, decode), in order; to be called once.

        seconds: float; index / fps, for a camera the monotonic time since its first frame.
        decode: returns the frame, uint8 (H, W, 3) RGB. It may be called until the next frame is asked for.

        The source is closed when its frames end or the iterator is given up.
        Errors: InputError if not one frame can be decoded, if a frame that is asked for can't be decoded, or if a
        camera stops delivering. A file that ends before frame_count simply ends. ValueError if the source is closed.
        """

    def decode_alone(self) -> None:  # noqa: B027 - only files are decoded by threads of their own
        """To be called before `frames`: decodes in the thread that reads, when it reads, instead of ahead of it in
        others, which would take the cores from whatever else runs on them."""

    def close(self) -> None:  # noqa: B027 - arrays and folders have nothing to release
        """Releases the file or the camera. May be called more than once."""

    def __enter__(self) -> "VideoSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(
    source: str | os.PathLike[str] | int | NDArray[np.uint8] | VideoSource, fps: float | None = None
) -> VideoSource:
    """Opens a video, to be read from its first frame on.

    source: one of
        path of a video file: whatever the FFmpeg in OpenCV decodes;
        path of a folder of images: PNG, JPEG, BMP, WebP and TIFF in natural order (frame2 before frame10), other files
            and hidden ones ignored; grey images become RGB and transparency is dropped;
        int N or "camera:N": the N-th camera of this machine;
        array: uint8 (frames, H, W, 3), RGB;
        a VideoSource, which is returned as it is.
    fps: how many images of a folder or an array were taken a second; None means 1.0. Files and cameras know better.

    A file whose header has no frame count, or no believable frame rate, is read through once to measure both.

    Errors: InputError, naming the source, if it is missing, empty, of another kind, or can't be opened, and if fps is
    given for a file or a camera.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise InputError(f"fps is {fps}; a positive number of frames a second was expected.")
    if isinstance(source, VideoSource):
        _refuse_fps(source.name, fps)
        return source
    if isinstance(source, np.ndarray):
        return FrameArray(source, fps or 1.0)
    if isinstance(source, int):
        source = f"camera:{source}"
    if isinstance(source, str) and source.startswith("camera:"):
        _refuse_fps(source, fps)
        return Camera(source)
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"A {type(source).__name__} can't be opened as a video; the path of a video file or of a folder of images, "
            "a camera number or a uint8 array was expected."
        )
    path = Path(source)
    try:
        if path.is_dir():
            return ImageFolder(path, fps or 1.0)
        if path.is_file():
            _refuse_fps(path, fps)
            return VideoFile(path)
        missing = "is neither a file nor a folder" if path.exists() else "does not exist"
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}. Check its permissions.") from error
    raise InputError(f'{path} {missing}; a video file, a folder of images or "camera:N" was expected. Check the path.')


def _refuse_fps(source: str | Path, fps: float | None) -> None:
    if fps is not None:
        raise InputError(
            f"fps={fps} was given for {source}, which has a frame rate of its own; leave fps out. It is for folders of "
            "images and for arrays only."
        )


class FrameArray(VideoSource):
    def __init__(self, images: NDArray[np.uint8], fps: float) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise InputError(
                f"The array of frames is {images.dtype} {images.shape}; uint8 (frames, height, width, 3) in RGB, with "
                "at least one frame, was expected."
            )
        self.name, self.fps, self.frame_count = "the array of frames", fps, len(images)
        self._images = images

    def frames(self) -> Iterator[Frame]:
        for index in range(len(self._images)):
            yield index / self.fps, partial(self._images.__getitem__, index)


class ImageFolder(VideoSource):
    def __init__(self, folder: Path, fps: float) -> None:
        self._paths = sorted(
            (
                path
                for path in folder.iterdir()
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
            ),
            key=_natural,
        )
        if not self._paths:
            raise InputError(
                f"The folder {folder} holds no images; files ending in {', '.join(sorted(IMAGE_SUFFIXES))} were "
                "expected. Give the folder that holds the frames themselves."
            )
        self.name, self.fps, self.frame_count = str(folder), fps, len(self._paths)

    def frames(self) -> Iterator[Frame]:
        for index, path in enumerate(self._paths):
            yield index / self.fps, partial(read_image, path)


def _natural(path: Path) -> tuple[list[str | int], str]:
    # split() alternates text and digits, so that two keys never compare a number with a text
    parts = re.split(r"(\d+)", path.name.lower())
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], path.name


def read_image(path: Path) -> Image:
    """One picture, uint8 (H, W, 3), RGB. Raises InputError when there is none that can be decoded."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; a picture was expected. Check the path.")
    try:
        image = cv2.imread(_opencv_name(path), cv2.IMREAD_COLOR)
    except cv2.error:  # raised, not returned, for sizes beyond OpenCV's limits
        image = None
    if image is None:
        raise InputError(
            f"The image {path} can't be decoded: it is damaged, unreadable or not what its name says. Restore it, or "
            "take it out of the folder."
        )
    return _rgb(image)


class _CaptureSource(VideoSource):
    """What files and cameras have in common: OpenCV's capture."""

    _capture: cv2.VideoCapture

    def _grabbed(self) -> Iterator[int]:
        """Counts the frames as they arrive, until one does not; then, or when given up, releases the capture."""
        if not self._capture.isOpened():
            raise ValueError(f"{self.name} is closed. A source is read once; open it again to read it again.")
        with self:
            for index in itertools.count():
                if not self._capture.grab():
                    return
                yield index

    def _decode(self) -> Image:
        decoded, image = self._capture.retrieve()
        if not decoded:
            raise InputError(
                f"A frame of {self.name} arrived but can't be converted to RGB; 8-bit video was expected. Re-encode "
                "the file, or set the camera to another pixel format."
            )
        return _rgb(image)

    def close(self) -> None:
        self._capture.release()


class VideoFile(_CaptureSource):
    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes); a video file was expected. Copy or record it again.")
        self._capture = _open_file(path)
        self.fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.frame_count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if self.frame_count < 1 or not 0 < self.fps <= HIGHEST_PLAUSIBLE_FPS:
            self._measure()
            self._capture = _open_file(path)

    def _measure(self) -> None:
        self.frame_count, last = 0, 0.0  # last: when the last frame is shown, seconds
        for _ in self._grabbed():
            self.frame_count += 1
            last = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if self.frame_count == 0:
            raise self._nothing_decoded()
        if last > 0:
            self.fps = (self.frame_count - 1) / last

    def decode_alone(self) -> None:
        self._capture.release()
        self._capture = _open_file(self._path, threads=1)

    def frames(self) -> Iterator[Frame]:
        index = None
        for index in self._grabbed():
            yield index / self.fps, self._decode
        if index is None:
            raise self._nothing_decoded()

    def _nothing_decoded(self) -> InputError:
        return InputError(
            f"{self.name} was opened as a video, but not one frame of it can be decoded; it is damaged, or in a coding "
            "that this OpenCV lacks. Copy it again, or re-encode it as H.264 in MP4."
        )


def _open_file(path: Path, threads: int | None = None) -> cv2.VideoCapture:
    """Without `threads` FFmpeg decodes in one for each core."""
    options = [] if threads is None else [cv2.CAP_PROP_N_THREADS, threads]
    capture = cv2.VideoCapture(_opencv_name(path), cv2.CAP_FFMPEG, options)
    if not capture.isOpened():
        raise InputError(
            f"{path} can't be opened as a video: it is cut off, damaged, not readable or not a video. A file that "
            "FFmpeg decodes was expected (MP4, MKV, WebM, AVI, ...); copy or record it again."
        )
    return capture


def _opencv_name(path: Path) -> str:
    # FFmpeg takes what stands before a colon for a protocol (10:30.mp4), but not in an absolute path
    name = str(path.absolute())
    try:
        name.encode()  # OpenCV crashes on names that are not UTF-8
    except UnicodeEncodeError:
        raise InputError(f"The name of {name!a} is not UTF-8, which OpenCV expects; rename it.") from None
    return name


class Camera(_CaptureSource):
    frame_count = None

    def __init__(self, name: str) -> None:
        # from 100 on, OpenCV reads numbers as the choice of another driver
        if not re.fullmatch(r"camera:\d{1,2}", name, re.ASCII):
            raise InputError(f"{name} is not a camera; camera:0 to camera:99 was expected.")
        self.name = name
        self._capture = cv2.VideoCapture(int(name.removeprefix("camera:")))
        if not self._capture.isOpened():
            raise InputError(
                f"{name} can't be opened; a camera that the system lists was expected. Check that it is connected, "
                "that no other program uses it, and that this user may."
            )
        self.fps = max(self._capture.get(cv2.CAP_PROP_FPS), 0.0)

    def frames(self) -> Iterator[Frame]:
        start, count = 0.0, 0
        for index in self._grabbed():
            now = time.monotonic()
            start, count = start if index else now, index + 1
            yield now - start, self._decode
        raise InputError(
            f"{self.name} stopped delivering after {count} frames; it was expected to go on. Check its cable and "
            "power, and that no other program has taken it, and start again."
        )


def _rgb(bgr: NDArray[Any]) -> Image:
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
