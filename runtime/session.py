"""A session with a video: watch, then ask, text comes as it is generated.

    watch: video -> clips -> encoder engine -> visual tokens
    ask:   chat text around the visual tokens -> decoder engine, in chunks, into the KV cache -> token by token -> text

The video's part of the prompt stays in the cache, so a further question costs only its own tokens. Each question
is a conversation of its own, and there is one cache: a new `watch` or `ask` ends the answer before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError, Package, open_package
from .clips import read_clips
from .engine import open_engines
from .text import ChatText, Sampler
from .video import open_video


@dataclass
class Stats:
    """What the last `watch` and `ask` took. Times in milliseconds.

    Attributes:
        frames, clips, visual_tokens: what was watched.
        prompt_tokens: positions before the answer, visual tokens included.
        vision_ms: encoding all clips; reading the video is not in it.
        llm_ms: prefill of what was not in the cache yet.
        decode_ms: the answer's tokens after the first.
        finished: why the answer ended: "end", "length" (max_new_tokens) or "cache" (the cache is full).
    """

    frames: int = 0
    clips: int = 0
    visual_tokens: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    vision_ms: float = 0.0
    llm_ms: float = 0.0
    decode_ms: float = 0.0
    finished: str = ""


class VideoSession:
    """
    Args:
        package: an engine package's folder, or one already opened with `open_package`.
        threads: CPU threads an engine; None leaves it to the executor.

    Raises:
        InputError: the package is damaged, unfinished, or not for this machine.
    """

    def __init__(self, package: str | Path | Package, threads: int | None = None):
        self.package = package if isinstance(package, Package) else open_package(package)
        self.model = self.package.manifest.model
        self._text = ChatText(self.package)
        self._encoder, self._decoder = open_engines(self.package, threads)
        self._tokens: list[NDArray[np.float32]] = []
        self._prefix: tuple[int, ...] = ()
        self._prefilled = 0
        self._turn = 0
        self.stats = Stats()

    def watch(
        self,
        source: str | Path | int | NDArray[np.uint8],
        frames: int | None = None,
        fps: float | None = None,
        progress: Callable[[int], object] = lambda encoded: None,
    ) -> None:
        """Reads and encodes a video, which replaces the one before once it is read; on an error that one stays.

        Args:
            source: a video file, a folder of images, a camera's number, or frames uint8 (frames, H, W, 3), RGB.
            frames: how many to sample, in whole clips; by default what the package was built for.
            fps: rate of the images of a folder or array; by default 1.
            progress: called with the number of frames encoded so far, after each call of the encoder.

        Raises:
            InputError: nothing can be read from the source, or `frames` is not what the package can take.
        """
        wanted = self.model.max_frames if frames is None else frames
        self.check_frames(wanted)
        tokens: list[NDArray[np.float32]] = []
        stats = Stats()
        batch: list[NDArray[np.uint8]] = []
        with open_video(source, fps) as video:
            for clip in read_clips(video, wanted, self.model.clip_length, self.model.image_size):
                batch.append(clip.frames)
                if len(batch) == self.model.max_clips:
                    tokens.extend(self._encode(batch, stats))
                    progress(stats.frames)
                    batch = []
        if batch:
            tokens.extend(self._encode(batch, stats))
            progress(stats.frames)
        self._tokens, self._prefilled, self.stats = tokens, 0, stats
        self._turn += 1

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

    def _encode(self, batch: list[NDArray[np.uint8]], stats: Stats) -> NDArray[np.float32]:
        clips = np.stack(batch)
        start = time.perf_counter()
        tokens = self._encoder.encode(clips)
        stats.vision_ms += (time.perf_counter() - start) * 1e3
        stats.clips += len(batch)
        stats.frames += len(batch) * self.model.clip_length
        stats.visual_tokens = stats.clips * self.model.tokens_per_clip
        return tokens

    def ask(
        self, question: str, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> Iterator[str]:
        """Answers about the video, or, when none was watched, about the question alone; text comes as generated.

        Nothing is computed before the first piece is asked for. The answer may be given up at any time.

        Raises:
            InputError: at the call: an empty question, one with a control token, one that does not fit the cache, or
                sampling values out of range; while answering: another `watch` or `ask` came in between.
        """
        if not question.strip():
            raise InputError("the question is empty")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        sampler = Sampler(temperature, top_p, seed)
        before, after = (
            self._text.question_about_video(question) if self._tokens else ([], self._text.question(question))
        )
        prompt = self._prompt(before)
        needed = sum(map(len, prompt)) + len(after) + 1
        if needed > self._decoder.capacity:
            raise InputError(
                f"video and question take {needed} positions, the KV cache holds {self._decoder.capacity}; "
                "use fewer frames or a shorter question, or build with more --frames"
            )
        self._turn += 1
        return self._text.stream(self._answer(self._turn, tuple(before), prompt, after, max_new_tokens, sampler))

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise InputError(
                "this answer ended when the session was given another video or question; read it to its end first, or "
                "ask again"
            )

    def _prompt(self, before: list[int]) -> list[NDArray[np.float32]]:
        """Embeddings of everything up to the question: chat prefix, then each unit between its own text."""
        if not self._tokens:
            return []
        model = self.model
        parts = [self._text.embed(before)]
        frames_per_unit = model.clip_length // model.units_per_clip
        units = (unit for clip in self._tokens for unit in np.split(clip, model.units_per_clip))
        for number, unit in enumerate(units):
            prefix, suffix = self._text.unit(number * frames_per_unit + 1, (number + 1) * frames_per_unit)
            parts += [self._text.embed(prefix), unit, self._text.embed(suffix)]
        return parts

    def _answer(
        self,
        turn: int,
        before: tuple[int, ...],
        prompt: list[NDArray[np.float32]],
        after: list[int],
        max_new_tokens: int,
        sampler: Sampler,
    ) -> Iterator[int]:
        self._check_turn(turn)
        start = time.perf_counter()
        if before != self._prefix or not self._prefilled:
            self._prefilled = 0  # holds if the prefill is interrupted
            self._decoder.rewind(0)
            if prompt:
                self._prefill(np.concatenate(prompt))
            self._prefix, self._prefilled = before, self._decoder.position
        self._decoder.rewind(self._prefilled)
        logits = self._prefill(self._text.embed(after))
        stats = self.stats
        stats.prompt_tokens, stats.new_tokens, stats.finished = self._decoder.position, 0, ""
        stats.llm_ms = (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        while not stats.finished:
            token = sampler.pick(logits)
            if token in self._text.end_of_turn:
                stats.finished = "end"
                break
            stats.new_tokens += 1
            stats.decode_ms = (time.perf_counter() - start) * 1e3
            yield token
            self._check_turn(turn)
            if stats.new_tokens == max_new_tokens:
                stats.finished = "length"
            elif self._decoder.position == self._decoder.capacity:
                stats.finished = "cache"
            else:
                logits = self._decoder.forward(self._text.embed([token]))

    def _prefill(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        for start in range(0, len(embeddings), self.model.chunk):
            logits = self._decoder.forward(embeddings[start : start + self.model.chunk])
        return logits
