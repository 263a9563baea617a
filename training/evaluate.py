"""Several packages on the same questions, accuracy beside latency, as a page.

    python -m liteframe.training.evaluate QUESTIONS NAME=PACKAGE ... --output FOLDER

The first package is also asked without a video, about one frame, and about the frames in another order. Out come
accuracy.md, a table by kind of question with 95 % confidence intervals; pareto.png and pareto.svg; accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ..calib.accuracy import Accuracy, Respondent, Shown, accuracies, ask_all, read_videos
from ..engines.package import InputError, Package, new_folder, open_package
from ..runtime.cli import guard
from ..runtime.plot import COLOURS, GRID, INK, Picture
from ..runtime.profile import measure
from ..runtime.session import VideoSession

WITHOUT: dict[Shown, str] = {"shuffled": "frames shuffled", "frame": "one frame", "nothing": "no video"}
ITERATIONS, WARMUP = 20, 5
LETTER, LINE = 7, 12  # pixels that a letter of a name takes, at most, and a line of them


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        total_ms: vision and prefill, for the frames of the questions' videos; None where it is another row's.
    """

    name: str
    accuracy: dict[str, Accuracy]
    total_ms: float | None


def judge(name: str, package: Package, questions: Path, shown: Shown = "video", timed: bool = True) -> Row:
    """Raises InputError when the package is not for this machine, or the folder holds no questions."""
    model = package.manifest.model
    videos = read_videos(questions, model.max_frames, model.clip_length, model.image_size)
    accuracy = accuracies(ask_all(Respondent.of(package), videos, shown, progress=name))
    total = None
    if timed:
        frames = max(len(clips) for clips, _ in videos) * model.clip_length
        with VideoSession(package) as session:
            (figures,) = measure(session, [frames], ITERATIONS, WARMUP)
        total = figures["total_ms"]
    return Row(name, accuracy, total)


def write_page(rows: list[Row], output: Path) -> None:
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.accuracy))
    first = rows[0].accuracy
    lines = [
        f"| | {' | '.join(f'{kind} ({first[kind].questions})' for kind in kinds)} | ms |",
        f"|---|{'---|' * len(kinds)}---|",
    ]
    for row in rows:
        cells = [str(row.accuracy[kind]) for kind in kinds]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {'' if row.total_ms is None else f'{row.total_ms:.0f}'} |")
    picture = pareto([row for row in rows if row.total_ms is not None])
    told = [
        {"name": r.name, "total_ms": r.total_ms, "accuracy": {k: vars(a) for k, a in r.accuracy.items()}} for r in rows
    ]
    with new_folder(output) as folder:
        (folder / "accuracy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "accuracy.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        (folder / "pareto.svg").write_text(picture.svg(), encoding="utf-8")
        (folder / "pareto.png").write_bytes(picture.png())


def pareto(rows: list[Row]) -> Picture:
    """Accuracy over latency; a line joins those that none beats in both."""
    width, height, left, right, top, bottom = 720, 400, 50, 200, 30, 45
    picture = Picture(width, height, "accuracy over latency")
    slowest = max(row.total_ms or 0.0 for row in rows) * 1.1

    def at(row: Row) -> tuple[float, float]:
        across = (row.total_ms or 0.0) / slowest
        return left + across * (width - left - right), top + (1 - row.accuracy["all"].percent / 100) * (
            height - top - bottom
        )

    for percent in range(0, 101, 20):
        y = top + (1 - percent / 100) * (height - top - bottom)
        picture.line([(left, y), (width - right, y)], GRID, 1)
        picture.text(f"{percent}", left - 8, y + 4, anchor="end")
    picture.text("% right", left, top - 12)
    picture.text(f"ms, vision and prefill; {slowest:.0f} at the right", width - right, height - 12, anchor="end")
    best = [row for row in rows if not any(_beats(other, row) for other in rows)]
    picture.line([at(row) for row in sorted(best, key=lambda row: row.total_ms or 0.0)], INK, 1)
    names: list[tuple[float, float, float]] = []  # start, end, line
    for row, colour in sorted(zip(rows, COLOURS * len(rows), strict=False), key=lambda pair: at(pair[0])[1]):
        x, y = at(row)
        picture.dot(x, y, colour)
        y += 4
        start, end = x + 8, x + 8 + LETTER * len(row.name)
        while any(start < b and a < end and abs(y - line) < LINE for a, b, line in names):
            y += 1  # names that would cover each other go below
        names.append((start, end, y))
        picture.text(row.name, start, y, colour)
    return picture


def _beats(one: Row, other: Row) -> bool:
    """Is as good in both, and better in one."""
    a, b = ((row.accuracy["all"].percent, -(row.total_ms or 0.0)) for row in (one, other))
    return a != b and a[0] >= b[0] and a[1] >= b[1]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("packages", nargs="+", metavar="NAME=PACKAGE")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    packages = []
    for given in options.packages:
        name, found, path = given.partition("=")
        if not found:
            raise InputError(f"{given}: expected NAME=PACKAGE")
        packages.append((name, open_package(Path(path))))
    rows = [judge(name, package, options.questions) for name, package in packages]
    name, package = packages[0]
    without = [
        judge(f"{name}, {what}", package, options.questions, shown, timed=False) for shown, what in WITHOUT.items()
    ]
    write_page([rows[0], *without, *rows[1:]], options.output)
    print((options.output / "accuracy.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
