"""Two graphs of one model, run on the same inputs and compared layer by layer.

    reference graph ─┐                ┌─ values ─┐
                     ├─ same inputs ─▶│ by name  ├─▶ cosine, largest error, SNR of each, in network order
    candidate graph ─┘                └─ values ─┘

Values are named after their module, `backbone.vit.blocks.0.mlp.fc1/MatMul`, and keep that name when a graph
is converted or compiled. Both graphs run on ONNX Runtime's CPU provider as they are written, without optimisation, and
a group of values is read out at a time: those of a whole graph take gigabytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ..engines.package import InputError
from .smooth import SMOOTHED

# a value below either is broken: a tenth of its amplitude is noise, or it points elsewhere
BROKEN_SNR_DB = 20.0
BROKEN_COSINE = 0.99

GROUP_BYTES = 512 << 20  # of values read out in one run

Feed = Mapping[str, NDArray]
Figures = tuple[float, float, float]  # cosine, largest absolute error, SNR


class LayerDrift(msgspec.Struct, frozen=True):
    """How far one value drifted; over several inputs, the worst.

    Attributes:
        value, module, operator: its name, what of that names the module, and the operator that computes it in the
            reference.
        cosine: smallest cosine; 1 where both are zero throughout.
        max_abs_error: largest absolute difference.
        snr_db: smallest 10 log10(mean(r^2) / mean((r - c)^2)), in decibels; infinite where nothing differs.

    A candidate that is not finite where its reference is has cosine 0, infinite error and an SNR of minus infinity.
    """

    value: str
    module: str
    operator: str
    cosine: float
    max_abs_error: float
    snr_db: float


def compare_graphs(
    reference: Path, candidate: Path, feeds: Iterable[Feed], progress: Callable[[int, int], None] | None = None
) -> list[LayerDrift]:
    """Compares every floating-point value that both graphs name alike, in the reference's topological order.

    Args:
        feeds: one run each: input -> array, converted to the type that each graph takes.
        progress: told how many runs of how many are done.

    Compared are values named after a module, and outputs; other names are numbers that libraries give, and mean other
    things in other graphs. A value that has another shape in the candidate is left out. One whose channels smoothing
    has scaled is compared after scaling them back, each by the factor that fits best.

    Raises:
        InputError: a file is no ONNX graph or can't be run, the inputs differ, or no value is in both.
    """
    graphs, feeds = (LayerGraph.load(reference), LayerGraph.load(candidate)), list(feeds)
    check_inputs(*graphs, feeds)
    groups = list(_groups(*graphs, feeds[0]))
    scaled = {*graphs[1].model.metadata_props.get(SMOOTHED, "").splitlines()}
    worst: dict[str, Figures] = {}
    for number, names in enumerate(groups):
        runs = zip(*([graph.runs(names, feeds) for graph in graphs]), strict=True)
        for done, (expected, found) in enumerate(runs, start=number * len(feeds) + 1):
            for name in names:
                r, c = expected.pop(name), found.pop(name)
                if name in scaled and r.shape == c.shape:
                    c = _scaled_back(r, c)
                if (now := _figures(r, c)) is not None:
                    before = worst.get(name, now)
                    worst[name] = min(before[0], now[0]), max(before[1], now[1]), min(before[2], now[2])
            if progress is not None:
                progress(done, len(groups) * len(feeds))
    if not worst:
        raise InputError(
            f"{reference} and {candidate} have no floating-point value of one name and shape; expected two graphs of "
            "one model, built by liteframe"
        )
    nodes = graphs[0].nodes()
    modules = {name: (name if "/" in name else str(nodes[name].name)).rpartition("/")[0] for name in worst}
    return [LayerDrift(name, modules[name], nodes[name].op_type, *figures) for name, figures in worst.items()]


def first_broken(rows: Iterable[LayerDrift]) -> LayerDrift | None:
    """The first row, in network order, with SNR < BROKEN_SNR_DB or cosine < BROKEN_COSINE."""
    return next((row for row in rows if row.snr_db < BROKEN_SNR_DB or row.cosine < BROKEN_COSINE), None)


@dataclass(frozen=True)
class LayerGraph:
    """A graph whose values can be read out. Its weights stay in the files beside it."""

    path: Path
    model: ir.Model

    @classmethod
    def load(cls, path: Path) -> LayerGraph:
        """Raises InputError when the file is missing or no ONNX graph."""
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected an engine package or an ONNX graph")
        try:
            model = ir.load(path)
        except Exception as error:  # what the parsers raise shares no base class
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: not an ONNX graph ({reason}); expected one that liteframe built") from None
        if not model.graph.inputs or not model.graph.outputs:
            raise InputError(f"{path}: not an ONNX graph (no inputs, no outputs); expected one that liteframe built")
        graph = cls(path, model)
        graph._find_types()
        values = [*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]
        if any(value.dtype == ir.DataType.FLOAT16 for value in values):
            from ..engines.cpu_rewrites import make_half_explicit

            make_half_explicit(model)  # ONNX Runtime's CPU provider would not round between operators
        return graph

    def _find_types(self) -> None:
        """ONNX Runtime knows those that a graph does not mention."""
        values = {value.name: value for node in self.model.graph for value in node.outputs if value.name}
        if any(value.dtype is None for value in values.values()):
            for output in self.open([str(name) for name in values]).get_outputs():
                if output.type.startswith("tensor("):  # tensor(float16)
                    values[output.name].dtype = ir.DataType[output.type[len("tensor(") : -1].upper()]

    def inputs(self) -> dict[str, list[int | str]]:
        """Input -> shape; a size that varies has a name."""
        return {
            str(value.name): [size if isinstance(size, int) else str(size.value) for size in value.shape or ()]
            for value in self.model.graph.inputs
        }

    def nodes(self) -> dict[str, ir.Node]:
        """Value -> the node that computes it, in topological order, where the name says what it is."""
        outputs = {value.name for value in self.model.graph.outputs}
        pairs = ((value.name, node) for node in self.model.graph for value in node.outputs)
        return {name: node for name, node in pairs if name and ("/" in name or name in outputs)}

    def open(self, values: Sequence[str], feed: Feed | None = None) -> ort.InferenceSession:
        """A session of what computes `values`, its outputs. A feed tells it, ahead of the run, the sizes that vary."""
        graph = ir.convenience.extract(self.model.graph, self.model.graph.inputs, values)
        for value in graph.outputs:
            value.shape = None  # ONNX Runtime finds out more than is written down
        model = ir.Model(graph, ir_version=self.model.ir_version, functions=[*self.model.functions.values()])
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # it would keep the peak of every run
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        folder = os.fspath(self.path.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        for name, shape in self.inputs().items() if feed else ():
            for size, actual in zip(shape, feed[name].shape, strict=False):  # type: ignore[index]
                if isinstance(size, str):
                    options.add_free_dimension_override_by_name(size, actual)
        try:
            content = ir.to_proto(model).SerializeToString()
            return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors share no base class
            raise self._refused(error) from None

    def runs(self, values: Sequence[str], feeds: Iterable[Feed]) -> Iterator[dict[str, NDArray]]:
        """Value -> array, for each feed."""
        session = self.open(values)
        for feed in feeds:
            yield dict(zip(values, self.run(session, feed), strict=True))

    def run(self, session: ort.InferenceSession, feed: Feed) -> list[NDArray]:
        """The outputs of a session that `open` gave."""
        inputs = {
            str(v.name): feed[str(v.name)].astype(v.dtype.numpy(), copy=False)
            for v in self.model.graph.inputs
            if v.dtype
        }
        try:
            arrays: list[NDArray] = session.run(None, inputs)
        except Exception as error:
            raise self._refused(error) from None
        return arrays

    def _refused(self, error: Exception) -> InputError:
        return InputError(f"{self.path}: ONNX Runtime {ort.__version__} cannot run it: {' '.join(str(error).split())}")


def check_inputs(reference: LayerGraph, candidate: LayerGraph, feeds: Sequence[Feed]) -> None:
    """Raises InputError unless both graphs take the same inputs, and each feed has them all."""
    ours, theirs = reference.inputs(), candidate.inputs()
    for name in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(name, "not there"), theirs.get(name, "not there")
        # a size may vary in one and be fixed in the other; `past`, which only `plain` decoders have, is no capacity
        alike = [x == y or ("past" not in (x, y) and not type(x) is type(y) is int) for x, y in zip(a, b, strict=False)]
        if len(a) != len(b) or not all(alike):
            raise InputError(
                f"input {name} is {a} in {reference.path} and {b} in {candidate.path}; expected two graphs of one "
                "model in one dialect"
            )
    if not feeds or any(feed.keys() != ours.keys() for feed in feeds):
        raise InputError(f"{reference.path} takes {', '.join(ours)}; expected runs with an array for each, and no more")


def _groups(reference: LayerGraph, candidate: LayerGraph, feed: Feed) -> Iterator[list[str]]:
    """The names to compare, in the reference's order, in groups of about GROUP_BYTES."""
    names = [name for name in reference.nodes() if name in candidate.nodes()]
    outputs = reference.open(names, feed).get_outputs() if names else ()
    group: list[str] = []
    held = 0
    for output in outputs:
        sizes = [size for size in output.shape if isinstance(size, int)]
        # what can't be told in advance counts as large
        size = 4 * math.prod(sizes) if len(sizes) == len(output.shape) > 0 else GROUP_BYTES // 32
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(output.name)
        held += size
    if group:
        yield group


