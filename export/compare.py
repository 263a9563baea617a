"""`liteframe compare`: every way to make visual tokens fewer, and the encoders they stand behind, measured alike.

    contender ─▶ fused graph ─▶ CPU engine ─▶ ms a clip ────────────────────┐
    tokens a clip + prompt text ─▶ positions ─▶ prefill ms, one decoder ────┴─▶ total, and frames at equal latency
    tower's features ─▶ each reducer ─▶ cosine to WAP's

docs/compare.md says what each column is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..calib.accuracy import Accuracy, Respondent, accuracies, ask_all, read_videos
from ..calib.questions import Question, read_frames, read_questions
from ..engines.compile_onnxruntime import compile_graph
from ..engines.package import InputError, Model, new_folder
from ..engines.targets import TARGETS
from ..runtime.layer_times import by_kind, by_module
from ..runtime.ort_engine import OrtDecoder, OrtEncoder
from .artifact import Artifact, load_artifact
from .build_engine import CHUNK, describe_model
from .compare_report import print_report, write_report
from .contenders import TABLE_2, Contender, Field, Kind, Size, artifact_field, random_field
from .models.encoder import VideoEncoder
from .peers import PAPER
from .progress import step
from .torch_engine import chat_text
from .trace import WeightsFile, trace_decoder, trace_frames
from .verify import sample_clips

CPU = "CPUExecutionProvider"
FRAMES, RATIO = 32, 16
CLIPS = 4  # that cosines are of
SPELL = 0.3  # seconds
ALIKE = 0.02  # totals nearer to each other are not told apart
ROUNDS = {"small": 5, "full": 3, "artifact": 5}
Videos = Sequence[tuple[NDArray[np.uint8], Sequence[Question]]]  # frames (T, H, W, 3)
VERSIONS = ("liteframe", "onnxruntime", "torch")


@dataclass(frozen=True)
class Row:
    """What was measured of one contender. None is what was not, for the reason in `note` or because it means nothing.

    Attributes:
        tokens: visual tokens of all frames.
        positions: of the prompt: the tokens, with the text around them.
        clip_ms: the vision encoder on one clip, median of the rounds; `vision_ms` is that for all clips.
        clip_ms_rounds: in each round, median.
        llm_ms: prefill of the prompt, median of the rounds.
        frames_at_equal_tokens: the most that have no more tokens than the reference's.
        frames_at_equal_ms: the most whose total is the reference's or less, or ALIKE.
        cosine: of WAP's tokens to the nearest of its own, mean.
        paper: the paper's milliseconds of the vision encoder on an A100, and of what.
        kinds: milliseconds of one clip by what they go into, under ONNX Runtime's profiler; of Table 2's encoders that
            are not in its order here.
    """

    name: str
    kind: Kind
    weights: Literal["artifact", "random"]
    frames: int
    tokens: int | None
    tokens_per_frame: float | None
    positions: int | None
    clip_ms: float | None
    clip_ms_rounds: list[float] | None
    vision_ms: float | None
    llm_ms: float | None
    total_ms: float | None
    frames_at_equal_tokens: int | None
    frames_at_equal_ms: int | None
    cosine: float | None
    accuracy: Accuracy | None
    paper: str
    kinds: dict[str, float] | None
    note: str


def compare(field: Field, frames: int, rounds: int, questions: Path | None = None) -> list[Row]:
    """Measures every contender of a field.

    Raises:
        InputError: frames are not in whole clips, or their prompt, with questions where there are some, is longer than
            the language model was trained for; the folder holds no questions, or videos that can't be read.
    """
    if frames < field.clip_length or frames % field.clip_length:
        raise InputError(f"--frames {frames}: expected a multiple of {field.clip_length}, the frames of a clip")
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: expected 1 or more")
    clips = frames // field.clip_length
    lengths = {one.name: positions(field, one, clips) for one in field.contenders if one.make is not None}
    fit = {name: length for name, length in lengths.items() if length <= field.max_positions}
    if field.reference not in fit:
        raise InputError(
            f"--frames {frames}: their prompt takes {lengths[field.reference]} positions with {field.reference}, the "
            f"language model was trained for {field.max_positions}; expected fewer frames"
        )
    models, unasked = ({}, {}) if questions is None else models_to_ask(field, frames)
    videos: Videos = [] if questions is None else read_videos(questions, frames, field.clip_length, field.image_size)
    with step("cosines to WAP's tokens"):
        cosines = cosines_to_wap(field, None if questions is None else first_clips(field, questions))
    with tempfile.TemporaryDirectory() as folder:
        engines, decoder = make_engines(field, Path(folder))
        in_rounds, prefill_ms = measure(field, engines, decoder, sorted(set(fit.values())), rounds)
        clip_ms = {name: statistics.median(times) for name, times in in_rounds.items()}
        llm = prefill_model(prefill_ms)
        kinds = {name: profile(field, engines[name], Path(folder)) for name in out_of_order(clip_ms)}
        answered = ask(field, engines, decoder, models, videos)
    rows = []
    of_reference = next(one for one in field.contenders if one.name == field.reference).tokens_per_clip
    budget = clips * clip_ms[field.reference] + prefill_ms[lengths[field.reference]]
    for one in field.contenders:
        measured = one.make is not None
        vision = clips * clip_ms[one.name] if measured else None
        prefill = prefill_ms[fit[one.name]] if one.name in fit else None
        note = one.note or unasked.get(one.name, "")
        if measured and one.name not in fit:
            note = f"{lengths[one.name]} positions, the language model was trained for {field.max_positions}"
        rows.append(
            Row(
                name=one.name,
                kind=one.kind,
                weights=one.weights,
                frames=frames,
                tokens=clips * one.tokens_per_clip if measured else None,
                tokens_per_frame=one.tokens_per_clip / field.clip_length if measured else None,
                positions=lengths.get(one.name),
                clip_ms=clip_ms.get(one.name),
                clip_ms_rounds=in_rounds.get(one.name),
                vision_ms=vision,
                llm_ms=prefill,
                total_ms=None if vision is None or prefill is None else vision + prefill,
                frames_at_equal_tokens=(
                    clips * of_reference // one.tokens_per_clip * field.clip_length if measured else None
                ),
                frames_at_equal_ms=most_frames(field, one, clip_ms[one.name], llm, budget) if measured else None,
                cosine=cosines.get(one.name),
                accuracy=answered.get(one.name),
                paper=one.paper,
                kinds=kinds.get(one.name),
                note=note,
            )
        )
    return rows


def positions(field: Field, contender: Contender, clips: int) -> int:
    """Of the language model's cache that the prompt takes."""
    prompt = field.prompt(contender.units_per_clip)
    return clips * (contender.tokens_per_clip + contender.units_per_clip * prompt.unit) + prompt.once


