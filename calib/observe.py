"""Runs an FP32 graph on calibration data and keeps what decisions about precision need, in one pass over the data.

feeds ──▶ ONNX Runtime ──▶ activations of linear layers  ──▶ a histogram each      (INT8 ranges)
                           all floating-point values     ──▶ largest magnitude      (the FP16 range audit)
                           activations, first feeds only ──▶ largest of each channel (smoothing)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ..engines.graph_edits import output_like
from ..runtime.ort_engine import open_session
from .placement import is_float, linear_layers
from .ranges import Histogram

Feed = dict[str, NDArray]

# what they put out has been in before
MOVES = frozenset("Reshape Transpose Slice Concat Gather Split Squeeze Unsqueeze Expand Identity TensorScatter".split())


@dataclass
class Observation:
    """
    Attributes:
        histograms: linear layer -> histogram of its activation.
        largest: value -> largest absolute value.
    """

    histograms: dict[str, Histogram] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)


def observe(
    graph: Path,
    feeds: Iterable[Feed],
    progress: Callable[[int], None] | None = None,
    histograms_too: bool = True,
) -> Observation:
    """One pass over `feeds`, each of which is one call of the graph; `progress` is told how many are done.

    Raises:
        ValueError: a value is not finite; the message names it.
    """
    model = ir.load(graph)
    layers = layers_by_activation(model) if histograms_too else {}
    histograms = {value: Histogram() for value in layers}
    unused = _unused_channels(model)
    extremes = _add_extremes(model)
    session = open_tapped(model, graph.parent, [*histograms, *extremes])
    largest: dict[str, float] = {}
    for done, feed in enumerate(feeds, start=1):
        results = dict(zip((*histograms, *extremes), session.run([*histograms, *extremes], feed), strict=True))
        for reduced, value in extremes.items():
            found = float(np.abs(results[reduced]))
            if not np.isfinite(found):
                raise ValueError(f"{value} is not finite in FP32; the weights or the input are damaged")
            largest[value] = max(largest.get(value, 0.0), found)
        for value, histogram in histograms.items():
            array = results[value]
            histogram.observe(np.delete(array, unused[value], axis=-1) if value in unused else array)
        if progress is not None:
            progress(done)
    _follow_moves(model, largest)
    return Observation({name: histograms[value] for value, names in layers.items() for name in names}, largest)


def observe_channels(graph: Path, feeds: Iterable[Feed]) -> dict[str, NDArray[np.float32]]:
    """Linear layer -> largest absolute value of each channel (K,) of its activation."""
    model = ir.load(graph)
    layers = layers_by_activation(model)
    session = open_tapped(model, graph.parent, list(layers))
    channels: dict[str, NDArray[np.float32]] = {}
    for feed in feeds:
        for value, array in zip(layers, session.run(list(layers), feed), strict=True):
            found = np.abs(array).max(axis=tuple(range(array.ndim - 1)))
            channels[value] = np.maximum(channels.get(value, found), found)
    return {name: channels[value] for value, names in layers.items() for name in names}


def open_tapped(model: ir.Model, folder: Path, outputs: Iterable[str], threads: int | None = None):
    """A session of a graph in memory, its weights in `folder`, with more of its values as outputs."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    have = {str(value.name) for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in outputs if name not in have and name in values)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # extremes are taken as soon as a value is there; by default they come last, and keep every value alive
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False  # it would keep what the largest moment took
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # between runs there is work in Python
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(folder))
    if threads is not None:
        options.intra_op_num_threads = threads
    proto = ir.to_proto(model)
    return open_session(proto.SerializeToString(), options, "CPUExecutionProvider")


def layers_by_activation(model: ir.Model) -> dict[str, list[str]]:
    """Value -> the linear layers that read it."""
    layers: dict[str, list[str]] = {}
    for layer in linear_layers(model):
        assert layer.inputs[0] is not None
        layers.setdefault(str(layer.inputs[0].name), []).append(str(layer.name))
    return layers


def _unused_channels(model: ir.Model) -> dict[str, NDArray[np.intp]]:
    """Value -> the channels of it that only meet weights of zero in linear layers: they need no range."""
    used: dict[str, NDArray[np.bool_]] = {}
    for layer in linear_layers(model):
        activation, weight = layer.inputs
        assert activation is not None and weight is not None and weight.const_value is not None
        rows: NDArray[np.bool_] = np.any(weight.const_value.numpy(), axis=1 if layer.op_type == "MatMul" else 0)
        name = str(activation.name)
        used[name] = np.logical_or(used[name], rows) if name in used else rows
    return {name: np.flatnonzero(~rows) for name, rows in used.items() if not rows.all()}


def _add_extremes(model: ir.Model) -> dict[str, str]:
    """Adds the smallest and largest element of every value that is computed: name of the new value -> value."""
    added: dict[str, str] = {}
    for node in list(model.graph):
        if node.op_type in MOVES:
            continue
        for value in node.outputs:
            if not is_float(value):
                continue
            for operator in ("ReduceMin", "ReduceMax"):
                reduce = ir.node(operator, [value], {"keepdims": 0}, name=f"{value.name}_{operator}")
                out = output_like(reduce, value)
                out.shape = ir.Shape([])
                model.graph.insert_after(node, reduce)
                added[str(out.name)] = str(value.name)
    return added


def _follow_moves(model: ir.Model, largest: dict[str, float]) -> None:
    for node in model.graph:
        if node.op_type in MOVES:
            known = [largest[str(v.name)] for v in node.inputs if v is not None and str(v.name) in largest]
            for value in node.outputs:
                if is_float(value) and known:
                    largest[str(value.name)] = max(known)
