"""From FP32 graphs to FP16 and INT8 ones: calibration, placement, and gates on what it is calibrated for.

    clips ──┬─▶ calibrating ──▶ encoder's ranges ──▶ visual tokens ─┐
            └─▶ held out                                            ├─▶ decoder's ranges
    text  ──┬─▶ calibrating ────────────────────────────────────────┘
            └─▶ held out                      (text: given, or else written by the FP32 decoder itself)

    graph ──smooth, place──▶ graph in its precision ──compile──▶ engine ──held-out clips and text──▶ gates

One reference graph of each kind is observed; its calibration serves every dialect, and from it the weights of all
dialects are the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from ..calib import calibrate, compensate, perplexity, placement, rewrite, sensitivity
from ..calib.clips import read_calibration_clips
from ..calib.gates import MEAN_COSINE, PERPLEXITY, WORST_COSINE, clip_cosines
from ..calib.layers import LayerDrift, compare_graphs
from ..calib.observe import Feed, observe
from ..calib.ranges import choose_range
from ..calib.smooth import smooth
from ..calib.tokens import could_be_scaled
from ..calib.weights import Rounded
from ..engines import compile_onnxruntime
from ..engines.package import Asked, GateError, InputError, Kept
from ..engines.targets import WEIGHTS_ONLY, Dialect, Target
from ..runtime.ort_engine import OrtEncoder
from .artifact import Artifact
from .models.attention import use_dialect
from .models.decoder import Decoder
from .trace import WeightsFile, cache_names, fix_capacity, trace_decoder, trace_encoder

GraphName = Literal["encoder", "decoder"]
Progress = Callable[[int, int], None]  # how many of how many are done
Step = Callable[[str], AbstractContextManager[Progress]]
CPU = "CPUExecutionProvider"

CLIPS = 64
HELD_OUT_EVERY = 4  # of clips and of windows of text
WINDOW = 256  # tokens
WINDOWS = 48  # INT4 weights are rounded for what they see: with 12 of them, perplexity rises half as much again
PROMPT_CLIPS = 4  # in each of the video prompts
SCAN_FEEDS = 2

# What the layers together may cost before the costliest are left out. The gates allow a noise of power 2 (1 - 0.99) in
# visual tokens, and a divergence of log(1.02) or log(1.08) of next tokens; together layers cost more than the sum of
# each alone, and more on what calibration did not see: on CLIP's held-out clips noise of 0.01 became 0.017.
BUDGET: dict[tuple[GraphName, Asked], float] = {
    ("encoder", "int8"): 0.007,
    ("decoder", "int8"): 0.009,
    ("decoder", "int4-weights"): 0.05,
}


@dataclass
class Lowering:
    """What is known of both reference graphs, and how it is applied.

    Attributes:
        graphs: the FP32 references, in `scratch`.
        clips: uint8 (n, T, H, W, 3), calibrating and held out.
        windows: token ids (n, WINDOW), calibrating and held out; `own_text` if the decoder wrote them.
        engines: the references, compiled for the CPU.
        kept: linear layers that stay in higher precision, by graph, with the reason.
        costs: of each linear layer alone, by graph.
        by_token: linear layers that the scan found too costly with one range for all tokens, by graph: each token gets
            a scale of its own.
        rounded: the decoder's weights, by layer and bits.
        allowed: gates that failed and were overridden.
    """

    artifact: Artifact
    asked: dict[GraphName, Asked]
    target: Target
    method: str
    allow_drift: bool
    scratch: Path
    graphs: dict[GraphName, Path]
    clips: NDArray[np.uint8]
    windows: NDArray[np.int64]
    own_text: bool
    calibrations: dict[str, calibrate.Calibration] = field(default_factory=dict)
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    by_token: dict[str, set[str]] = field(default_factory=lambda: {"encoder": set(), "decoder": set()})
    rounded: dict[tuple[str, int], Rounded] = field(default_factory=dict)
    engines: dict[str, Path] = field(default_factory=dict)
    references: dict[str, Any] = field(default_factory=dict)
    feeds: dict[GraphName, list[Feed]] = field(default_factory=dict)
    allowed: list[str] = field(default_factory=list)

    @property
    def on_cpu(self) -> bool:
        return self.target.name == "cpu"

    @property
    def held_out(self) -> NDArray[np.uint8]:
        return self.clips[::HELD_OUT_EVERY]

    @property
    def held_out_windows(self) -> NDArray[np.int64]:
        return self.windows[::HELD_OUT_EVERY]

    def reference(self, name: GraphName, capacity: int | None) -> ir.Model:
        """The graph in FP32, `fused`; see `trace_decoder` for the capacity."""
        model = ir.load(self.graphs[name])
        if name == "decoder" and capacity is not None:
            fix_capacity(model, capacity)
        return model

    def lower(self, name: GraphName, dialect: Dialect, model: ir.Model) -> list[Kept]:
        """Puts an FP32 graph of either dialect into the precision asked for, in place; returns the exceptions."""
        asked, calibration = self.asked[name], self.calibrations[name]
        if asked == "fp32":
            return []
        apart: list[str] = []
        if asked == "int8":
            apart = calibrate.even_out(model, calibration.channels, self.by_token[name])
        elif asked == "fp16":
            smooth(model, calibration.channels)
        largest = calibration.observation.largest
        # attention written out has values that the reference does not have, scaled tokens have, too; weights alone are
        # better off unsmoothed
        if not self.on_cpu and (dialect == "plain" or asked in WEIGHTS_ONLY or self.by_token[name]):
            largest = self._audit(name, model, dialect)
        beside: placement.Type = "fp32" if self.on_cpu and asked != "fp16" else "fp16"
        kept, signed = self.kept.get(name), not self.on_cpu
        plan = placement.plan(model, beside, asked, largest, kept, weights_of_kept=name == "decoder", signed=signed)
        rewrite.apply(model, plan, self._ranges(name), signed, self.rounded)
        return [
            *(Kept(node=node, type="fp32", reason=why) for node, why in plan.islands.items()),
            *(Kept(node=node, type=beside, reason=why) for node, why in plan.kept.items()),
            *(Kept(node=f"{layer}{placement.OF_OUTLIERS}", type=beside, reason="outliers") for layer in apart),
        ]

    def _audit(self, name: GraphName, model: ir.Model, dialect: Dialect) -> dict[str, float]:
        """Largest absolute values in a graph that is not as it was observed."""
        feeds = [_fit_caches(feed, model, dialect) for feed in self.feeds[name]]
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            graph = Path(folder) / "audited.onnx"
            with WeightsFile(graph.with_suffix(".data")) as weights:
                weights.save(model.clone(), graph)
            return observe(graph, feeds, histograms_too=False).largest

    def drift(self, name: GraphName, candidate: Path, progress: Progress) -> list[LayerDrift]:
        """How far the layers of a `fused` graph are from the reference's, on calibration data."""
        feed = _fit_caches(self.feeds[name][-1], ir.load(candidate), "fused")
        return compare_graphs(self.graphs[name], candidate, [feed], progress)

    def _ranges(self, name: GraphName) -> dict[str, tuple[float, float]]:
        if self.asked[name] != "int8":
            return {}
        histograms = self.calibrations[name].observation.histograms
        ranges = {layer: choose_range(histogram, self.method) for layer, histogram in histograms.items()}
        return ranges | dict.fromkeys(self.by_token[name], (-1.0, 1.0))

    def round_weights(self, name: GraphName, progress: Progress) -> None:
        """Rounds weights with calibration data in view."""
        beside = np.dtype(np.float32 if self.on_cpu else np.float16)
        with self._before_rounding(name) as graph:
            plan = placement.plan(ir.load(graph), "fp32", self.asked[name], {}, signed=not self.on_cpu)
            bits = dict.fromkeys(plan.int8, 8) | plan.weights
            self.rounded = compensate.round_layers(graph, self.feeds[name], bits, beside, progress)

    def scan(self, name: GraphName, feeds: list[Feed], progress: Progress) -> None:
        """Finds the layers that cost too much: noise of visual tokens, divergence of next tokens.

        In INT8 those first get a scale for each token, and are kept where they still do.
        """
        budget = BUDGET[name, self.asked[name]]
        costs = self._scan(name, feeds, progress)
        if self.asked[name] == "int8":
            layers = could_be_scaled(ir.load(self.graphs[name]), sensitivity.too_costly(costs, budget))
            self.by_token[name] = layers
            scaled = self._scan(name, feeds, progress, layers) if layers else {}
            self.by_token[name] = {layer for layer in layers if scaled[layer] < costs[layer]}
            costs |= {layer: scaled[layer] for layer in self.by_token[name]}
        self.costs[name] = costs
        self.kept[name] = sensitivity.too_costly(costs, budget)

    def _scan(
        self, name: GraphName, feeds: list[Feed], progress: Progress, only: set[str] | None = None
    ) -> dict[str, float]:
        output, cost = "visual_tokens", sensitivity.noise
        if name == "decoder":
            output, cost = "logits", sensitivity.divergence
        asked, ranges, signed = self.asked[name], self._ranges(name), not self.on_cpu
        with self._before_rounding(name) as graph:
            return sensitivity.scan(graph, feeds, output, ranges, signed, cost, progress, asked, self.rounded, only)

    @contextmanager
    def _before_rounding(self, name: GraphName) -> Iterator[Path]:
        """The graph in FP32 as it will be quantised; a decoder's has logits at every position."""
        model = ir.load(self.graphs[name])
        if self.asked[name] == "int8":
            calibrate.even_out(model, self.calibrations[name].channels, self.by_token[name])
        if name == "decoder":
            perplexity.select_all_positions(model, self.graphs[name])
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            graph = Path(folder) / self.graphs[name].name
            ir.save(model, graph, external_data=f"{graph.stem}.data")
            yield graph

    def check(self, name: GraphName, engine: Path) -> dict[str, float]:
        """Figures of an engine of ONNX Runtime's CPU provider on what was held out.

        Raises:
            GateError: it misses a gate, and drift is not allowed.
        """
        if name == "encoder":
            encoder = OrtEncoder(engine)
            tokens = np.concatenate([encoder.encode(clip[None]) for clip in self.held_out])
            cosines = clip_cosines(tokens, self.references["encoder"])
            figures = {"mean_cosine": float(cosines.mean()), "worst_cosine": float(cosines.min())}
            for figure, gate in (("mean_cosine", MEAN_COSINE), ("worst_cosine", WORST_COSINE)):
                if not figures[figure] >= gate[self.asked[name]]:
                    self._fail(
                        name, f"{figure} {figures[figure]:.5f} on held-out clips, the gate is {gate[self.asked[name]]}"
                    )
        else:
            ids = self.held_out_windows.reshape(-1)
            losses = perplexity.token_losses(engine, self.table, ids, WINDOW)
            reference = self.references["decoder"]
            if self.own_text:
                reference = losses - perplexity.token_divergences(
                    self.engines["decoder"], engine, self.table, ids, WINDOW
                )
            increase, sure = perplexity.cost(reference, losses)
            figures = {"perplexity": perplexity.perplexity(losses), "perplexity_increase": increase}
            if np.isfinite(sure):
                figures["perplexity_increase_95"] = sure
            if not increase <= PERPLEXITY[self.asked[name]]:
                self._fail(
                    name,
                    f"perplexity on held-out text rises {increase:.2%}, its gate is {PERPLEXITY[self.asked[name]]:.1%}",
                )
        return {figure: float(f"{value:.6g}") for figure, value in figures.items()}

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """Token embeddings as the package stores them."""
        return embedding_table(self.artifact, self.asked["decoder"]).astype(np.float32)

    def _fail(self, name: GraphName, what: str) -> None:
        worst = sorted(self.costs.get(name, {}).items(), key=lambda item: -item[1])
        worst = [(layer, cost) for layer, cost in worst if layer not in self.kept.get(name, {})][:3]
        costly = ", ".join(f"{layer} ({cost:.2g})" for layer, cost in worst)
        message = f"{name} in {self.asked[name]}: {what}" + (f"; costliest layers: {costly}" if costly else "")
        if not self.allow_drift:
            raise GateError(f"{message}; calibrate on clips like those it will see, or accept it with --allow-drift")
        self.allowed.append(message)