def most_frames(
    field: Field, contender: Contender, clip_ms: float, llm_ms: Callable[[int], float], budget: float
) -> int:
    """The most frames, in whole clips, that take no longer than `budget`, or hardly longer, and that the language model
    has positions for."""

    def fits(clips: int) -> bool:
        length = positions(field, contender, clips)
        return length <= field.max_positions and clips * clip_ms + llm_ms(length) <= budget * (1 + ALIKE)

    clips = 0
    while fits(clips + 1):
        clips += 1
    return clips * field.clip_length


def prefill_model(measured: dict[int, float]) -> Callable[[int], float]:
    """Milliseconds of a prompt by its positions: straight lines from nothing through what was measured, the last of
    them going on."""
    x, y = np.array([0, *sorted(measured)]), np.array([0.0, *(measured[length] for length in sorted(measured))])

    def milliseconds(length: int) -> float:
        if length <= x[-1]:
            return float(np.interp(length, x, y))
        return float(y[-1] + (length - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))

    return milliseconds


# -- engines -----------------------------------------------------------------------------------------------------------


def make_engines(field: Field, folder: Path) -> tuple[dict[str, Path], Path]:
    """The contenders' encoders by name, and the decoder. One module is in memory at a time; weights that several
    engines hold are stored once."""
    engines = {}
    with WeightsFile(folder / "engines.data") as weights:
        for number, one in enumerate(field.contenders):
            if one.make is None:
                continue
            with step(f"encoder engine {one.name}"):
                traced = partial(_trace, field, one.make)
                engines[one.name] = _compile(traced, weights, folder / f"encoder-{number}.onnx")
        with step("decoder engine"):
            decoder = _compile(lambda: trace_decoder(field.decoder(), "fused"), weights, folder / "decoder.onnx")
    return engines, decoder


def _trace(field: Field, make: Callable[[], nn.Module]) -> ir.Model:
    return trace_frames(make(), (field.clip_length, *field.image_size), ["visual_tokens"], "fused")


def _compile(trace: Callable[[], ir.Model], weights: WeightsFile, engine: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=engine.parent) as name:
        scratch = Path(name)
        with WeightsFile(scratch / "graph.data") as own:
            own.save(trace(), scratch / "graph.onnx")
        gc.collect()  # module and graph, before ONNX Runtime holds the weights once more
        compiled, *_ = compile_graph(scratch / "graph.onnx", scratch / "engine.onnx", CPU)
        weights.save(ir.load(compiled), engine)
    return engine


# -- time --------------------------------------------------------------------------------------------------------------


