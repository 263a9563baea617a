"""Drift for people: a table in the terminal, a page without anything from outside it, a picture for each graph.

rows ─┬─ print_report ─▶ terminal
      └─ _lay_out ─▶ curve of SNR over network order ─▶ drift.html (SVG), drift-encoder.png, drift-decoder.png
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runtime.plot import ACCENT, GRID, Picture
from .bisect import Bisection
from .layers import BROKEN_COSINE, BROKEN_SNR_DB, LayerDrift, first_broken

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1100, 360, 60, 20, 30, 50  # of a curve and its margins, pixels
LINE = 16  # height of one of text
SHOWN = 10  # modules in the terminal


@dataclass(frozen=True)
class Mark:
    """A point that is pointed out; its label stands to its right, or, in the right half, to its left."""

    x: float
    y: float
    label: str
    label_y: float

    @property
    def leftwards(self) -> bool:
        return self.x > WIDTH / 2


@dataclass(frozen=True)
class Curve:
    """Where everything goes, in pixels from the top left."""

    points: list[tuple[float, float]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    limit: float
    marks: list[Mark]


def write_report(
    folder: Path,
    title: str,
    graphs: Mapping[str, Sequence[LayerDrift]],
    bisections: Mapping[str, Bisection] = MappingProxyType({}),
) -> None:
    """Writes drift.html and, for each graph, drift-NAME.png into a folder, which is made where it is missing.

    Args:
        graphs: name -> its rows in network order, at least one.
        bisections: name -> what to keep in higher precision, where that was looked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: _draw(_lay_out(rows), name, rows) for name, rows in graphs.items()}
    for name, picture in pictures.items():
        (folder / f"drift-{name}.png").write_bytes(picture.png())
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    content = page.render(globals(), title=title, graphs=graphs, pictures=pictures, bisections=bisections)
    (folder / "drift.html").write_text(content, encoding="utf-8")


def print_report(
    graphs: Mapping[str, Sequence[LayerDrift]], bisections: Mapping[str, Bisection] = MappingProxyType({})
) -> None:
    """Of each graph, the first value that is broken and the modules that drift most, each by its worst value; then the
    modules to keep."""
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    for name, rows in graphs.items():
        console.print(f"\n{name}: {len(rows)} values, {escape(summary(rows))}", soft_wrap=True)
        worst: dict[str, LayerDrift] = {}
        for row in sorted(rows, key=lambda row: row.snr_db):
            worst.setdefault(row.module, row)
        table = Table("", "module", "operator", "cosine", "max abs error", "SNR dB", box=None, padding=(0, 1))
        for row in [*worst.values()][:SHOWN]:
            figures = f"{row.cosine:.6f}", f"{row.max_abs_error:.3g}", decibels(row.snr_db)
            table.add_row(str(rows.index(row) + 1), escape(row.module), row.operator, *figures)
        console.print(table)
        if name in bisections:
            console.print(f"\n{name}: {verdict(bisections[name])}", soft_wrap=True)
            if bisections[name].kept:
                table = Table("", "module to keep", "cost alone", box=None, padding=(0, 1))
                for number, kept in enumerate(bisections[name].kept or (), start=1):
                    table.add_row(str(number), escape(kept.module), f"{kept.cost:.3g}")
                console.print(table)


def summary(rows: Sequence[LayerDrift]) -> str:
    broken = first_broken(rows)
    if broken is None:
        return f"none below {BROKEN_SNR_DB:g} dB or cosine {BROKEN_COSINE:g}"
    figures = f"{decibels(broken.snr_db)} dB, cosine {broken.cosine:.6f}"
    return f"the first that breaks is number {rows.index(broken) + 1}, {broken.value}: {figures}"


