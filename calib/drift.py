"""`liteframe drift`: where the layers of a candidate, such as an INT8 engine, drift from those of its reference.

packages or graphs ─▶ encoder: up to 4 clips                          ─┐
                      decoder: the first clip's visual tokens, a text ─┴─┬─▶ layers.py ─────────────┬─▶ drift_report.py
                                                                         └─▶ bisect.py (--bisect) ─┘
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from ..engines.package import Engine, GateError, Graph, InputError, Package, new_folder, open_package
from ..engines.targets import Asked
from ..runtime.ort_engine import OrtDecoder
from .bisect import TEXT, Bisection, bisect
from .drift_report import print_report, write_report
from .layers import LayerDrift, LayerGraph, compare_graphs, first_broken

KINDS = {"frames": "encoder", "inputs_embeds": "decoder"}  # by an input that only this kind has
CLIPS = 4
EMBEDDING_SCALE = 0.05  # standard deviation of their stand-ins; the first norm takes any scale out again
CACHE_STEP = 256

Feeds = list[dict[str, NDArray]]


@dataclass(frozen=True)
class Pair:
    """Two graphs of one kind and the inputs they are run on; `asked` is what the candidate's manifest says."""

    reference: Path
    candidate: Path
    feeds: Feeds
    asked: Asked | None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="liteframe drift",
        description="Compare the layers of a candidate with those of its reference, and write a report.",
    )
    parser.add_argument("reference", type=Path, help="an engine package or an ONNX graph")
    parser.add_argument("candidate", type=Path, help="the same")
    parser.add_argument("clips", type=Path, nargs="*", help="videos, folders of images, or .npy files of uint8 clips")
    parser.add_argument(
        "--bisect", action="store_true", help="find the modules to keep in higher precision so that the gate holds"
    )
    parser.add_argument("--output", type=Path, default=Path("drift"), help="folder of the report (default: drift)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="make the last line of the output one JSON document, in which null stands for what is infinite",
    )
    options = parser.parse_args(arguments)
    with new_folder(options.output) as folder:
        pairs = open_pairs(options.reference, options.candidate, options.clips)
        found = bisect_all(pairs) if options.bisect else {}
        rows = compare_all(pairs)
        write_report(folder, f"Drift of {options.candidate} from {options.reference}", rows, found)
    print_report(rows, found)
    print(f"\nreport: {options.output / 'drift.html'}")
    if options.json:
        graphs = {
            name: {"first_broken": first_broken(drifts), "rows": drifts}
            | ({"bisection": found.get(name)} if options.bisect else {})
            for name, drifts in rows.items()
        }
        print(msgspec.json.encode({"report": str(options.output / "drift.html"), "graphs": graphs}).decode())
    if hopeless := [name for name, bisection in found.items() if bisection.kept is None]:
        raise GateError(
            f"{options.candidate}: even with every module kept in higher precision the gate of the "
            f"{' and the '.join(hopeless)} does not hold; what drifts is outside of them, see the report"
        )
    return 0


def open_pairs(reference: Path, candidate: Path, sources: list[Path]) -> dict[str, Pair]:
    """Encoder, decoder or both, as far as both paths have them.

    Args:
        sources: videos, folders of images, .npy files; the first 4 clips are looked at. A decoder alone needs none.

    Raises:
        InputError: a path is no package or graph, or they have no kind in common.
    """
    package, references = _open(reference)
    other, candidates = _open(candidate)
    if not references.keys() & candidates.keys():
        kinds = next(iter(references)), next(iter(candidates))
        raise InputError(f"{reference}: {kinds[0]}, {candidate}: {kinds[1]}; expected two graphs of one kind")
    feeds: dict[str, Feeds] = {}
    if "encoder" in references:
        feeds["encoder"] = [{"frames": clip[None]} for clip in _read_clips(references["encoder"], sources)]
    if "decoder" in references.keys() & candidates.keys():
        prompt = _prompt(package, references, feeds)
        feeds["decoder"] = [_decoder_feed(prompt, references["decoder"], candidates["decoder"])]
    asked: dict[str, Asked] = {part.name: part.precision.asked for part in _parts(other)}
    return {
        name: Pair(references[name].path, candidates[name].path, feeds[name], asked.get(name))
        for name in feeds
        if name in candidates
    }


def compare_all(pairs: dict[str, Pair]) -> dict[str, list[LayerDrift]]:
    """Name -> drift in network order.

    Raises:
        InputError: what `compare_graphs` raises.
    """
    rows = {}
    with _progress() as bar:
        for name, pair in pairs.items():
            task = bar.add_task(f"comparing the {name}s")

            def progress(done: int, total: int, task: Any = task) -> None:
                bar.update(task, completed=done, total=total)

            rows[name] = compare_graphs(pair.reference, pair.candidate, pair.feeds, progress)
    return rows


