"""A profile for people: profile.html, a page without anything from outside it, and its plots as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from ..engines.package import Package
from .plot import bars, curves

CURVES = {
    "vision_ms": "vision",
    "llm_ms": "LLM",
    "total_ms": "total",
    "first_token_streamed_ms": "first token, streamed",
}


def write_report(
    folder: Path,
    package: Package,
    rows: list[dict[str, Any]],
    columns: dict[str, str],
    layers: dict[str, dict[str, float]],
) -> None:
    """Writes profile.html, profile-latency.png and profile-NAME.png for each of `layers`.

    Args:
        folder: made where it is missing.
        rows: of `profile.measure`.
        columns: what of them is shown -> heading.
        layers: title -> module -> milliseconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = package.manifest
    title = f"{manifest.built_from.artifact} on {manifest.target}"
    frames = [float(row["frames"]) for row in rows]
    lines = {label: [max(row[name], 0.1) for row in rows] for name, label in CURVES.items()}
    latency = curves("Latency by number of frames", "frames", "ms", frames, lines)
    pictures = {name: bars(name, "ms", modules) for name, modules in layers.items()}
    (folder / "profile-latency.png").write_bytes(latency.png())
    for number, picture in enumerate(pictures.values(), start=1):
        (folder / f"profile-layers-{number}.png").write_bytes(picture.png())
    commands = package.folder / "polygraphy" / "commands.txt"
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    content = page.render(
        title=title,
        rows=rows,
        columns=columns,
        latency=latency,
        layers=pictures.values(),
        commands=commands.read_text(encoding="utf-8") if commands.exists() else "",
    )
    (folder / "profile.html").write_text(content, encoding="utf-8")