def verdict(bisection: Bisection) -> str:
    def values(figures: Mapping[str, float]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {figures[name]:.5f}" for name in bisection.gate)

    gate = f"the gate of {bisection.asked} ({values(bisection.gate)})"
    if bisection.kept is None:
        return (
            f"{gate} does not hold even with all {bisection.modules} modules kept in higher precision "
            f"({values(bisection.after)}; as it is {values(bisection.before)})"
        )
    if not bisection.kept:
        return f"{gate} holds as it is ({values(bisection.before)}); nothing has to be kept in higher precision"
    return (
        f"{gate} does not hold as it is ({values(bisection.before)}); it does with {len(bisection.kept)} of "
        f"{bisection.modules} modules kept in higher precision ({values(bisection.after)}), and without any one of "
        f"them it does not; {bisection.runs} runs"
    )


def decibels(snr: float) -> str:
    return f"{snr:.1f}" if math.isfinite(snr) else "∞" if snr > 0 else "-∞"


def _lay_out(rows: Sequence[LayerDrift]) -> Curve:
    finite = [row.snr_db for row in rows if math.isfinite(row.snr_db)]
    top = 10 * math.ceil(max([50.0, *finite]) / 10) + 10  # what is infinite lies on the edge
    bottom = 10 * math.floor(min([0.0, *finite]) / 10) - 10

    def x(number: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (number - 0.5) / len(rows)

    def y(snr: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - min(max(snr, bottom), top)) / (top - bottom)

    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if len(rows) <= 12 * s or s == 1000)
    y_ticks = {snr: str(snr) for snr in range(-(-bottom // 20) * 20, top, 20)}
    ends = {row.snr_db for row in rows}
    y_ticks |= {edge: decibels(end) for edge, end in ((top, math.inf), (bottom, -math.inf)) if end in ends}
    broken, worst = first_broken(rows), min(rows, key=lambda row: row.snr_db)
    wanted = {"first broken and worst": worst} if broken is worst else {"first broken": broken, "worst": worst}
    marks: list[Mark] = []
    for what, row in wanted.items():
        if row is not None and row.snr_db < math.inf:
            number, height = rows.index(row) + 1, y(row.snr_db)
            label = f"{what}: {number} {row.value}, {decibels(row.snr_db)} dB"
            below = marks[-1].label_y + LINE if marks else 0
            marks.append(Mark(x(number), height, label, label_y=max(height, below)))
    return Curve(
        points=[(x(number), y(row.snr_db)) for number, row in enumerate(rows, start=1)],
        x_ticks=[(x(number), str(number)) for number in range(step, len(rows) + 1, step)],
        y_ticks=[(y(snr), label) for snr, label in y_ticks.items()],
        limit=y(BROKEN_SNR_DB),
        marks=marks,
    )


def _draw(curve: Curve, name: str, rows: Sequence[LayerDrift]) -> Picture:
    picture = Picture(WIDTH, HEIGHT, f"SNR of the {name} over network order")
    for y, label in curve.y_ticks:
        picture.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID, 1)
        picture.text(label, LEFT - 8, y + 4, anchor="end")
    for x, label in curve.x_ticks:
        picture.text(label, x, HEIGHT - BOTTOM + 18, anchor="middle")
    picture.text(f"SNR of the {name}, dB", LEFT, TOP - 12)
    picture.text("values in network order", WIDTH - RIGHT, HEIGHT - 10, anchor="end")
    picture.line([(LEFT, curve.limit), (WIDTH - RIGHT, curve.limit)], ACCENT, 0.5)
    picture.line(curve.points)
    for number, (row, (x, y)) in enumerate(zip(rows, curve.points, strict=True), start=1):
        picture.hint(x, y, f"{number} {row.value}, {decibels(row.snr_db)} dB")
    for mark in curve.marks:
        picture.dot(mark.x, mark.y, ACCENT)
        beside = -10 if mark.leftwards else 10
        picture.text(mark.label, mark.x + beside, mark.label_y + 4, ACCENT, "end" if mark.leftwards else "start")
    return picture
