"""`liteframe inspect`: checks a package as the runtime would, and prints what is in it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from .package import Accuracy, Engine, Graph, Kept, Model, Package, TensorSpec, open_package, views_of

TILES = (1, 2, 4, 6, 9, 12, 16, 25, 36)  # of a frame: whose rows are shown


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="liteframe inspect", description="Check a package and print what is in it.")
    parser.add_argument("package", type=Path)
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    package = open_package(options.package)
    _print(package)
    if options.json:
        print(msgspec.json.encode(package.manifest).decode())
    return 0


def _print(package: Package) -> None:
    manifest, model = package.manifest, package.manifest.model
    print(f"{package.folder}: target {manifest.target}, {'engines' if manifest.engines else 'bundle without engines'}")
    print(f"built from {manifest.built_from.artifact}, SHA-256 {manifest.built_from.artifact_sha256}")
    print("with " + ", ".join(f"{name} {version}" for name, version in manifest.built_from.versions.items()))
    height, width = model.image_size
    print(
        f"up to {model.max_frames} frames of {width} x {height} in clips of {model.clip_length}, "
        f"{f'each in up to {model.max_tiles} tiles and a thumbnail, ' if model.max_tiles > 1 else ''}"
        f"{model.tokens_per_clip} visual tokens a clip, KV cache of {model.capacity} positions"
    )
    if manifest.text.notice:
        print(f"note: {manifest.text.notice}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if budget := budget_of(model):
        table = Table("tiles", "most frames", title="what the cache holds", title_style="", box=None, padding=(0, 1))
        for tiles, frames in budget.items():
            table.add_row(str(tiles), str(frames))
        console.print(table)
    parts: list[Engine | Graph] = [*manifest.engines, *manifest.graphs]
    for part in parts:
        kind = "engine" if isinstance(part, Engine) else "graph"
        print(f"\n{part.name} {kind}, {part.dialect}: " + ", ".join(file.path for file in part.files))
        if isinstance(part, Engine):
            found = ", ".join(f"{count} {name}" for name, count in part.precision.found.items())
            capabilities = " ".join(part.capabilities) or "any"
            print(f"  {part.compiler} {part.compiler_version}, compute capability {capabilities}")
            print(f"  precision asked {part.precision.asked}, tensors found {found}")
            for line in describe_kept(part.precision.kept):
                print(f"  {line}")
            if part.operators is not None:
                print(f"  {describe_operators(part)}")
        if part.parity is None:
            print("  against torch: not run, no device for it where it was compiled")
        elif part.parity:
            print(f"  against torch: {', '.join(f'{name} {value}' for name, value in part.parity.items())}")
        table = Table("", "tensor", "type", "shape", "min", "opt", "max", box=None, padding=(0, 1))
        for way, specs in (("in", part.inputs), ("out", part.outputs)):
            for spec in _without_repeats(specs):
                profile = spec.profile
                sizes = [" ".join(map(str, spec.shape))]
                if profile is not None:
                    sizes += [" ".join(map(str, shape)) for shape in (profile.min, profile.opt, profile.max)]
                table.add_row(way, spec.name, spec.dtype, *sizes)
        console.print(table)
    if (told := manifest.accuracy) is not None:
        print(f"\n{describe_accuracy(told)}")
    for line in manifest.allowed_drift:
        print(f"\ndrift allowed: {line}")
    print("\nall files are there and match their hashes")


def budget_of(model: Model) -> dict[int, int]:
    """Tiles of a frame: the most frames of which the cache holds so many with a thumbnail, as far as it holds any."""
    tiles = sorted({*TILES, model.max_tiles})
    return {count: most for count in tiles if (most := model.most_frames(views_of(count)))}


def describe_accuracy(told: Accuracy) -> str:
    return (
        f"{told.questions} questions: {told.engines:.2f} % right, the torch modules {told.modules:.2f} %; "
        f"{told.different} answers differ"
    )


def describe_operators(engine: Engine) -> str:
    """How its custom operators were compiled, and the times of both ways where there are two."""
    if engine.operators is None:
        return ""
    times = ", ".join(f"{way} {time:.2f} ms" for way, time in engine.operators.milliseconds.items())
    return f"custom operators: {engine.operators.way}{times and f' ({times})'}"


def describe_kept(kept: list[Kept]) -> list[str]:
    """Exceptions from the precision asked for: rules with how many nodes they hold, then measured ones by name."""
    rules = Counter((entry.type, entry.reason) for entry in kept if ":" not in entry.reason)
    lines = [f"kept in {kind} by rule {reason}: {count} nodes" for (kind, reason), count in sorted(rules.items())]
    return lines + [f"kept in {entry.type}: {entry.node} ({entry.reason})" for entry in kept if ":" in entry.reason]


def _without_repeats(specs: list[TensorSpec]) -> list[TensorSpec]:
    """The caches of the first layer stand for those of all."""
    shown = [spec for spec in specs if "_cache_" not in spec.name or spec.name.split("_")[2] == "0"]
    if len(shown) == len(specs):
        return specs
    layers = len([spec for spec in specs if "_cache_" in spec.name]) // 2
    return [
        msgspec.structs.replace(spec, name=spec.name.replace("_0", f"_0..{layers - 1}", 1))
        if "_cache_" in spec.name
        else spec
        for spec in shown
    ]
