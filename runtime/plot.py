"""Pictures of lines, boxes and words, drawn alike as SVG, for a page, and as PNG, without a plotting library."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

INK, FAINT, GRID, ACCENT = "#1e293b", "#64748b", "#e2e8f0", "#c2410c"
COLOURS = ("#0369a1", "#c2410c", "#4d7c0f", "#7e22ce", "#be185d", "#0f766e", "#a16207", "#475569")
SCALE = 2  # pixels of a PNG for one of the picture's

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]


@dataclass
class Picture:
    """Coordinates are pixels from the top left."""

    width: int
    height: int
    title: str
    _svg: list[str] = field(default_factory=list)
    _image: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        self._image = np.full((self.height * SCALE, self.width * SCALE, 3), 255, np.uint8)

    def line(self, points: list[Point], colour: str = INK, width: float = 1.5) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._svg.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{path}"/>')
        pixels = np.rint(np.array(points) * SCALE * 16).astype(np.int32)  # in sixteenths: cv2's fixed point
        cv2.polylines(self._image, [pixels], False, _bgr(colour), round(width * SCALE), cv2.LINE_AA, shift=4)

    def box(self, x: float, y: float, width: float, height: float, colour: str, hint: str = "") -> None:
        """`hint` shows where a pointer rests, in SVG."""
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self._svg.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">{title}</rect>'
        )
        corners = [(round(a * SCALE), round(b * SCALE)) for a, b in ((x, y), (x + width, y + height))]
        cv2.rectangle(self._image, corners[0], corners[1], _bgr(colour), cv2.FILLED)

    def dot(self, x: float, y: float, colour: str) -> None:
        self._svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        centre = round(x * SCALE * 16), round(y * SCALE * 16)
        cv2.circle(self._image, centre, 4 * SCALE * 16, _bgr(colour), cv2.FILLED, cv2.LINE_AA, shift=4)

    def hint(self, x: float, y: float, words: str) -> None:
        """Shows where a pointer rests, in SVG."""
        self._svg.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="transparent"><title>{escape(words)}</title></circle>'
        )

    def text(self, words: str, x: float, y: float, colour: str = FAINT, anchor: Anchor = "start") -> None:
        self._svg.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>')
        font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.4 * SCALE  # whose letters are ASCII's
        words = words.replace("∞", "inf").encode("ascii", "replace").decode()
        (wide, _), _ = cv2.getTextSize(words, font, size, 1)
        left = round(x * SCALE - {"start": 0, "middle": 0.5, "end": 1}[anchor] * wide)
        cv2.putText(self._image, words, (left, round(y * SCALE)), font, size, _bgr(colour), 1, cv2.LINE_AA)

    def svg(self) -> str:
        inside = "\n".join(self._svg)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">\n'
            f"{inside}\n</svg>"
        )

    def png(self) -> bytes:
        _, encoded = cv2.imencode(".png", self._image)
        return encoded.tobytes()


def curves(
    title: str, x_label: str, y_label: str, x: list[float], lines: dict[str, list[float]], width: int = 900
) -> Picture:
    """Lines over `x`, both axes logarithmic; the legend names them from the top down as they end on the right."""
    height, left, right, top, bottom = 380, 60, 190, 30, 45
    picture = Picture(width, height, title)
    values = [value for line in lines.values() for value in line]
    low, high = (10 ** f(np.log10(v)) for f, v in ((np.floor, min(values)), (np.ceil, max(values) * 1.0001)))

    def at(value: float, count: float) -> Point:
        across = np.log(count / x[0]) / max(np.log(x[-1] / x[0]), 1e-9)
        up = np.log(value / low) / np.log(high / low)
        return left + across * (width - left - right), top + (1 - up) * (height - top - bottom)

    for power in range(round(np.log10(low)), round(np.log10(high)) + 1):
        (_, y) = at(10.0**power, x[0])
        picture.line([(left, y), (width - right, y)], GRID, 1)
        picture.text(f"{10.0**power:g}", left - 8, y + 4, anchor="end")
    for count in x:
        picture.text(f"{count:g}", at(low, count)[0], height - bottom + 18, anchor="middle")
    picture.text(y_label, left, top - 12)
    picture.text(x_label, width - right, height - 8, anchor="end")
    label_y = 0.0
    by_end = sorted(lines.items(), key=lambda line: -line[1][-1])
    for (name, line), colour in zip(by_end, COLOURS, strict=False):
        points = [at(value, count) for value, count in zip(line, x, strict=True)]
        picture.line(points if len(points) > 1 else [*points, (points[0][0] + 4, points[0][1])], colour, 2)
        label_y = max(points[-1][1] + 4, label_y + 16)
        picture.text(name, points[-1][0] + 10, label_y, colour)
    return picture


def bars(title: str, unit: str, values: dict[str, float], width: int = 900) -> Picture:
    """One bar under the other, from the top down."""
    left, right, top, step = 250, 90, 20, 20
    picture = Picture(width, top + step * len(values) + 10, title)
    longest = max(values.values(), default=0) or 1.0
    for number, (name, value) in enumerate(values.items()):
        y = top + number * step
        picture.text(name, left - 8, y + 11, anchor="end")
        length = (width - left - right) * value / longest
        picture.box(left, y, length, step - 6, COLOURS[0], f"{name}: {value:.3f} {unit}")
        picture.text(f"{value:.2f} {unit}", left + length + 6, y + 11, INK)
    return picture


def heat_map(
    title: str, x_label: str, y_label: str, columns: list[str], rows: list[str], values: list[list[float]]
) -> Picture:
    """A square for each row and column, from white at 0 to dark at 1, with its value in percent."""
    left, top, side = 70, 40, 64
    picture = Picture(left + side * len(columns) + 30, top + side * len(rows) + 50, title)
    picture.text(f"{title}; {y_label} down", 10, 20, INK)
    for row, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = top + row * side
        picture.text(name, left - 8, y + side / 2 + 4, anchor="end")
        for column, value in enumerate(line):
            x = left + column * side
            shade = "".join(f"{round(255 + value * (dark - 255)):02x}" for dark in (3, 105, 161))
            words = f"{100 * value:.0f} %"
            picture.box(x, y, side - 2, side - 2, f"#{shade}", f"{columns[column]}, {name}: {words}")
            picture.text(words, x + side / 2, y + side / 2 + 4, "#ffffff" if value > 0.5 else INK, "middle")
    for column, name in enumerate(columns):
        picture.text(name, left + (column + 0.5) * side, top + side * len(rows) + 16, anchor="middle")
    picture.text(x_label, left + side * len(columns), top + side * len(rows) + 36, anchor="end")
    return picture


def _bgr(code: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(code[1:])[::-1])
