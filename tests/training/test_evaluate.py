"""The page of accuracies: its figures are those of the questions, its line joins what nothing beats."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
from liteframe.calib.accuracy import Accuracy
from liteframe.calib.questions import Question
from liteframe.runtime.cli import guard
from liteframe.training.evaluate import Row, _beats, main, pareto
from liteframe.training.samples import Sample, write_samples


def row(name, percent, total_ms):
    return Row(name, {"all": Accuracy(percent, percent, percent, 10)}, total_ms)


def test_a_page_has_a_row_for_each_package_and_each_way_of_showing(tiny_package, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), np.uint8)
    write_samples([Sample(frames, 2.0, (Question("k", "what is it?", "a cat"),))], tmp_path / "set")
    arguments = [str(tmp_path / "set"), f"one={tiny_package.folder}", f"two={tiny_package.folder}"]
    assert main([*arguments, "--output", str(tmp_path / "page")]) == 0
    table = (tmp_path / "page" / "accuracy.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    names = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert names == ["one", "one, frames shuffled", "one, one frame", "one, no video", "two"]
    told = json.loads((tmp_path / "page" / "accuracy.json").read_text())
    assert [entry["total_ms"] is None for entry in told] == [False, True, True, True, False]
    assert told[0]["accuracy"]["k"]["questions"] == 1
    assert (tmp_path / "page" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_as_fast_and_better_beats():
    slow, fast, poor = row("slow", 90, 200), row("fast", 80, 100), row("poor", 70, 150)
    assert [(a.name, b.name) for a in (slow, fast, poor) for b in (slow, fast, poor) if _beats(a, b)] == [
        ("fast", "poor")
    ]
    assert not _beats(slow, row("same", 90, 200))
    svg = pareto([slow, fast, poor]).svg()
    assert svg.count("<circle") == 3 and all(name in svg for name in ("slow", "fast", "poor"))


def test_names_in_the_plot_do_not_cover_each_other():
    """Points that nearly coincide, and one whose long name reaches to the next."""
    rows = [row(f"model {n}", 60 + n / 10, 300 + n) for n in range(6)]
    rows += [row("a name that is longer than others", 30, 300), row("next", 30, 600), row("far", 30, 900)]
    svg = pareto(rows).svg()
    drawn = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    names = [(float(x), float(x) + 7 * len(text), float(y)) for x, y, text in drawn if text in {r.name for r in rows}]
    assert len(names) == len(rows)
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    where = {(r.total_ms, r.accuracy["all"].percent) for r in rows}  # dots lie as latency and accuracy do
    assert np.corrcoef(sorted(x for x, _ in dots), sorted(x for x, _ in where))[0, 1] == pytest.approx(1, abs=1e-5)
    assert np.corrcoef(sorted(-y for _, y in dots), sorted(y for _, y in where))[0, 1] == pytest.approx(1, abs=1e-5)
    for (left, right, line), (start, end, other) in combinations(names, 2):
        assert right <= start or end <= left or abs(line - other) > 11


@pytest.mark.parametrize("given", ["package", "name=/nowhere"])
def test_what_is_no_package_is_refused(tmp_path, given, capsys):
    assert guard(main, [str(tmp_path), given, "--output", str(tmp_path / "page")]) == 2
    assert capsys.readouterr().err.count("\n") <= 2
    assert not (tmp_path / "page").exists()
