"""What streaming saves and what it costs, on a CPU.

    python bench/streaming.py [--only live file overhead memory] [--rounds 3] [--threads 2]

live      256 frames of a real video arrive at 4 a second; the time from the last frame to the first token, beside the
          serial path's, which begins when the last frame is there; and after 64, 128 and 512 frames.
file      a video file read as fast as it goes, up to the first token: streamed, and serially.
overhead  LiteFrame-B at 448 px and a decoder of Qwen2.5-0.5B's shape: 256 frames of 640 x 480 are pushed and a question
          answered, on engines that do nothing, beside the same on the engines themselves.
memory    10,000 frames through a session whose window holds 64: resident memory after frame 1,000, threads, handles.

live, file and memory run the demo's artifact, CLIP ViT-B/16 + WAP and SmolLM2-135M, built for the CPU in FP32.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from build_full_size import write_artifact
from liteframe.engines.package import Package
from liteframe.export.build_engine import build
from liteframe.runtime import VideoSession
from liteframe.runtime import session as session_module
from liteframe.runtime.clips import read_clips
from liteframe.runtime.conversation import Cache
from liteframe.runtime.text import ChatText, Sampler
from liteframe.runtime.video import open_video
from numpy.typing import NDArray
from timing import in_turns

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from assets import fetch
from clip_smollm2 import assemble

QUESTION = "What is happening in this video?"
FPS, MARKS = 4.0, (64, 128, 256, 512)
SAMPLES = 5  # clips after which is asked, at each mark
WINDOW, FRAMES, WARM = 64, 10_000, 1_000


def demo_package(folder: Path, frames: int) -> Package:
    if not (folder / "artifact").exists():
        assemble(folder / "artifact")
    return build(folder / "artifact", "cpu", folder / f"cpu-{frames}", frames)


def video_frames(name: str) -> list[NDArray[np.uint8]]:
    capture, frames = cv2.VideoCapture(str(fetch(name))), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return frames


class Serial:
    """Encodes every clip, then prefills everything, then the question: nothing overlaps."""

    def __init__(self, session: VideoSession):
        self._model, (self._encoder, decoder) = session.model, session.engines
        self._cache = Cache(decoder.twin(), ChatText.of(session.package), session.model, [])

    def answer(self, clips: list[NDArray[np.uint8]]) -> None:
        """Up to the first token, which may be the end of the answer."""
        self._cache.refill([self._encoder.encode(clip[None])[0] for clip in clips])
        next(self._cache.ask(QUESTION, 1, Sampler()), None)

    def read(self, path: Path, frames: int) -> list[NDArray[np.uint8]]:
        clips = read_clips(open_video(path), frames, self._model.clip_length, self._model.image_size)
        return [clip.frames for clip in clips]


def live(folder: Path, rounds: int, threads: int) -> dict[str, object]:
    frames = video_frames("bikes")
    with VideoSession(demo_package(folder, 256), threads) as session:
        clip, size = session.model.clip_length, session.model.image_size
        serial = Serial(session)
        resized = [cv2.resize(frame, size[::-1]) for frame in frames[:256]]
        resized += resized[: 256 - len(resized)]
        clips = [np.stack(resized[i : i + clip]) for i in range(0, 256, clip)]
        ask_after = {mark + clip * sample: mark for mark in MARKS for sample in range(SAMPLES)}
        after: dict[int, list[float]] = {mark: [] for mark in MARKS}
        serially = []
        for _ in range(rounds):
            session.reset()
            start = time.perf_counter()
            for number in range(1, max(ask_after) + 1):
                time.sleep(max(0.0, start + number / FPS - time.perf_counter()))
                arrived = time.perf_counter()
                session.push(frames[number % len(frames)], number / FPS)
                if number in ask_after:
                    answer = session.ask(QUESTION, max_new_tokens=1)
                    next(answer, None)
                    after[ask_after[number]].append(time.perf_counter() - arrived)
                    answer.close()
            session.drain()
            stats = session.stats()
            start = time.perf_counter()
            serial.answer(clips)
            serially.append(time.perf_counter() - start)
    medians = {mark: statistics.median(times) for mark, times in after.items()}
    whole = statistics.median(serially)
    for mark, median in medians.items():
        spread = f"{min(after[mark]):.3f} to {max(after[mark]):.3f}"
        print(f"{mark:5} frames: {median:.3f} s from the last frame to the first token ({spread})")
    print(f"serially, 256 frames: {whole:.2f} s; streamed / serial {medians[256] / whole:.4f}")
    flat = max(medians.values()) / min(medians.values())
    print(f"largest / smallest of {', '.join(map(str, MARKS))} frames: {flat:.3f}")
    again = stats.again_ms / stats.clips_seen
    print(f"a clip: {stats.vision_ms / stats.clips_seen:.0f} ms encoding, {stats.llm_ms / stats.clips_seen:.0f} ms "
          f"prefilling with questions, {again:.0f} ms for the second cache")  # fmt: skip
    return {"seconds": medians, "serial_seconds": whole, "ratio": medians[256] / whole, "flatness": flat}


def file(folder: Path, rounds: int, threads: int) -> dict[str, object]:
    path, frames = fetch("bikes"), 248
    with VideoSession(demo_package(folder, 256), threads) as session:
        serial = Serial(session)

        def streamed() -> None:
            session.watch(path, frames)
            next(session.ask(QUESTION, max_new_tokens=1), None)

        times = in_turns({"serial": lambda: serial.answer(serial.read(path, frames)), "streamed": streamed}, rounds, 1)
    ratio = statistics.median(a / b for a, b in zip(times["streamed"], times["serial"], strict=True))
    for name, seconds in times.items():
        print(f"{name:10}{statistics.median(seconds):.2f} s")
    print(f"streamed / serial {ratio:.3f}")
    return {"seconds": {name: statistics.median(seconds) for name, seconds in times.items()}, "ratio": ratio}


class NoEncoder:
    def __init__(self, model: object):
        self._tokens = np.zeros((1, model.tokens_per_clip, model.hidden_size), np.float32)

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.repeat(self._tokens, len(frames), axis=0)


class NoDecoder:
    def __init__(self, model: object):
        self.capacity = model.capacity
        self.position = 0
        self._logits = np.eye(1, model.vocabulary, 7, dtype=np.float32)[0]

    def forward(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        self.position += len(embeddings)
        return self._logits

    def rewind(self, position: int) -> None:
        self.position = position

    def reserve(self, positions: int) -> None:
        """There is no cache."""

    def twin(self) -> NoDecoder:
        twin = NoDecoder.__new__(NoDecoder)
        twin.__dict__ = self.__dict__ | {"position": 0}
        return twin


def overhead(folder: Path, rounds: int, threads: int) -> dict[str, object]:
    write_artifact(folder / "full-size")
    package = build(folder / "full-size", "cpu", folder / "full-size-cpu", 256)
    frames = np.random.default_rng(0).integers(0, 256, (8, 480, 640, 3), dtype=np.uint8)

    def run(session: VideoSession) -> None:
        session.reset()
        for number in range(256):
            session.push(frames[number % 8], number / FPS)
        for _ in session.ask(QUESTION, max_new_tokens=64):
            pass

    open_engines = session_module.open_engines
    with VideoSession(package, threads) as real:
        model = package.manifest.model
        session_module.open_engines = lambda *_: (NoEncoder(model), NoDecoder(model))
        with VideoSession(package) as empty:
            session_module.open_engines = open_engines
            run(empty)
            times = in_turns(
                {"engines that do nothing": lambda: run(empty), "the engines": lambda: run(real)}, rounds, 0
            )
    for name, seconds in times.items():
        print(f"{name:25}{statistics.median(seconds):.3f} s for 256 frames and a question")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    share = medians["engines that do nothing"] / medians["the engines"]
    print(f"our own Python: {share:.2%} of wall time")
    return {"seconds": medians, "share": share}


def memory(folder: Path, rounds: int, threads: int) -> dict[str, object]:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    def handles() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    frames, package = video_frames("bikes"), demo_package(folder, WINDOW)
    with VideoSession(package, threads) as session:  # whatever libraries open once
        session.watch(fetch("bikes"), 8)
    before = threading.active_count(), handles()
    peak = 0.0
    with VideoSession(package, threads) as session:
        for number in range(FRAMES):
            session.push(frames[number % len(frames)], number / FPS)
            if number % 500 == 499:
                for _ in session.ask(QUESTION, max_new_tokens=16):
                    pass
                print(f"{number + 1:6} frames: {resident():.0f} MB", flush=True)
            if number == WARM:
                session.drain()
                warm = resident()
            elif number > WARM and number % 100 == 0:
                peak = max(peak, resident())
        session.drain()
        stats = session.stats()
    left = threading.active_count() - before[0], handles() - before[1]
    print(f"resident memory after frame {WARM}: {warm:.0f} MB, at most {peak:.0f} MB later; {peak - warm:+.0f} MB")
    print(f"left behind: {left[0]} threads, {left[1]} handles; {stats}")
    return {"warm_mb": warm, "peak_mb": peak, "growth_mb": peak - warm, "threads": left[0], "handles": left[1]}


MEASURES: dict[str, Callable[[Path, int, int], dict[str, object]]] = {
    "live": live,
    "file": file,
    "overhead": overhead,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = {}
    for name in options.only:
        print(f"\n{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = MEASURES[name](Path(folder), options.rounds, options.threads)
    print(json.dumps({"machine": platform.processor() or platform.machine(), "threads": options.threads, **results}))


if __name__ == "__main__":
    main()