def embedding_table(artifact: Artifact, asked: Asked) -> NDArray:
    table = artifact.decoder.model.embed_tokens.weight.detach().numpy()
    return table if asked == "fp32" else table.astype(np.float16)


def prepare(
    artifact: Artifact,
    asked: dict[GraphName, Asked],
    target: Target,
    sources: list[Path],
    cache: Path | None,
    method: str,
    allow_drift: bool,
    scratch: Path,
    step: Step,
) -> Lowering:
    """Exports the reference graphs, observes them on calibration data, and decides which layers stay out of INT8.

    Args:
        sources: videos, folders, saved clips (.npy), and text files (.txt).
        cache: read if it exists, else written.
        method: a key of `ranges.METHODS`.
        scratch: folder for the reference graphs.
        step: announces a step; what it returns is told the progress.

    Raises:
        InputError: no or unusable sources, or a cache from other graphs.
    """
    texts = [source for source in sources if source.suffix.lower() == ".txt"]
    videos = [source for source in sources if source not in texts]
    if videos and cache is not None and cache.exists():
        raise InputError(f"{cache}: exists already, so clips are not needed; leave out --calib, or name a new cache")
    encoder_config = artifact.encoder.config
    shape = encoder_config.clip_length, encoder_config.vit.image_size
    graphs: dict[GraphName, Path] = {"encoder": scratch / "encoder.onnx", "decoder": scratch / "decoder.onnx"}
    for name, graph in graphs.items():
        with step(f"export the {name} as the FP32 reference"), WeightsFile(graph.with_suffix(".data")) as weights:
            traced = (
                trace_encoder(artifact.encoder, "fused")
                if name == "encoder"
                else trace_decoder(artifact.decoder, "fused")
            )
            weights.save(traced, graph)
            del traced
    hashes: dict[str, str] = {}
    for name, graph in graphs.items():
        hashes[name] = calibrate.hash_graph(graph, graph.with_suffix(".data"))
    calibrations: dict[str, calibrate.Calibration] = {}
    if cache is not None and cache.exists():
        clips, calibrations = calibrate.load_cache(cache, hashes)
        if clips.shape[1:4] != (shape[0], *shape[1]):
            raise InputError(
                f"{cache}: holds clips {clips.shape}, the model takes {shape}; calibrate again with --calib"
            )
    elif videos:
        with step("read calibration clips") as progress:
            clips = read_calibration_clips(videos, *shape, CLIPS, progress=lambda done: progress(done, CLIPS))
    else:
        raise InputError(
            f"precision {' and '.join(asked.values())} needs calibration clips and none were given; name videos like "
            "those the model will see: --calib VIDEO|FOLDER ..."
        )
    lowering = Lowering(
        artifact,
        asked,
        target,
        method,
        allow_drift,
        scratch,
        graphs,
        clips,
        np.empty((0, WINDOW), np.int64),
        not texts,
        calibrations,
    )
    engines = lowering.engines
    for name, graph in graphs.items():
        engines[name] = compile_onnxruntime.compile_graph(
            graph, scratch / f"{name}.engine.onnx", "CPUExecutionProvider"
        )[0]
    with step("text for the decoder") as progress:
        lowering.windows = _windows(artifact, texts, progress)
    with step("encode clips in FP32") as progress:
        encoder = OrtEncoder(engines["encoder"])
        lowering.references["encoder"] = np.concatenate([encoder.encode(clip[None]) for clip in lowering.held_out])
        used = _calibrating(clips)
        tokens = np.concatenate([encoder.encode(clip[None]) for clip in used[: 2 * PROMPT_CLIPS]])
        del encoder
    with step("perplexity of held-out text in FP32"):
        ids = lowering.held_out_windows.reshape(-1)
        lowering.references["decoder"] = perplexity.token_losses(engines["decoder"], lowering.table, ids, WINDOW)
    feeds = lowering.feeds = {
        "encoder": [{"frames": clip[None]} for clip in used],
        "decoder": _decoder_feeds(artifact, graphs["decoder"], tokens, _calibrating(lowering.windows), lowering.table),
    }
    if not calibrations:
        for name, graph in graphs.items():
            with step(f"calibrate the {name}") as progress:
                total = len(feeds[name])
                lowering.calibrations[name] = calibrate.calibrate(
                    graph,
                    feeds[name],
                    scratch,
                    lambda done, total=total: progress(done, total),  # type: ignore[misc]
                )
        if cache is not None:
            calibrate.save_cache(cache, clips, hashes, lowering.calibrations)
    for name in graphs:
        if name == "decoder" and asked[name] in ("int8", *WEIGHTS_ONLY):
            with step(f"round the {name}'s weights") as progress:
                lowering.round_weights(name, progress)
        if (name, asked[name]) in BUDGET:
            with step(f"sensitivity of the {name}'s layers") as progress:
                lowering.scan(name, feeds[name][-SCAN_FEEDS:], progress)
    return lowering


