"""`liteframe profile`: latency by number of frames, after the paper's protocol (LiteFrame, Appendix A, Latency), what
each module takes, and how much of it is left to wait for when frames are read as they come.

Vision encoding and LLM prefill, batch 1, one after the other, each the median of 100 runs after 40 to warm up. Frames
are random; reading and resizing a video is not measured. The LLM's share is the prefill of the whole prompt up to the
first token.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..engines.package import InputError, Package, open_package
from .conversation import Cache
from .cuda import Cuda
from .engine import Decoder, open_engines
from .layer_times import by_kind, by_module
from .profile_report import write_report
from .session import VideoSession
from .text import ChatText, Sampler
from .trace import Trace

QUESTION = "What happens in this video?"
FRAMES = (8, 16, 32, 64, 128, 256)
STREAMED_RUNS = 5  # each after the whole video has been read again
LAYER_RUNS = 5
DECODED = 16  # tokens
# LiteFrame with InternVL3-8B on an A100-80GB: frames -> vision and LLM together, ms (the paper's latency table)
PAPER = {64: 150.1, 128: 272.6, 256: 532.3}
LAYER_TITLES = {
    "encoder": "encoder, one clip",
    "decoder": "decoder, a chunk of the prompt",
    "decode": "decoder, one token",
}
EPILOG = (
    "Engines and graphs also open in polygraphy and trtexec; the package's polygraphy/commands.txt has the commands."
)


def measure(session: VideoSession, frames: list[int], iterations: int, warmup: int) -> list[dict[str, Any]]:
    """One row for each number of frames. What the session has seen is forgotten.

    Returns rows of `frames`; `tokens` of the prompt; `vision_ms`, `llm_ms` and `total_ms` after the paper's protocol;
    `first_token_serial_ms`, from the last frame to the first token where all work begins then;
    `first_token_streamed_ms`, where the frames before the last were read as they came; `peak_memory_mb` of the process
    while the row was measured; `device_memory_mb`, what was in use on the GPU at its end, by whomever, or None on a CPU
    (engines keep what they have taken, so it is their peak); `paper_ms`, the paper's total where it has one.

    Raises:
        InputError: a number of frames that the package can't take.
    """
    for count in frames:
        session.check_frames(count)
    serial = _Serial(session)
    gpu = None if session.package.manifest.target == "cpu" else Cuda()
    console, rows = Console(stderr=True), []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for count in frames:
            _reset_peak_memory()
            video = _random_clips(session, count)
            runs = progress.track(range(warmup + iterations), description=f"{count} frames, one after the other")
            times = [serial.run(video) for _ in runs][warmup:]
            runs = progress.track(range(1 + STREAMED_RUNS), description=f"{count} frames, streamed")
            streamed = [_stream(session, video) for _ in runs][1:]
            vision, llm = (statistics.median(column) for column in zip(*times, strict=True))
            row = {
                "frames": count,
                "tokens": serial.tokens,
                "vision_ms": vision,
                "llm_ms": llm,
                "total_ms": vision + llm,
                "first_token_serial_ms": statistics.median(map(sum, times)),
                "first_token_streamed_ms": statistics.median(streamed),
                "peak_memory_mb": _peak_memory() / 2**20,
                "device_memory_mb": None if gpu is None else gpu.used_memory() / 2**20,
                "paper_ms": PAPER.get(count),
            }
            rows.append({name: None if value is None else round(value, 1) for name, value in row.items()})
    session.reset()
    return rows


class _Serial:
    """The paper's protocol: all clips encoded, then the whole prompt prefilled, in this thread."""

    def __init__(self, session: VideoSession):
        self._encoder, decoder = session.engines
        self._cache = Cache(decoder.twin(), ChatText.of(session.package), session.model, [])
        self._batch = session.model.max_clips
        self.tokens = 0

    def run(self, clips: NDArray[np.uint8]) -> tuple[float, float]:
        """Milliseconds of vision and of the language model up to the first token."""
        start = time.perf_counter()
        batches = [self._encoder.encode(clips[i : i + self._batch]) for i in range(0, len(clips), self._batch)]
        encoded = time.perf_counter()
        self._cache.refill([clip for batch in batches for clip in batch])
        next(self._cache.ask(QUESTION, 1, Sampler()), None)
        self.tokens = self._cache.prompt
        return (encoded - start) * 1e3, (time.perf_counter() - encoded) * 1e3


def _stream(session: VideoSession, clips: NDArray[np.uint8]) -> float:
    """Milliseconds from the last frame to the first token, where everything before has been read."""
    session.reset()
    frames = clips.reshape(-1, *clips.shape[2:])
    for number, frame in enumerate(frames[:-1]):
        session.push(frame, float(number))
    session.drain()
    start = time.perf_counter()
    session.push(frames[-1], float(len(frames)))
    answer = session.ask(QUESTION, max_new_tokens=1)
    next(answer, None)
    return (time.perf_counter() - start) * 1e3