def _scaled_back(reference: NDArray, candidate: NDArray) -> NDArray:
    """The candidate with each channel times the factor of least squared error. Where heads are apart, positions may be
    any axis between the first and the last: the one that fits best."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    fits = []
    for between in range(1, max(r.ndim - 1, 2)):
        positions = (0, between) if r.ndim > 2 else 0
        power = np.square(c).sum(axis=positions, keepdims=True)
        fits.append(c * ((r * c).sum(axis=positions, keepdims=True) / np.where(power > 0, power, 1)))
    return min(fits, key=lambda fit: float(np.square(fit - r).sum()))


def _figures(reference: NDArray, candidate: NDArray) -> Figures | None:
    """In double precision; None for what can't be compared: integers, other shapes, nothing at all."""
    if (
        not reference.dtype.kind == candidate.dtype.kind == "f"
        or reference.shape != candidate.shape
        or not reference.size
    ):
        return None
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    odd = ~(np.isfinite(r) & np.isfinite(c))  # such as a mask's minus infinity
    if not np.array_equal(r[odd], c[odd], equal_nan=True):
        return 0.0, math.inf, -math.inf
    r[odd] = c[odd] = 0
    # polygraphy settles which TensorRT it drives when first imported; a build that goes on to compile uses TensorRT-RTX
    os.environ.setdefault("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    from polygraphy.comparator import CosineSimilarityCompareFunc, IterationResult, SnrCompareFunc
    from polygraphy.logger import G_LOGGER

    results = IterationResult({"": r}), IterationResult({"": c})
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it also judges, by thresholds of its own
        cosine = CosineSimilarityCompareFunc()(*results)[""].cosine_similarity
        snr = SnrCompareFunc()(*results)[""].snr
    return cosine, float(np.abs(r - c).max()), snr
