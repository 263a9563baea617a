"""A session with a video: watch a file, or push frames as a camera gives them; ask; text comes as it is generated.

    watch: file, folder, array, camera ─▶ clips ─┐
    push:  frames, as they arrive ──────▶ clips ─┴─▶ pipeline: encoder ─▶ language model's cache
    ask:   question ─▶ pipeline: behind what was given before ─▶ text

While a clip is encoded the next is being read, and those before it go into the language model's cache, so that when
the question comes the video has been read already. The chat goes on: later questions know of earlier ones.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError, Package, open_package
from .clips import Clip as ReadClip
from .clips import read_clips, resize
from .conversation import Conversation, Entry
from .cuda import DeviceFrames, is_on_device
from .engine import EngineError, open_engines
from .long_video import LongVideo, MergerError, Mode, check_long_frames, check_mode
from .pipeline import Answer, Backpressure, Clip, Pipeline, Stats
from .search import Searcher, has_features
from .text import ChatText, Sampler
from .tiles import Tiler, check_budget, check_tiles
from .trace import Trace
from .video import VideoSource, open_video

# seconds between frames, beyond which they are no dense clip (LiteFrame, Appendix A: 1 frame a second or more, and
# cameras are not exact)
STALL = 2.0
DENSE = 8  # frames in a file for each that is looked at, up to which decoding costs little beside encoding


class VideoSession:
    """Frames may be pushed from one thread and questions asked from another. A context manager: leaving it closes it.

    Args:
        package: an engine package's folder, or one already opened with `open_package`.
        threads: CPU threads an engine; None leaves it to the executor.
        when_full: what `push` does when clips arrive faster than they are encoded: "block" waits; "drop-oldest" leaves
            out the clip that has waited longest; "latest-only" leaves out all that wait. Whole clips are dropped, for
            frames of a clip belong close together; each frame is counted in `stats`.
        trace: told what each stage does, and when.

    Raises:
        InputError: the package is damaged, unfinished, or not for this machine.
    """

    def __init__(
        self,
        package: str | Path | Package,
        threads: int | None = None,
        when_full: Backpressure = "block",
        trace: Trace | None = None,
    ):
        if when_full not in ("block", "drop-oldest", "latest-only"):
            raise InputError(f'when_full is {when_full!r}, expected "block", "drop-oldest" or "latest-only"')
        self.package = package if isinstance(package, Package) else open_package(package)
        self.model = self.package.manifest.model
        self._text = ChatText.of(self.package)
        self._when_full = when_full
        encoder, decoder = self.engines = open_engines(self.package, threads)
        self._threads = threads
        self._searcher: Searcher | None = None  # until a long video is watched
        conversation = Conversation(decoder, self._text, self.model)
        self._takes_turns = self.package.manifest.target == "cpu"
        self._pipeline = Pipeline(encoder, conversation, self.model.max_clips, self._takes_turns, trace)
        weakref.finalize(self, self._pipeline.close)
        self._frames: HostFrames | DeviceFrames = self._host_frames()
        self._filled = 0  # of the clip that is being pushed
        self._last = -math.inf  # time of the last frame
        self._live = False
        self._pushing = threading.Lock()
        self._asking = threading.Lock()
        self._answer: Answer | None = None

    def __enter__(self) -> VideoSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is being done; what waits is dropped, a clip that is not full as well. May be called again."""
        self._pipeline.close()

    # -- video ---------------------------------------------------------------------------------------------------------

    def watch(
        self,
        source: str | Path | int | NDArray[np.uint8] | VideoSource,
        frames: int | None = None,
        fps: float | None = None,
        progress: Callable[[int], object] = lambda encoded: None,
        tiles: int = 1,
        thumbnail: bool = True,
        long_video: Mode = "uniform",
        query: str | NDArray[np.uint8] | None = None,
    ) -> None:
        """Reads a video into the language model's cache. It replaces what was seen and said before; on an error that
        stays.

        Args:
            source: a video file, a folder of images, a camera's number, frames uint8 (frames, H, W, 3), RGB, or another
                source of frames.
            frames: how many to sample, in whole clips; by default what the package was built for.
            fps: rate of the images of a folder or array; by default 1.
            progress: called with the number of frames encoded so far.
            tiles: into how many of the encoder's size a frame is cut at most, after the aspect ratio of the first; see
                tiles.py.
            thumbnail: whether the encoder is given the whole frame, too, where there are several tiles.
            long_video: "uniform" keeps all visual tokens of every frame; "vilamp" and "hybrid" keep them of the frames,
                or clips, that have most to do with `query`, and one of every other: see long_video.py. Not in tiles.
            query: what decides that: a question, or a picture uint8 (H, W, 3), RGB.

        Raises:
            InputError: nothing can be read from the source, `frames` and `tiles` are not what the package can take, it
                was not built for long videos, or the query is missing, or is for one that is not.
            EngineError: an engine failed.
        """
        wanted = self._wanted(frames, tiles, long_video, query)
        check_tiles(self.model, tiles, thumbnail)
        tiler = Tiler(self.model.image_size, tiles, thumbnail) if tiles > 1 else None
        self._pipeline.raise_error()
        with open_video(source, fps) as video, self._pushing:
            if long_video != "uniform":
                there = wanted if video.frame_count is None else min(wanted, video.frame_count)
                check_long_frames(long_video, wanted, there, self.model)
            if self._takes_turns and video.frame_count is not None and video.frame_count <= DENSE * wanted:
                video.decode_alone()
            before = self._begin_anew()
            clip = self.model.clip_length
            expected = wanted if video.frame_count is None else min(wanted, video.frame_count)
            try:
                if query is not None:
                    self._begin_long(long_video, query)
                clips = read_clips(video, wanted, clip, self.model.image_size, tiler)
                clips = self._pipeline.read(clips, in_turn=video.frame_count is not None)
                if query is None:
                    clips = self._expected(clips, -(-expected // clip), tiler, thumbnail)
                self._read(clips, progress)
            except BaseException:
                conversation = self._pipeline.conversation
                conversation.stop_long()
                self._pipeline.discard()
                with suppress(InputError):  # closed
                    self._pipeline.submit(conversation.give_up_long)
                    self._pipeline.submit(lambda: self._begin(*before)).result()
                self._pipeline.forget_errors()
                self._live = before[1]
                raise

    def _wanted(self, frames: int | None, tiles: int, long_video: Mode, query: str | NDArray[np.uint8] | None) -> int:
        """How many frames to sample. Raises InputError when what is asked of `watch` does not go together."""
        check_mode(long_video, self.model)
        if long_video == "uniform" or self.model.long_video is None:
            wanted = self.model.max_frames if frames is None else frames
            self.check_frames(wanted)
            if query is not None:
                raise InputError('a query is for long videos; leave it out, or take long_video="hybrid"')
            return wanted
        if query is None:
            raise InputError("a long video is searched for something; give the question, or a picture, as query")
        if tiles > 1:
            raise InputError(f"a long video in {tiles} tiles: frames of long videos stay whole; take 1 tile")
        return self.model.long_video.max_frames if frames is None else frames

    def _begin_long(self, mode: Mode, query: str | NDArray[np.uint8]) -> None:
        if self._searcher is None:
            self._searcher = Searcher(self.package, self._text, self.engines[0], self._threads)
        searcher, conversation = self._searcher, self._pipeline.conversation
        searched = searcher.query(query)

        def begin() -> None:
            conversation.long = LongVideo(mode, searched, self.model, searcher.merger, searcher.trained)

        self._pipeline.submit(begin).result()  # there, so that one that closes the session meanwhile finds it

    def reset(self) -> None:
        """Forgets what was seen and said; a video or a stream may begin."""
        self._pipeline.raise_error()
        with self._pushing:
            self._pipeline.discard()
            self._begin_anew()

    def _begin_anew(self) -> tuple[list[Entry], bool, Stats]:
        self._end_answer()
        before = self._pipeline.submit(lambda: self._begin([], False, Stats())).result()
        self._filled, self._last, self._live = 0, -math.inf, False
        return before

    def _begin(self, entries: list[Entry], live: bool, stats: Stats) -> tuple[list[Entry], bool, Stats]:
        """Replaces what was seen and said, and returns it; on the language model's thread."""
        conversation, pipeline = self._pipeline.conversation, self._pipeline
        before = conversation.entries, conversation.live, pipeline.stats
        conversation.refill(entries)
        conversation.live, pipeline.stats = live, stats
        return before

    def _expected(
        self, clips: Iterator[ReadClip], count: int, tiler: Tiler | None, thumbnail: bool
    ) -> Iterator[ReadClip]:
        """The same clips. Makes room for as many as are expected, in the views that the first has."""
        for number, clip in enumerate(clips):
            if number == 0:
                views = 1
                if tiler is not None and tiler.grid is not None:
                    check_budget(self.model, count * self.model.clip_length, tiler.grid, thumbnail)
                    views = len(clip.frames)
                self._pipeline.submit(partial(self._pipeline.conversation.expect, count, views))
            yield clip

    def _read(self, clips: Iterator[ReadClip], progress: Callable[[int], object]) -> None:
        with_features = self._pipeline.conversation.long is not None and has_features(self.package)
        told = 0

        def tell() -> None:
            nonlocal told
            self._pipeline.raise_error()
            while told < self._pipeline.stats.clips_seen:
                told += 1
                progress(told * self.model.clip_length)

        for clip in clips:
            self._pipeline.put(Clip(clip.frames, given=0, features=with_features))
            tell()
        read = self._pipeline.settle()
        while not wait([read], timeout=0.05).done:
            tell()
        tell()
        try:
            read.result()
        except (InputError, MergerError):
            raise
        except Exception as error:
            raise EngineError(f"the decoder failed on the video: {error}") from error

    def check_frames(self, frames: int) -> None:
        """Raises InputError when the package can't take so many frames: not in whole clips, or too many."""
        clip = self.model.clip_length
        if frames < clip or frames % clip:
            raise InputError(f"{frames} frames, expected a multiple of {clip}, the frames of a clip")
        if frames > self.model.max_frames:
            raise InputError(
                f"{frames} frames, the package was built for at most {self.model.max_frames}; "
                f"build with --frames {frames}"
            )

    def push(self, frame: Any, timestamp: float) -> None:
        """Takes one frame of a stream. When a clip is full, it goes on its way; see `when_full`.

        The stream has no end: when as many frames as the package was built for are in the window, the older half
        leaves. After a stall of more than STALL seconds the clip in the middle is filled with its last frame.

        Args:
            frame: uint8 (H, W, 3), RGB, as a NumPy array or by DLPack, of any size; or on the GPU, by DLPack or
                `__cuda_array_interface__`, of the encoder's size and contiguous, for packages that TensorRT runs. It is
                copied; from the GPU not over the host.
            timestamp: seconds on any clock, later than that of the frame before.

        Raises:
            InputError: the frame or its time is not as above, or the session is closed. The frame is not taken, and the
                next may be pushed.
            EngineError: an engine failed on something before. The frame is not taken; the session goes on.
        """
        self._pipeline.raise_error()
        on_device = is_on_device(frame)
        if not on_device:
            frame = resize(_checked(frame), self.model.image_size)
        with self._pushing:
            if not self._last < timestamp < math.inf:
                raise InputError(f"a frame at {timestamp} s came after one at {self._last} s; push them in their order")
            self._go_live()
            if self._filled and timestamp - self._last > STALL:
                self._put()
            self._make_ready(on_device)
            self._frames.put(self._filled, frame)
            self._filled, self._last = self._filled + 1, timestamp
            self._pipeline.stats.pushed += 1
            self._pipeline.stats.waiting += 1
            if self._filled == self.model.clip_length:
                self._put()

    def flush(self) -> None:
        """Fills the clip in the middle with its last frame and sends it on its way, as at the end of a stream."""
        self._pipeline.raise_error()
        with self._pushing:
            if self._filled:
                self._put()

    def drain(self) -> None:
        """Waits until every whole clip that was pushed has been read."""
        self._pipeline.raise_error()
        self._pipeline.submit(lambda: None).result()
        self._pipeline.raise_error()

    def _go_live(self) -> None:
        if not self._live:
            self._pipeline.begin_stream()
            self._live = True

    def _put(self) -> None:
        if self._answer is not None and self._answer.given_up.is_set():
            self._end_answer()
        given, self._filled = self._filled, 0
        frames, self._frames = self._frames, self._host_frames()
        frames.fill(given)
        self._pipeline.put(Clip(frames.array if isinstance(frames, HostFrames) else frames, given), self._when_full)

    def _make_ready(self, on_device: bool) -> None:
        """For a frame on the GPU, or on the host."""
        if on_device == isinstance(self._frames, DeviceFrames):
            return
        if self._filled:
            raise InputError("the frames of a clip lie all on the GPU or all on the host; flush() in between")
        room = self.engines[0].device_frames() if on_device else self._host_frames()
        if room is None:
            raise InputError(
                f"a frame lies on a GPU, a package for {self.package.manifest.target} takes it from the host; copy it"
            )
        self._frames = room

    def _host_frames(self) -> HostFrames:
        return HostFrames(np.empty((self.model.clip_length, *self.model.image_size, 3), np.uint8))

    # -- text ----------------------------------------------------------------------------------------------------------

    def ask(
        self, question: str, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Reading:
        """Answers about all whole clips given before, knowing the questions and answers before, if there are any. Text
        comes as it is generated, in pieces, while frames may go on to be pushed; these belong behind the answer.

        A question ends the answer before it, and so does giving it up. What was read of an answer stays in the chat; if
        nothing was, its question leaves it, too.

        Raises:
            InputError: at the call: an empty question, one with a control token, one that does not fit the cache,
                sampling values out of range, or the session is closed; while reading: another `watch` or `ask` came in
                between, or in a stream it does not fit.
            EngineError: an engine failed; the question may be asked again.
        """
        if not question.strip():
            raise InputError("the question is empty")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        sampler = Sampler(temperature, top_p, seed)
        self._pipeline.raise_error()
        stats = self._pipeline.stats
        if self._filled and stats.waiting == self._filled and not stats.clips_seen:
            raise InputError(
                f"only {self._filled} of the {self.model.clip_length} frames of a clip were pushed; push the rest, "
                "or flush() to ask about these"
            )
        self._pipeline.conversation.check(question)
        self._end_answer()
        answer = self._answer = self._pipeline.answer(question, max_new_tokens, sampler)
        return Reading(self, answer, self._text.stream(iter(answer)))

    def forget(self) -> None:
        """Forgets questions and answers; the video stays."""
        self._pipeline.raise_error()
        self._end_answer()
        self._pipeline.submit(self._pipeline.conversation.forget).result()

    def _end_answer(self) -> None:
        with self._asking:
            answer, self._answer = self._answer, None
        if answer is not None:
            self._pipeline.end(answer)

    def stats(self) -> Stats:
        """A copy of the figures as they are now."""
        conversation = self._pipeline.conversation
        return replace(
            self._pipeline.stats,
            frames=conversation.frames,
            clips=conversation.clips,
            visual_tokens=conversation.visual_tokens,
            moves=conversation.moves,
        )


@dataclass
class HostFrames:
    """Room for a clip's frames, uint8 (T, H, W, 3)."""

    array: NDArray[np.uint8]

    def put(self, index: int, frame: NDArray[np.uint8]) -> None:
        self.array[index] = frame

    def fill(self, given: int) -> None:
        """Repeats the last of the first `given` frames to the end."""
        self.array[given:] = self.array[given - 1]


class Reading(Iterator[str]):
    """An answer's text, piece by piece. Holds its session open."""

    def __init__(self, session: VideoSession, answer: Answer, pieces: Iterator[str]):
        self._session, self._answer, self._pieces = session, answer, pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Gives the answer up."""
        self._answer.given_up.set()

    __del__ = close


def _checked(frame: Any) -> NDArray[np.uint8]:
    if not isinstance(frame, np.ndarray) and hasattr(frame, "__dlpack__"):
        try:
            frame = np.from_dlpack(frame)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"a {type(frame).__name__} can't be read as a frame: {error}") from None
    if not isinstance(frame, np.ndarray):
        raise InputError(f"a {type(frame).__name__} is not a frame; uint8 (height, width, 3) in RGB was expected")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise InputError(f"a frame is {frame.dtype} {frame.shape}; uint8 (height, width, 3) in RGB was expected")
    return frame