def layer_times(package: Package, threads: int | None = None) -> dict[str, dict[str, float]]:
    """Milliseconds of each module, by the engine's own profiler, means of LAYER_RUNS: of the `encoder` on one clip, of
    the `decoder` on a chunk of the prompt, and of `decode`, a token after it."""
    random = np.random.default_rng(0)
    model, times = package.manifest.model, {}
    chunk = min(model.chunk, model.capacity - 1)
    embeddings = ChatText.of(package).embed(random.integers(0, model.vocabulary, chunk + 1).tolist())
    clip = random.integers(0, 256, (1, model.clip_length, *model.image_size, 3), dtype=np.uint8)

    def fill(decoder: Decoder) -> None:
        decoder.rewind(0)
        decoder.forward(embeddings[:chunk])

    def decode(decoder: Decoder) -> None:
        decoder.rewind(chunk)
        decoder.forward(embeddings[chunk:])

    with tempfile.TemporaryDirectory() as folder:
        for name in ("encoder", "decoder", "decode"):
            encoder, decoder = open_engines(package, threads, Path(folder))
            calls = 1 + LAYER_RUNS  # the first warms up
            for _ in range(calls):
                if name == "encoder":
                    encoder.encode(clip)
                elif name == "decoder":
                    fill(decoder)
            if name == "decode":
                fill(decoder)
                calls += 1
                for _ in range(1 + LAYER_RUNS):
                    decode(decoder)
            nodes = (encoder if name == "encoder" else decoder).node_times()
            counted = nodes[-(len(nodes) // calls) * LAYER_RUNS :]
            times[name] = {module: time / LAYER_RUNS for module, time in by_module(counted).items()}
    return times


def trace(session: VideoSession, frames: int, path: Path) -> None:
    """Writes what the stages do, and when, while a video is watched and asked about."""
    trace = Trace()
    video = _random_clips(session, frames)
    with VideoSession(session.package, trace=trace) as traced:
        traced.watch(video.reshape(-1, *video.shape[2:]), frames)
        for _ in traced.ask(QUESTION, max_new_tokens=DECODED):
            pass
    trace.write(path)


def _random_clips(session: VideoSession, frames: int) -> NDArray[np.uint8]:
    model, random = session.model, np.random.default_rng(0)
    shape = frames // model.clip_length, model.clip_length, *model.image_size, 3
    return random.integers(0, 256, shape, dtype=np.uint8)


def _reset_peak_memory() -> None:
    with suppress(OSError):  # as Linux lets a process do; elsewhere the peak is that of all rows so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Bytes of the process's memory, at most, since `_reset_peak_memory`."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


COLUMNS = {
    "frames": "frames",
    "tokens": "tokens",
    "vision_ms": "vision ms",
    "llm_ms": "LLM ms",
    "total_ms": "total ms",
    "first_token_serial_ms": "first token ms",
    "first_token_streamed_ms": "streamed",
    "peak_memory_mb": "peak MB",
    "device_memory_mb": "GPU MB",
    "paper_ms": "paper ms",
}


def columns_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Those of COLUMNS in which a row has something."""
    return {name: title for name, title in COLUMNS.items() if any(row[name] is not None for row in rows)}


def print_table(rows: list[dict[str, Any]], iterations: int, warmup: int) -> None:
    columns = columns_of(rows)
    table = Table(*columns.values(), box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*("" if row[name] is None else str(row[name]) for name in columns))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(
        f"medians of {iterations} after {warmup}, batch 1\n"
        f"first token: from the last frame; streamed: those before it were read as they came, of {STREAMED_RUNS}\n"
        "paper: LiteFrame with InternVL3-8B on an A100"
    )


def print_layers(layers: dict[str, dict[str, float]]) -> None:
    for name, modules in layers.items():
        whole = sum(modules.values())
        kinds = ", ".join(f"{kind} {time / whole:.0%}" for kind, time in by_kind(modules).items())
        print(f"{LAYER_TITLES[name]}: {whole:.2f} ms; {kinds}")


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 64,128,256") from None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="liteframe profile", description="Latency by number of frames, and by module.", epilog=EPILOG
    )
    parser.add_argument("package", type=Path)
    parser.add_argument("--frames", type=_counts, help="such as 64,128,256 (default: 8 to 256, as far as they fit)")
    parser.add_argument("--iterations", type=int, default=100, help="runs that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=40, help="runs before them (default: %(default)s)")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace of a video being answered about"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write profile.html and its plots as PNG")
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    if options.iterations < 1 or options.warmup < 0:
        raise InputError("--iterations takes 1 or more, --warmup 0 or more")
    package = open_package(options.package)
    with VideoSession(package) as session:
        fit = [count for count in FRAMES if count <= session.model.max_frames]
        frames = options.frames or [count for count in fit if count % session.model.clip_length == 0]
        rows = measure(session, frames, options.iterations, options.warmup)
        print_table(rows, options.iterations, options.warmup)
        if options.trace is not None:
            trace(session, frames[-1], options.trace)
    layers = layer_times(package)
    print_layers(layers)
    if options.report is not None:
        write_report(options.report, package, rows, columns_of(rows), {LAYER_TITLES[n]: t for n, t in layers.items()})
    print(f"commands for polygraphy and trtexec: {package.folder / 'polygraphy' / 'commands.txt'}")
    if options.json:
        document = {"package": str(options.package), "iterations": options.iterations, "warmup": options.warmup}
        print(json.dumps(document | {"rows": rows, "layers": layers}))
    return 0
