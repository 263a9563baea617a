"""`liteframe drift --bisect`: which modules of a candidate to keep in higher precision, so that its gate holds.

candidate ──a switch for each rounded module──▶ one session ─┬─ each module alone rounded ──▶ costs, the highest first
reference ──its weights, its outputs───────────────────────┘ ├─ bisection: how many of the first must be kept
                                                             └─ of those, leave out each that need not be

Of a candidate with quantised layers these are the modules, and a kept one multiplies its activation as it was before
QuantizeLinear with the weights of the reference. Of a candidate in FP16 every module is one, and a kept one rounds
neither what it reads nor what it puts out.

    flag ──▶ If ─┬─ x ──── MatMul(weights of the reference) ─┬─ y      flag ──▶ Where ─┬─ x ──────────┬─ x'
                 └─ DQ(Q(x)) ── MatMul(DQ(integers)) ────────┘                         └─ FP16 ── FP32 ┘

Flags and weights are inputs, so that one session serves every set of modules.

Smoothing (smooth.py) has scaled rows and columns of the weights, and the graph does not say how. The scaled weights
are found again by least squares: the factors a, b for which a_i W_ij b_j comes closest to the integers, in their steps.
What is left is the error of a factor, smaller than that of rounding by the root of the row's length.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..engines.cpu_rewrites import MOVES
from ..engines.package import InputError
from ..engines.targets import Asked
from .gates import MEAN_COSINE, PERPLEXITY, WORST_COSINE, clip_cosines
from .layers import Feed, LayerGraph, check_inputs
from .perplexity import select_all_positions
from .placement import module
from .sensitivity import divergence, noise

BIASES = {"MatMulIntegerToFloat": 6, "MatMulNBits": 5}  # operator -> which input its bias is
TEXT = 128  # positions at the end of a decoder's feed; their logits count
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# steps between weights and their integers: at most, at most in four bits, whose ends are cut, and root mean square
ROUNDED, CLIPPED, ROUNDED_RMS = 0.51, 1.01, 0.35
FIT_ROUNDS = 20  # of alternating least squares; it converges in a few
MISFIT = 0.5  # of the integers; other weights would leave nearly all
FP16_PRECISION = 2.0**-10


class KeptModule(msgspec.Struct, frozen=True):
    """`cost`: of this module alone rounded, on the first feed: noise of the encoder, divergence of the decoder."""

    module: str
    cost: float


class Bisection(msgspec.Struct, frozen=True):
    """What has to be kept.

    Attributes:
        asked: precision whose gate it is.
        gate: figure -> its gate; figures named `..._cosine` are at least that, others at most.
        before, after: figure -> value, of the candidate as it is and with `kept`, or, where that is null, with all.
        kept: by falling cost; empty where the gate holds as it is, null where it does not even with all of them kept.
        modules: how many could be.
        runs: how often the candidate ran, once for each feed.
    """

    asked: Asked
    gate: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    kept: list[KeptModule] | None
    modules: int
    runs: int


def bisect(
    name: str,
    reference_path: Path,
    candidate_path: Path,
    feeds: Sequence[Feed],
    asked: Asked | None = None,
    progress: Callable[[str, int], object] | None = None,
) -> Bisection | None:
    """The smallest set of modules to keep; None where the candidate rounds nothing.

    It is 1-minimal: the gate holds with it, and with any one of it missing it does not; both were run. There may be a
    smaller set of other modules.

    Args:
        name: "encoder" or "decoder".
        feeds: a clip each, or prompts into empty caches.
        asked: what the candidate was built for; None reads it off the graph.
        progress: told what is going on, and how many runs are done.

    Raises:
        InputError: the inputs differ, a quantised layer is not in the reference or has other weights there, or a graph
            can't be run.
    """
    reference, candidate = LayerGraph.load(reference_path), LayerGraph.load(candidate_path)
    check_inputs(reference, candidate, feeds)
    if name == "decoder":
        for graph in (reference, candidate):
            select_all_positions(graph.model, graph.path)
    output = "logits" if name == "decoder" else str(candidate.model.graph.outputs[0].name)
    switches = _Switches(candidate.model)
    found = _switch_products(switches, reference) or _switch_rounding(switches, reference)
    if found is None:
        return None
    if asked is None or asked == "fp32":
        asked = found if name == "decoder" or found in MEAN_COSINE else "int8"
    gate = _gate(name, asked)
    part = slice(-TEXT if name == "decoder" else None, None)
    expected = [outputs[output][part] for outputs in reference.runs([output], feeds)]
    modules, session, runs = list(switches.flags), candidate.open([output]), 0

    def run(kept: Collection[str], some: Sequence[Feed], what: str) -> list[NDArray]:
        nonlocal runs
        flags = {str(flag.name): np.array(unit in kept) for unit, flag in switches.flags.items()}
        outputs = []
        for feed in some:
            outputs += [array[part] for array in candidate.run(session, {**feed, **flags, **switches.constants})]
            runs += 1
            if progress is not None:
                progress(what, runs)
        return outputs

    tried: dict[frozenset[str], dict[str, float]] = {}

    def figures(kept: Collection[str]) -> dict[str, float]:
        if (key := frozenset(kept)) not in tried:
            tried[key] = measure(name, expected, run(kept, feeds, f"{len(kept)} of {len(modules)} modules kept"))
        return tried[key]

    before, after, kept = figures([]), figures(modules), None
    costs: dict[str, float] = {}
    if holds(gate, before):
        kept, after = [], before
    elif holds(gate, after):
        cost = divergence if name == "decoder" else noise
        for unit in modules:
            outputs = run([other for other in modules if other != unit], feeds[:1], "the cost of each module")
            with np.errstate(invalid="ignore", over="ignore"):
                found_cost = cost(expected[:1], outputs)
            costs[unit] = found_cost if math.isfinite(found_cost) else math.inf
        order = sorted(modules, key=lambda unit: -costs[unit])
        kept = smallest(order, lambda units: holds(gate, figures(units)))
        after = figures(kept)
    rows = None if kept is None else [KeptModule(unit, costs[unit]) for unit in kept]
    return Bisection(asked, gate, before, after, rows, len(modules), runs)


def smallest(order: Sequence[str], enough: Callable[[list[str]], bool]) -> list[str]:
    """A 1-minimal part of `order`, in its order: it is enough, and without any one of it it is not.

    Args:
        order: the likeliest first. All of it is enough, none of it is not.
    """
    low, high = 0, len(order)  # so many of the first are too few, and enough
    while high - low > 1:
        middle = (low + high) // 2
        if enough([*order[:middle]]):
            high = middle
        else:
            low = middle
    kept = deque(reversed(order[:high]))  # the likeliest to be left out first
    needed = 0  # how many at the end are, in what is left now
    while needed < len(kept):
        unit = kept.popleft()
        if enough(sorted(kept, key=order.index)):
            needed = 0
        else:
            kept.append(unit)
            needed += 1
    return sorted(kept, key=order.index)


def _gate(name: str, asked: Asked) -> dict[str, float]:
    """The build's. Perplexity needs text that a model was made for; of a prompt that may not be, the divergence of the
    next token's distribution is what a small change adds to perplexity's logarithm."""
    if name == "decoder":
        return {"divergence": math.log1p(PERPLEXITY[asked])}
    return {"mean_cosine": MEAN_COSINE[asked], "worst_cosine": WORST_COSINE[asked]}


def holds(gate: dict[str, float], figures: dict[str, float]) -> bool:
    """NaN holds no gate."""
    return all(
        figures[name] >= limit if name.endswith("cosine") else figures[name] <= limit for name, limit in gate.items()
    )


def measure(name: str, expected: list[NDArray], found: list[NDArray]) -> dict[str, float]:
    """Figure -> value, of outputs (one array for each feed); NaN where one is not finite."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if name == "decoder":
            return {"divergence": divergence(expected, found)}
        cosines = np.concatenate([clip_cosines(a, b) for a, b in zip(found, expected, strict=True)])
        return {"mean_cosine": float(cosines.mean()), "worst_cosine": float(cosines.min())}


