"""`liteframe profile`: latency by number of frames, after the paper's protocol (Appendix A, Latency).

Vision encoding and LLM prefill, batch 1, each the median of 100 runs after 40 to warm up. Frames are random; reading
and resizing a video is not measured. The LLM's share is the prefill of the whole prompt up to the first logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..engines.package import InputError, open_package
from .session import VideoSession

QUESTION = "What happens in this video?"


def measure(session: VideoSession, frames: list[int], iterations: int, warmup: int) -> list[dict[str, Any]]:
    """One row for each number of frames: frames, tokens of the prompt, vision_ms, llm_ms, total_ms.

    Raises:
        InputError: a number of frames that the package can't take.
    """
    model = session.model
    random = np.random.default_rng(0)
    for count in frames:
        session.check_frames(count)
    rows = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for count in frames:
            video = random.integers(0, 256, (count, *model.image_size, 3), dtype=np.uint8)
            task = progress.add_task(f"{count} frames", total=warmup + iterations)
            runs = []
            for run in range(warmup + iterations):
                session.watch(video, frames=count)
                for _ in session.ask(QUESTION, max_new_tokens=1):
                    break
                if run >= warmup:
                    runs.append((session.stats.vision_ms, session.stats.llm_ms))
                progress.advance(task)
            vision, llm = (statistics.median(column) for column in zip(*runs, strict=True))
            rows.append(
                {
                    "frames": session.stats.frames,
                    "tokens": session.stats.prompt_tokens,
                    "vision_ms": round(vision, 1),
                    "llm_ms": round(llm, 1),
                    "total_ms": round(vision + llm, 1),
                }
            )
    return rows


def print_table(rows: list[dict[str, Any]], iterations: int, warmup: int) -> None:
    table = Table("frames", "tokens", "vision ms", "LLM ms", "total ms", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    print(f"medians of {iterations} after {warmup}, batch 1")


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 64,128,256") from None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="liteframe profile", description="Latency by number of frames.")
    parser.add_argument("package", type=Path)
    parser.add_argument("--frames", type=_counts, help="such as 64,128,256 (default: up to the most)")
    parser.add_argument("--iterations", type=int, default=100, help="runs that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=40, help="runs before them (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    if options.iterations < 1 or options.warmup < 0:
        raise InputError("--iterations takes 1 or more, --warmup 0 or more")
    session = VideoSession(open_package(options.package))
    most, clip = session.model.max_frames, session.model.clip_length
    frames = options.frames or sorted({max(clip, most // part // clip * clip) for part in (8, 4, 2, 1)})
    rows = measure(session, frames, options.iterations, options.warmup)
    print_table(rows, options.iterations, options.warmup)
    if options.json:
        print(json.dumps({"package": str(options.package), "iterations": options.iterations, "rows": rows}))
    return 0
