"""What each stage did when, as a Chrome trace: open it in chrome://tracing or Perfetto."""

from __future__ import annotations

import json
import threading
from pathlib import Path


class Trace:
    """Source: "Trace Event Format", JSON array of complete ("X") and metadata ("M") events, times in microseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.spans: list[tuple[str, str, float, float, dict[str, object]]] = []

    def add(self, stage: str, name: str, start: float, end: float, **details: object) -> None:
        """A span of a stage; times in seconds, of `time.perf_counter`."""
        with self._lock:
            self.spans.append((stage, name, start, end, details))

    def write(self, path: Path) -> None:
        stages = list(dict.fromkeys(stage for stage, *_ in self.spans))
        origin = min((start for _, _, start, _, _ in self.spans), default=0.0)
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": stage}}
            for number, stage in enumerate(stages)
        ]
        events += [
            {
                "ph": "X",
                "name": name,
                "cat": "liteframe",
                "pid": 0,
                "tid": stages.index(stage),
                "ts": round((start - origin) * 1e6, 3),
                "dur": round((end - start) * 1e6, 3),
                "args": details,
            }
            for stage, name, start, end, details in self.spans
        ]
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
