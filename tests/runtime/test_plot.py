"""What pictures say where."""

import re

from liteframe.runtime.plot import heat_map


def test_a_heat_maps_squares_stand_under_their_columns_and_beside_their_rows():
    svg = heat_map(
        "found", "frames", "depth", ["100", "200", "300"], ["0", "1"], [[0, 0.25, 0.5], [0.6, 0.75, 1]]
    ).svg()
    texts = {
        words: (float(x), float(y))
        for x, y, words in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    }
    for row, (name, line) in enumerate((("0", ("0 %", "25 %", "50 %")), ("1", ("60 %", "75 %", "100 %")))):
        for column, words in zip(("100", "200", "300"), line, strict=True):
            assert texts[words] == (texts[column][0], texts[name][1]), (row, column)