def bisect_all(pairs: dict[str, Pair]) -> dict[str, Bisection]:
    """Name -> what to keep, of those graphs that round anything.

    Raises:
        InputError: none does, or what `bisect` raises.
    """
    found = {}
    with _progress() as bar:
        for name, pair in pairs.items():
            task = bar.add_task(f"bisecting the {name}", total=None)

            def progress(what: str, runs: int, task: Any = task, name: str = name) -> None:
                bar.update(task, description=f"bisecting the {name}, run {runs}: {what}")

            if bisection := bisect(name, pair.reference, pair.candidate, pair.feeds, pair.asked, progress):
                found[name] = bisection
    if not found:
        paths = ", ".join(str(pair.candidate) for pair in pairs.values())
        raise InputError(f"{paths}: no quantised layers and nothing in FP16; expected a candidate in lower precision")
    return found


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _open(path: Path) -> tuple[Package | None, dict[str, LayerGraph]]:
    """Encoder and decoder of a package: engines where ONNX Runtime compiled them, else `fused` graphs. Or one graph."""
    if path.is_dir():
        package = open_package(path)
        return package, {part.name: LayerGraph.load(package.path(part.files[0])) for part in _parts(package)}
    graph = LayerGraph.load(path)
    kinds = [kind for name, kind in KINDS.items() if name in graph.inputs()]
    if not kinds:
        raise InputError(f"{path}: takes {', '.join(graph.inputs())}; expected a graph that takes {' or '.join(KINDS)}")
    return None, {kinds[0]: graph}


def _parts(package: Package | None) -> list[Engine | Graph]:
    if package is None:
        return []
    engines: dict[str, Engine] = {e.name: e for e in package.manifest.engines if e.compiler == "onnxruntime"}
    return [engines.get(name) or package.graph(name, "fused") for name in KINDS.values()]


def _read_clips(encoder: LayerGraph, sources: list[Path]) -> NDArray[np.uint8]:
    from .clips import read_calibration_clips

    shape = encoder.inputs()["frames"]
    if len(shape) != 5 or any(isinstance(size, str) for size in shape[1:]):
        raise InputError(f"{encoder.path}: frames are {shape}; expected [clips, T, H, W, 3] with fixed T, H and W")
    return read_calibration_clips(sources, int(shape[1]), (int(shape[2]), int(shape[3])), CLIPS)


def _prompt(package: Package | None, references: dict[str, LayerGraph], feeds: dict[str, Feeds]) -> NDArray[np.float32]:
    """Embeddings (positions, D): of a package the first clip's visual tokens, then text that its decoder goes on with;
    for a graph alone, stand-ins."""
    draw = np.random.default_rng(0)
    if package is None:
        width = references["decoder"].inputs()["inputs_embeds"][-1]
        return draw.normal(0, EMBEDDING_SCALE, (TEXT, int(width))).astype(np.float32)
    table = np.load(package.path(package.manifest.text.embeddings), mmap_mode="r", allow_pickle=False)
    (outputs,) = references["encoder"].runs(["visual_tokens"], feeds["encoder"][:1])
    prompt = [outputs["visual_tokens"][0]]
    decoder = OrtDecoder(references["decoder"].path)
    for _ in range(TEXT):  # sampled at temperature 1: text as the model expects it
        logits = decoder.forward(prompt[-1]).astype(np.float64)
        token = int(np.argmax(logits + draw.gumbel(size=logits.shape)))
        prompt.append(table[token : token + 1].astype(np.float32))
    return np.concatenate(prompt)


def _decoder_feed(prompt: NDArray[np.float32], *decoders: LayerGraph) -> dict[str, NDArray]:
    """The prompt, into empty caches: as long as either graph has them, or as the prompt needs."""
    reference, candidate = (decoder.inputs() for decoder in decoders)
    feed: dict[str, NDArray] = {"inputs_embeds": prompt[None], "write_index": np.zeros(1, np.int64)}
    for name in reference.keys() - feed.keys():
        shape = []
        for size, other in zip(reference[name], candidate.get(name, reference[name]), strict=False):
            fixed = [s for s in (size, other) if isinstance(s, int)]
            free = 0 if size == "past" else -(-len(prompt) // CACHE_STEP) * CACHE_STEP
            shape.append(fixed[0] if fixed else free)
        feed[name] = np.zeros(shape, np.float32)
    return feed
