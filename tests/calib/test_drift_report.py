"""The report: what the page holds, that it needs nothing from outside, and that curves are where their figures are."""

import io
import math
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.calib.bisect import Bisection, KeptModule
from liteframe.calib.drift_report import HEIGHT, SHOWN, WIDTH, _lay_out, print_report, write_report
from liteframe.calib.layers import LayerDrift
from liteframe.runtime.plot import INK, SCALE
from rich.console import Console

NASTY = "<script>alert(1)</script>&\"'[bold]é"
ACCENT = (12, 65, 194)  # #c2410c, BGR


def row(number, snr, cosine=1.0, module=None):
    error = 0.0 if snr == math.inf else 10 ** (-snr / 20) if math.isfinite(snr) else math.inf
    module = module or f"blocks.{number // 3}.fc{number % 3}"
    return LayerDrift(f"{module}/MatMul_{number}", module, "MatMul", cosine, error, snr)


def falling(count=60):
    return [row(i, math.inf if i < 4 else 70 - i, 1 - i / 4000) for i in range(count)]


class Page(HTMLParser):
    """Tags with their attributes, text, and the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.rows, self.cell = [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data.strip()


def written(folder, graphs, title="Drift of b from a"):
    write_report(folder, title, graphs)
    return Page((folder / "drift.html").read_text(encoding="utf-8"))


def points(page, graph=0):
    polylines = [a["points"] for tag, a in page.tags if tag == "polyline" and a["stroke"] == INK]
    return np.array([[float(v) for v in point.split(",")] for point in polylines[graph].split()])


def test_every_value_is_in_the_table_in_network_order(tmp_path):
    rows = falling()
    page = written(tmp_path / "made" / "report", {"encoder": rows})
    assert page.rows[0] == ["number", "module", "operator", "cosine", "max abs error", "SNR, dB"]
    assert page.rows[1:] == [
        [str(i), r.module, "MatMul", f"{r.cosine:.6f}", f"{r.max_abs_error:.3g}", f"{r.snr_db:.1f}"]
        if r.snr_db < math.inf
        else [str(i), r.module, "MatMul", f"{r.cosine:.6f}", "0", "∞"]
        for i, r in enumerate(rows, start=1)
    ]
    titles = [attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    assert titles == [r.value for r in rows]


def test_the_page_needs_nothing_from_outside_and_names_are_text(tmp_path):
    rows = [*falling(5), row(5, 3.0, module=NASTY)]
    page = written(tmp_path, {"encoder": rows, NASTY.replace("/", ""): rows}, title=f"Drift of {NASTY}")
    assert f"Drift of {NASTY}" in page.text
    assert [cells[1] for cells in page.rows if cells[1].startswith("<")] == [NASTY] * 2
    assert [tag for tag, _ in page.tags].count("script") == 1
    allowed = {"html", "meta", "title", "style", "h1", "h2", "p", "sub", "svg", "path", "text", "polyline", "circle"}
    assert {tag for tag, _ in page.tags} <= allowed | {"table", "thead", "tbody", "tr", "th", "td", "script"}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "xlink:href"}
    assert not re.search(r"@import|url\(|https?://|fetch\(", (tmp_path / "drift.html").read_text().replace(NASTY, ""))


def test_summary_and_marks_name_the_first_broken_and_the_worst(tmp_path):
    rows = falling()
    rows[40], rows[30] = row(40, -5.0, 0.9), row(30, 33.0, 0.98)
    page = written(tmp_path, {"encoder": rows, "decoder": falling(20)})
    assert f"60 values, the first that breaks is number 31, {rows[30].value}: 33.0 dB, cosine 0.980000." in page.text
    assert "20 values, none below 20 dB or cosine 0.99." in page.text
    assert f"first broken: 31 {rows[30].value}, 33.0 dB" in page.text
    assert f"worst: 41 {rows[40].value}, -5.0 dB" in page.text
    assert f"worst: 20 {falling(20)[19].value}, 51.0 dB" in page.text
    marked = [tag for tag, attributes in page.tags if tag == "circle" and attributes["fill"] != "transparent"]
    assert len(marked) == 3
    assert "first broken and worst: 6" in written(tmp_path, {"encoder": [*falling(5), row(5, 1.0)]}).text


@given(st.lists(st.floats(-400, 400) | st.just(math.inf) | st.just(-math.inf), min_size=1, max_size=40))
def test_curves_rise_and_fall_as_the_figures_do(figures):
    curve = _lay_out([row(i, snr) for i, snr in enumerate(figures)])
    x, y = np.array(curve.points).T
    assert len(x) == len(figures)
    assert (np.diff(x) > 0).all() and x[0] > 0 and x[-1] < WIDTH
    assert (y > 0).all() and (y < HEIGHT).all()
    assert (np.diff(y[np.argsort(figures)]) <= 0).all()  # downwards on the page
    ticks = np.array([(int(label), at) for at, label in curve.y_ticks if "∞" not in label])
    finite = np.isfinite(figures)
    slope, offset = np.polyfit(*ticks.T, 1)
    np.testing.assert_allclose(slope * np.array(figures)[finite] + offset, y[finite], atol=1e-6)


def test_the_picture_shows_the_same_curve_and_marks(tmp_path):
    rows = falling()
    curve = points(written(tmp_path, {"encoder": rows}))
    image = cv2.imread(str(tmp_path / "drift-encoder.png"))
    assert (image[0] == 255).all() and (image[:, 0] == 255).all()  # a light background, nothing at the edge
    for x, y in curve[5:-1]:
        column, line = round(x * SCALE), round(y * SCALE)
        assert image[line - 2 : line + 3, column - 2 : column + 3].min() < 100
    broken = [r.cosine < 0.99 or r.snr_db < 20 for r in rows].index(True)
    for x, y in (curve[broken], curve[-1]):
        assert tuple(image[round(y * SCALE), round(x * SCALE)].tolist()) == ACCENT


def test_graphs_that_do_not_differ_have_no_marks(tmp_path):
    page = written(tmp_path, {"encoder": [row(i, math.inf) for i in range(5)]})
    assert "worst:" not in page.text and "∞" in page.text
    assert len(set(points(page)[:, 1])) == 1


@pytest.fixture
def printed(monkeypatch):
    def printed(*arguments):
        out = io.StringIO()
        monkeypatch.setattr("liteframe.calib.drift_report.Console", lambda **o: Console(**o, file=out))
        print_report(*arguments)
        return out.getvalue()

    return printed


def test_the_terminal_shows_the_ten_worst_modules_once_each(printed):
    rows = [row(i, 80.0 - i, 0.999, module=f"blocks.{i // 2}") for i in range(40)]
    lines = printed({"decoder": rows}).splitlines()
    assert lines[1] == "decoder: 40 values, none below 20 dB or cosine 0.99"
    shown = [line.split() for line in lines[3:]]
    expected = rows[:-22:-2]
    assert [cells[1] for cells in shown] == [r.module for r in expected[:SHOWN]]
    assert [float(cells[-1]) for cells in shown] == [r.snr_db for r in expected[:SHOWN]]
    assert [int(cells[0]) for cells in shown] == [rows.index(r) + 1 for r in expected[:SHOWN]]


def test_the_terminal_shows_names_as_they_are(printed):
    out = printed({"encoder": [row(0, 3.0, module="a[bold]b[/]")]})
    assert "the first that breaks is number 1, a[bold]b[/]/MatMul_0: 3.0 dB" in out
    assert " a[bold]b[/] " in out


def bisection(kept):
    gate = {"mean_cosine": 0.99, "worst_cosine": 0.97}
    before, after = {"mean_cosine": 0.9, "worst_cosine": 0.8}, {"mean_cosine": 0.995, "worst_cosine": 0.98}
    return Bisection("int8", gate, before, after, kept, modules=7, runs=42)


def test_the_modules_to_keep_are_in_the_page_and_in_the_terminal(tmp_path, printed):
    kept = [KeptModule(NASTY, math.inf), KeptModule("blocks.2.fc1", 0.0123)]
    graphs, found = {"encoder": falling(3)}, {"encoder": bisection(kept)}
    write_report(tmp_path, "Drift", graphs, found)
    page, out = Page((tmp_path / "drift.html").read_text(encoding="utf-8")), printed(graphs, found)
    table = [["number", "module to keep", "cost alone"], ["1", NASTY, "inf"], ["2", "blocks.2.fc1", "0.0123"]]
    assert page.rows[:3] == table
    assert [line.split() for line in out.splitlines()[-2:]] == table[1:]
    for text in (page.text, out):
        assert "does not hold as it is (mean cosine 0.90000, worst cosine 0.80000); it does with 2 of 7 modules" in text
        assert "42 runs" in text


@pytest.mark.parametrize(
    ("kept", "words"), [([], "nothing has to be kept"), (None, "does not hold even with all 7 modules kept")]
)
def test_where_there_is_nothing_to_list_the_verdict_says_why(tmp_path, printed, kept, words):
    graphs, found = {"encoder": falling(3)}, {"encoder": bisection(kept)}
    write_report(tmp_path, "Drift", graphs, found)
    page, out = Page((tmp_path / "drift.html").read_text(encoding="utf-8")), printed(graphs, found)
    assert words in page.text and words in out
    assert "module to keep" not in page.text + out
