"""What `liteframe compare` found: a table, a page, and a picture of quality over latency."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..runtime.plot import COLOURS, GRID, INK, Picture
from .peers import PAPERS

COLUMNS = (
    "method",
    "tokens / frame",
    "tokens",
    "vision ms",
    "± %",
    "LLM ms",
    "total ms",
    "frames at equal tokens",
    "frames at equal ms",
    "cosine to WAP",
    "% right",
    f"{PAPERS}: vision ms",
)
PAPER_COLUMNS = (PAPERS, "in", "frames", "tokens / frame", "vision ms", "LLM ms", "total ms", "% right", "")
LETTER, LINE = 7, 12  # pixels that a letter of a name takes, at most, and a line of them

Document = dict[str, Any]


def header(document: Document) -> list[str]:
    """What was measured, and what was multiplied."""
    machine, versions, ratio = document["machine"], document["versions"], document["ratio"]
    reduced = "" if ratio is None else f", of which reducers make 1 token of {ratio}"
    return [
        f"{document['title']}; {document['frames']} frames{reduced}; batch 1, FP32, "
        f"ONNX Runtime {versions['onnxruntime']} on {machine['cores']} cores of {machine['processor']}",
        f"vision ms: one clip, median of {document['rounds']} rounds in turns, times the clips; ±: half of the "
        "way from the fastest round to the slowest; LLM ms: the prefill of the whole prompt, measured",
        f"frames at equal ms: the most whose total is no more than {document['reference']}'s for "
        f"{document['frames']} frames, to {document['alike']:.0%}, by lines through the prefills that were measured",
    ]


def footnotes(document: Document) -> list[str]:
    lines = []
    if any(row["cosine"] is not None for row in document["rows"]):
        lines.append("cosine to WAP: of each of WAP's tokens to the nearest of the method's; more tokens are nearer")
    random = [row for row in document["rows"] if row["weights"] == "random" and row["clip_ms"] is not None]
    if random:
        whose = "all" if len(random) == len(document["rows"]) else ", ".join(row["name"] for row in random)
        pools = any(row["cosine"] is not None for row in random)
        cosines = "; cosines say how a method pools, not how good it is" if pools else ""
        lines.append(f"random weights: {whose}{cosines}")
    lines += [f"{row['name']}: {row['note']}" for row in document["rows"] if row["note"]]
    here, paper = document["order"]["here"], document["order"]["paper"]
    if len(here) > 1:
        same = "as in " if here == [*paper] else f"{' > '.join(f'{name} {ms:g}' for name, ms in paper.items())} in "
        lines.append(f"vision ms, slowest first: {' > '.join(here)}; {same}the paper's Table 2")
    for row in document["rows"]:
        if row["kinds"] is not None:
            kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in sorted(row["kinds"].items(), key=lambda k: -k[1]))
            lines.append(f"{row['name']}, ms of a clip under the profiler: {kinds}")
    return lines


def cells(document: Document) -> list[list[str]]:
    """Of COLUMNS, a row for each contender."""
    return [
        [
            row["name"],
            _number(row["tokens_per_frame"], "g"),
            _number(row["tokens"], "d"),
            _number(row["vision_ms"]),
            _spread(row["clip_ms_rounds"]),
            _number(row["llm_ms"]),
            _number(row["total_ms"]),
            _number(row["frames_at_equal_tokens"], "d"),
            _number(row["frames_at_equal_ms"], "d"),
            _number(row["cosine"], ".3f"),
            _number(row["accuracy"] and row["accuracy"]["percent"]),
            row["paper"],
        ]
        for row in document["rows"]
    ]


def paper_cells(document: Document) -> list[list[str]]:
    """Of PAPER_COLUMNS."""
    return [
        [
            row["name"],
            row["table"],
            str(row["frames"]),
            _number(row["tokens_per_frame"], "d"),
            _number(row["vision_ms"]),
            _number(row["llm_ms"]),
            _number(row["total_ms"]),
            _number(row["accuracy"]),
            row["note"],
        ]
        for row in document["paper"]
    ]


def _spread(rounds: list[float] | None) -> str:
    if rounds is None or len(rounds) < 2:
        return ""
    return _number(50 * (max(rounds) - min(rounds)) / statistics.median(rounds), ".0f")


def _number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def print_report(document: Document) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print("\n".join(header(document)), highlight=False, markup=False)
    for columns, rows in ((COLUMNS, cells(document)), (PAPER_COLUMNS, paper_cells(document))):
        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table, markup=False)
        if columns is COLUMNS:
            console.print("\n".join(footnotes(document)), highlight=False, markup=False)


def write_report(folder: Path, document: Document) -> None:
    """compare.md, compare.json, and pareto.png where a row has a quality."""
    parts = ["\n\n".join(header(document)), _page_table(COLUMNS, cells(document)), "\n\n".join(footnotes(document))]
    picture = pareto(document)
    if picture is not None:
        (folder / "pareto.png").write_bytes(picture.png())
        parts.append("![quality over latency](pareto.png)")
    parts.append(_page_table(PAPER_COLUMNS, paper_cells(document)))
    (folder / "compare.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / "compare.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def _page_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def pareto(document: Document) -> Picture | None:
    """Accuracy over total latency, or without questions the cosine; a line joins those that none beats in both. None
    where no row has either."""
    asked = any(row["accuracy"] for row in document["rows"])
    points = {}
    for row in document["rows"]:
        quality = (row["accuracy"] and row["accuracy"]["percent"]) if asked else row["cosine"]
        if quality is not None and row["total_ms"] is not None:
            points[row["name"]] = row["total_ms"], quality if asked else 100 * max(quality, 0.0)
    if not points:
        return None
    width, height, left, right, top, bottom = 720, 400, 50, 120, 30, 45
    picture = Picture(width, height, "quality over latency")
    slowest = max(ms for ms, _ in points.values()) * 1.1

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across, up = point[0] / slowest, point[1] / 100
        return left + across * (width - left - right), top + (1 - up) * (height - top - bottom)

    for percent in range(0, 101, 20):
        y = at((0.0, percent))[1]
        picture.line([(left, y), (width - right, y)], GRID, 1)
        picture.text(f"{percent}" if asked else f"{percent / 100:g}", left - 8, y + 4, anchor="end")
    picture.text("% right" if asked else "cosine to WAP", left, top - 12)
    picture.text(f"ms, vision and prefill; {slowest:.0f} at the right", width - right, height - 12, anchor="end")
    best = [p for p in points.values() if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points.values())]
    picture.line([at(point) for point in sorted(best)], INK, 1)
    names: list[tuple[float, float, float]] = []  # start, end, line
    for (name, point), colour in zip(
        sorted(points.items(), key=lambda item: -item[1][1]), COLOURS * len(points), strict=False
    ):
        x, y = at(point)
        picture.dot(x, y, colour)
        start, end, y = x + 8, x + 8 + LETTER * len(name), y + 4
        while any(start < b and a < end and abs(y - line) < LINE for a, b, line in names):
            y += 1  # names that would cover each other go below
        names.append((start, end, y))
        picture.text(name, start, y, colour)
    return picture
