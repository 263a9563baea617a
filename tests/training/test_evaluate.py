"""The page of accuracies: its figures are those of the questions, its line joins what nothing beats."""

import json

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


@pytest.mark.parametrize("given", ["package", "name=/nowhere"])
def test_what_is_no_package_is_refused(tmp_path, given, capsys):
    assert guard(main, [str(tmp_path), given, "--output", str(tmp_path / "page")]) == 2
    assert capsys.readouterr().err.count("\n") <= 2
    assert not (tmp_path / "page").exists()
