"""What each linear layer costs when it alone is quantised, and which to leave out to stay within a budget.

for each group of layers that read the same activation:  the graph with only that group in INT8  ──▶  cost
costs add up, nearly: rounding errors of different layers are independent
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..engines.targets import Asked
from .observe import Feed, layers_by_activation, open_tapped
from .placement import is_head, linear_layers, plan
from .rewrite import apply
from .weights import Rounded

Cost = Callable[[list[NDArray], list[NDArray]], float]


def noise(reference: list[NDArray], candidate: list[NDArray]) -> float:
    """Power of the difference over power of the reference, all outputs together."""
    error = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(candidate, reference, strict=True))
    return error / sum(float(np.square(b.astype(np.float64)).sum()) for b in reference)


def divergence(reference: list[NDArray], candidate: list[NDArray]) -> float:
    """Mean Kullback-Leibler divergence, in nats, of the candidate's next-token distributions from the reference's.

    For small changes, it is what they add to the mean loss, the logarithm of perplexity.

    Args:
        reference, candidate: logits (positions, vocabulary), one array for each feed.
    """
    per_position = [divergences(*pair) for pair in zip(reference, candidate, strict=True)]
    return float(np.concatenate(per_position).mean(dtype=np.float64))


def divergences(reference: NDArray, candidate: NDArray) -> NDArray[np.float32]:
    """Of each position (positions,), for logits (positions, vocabulary); see `divergence`."""
    expected, found = _log_softmax(reference), _log_softmax(candidate)
    return (np.exp(expected) * (expected - found)).sum(axis=-1)


def _log_softmax(logits: NDArray) -> NDArray[np.float32]:
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def scan(
    graph: Path,
    feeds: list[Feed],
    output: str,
    ranges: Mapping[str, tuple[float, float]],
    signed_activations: bool,
    cost: Cost = noise,
    progress: Callable[[int, int], None] | None = None,
    quantise: Asked = "int8",
    rounded: Mapping[tuple[str, int], Rounded] = MappingProxyType({}),
    only: set[str] | None = None,
) -> dict[str, float]:
    """Linear layer -> cost of quantising it and those that share its activation, in an otherwise FP32 graph. The head
    is none of them: nothing but its weights is quantised, whatever it costs.

    Args:
        output: the value whose change is the cost.
        cost: of the values over all feeds, reference first.
        progress: told how many of how many groups are done.
        quantise: to what.
        rounded: see `rewrite.apply`.
        only: the layers to scan; all, unless told otherwise.
    """

    def run(model: ir.Model) -> list[NDArray]:
        session = open_tapped(model, graph.parent, [output])
        return [session.run([output], feed)[0] for feed in feeds]

    model = ir.load(graph)
    reference = run(model)
    every = {str(layer.name): layer for layer in linear_layers(model)}
    groups = [group for group in layers_by_activation(model).values() if not is_head(every[group[0]])]
    if only is not None:
        groups = [group for group in groups if not only.isdisjoint(group)]
    costs: dict[str, float] = {}
    for done, group in enumerate(groups, start=1):
        candidate = ir.load(graph)
        others = dict.fromkeys(every.keys() - set(group), "")
        alone = plan(candidate, "fp32", quantise, {}, others, signed=signed_activations)
        apply(candidate, alone, ranges, signed_activations, rounded)
        costs |= dict.fromkeys(group, cost(reference, run(candidate)))
        if progress is not None:
            progress(done, len(groups))
    return costs


def too_costly(costs: Mapping[str, float], budget: float) -> dict[str, str]:
    """The costliest layers, as few as possible, without which the others' costs add up to no more than `budget`:
    layer -> why it is kept."""
    groups: dict[float, list[str]] = {}
    for layer, cost in costs.items():  # layers that were scanned together have one cost
        groups.setdefault(cost, []).append(layer)
    kept: dict[str, str] = {}
    by_cost = sorted(groups, reverse=True)
    for position, cost in enumerate(by_cost):
        if math.fsum(by_cost[position:]) <= budget:
            break
        kept |= dict.fromkeys(groups[cost], f"sensitivity: alone it costs {cost:.3g}, all may cost {budget:.3g}")
    return kept
