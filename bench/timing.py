"""Peers timed in turns: every round runs each of them once, every other round backwards, so that a noisy machine, and
what the one before leaves behind, is the same to all."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version


def in_turns(peers: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each round of each peer, after `warmup` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(warmup + rounds):
        for name, run in list(peers.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], ours: str, libraries: list[str]) -> None:
    """A table for people; the last line is one JSON document. Ratios are medians of ratios within a round."""
    print(title)
    print(f"{'':40}{'median ms':>12}{'best ms':>12}{'ours / it':>12}")
    rows = {}
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[ours], times, strict=True))
        median, best = statistics.median(times) * 1e3, min(times) * 1e3
        print(f"{name:40}{median:12.1f}{best:12.1f}{ratio:12.3f}")
        rows[name] = {"median_ms": round(median, 2), "best_ms": round(best, 2), "ours_over_it": round(ratio, 4)}
    versions = {name: version(name) for name in libraries}
    print(json.dumps({"title": title, "machine": platform.processor() or platform.machine(), **versions, "rows": rows}))