# -- switches --------------------------------------------------------------------------------------------------------


@dataclass
class _Switches:
    """A graph whose modules can be kept.

    Attributes:
        flags: module -> input that is true where it is kept.
        constants: input -> what is fed to it in every run. Weights as inputs are neither copied nor serialised.
    """

    model: ir.Model
    flags: dict[str, ir.Value] = field(default_factory=dict)
    constants: dict[str, NDArray] = field(default_factory=dict)

    def flag(self, node: ir.Node) -> ir.Value:
        unit = module(node) or str(node.name)
        if unit not in self.flags:
            self.flags[unit] = self._input(f"{unit}:kept", ir.DataType.BOOL, ())
        return self.flags[unit]

    def constant(self, name: str, array: NDArray) -> ir.Value:
        self.constants[name] = np.ascontiguousarray(array, np.float32)
        return self._input(name, FLOAT, array.shape)

    def _input(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.model.graph.inputs.append(value)
        return value


@dataclass(frozen=True)
class _Quantised:
    """Weights of a product (K, N) as they are multiplied, and the step between two of their levels."""

    weights: NDArray[np.float32]
    step: NDArray[np.float32]


def _switch_products(switches: _Switches, reference: LayerGraph) -> Asked | None:
    """Puts a switch at every product with quantised weights; returns the precision that they speak of."""
    graph = switches.model.graph
    theirs = {str(node.name): node for node in reference.model.graph}
    asked: Asked | None = None
    for node in list(graph):
        quantised = _quantised(node)
        if quantised is None:
            continue
        weights = _reference_weights(theirs, str(node.name))
        if weights is None or weights.shape != quantised.weights.shape:
            raise InputError(
                f"{node.name} is quantised, and {reference.path} has no weights of its shape "
                f"{quantised.weights.shape} by that name; expected the FP32 graph of the same model, in the same form: "
                "two packages for the same target, or two graphs"
            )
        source = _unrounded(node.inputs[0])
        if source is not None or node.op_type == "MatMulIntegerToFloat":
            asked = "int8"
        elif asked != "int8" and (quantised.step != quantised.step[:1]).any():  # in blocks
            asked = "int4-weights"
        else:
            asked = asked or "int8-weights"
        exact = _scaled_alike(weights, quantised)
        if exact is None:
            raise InputError(
                f"{node.name}: its weights are not those of {reference.path}, rounded or scaled and rounded; expected "
                "two graphs of one model"
            )
        _switch_product(switches, node, source, *exact, theirs)
    return asked


def _quantised(node: ir.Node) -> _Quantised | None:
    if node.op_type == "MatMulNBits":
        return _unpacked(node)
    if node.op_type == "MatMulIntegerToFloat":
        stored, scale, zero, axis, block = node.inputs[1], node.inputs[3], node.inputs[5], 1, 0
    elif node.op_type == "MatMul":
        producer = node.inputs[1].producer()  # type: ignore[union-attr]
        while producer is not None and producer.op_type == "Cast":
            producer = producer.inputs[0].producer()  # type: ignore[union-attr]
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        stored, scale, zero = [*producer.inputs, None][:3]
        axis, block = producer.attributes.get_int("axis", 1), producer.attributes.get_int("block_size", 0)
    else:
        return None
    arrays = [None if value is None else _constant(value) for value in (stored, scale, zero)]
    if arrays[0] is None or arrays[1] is None or arrays[0].ndim != 2:
        return None
    integers, step, zeros = (None if array is None else array.astype(np.float32) for array in arrays)
    assert integers is not None and step is not None
    if block:
        step, zeros = (None if array is None else np.repeat(array, block, axis=axis) for array in (step, zeros))
    elif step.ndim == 1 and axis % 2 == 0:  # a scale for each row
        step, zeros = (None if array is None else array[:, None] for array in (step, zeros))
    step = np.broadcast_to(step, integers.shape)  # type: ignore[arg-type]
    return _Quantised((integers - (0 if zeros is None else zeros)) * step, np.abs(step))


def _unpacked(node: ir.Node) -> _Quantised | None:
    """MatMulNBits: (N, blocks, bytes), of 4 bits the lower half first; level 2^(bits - 1) is zero."""
    rows, columns, bits, block = (node.attributes.get_int(name, 0) for name in ("K", "N", "bits", "block_size"))
    packed, scale = (_constant(value) for value in node.inputs[1:3] if value is not None)
    if packed is None or scale is None or any(node.inputs[3:5]) or bits not in (4, 8):  # points of zero, an order
        return None
    levels = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
    integers = levels.reshape(columns, -1).T[:rows].astype(np.float32) - (1 << (bits - 1))
    step = np.repeat(scale.reshape(columns, -1).T.astype(np.float32), block, axis=0)[:rows]
    return _Quantised(integers * step, np.abs(step))


def _constant(value: ir.Value) -> NDArray | None:
    return None if value.const_value is None else value.const_value.numpy()


def _reference_weights(theirs: Mapping[str, ir.Node], name: str) -> NDArray[np.float32] | None:
    """(K, N); side by side where one engine multiplies queries, keys and values apart and the other does not."""
    if name not in theirs:
        parts = [_reference_weights(theirs, part) for i in "qkv" if (part := f"{name}_{i}") in theirs]
        return np.concatenate([part for part in parts if part is not None], axis=1) if len(parts) == 3 else None
    node = theirs[name]
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
        return None
    array = _constant(node.inputs[1])
    return array.T if array is not None and node.attributes.get_int("transB", 0) == 1 else array


def _scaled_alike(weights: NDArray[np.float32], quantised: _Quantised) -> tuple[NDArray, NDArray] | None:
    """The weights (K, N), rows and columns scaled as those that were rounded, and the factors of the columns (N,); None
    where they are others."""
    step = np.maximum(quantised.step, np.finfo(np.float32).tiny).astype(np.float64)
    found, expected = quantised.weights / step, weights / step  # integers, and what they should be
    rows, columns = np.ones(len(weights)), np.ones(weights.shape[1])
    error = np.abs(found - expected)
    if error.max() <= ROUNDED or (error.max() <= CLIPPED and np.sqrt(np.square(error).mean()) <= ROUNDED_RMS):
        return weights, columns
    products, squares = found * expected, np.square(expected)
    for _ in range(FIT_ROUNDS):
        rows = _ratio(products @ columns, squares @ np.square(columns))
        columns = _ratio(rows @ products, np.square(rows) @ squares)
    if not np.linalg.norm(found - expected * columns * rows[:, None]) <= MISFIT * np.linalg.norm(found):
        return None
    return (weights * rows[:, None] * columns).astype(np.float32), columns


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 where b is."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _unrounded(value: ir.Value | None) -> ir.Value | None:
    """An activation before it was quantised, moved about as it is after; None where it is not quantised."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type == "QuantizeLinear":
        return None if node is None else node.inputs[0]
    if node.op_type not in MOVES:
        return None
    source = _unrounded(node.inputs[0])
    if source is None or node.op_type in ("Cast", "DequantizeLinear"):
        return source
    moved = ir.node(node.op_type, [source, *node.inputs[1:]], node.attributes)
    assert node.graph is not None
    moved.outputs[0].type = source.type
    node.graph.insert_after(node, moved)
    return moved.outputs[0]


def _switch_product(
    switches: _Switches,
    node: ir.Node,
    source: ir.Value | None,
    exact: NDArray[np.float32],
    columns: NDArray[np.float64],
    theirs: Mapping[str, ir.Node],
) -> None:
    graph, name = switches.model.graph, str(node.name)
    end: ir.Node | None = node
    bias = next(iter(node.inputs[BIASES.get(node.op_type, len(node.inputs)) :]), None)
    if (subtract := _centring(source)) is not None:
        # its bias makes up for the centre, in FP16 with a loss: a kept module has the bias that it had
        end = _next(node)
        original = [] if end is None or str(end.name) not in theirs else theirs[str(end.name)].inputs
        vectors = [_constant(v) for v in original if v is not None and _constant(v) is not None]
        if end is None or len(vectors) != 1 or vectors[0] is None:
            raise InputError(f"{name}: its activation is centred, but no bias in the reference belongs to it")
        source, bias = subtract.inputs[0], switches.constant(f"{name}:bias_exact", vectors[0] * columns)
    elif source is None and node.op_type == "MatMulIntegerToFloat":  # pixels: integers from the start
        pixels = ir.node("DequantizeLinear", [node.inputs[0], node.inputs[2], node.inputs[4]], name=f"{name}:0_exact")
        pixels.outputs[0].name, pixels.outputs[0].dtype = pixels.name, FLOAT
        graph.insert_before(node, pixels)
        source = pixels.outputs[0]
    weights = switches.constant(f"{name}:1_exact", exact)
    kept = [ir.node("Cast", [source or node.inputs[0]], {"to": int(FLOAT)})]
    kept.append(ir.node("MatMul", [kept[0].outputs[0], weights]))
    if bias is not None:
        kept.append(ir.node("Add", [kept[1].outputs[0], bias]))
    assert end is not None
    rounded = [ir.node(end.op_type, end.inputs, end.attributes, domain=end.domain)]
    branches = {"then_branch": _branch(kept, f"{name}:kept"), "else_branch": _branch(rounded, f"{name}:rounded")}
    choice = ir.node("If", [switches.flag(node)], branches, name=end.name)
    ir.convenience.replace_nodes_and_values(graph, end, [end], [choice], end.outputs, choice.outputs)


def _centring(value: ir.Value | None) -> ir.Node | None:
    """The subtraction with which rewrite.py has centred an activation."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == "Sub" and str(node.name).endswith("_centred") else None


def _next(node: ir.Node) -> ir.Node | None:
    """The Add behind a product."""
    users = [user for user, _ in node.outputs[0].uses()]
    while len(users) == 1 and users[0].op_type == "Cast":
        users = [user for user, _ in users[0].outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == "Add" else None


def _branch(nodes: list[ir.Node], name: str) -> ir.Graph:
    for number, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{name}_{number}"
        node.outputs[0].dtype = FLOAT
    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=name)


# -- FP16 ------------------------------------------------------------------------------------------------------------


def _switch_rounding(switches: _Switches, reference: LayerGraph) -> Asked | None:
    """Makes every FP16 value FP32, and every rounding to FP16 one that a flag can turn off.

    The graph is in the form that `make_half_explicit` gives: what computes in FP16 does so in FP32, and is followed by
    a Cast of its name.
    """
    graph = switches.model.graph
    rounding = {node: producer for node in graph if (producer := _rounded(node)) is not None}
    if not rounding:
        return None
    for value in [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]:
        if value.dtype == HALF:
            value.dtype = FLOAT
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    halves = dict.fromkeys(rounding.values())
    theirs = {str(node.name): node for node in reference.model.graph}
    for node in halves:
        _switch_inputs(switches, node, halves, theirs.get(str(node.name)))
    for node in [n for n in graph if n.op_type == "Cast" and n.attributes.get_int("to", 0) in (int(FLOAT), int(HALF))]:
        if node in rounding:
            value = _rounded_unless(switches.flag(rounding[node]), node.inputs[0], f"{node.name}_switch", node)
            node.replace_input_with(0, value)
        if not _is_float(node.inputs[0]):
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        elif not str(node.name).endswith(_SWITCHED):
            node.op_type = "Identity"
            node.attributes.clear()
    return "fp16"


_SWITCHED = ("_to_half", "_from_half")


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == FLOAT


def _rounded(node: ir.Node) -> ir.Node | None:
    """What computes in FP16 and is rounded by this Cast."""
    if node.op_type != "Cast" or node.attributes.get_int("to", 0) != int(HALF) or node.inputs[0] is None:
        return None
    producer = node.inputs[0].producer()
    return producer if producer is not None and node.name == f"{producer.name}_round" else None


def _switch_inputs(switches: _Switches, node: ir.Node, halves: Collection[ir.Node], twin: ir.Node | None) -> None:
    """Rounds what a module reads of others, unless it is kept; gives it weights that FP16's range has changed."""
    flag = switches.flag(node)
    for position, value in enumerate(node.inputs):
        if value is None or not _is_float(value):
            continue
        array = _constant(value)
        if array is None:
            producer = _source(value)
            if producer is None or producer not in halves or switches.flag(producer) is not flag:
                name = f"{node.name}:{position}_switch"
                node.replace_input_with(position, _rounded_unless(flag, value, name, node))
            continue
        other = twin.inputs[position] if twin is not None and position < len(twin.inputs) else None
        exact = _constant(other) if other is not None else None
        if exact is not None and _out_of_range(exact, array):
            choice = ir.node("Where", [flag, switches.constant(f"{node.name}:{position}_exact", exact), value])
            choice.name = choice.outputs[0].name = f"{node.name}:{position}_switch"
            choice.outputs[0].dtype = FLOAT
            switches.model.graph.insert_before(node, choice)
            node.replace_input_with(position, choice.outputs[0])


def _source(value: ir.Value) -> ir.Node | None:
    """What computed a value that was moved about since."""
    node = value.producer()
    while node is not None and node.op_type in MOVES:
        floats = [v for v in node.inputs if _is_float(v)]
        node = floats[0].producer() if len(floats) == 1 and floats[0] is not None else None
    return node


def _out_of_range(exact: NDArray, array: NDArray) -> bool:
    """Whether these are the same weights, but for some that are too large or too small for FP16."""
    if exact.shape != array.shape or exact.dtype != np.float32:
        return False
    ends = np.finfo(np.float16).min, np.finfo(np.float16).max
    same = np.array_equal(np.clip(exact, *ends).astype(np.float16), np.clip(array, *ends).astype(np.float16))
    return same and not np.allclose(array, exact, rtol=FP16_PRECISION, atol=0)


def _rounded_unless(flag: ir.Value, value: ir.Value | None, name: str, before: ir.Node) -> ir.Value:
    assert value is not None and before.graph is not None
    down = ir.node("Cast", [value], {"to": int(HALF)}, name=f"{name}_to_half")
    up = ir.node("Cast", [down.outputs[0]], {"to": int(FLOAT)}, name=f"{name}_from_half")
    choice = ir.node("Where", [flag, value, up.outputs[0]], name=name)
    for node, dtype in ((down, HALF), (up, FLOAT), (choice, FLOAT)):
        node.outputs[0].name, node.outputs[0].dtype = node.name, dtype
    before.graph.insert_before(before, [down, up, choice])
    return choice.outputs[0]