def measure(
    field: Field, engines: dict[str, Path], decoder: Path, lengths: list[int], rounds: int
) -> tuple[dict[str, list[float]], dict[int, float]]:
    """Milliseconds of one clip through each encoder in each round, and of prefilling prompts of so many positions.

    Every round gives each its turn, every other round backwards. In its turn an engine is opened, run once to warm up,
    and then until SPELL seconds are over, so that one is in memory at a time.
    """
    random = np.random.default_rng(0)
    clip = random.integers(0, 256, (1, field.clip_length, *field.image_size, 3), dtype=np.uint8)
    vision: dict[str, list[float]] = {name: [] for name in engines}
    llm: dict[int, list[float]] = {length: [] for length in lengths}
    turns = len(engines) + len(lengths)
    for turn in range(rounds):
        way = 1 if turn % 2 == 0 else -1
        with step(f"measure, round {turn + 1} of {rounds}") as progress:
            for done, name in enumerate([*engines][::way], start=1):
                vision[name].append(_timed(partial(OrtEncoder(engines[name]).encode, clip)))
                progress(done, turns)
            prefiller = OrtDecoder(decoder, capacity=max(lengths))
            for done, length in enumerate(lengths[::way], start=len(engines) + 1):
                embeddings = random.standard_normal((length, field.hidden_size), np.float32)
                twin = prefiller.twin()
                twin.reserve(length)
                warm_up = partial(_prefill, twin, embeddings[:CHUNK])
                llm[length].append(_timed(partial(_prefill, twin, embeddings), warm_up))
                progress(done, turns)
            del prefiller, twin
    return vision, {length: statistics.median(times) for length, times in llm.items()}


def _timed(run: Callable[[], object], warm_up: Callable[[], object] | None = None) -> float:
    """Milliseconds of a run: the median of as many as SPELL has room for, after one to warm up."""
    (warm_up or run)()
    times: list[float] = []
    while sum(times) < SPELL * 1e3:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _prefill(decoder: OrtDecoder, embeddings: NDArray[np.float32]) -> None:
    decoder.rewind(0)
    for start in range(0, len(embeddings), CHUNK):
        decoder.forward(embeddings[start : start + CHUNK])


def order(clip_ms: dict[str, float]) -> tuple[list[str], dict[str, float]]:
    """Table 2's encoders, slowest first: here, and in the paper, with its milliseconds."""
    paper = {name: milliseconds for name, milliseconds in TABLE_2.items() if name in clip_ms}
    return sorted(paper, key=lambda name: -clip_ms[name]), paper


def out_of_order(clip_ms: dict[str, float]) -> list[str]:
    """Table 2's encoders that are faster than one behind them there, or slower than one before them."""
    _, paper = order(clip_ms)
    turned = [(a, b) for a, b in combinations(paper, 2) if clip_ms[a] < clip_ms[b]]
    return [name for name in paper if any(name in pair for pair in turned)]