def _calibrating(items: NDArray) -> NDArray:
    """What is not held out; everything, where there is only one."""
    kept = np.arange(len(items)) % HELD_OUT_EVERY != 0
    return items[kept] if kept.any() else items


def _windows(artifact: Artifact, texts: list[Path], progress: Progress) -> NDArray[np.int64]:
    """Token ids (n, WINDOW) of the given text, or of text that the decoder writes."""
    if not texts:
        return _own_text(artifact.decoder, progress)
    ids: list[int] = []
    for path in texts:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as UTF-8 text ({error})") from None
        ids += artifact.text.tokenizer.encode(text, add_special_tokens=False).ids
    count = min(len(ids) // WINDOW, WINDOWS)
    if count < 2:
        raise InputError(f"{texts[0]}: {len(ids)} tokens of text, at least {2 * WINDOW} are needed; give more text")
    return np.array(ids[: count * WINDOW], np.int64).reshape(count, WINDOW)


def _own_text(decoder: Decoder, progress: Progress) -> NDArray[np.int64]:
    """Sampled from the decoder at temperature 1, which is text as it expects it; each window starts with a token drawn
    from the vocabulary and goes on over ends of turn. All windows are written at once."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (WINDOWS, 1), generator=generator)
    with torch.inference_mode(), use_dialect("plain"):  # whose caches are as long as the text
        caches = decoder.empty_caches(0, WINDOWS)
        while (length := ids.shape[1]) < WINDOW:
            embeddings = decoder.model.embed_tokens(ids[:, -1:])
            logits, caches = decoder(embeddings, torch.tensor([length - 1]), caches)
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
            progress(length + 1, WINDOW)
    return ids.numpy()


def _decoder_feeds(
    artifact: Artifact, graph: Path, tokens: NDArray[np.float32], windows: NDArray[np.int64], table: NDArray[np.float32]
) -> list[Feed]:
    """Prompts about clips, then windows of text, each into empty caches."""
    encode = artifact.text.tokenizer.encode
    around = [
        encode(text, add_special_tokens=False).ids
        for text in (artifact.prompt.unit_prefix, artifact.prompt.unit_suffix)
    ]
    prefix, suffix = (table[np.array(ids, np.int64)] for ids in around)
    prompts = []
    units = tokens.reshape(-1, artifact.encoder.tokens_per_clip // artifact.encoder.units_per_clip, tokens.shape[-1])
    per_prompt = PROMPT_CLIPS * artifact.encoder.units_per_clip
    for start in range(0, len(units), per_prompt):
        prompts.append(
            np.concatenate([part for unit in units[start : start + per_prompt] for part in (prefix, unit, suffix)])
        )
    prompts += [table[window] for window in windows]
    return [_into_empty_caches(artifact, prompt) for prompt in prompts]


def _fit_caches(feed: Feed, model: ir.Model, dialect: Dialect) -> Feed:
    """Empty caches as the graph takes them: holding nothing, or a fixed number of positions, or as many as are fed."""
    fitted = dict(feed)
    for value in model.graph.inputs[2:]:
        _, heads, positions, size = feed[str(value.name)].shape
        fixed = value.shape[2] if value.shape is not None else None
        positions = 0 if dialect == "plain" else fixed if isinstance(fixed, int) else positions
        fitted[str(value.name)] = np.zeros((1, heads, positions, size), np.float32)
    return fitted


def _into_empty_caches(artifact: Artifact, prompt: NDArray[np.float32]) -> Feed:
    config = artifact.decoder.config
    shape = 1, config.num_key_value_heads, len(prompt), config.head_dim
    feed: Feed = {"inputs_embeds": prompt[None].astype(np.float32), "write_index": np.zeros(1, np.int64)}
    return feed | {name: np.zeros(shape, np.float32) for name in cache_names(config.num_hidden_layers)}