def profile(field: Field, engine: Path, folder: Path) -> dict[str, float]:
    """Milliseconds of one clip by kind of module, of the second run under ONNX Runtime's profiler."""
    with step(f"profile {engine.stem}"):
        encoder = OrtEncoder(engine, profiling=folder)
        clip = np.zeros((1, field.clip_length, *field.image_size, 3), np.uint8)
        for _ in range(2):
            encoder.encode(clip)
        nodes = encoder.node_times()
        return by_kind(by_module(nodes[len(nodes) // 2 :]))


# -- quality -----------------------------------------------------------------------------------------------------------


class _Remembered(nn.Module):
    """A tower that has seen its frames already."""

    def __init__(self, features: Tensor, seen: list[Tensor]):
        super().__init__()
        self.features, self.seen = features, seen

    def forward(self, frames: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        if seen is not None:
            seen += self.seen
        return self.features


@torch.inference_mode()
def cosines_to_wap(field: Field, clips: NDArray[np.uint8] | None = None) -> dict[str, float]:
    """How near each reducer's tokens are to WAP's, of the same tower and clips, before the projector's MLP.

    The tokens of a clip are compared behind the pixel shuffle, each of WAP's with the nearest; the mean over WAP's.

    Args:
        clips: uint8 (clips, T, H, W, 3); by default `sample_clips`.
    """
    if field.teacher is None:
        return {}
    tower = field.teacher()
    frames = torch.from_numpy(sample_clips(tower) if clips is None else clips)
    seen: list[Tensor] = []
    remembered = _Remembered(tower.backbone(tower.images(frames), seen), seen)
    del tower
    configs = {one.name: one.config for one in field.contenders if one.kind == "reducer" and one.config is not None}
    tokens = {}
    for name, config in configs.items():
        with torch.device("meta"):  # nothing but the reducer computes, and that has no weights
            encoder = VideoEncoder(config)
        encoder.backbone = remembered
        compressed = encoder.compressed(torch.empty(frames.shape, dtype=torch.uint8, device="meta"))
        tokens[name] = compressed.reshape(len(frames), -1, compressed.shape[-1])
    return {name: to_wap(found, tokens["wap"]) for name, found in tokens.items()}


def first_clips(field: Field, questions: Path) -> NDArray[np.uint8]:
    """Of the first CLIPS videos, uint8 (clips, T, H, W, 3)."""
    videos = [*read_questions(questions)][:CLIPS]
    return np.concatenate(
        [read_frames(path, field.clip_length, field.clip_length, field.image_size) for path in videos]
    )


def to_wap(found: Tensor, wap: Tensor) -> float:
    """Mean cosine of WAP's tokens (clips, M, C), each to the nearest of a clip's (clips, N, C)."""
    found, wap = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (found.double(), wap.double()))
    return float((wap @ found.transpose(1, 2)).amax(-1).mean())


def models_to_ask(field: Field, frames: int) -> tuple[dict[str, Model], dict[str, str]]:
    """What answers questions about so many frames, of each contender with the artifact's weights; and for the others,
    why they can't be asked.

    Raises:
        InputError: the reference can't be.
    """
    models, unasked = {}, {}
    for one in field.contenders:
        if one.weights == "artifact" and one.make is not None:
            try:
                models[one.name] = describe_model(_with_encoder(field, one), frames, 1, TARGETS["cpu"])
            except InputError as error:
                if one.name == field.reference:
                    raise
                unasked[one.name] = f"not asked: {error}"
    return models, unasked


def ask(
    field: Field, engines: dict[str, Path], decoder: Path, models: dict[str, Model], videos: Videos
) -> dict[str, Accuracy | None]:
    """Accuracy of every contender that can be asked."""
    answered: dict[str, Accuracy | None] = {}
    for one in field.contenders:
        if one.name not in models:
            continue
        with step(f"answer with {one.name}"):
            model, text = models[one.name], chat_text(_with_encoder(field, one))
            engine = OrtDecoder(decoder, capacity=model.capacity)
            respondent = Respondent(OrtEncoder(engines[one.name]), engine, text, model)
            answered[one.name] = accuracies(ask_all(respondent, videos))["all"]
    return answered


def _with_encoder(field: Field, contender: Contender) -> Artifact:
    assert field.artifact is not None and contender.make is not None
    encoder = contender.make()
    assert isinstance(encoder, VideoEncoder)
    return replace(field.artifact, encoder=encoder)


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="liteframe compare",
        description="Every way to make visual tokens fewer, at equal token budget and at equal latency, on this CPU.",
    )
    parser.add_argument("artifact", type=Path, nargs="?", help="default: random weights")
    parser.add_argument("--size", choices=("small", "full"), help="of random weights (default: small)")
    parser.add_argument("--frames", type=int, default=FRAMES, help="of a video (default: %(default)s)")
    parser.add_argument("--ratio", type=int, help="how many tokens become one (default: 16)")
    parser.add_argument("--questions", type=Path, metavar="DIR", help="ask the artifact's, with every reducer")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 5; of --size full 3)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write compare.md, pareto.png and compare.json")
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    if options.artifact is None and options.questions is not None:
        raise InputError("--questions are answered by an artifact; name one, random weights know nothing")
    if options.artifact is not None and options.size is not None:
        raise InputError(f"--size {options.size} is for random weights; an artifact has its own, leave it out")
    if options.ratio is not None and options.ratio < 1:
        raise InputError(f"--ratio {options.ratio}: expected 1 or more")
    if options.questions is not None:
        read_questions(options.questions)  # before anything takes its time
    size: Size = options.size or "small"
    rounds = options.rounds if options.rounds is not None else ROUNDS[size if options.artifact is None else "artifact"]
    with nullcontext() if options.output is None else new_folder(options.output) as folder:
        with step("set up what is compared"):
            if options.artifact is None:
                field = random_field(size, options.ratio or RATIO)
            else:
                field = artifact_field(load_artifact(options.artifact), options.ratio, options.frames)
        rows = compare(field, options.frames, rounds, options.questions)
        here, paper = order({row.name: row.clip_ms for row in rows if row.clip_ms is not None})
        document = {
            "title": field.title,
            "frames": options.frames,
            "ratio": field.ratio,
            "rounds": rounds,
            "reference": field.reference,
            "alike": ALIKE,
            "machine": {"processor": _processor(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in VERSIONS},
            "rows": [asdict(row) for row in rows],
            "order": {"here": here, "paper": paper},
            "paper": [asdict(figures) for figures in PAPER],
        }
        print_report(document)
        if folder is not None:
            write_report(folder, document)
    if options.json:
        print(json.dumps(document))
    return 0


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
