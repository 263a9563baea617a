"""What calibration learns of a graph, and the file that keeps it.

    graph, feeds ──▶ channels of the first feeds ──▶ smoothed graph ──▶ one pass over all feeds ──▶ Calibration
                                                     outliers apart,                   └──▶ FILE.safetensors and back
                                                     tokens scaled

The cache is a safetensors file:

    metadata      format: "liteframe calibration 2"; graphs: JSON {name: SHA-256 of the graph and its weights}
    clips         uint8 (n, T, H, W, 3), the clips themselves
    NAME/channels/LAYER          float32 (K,)      largest |x| of each channel of the layer's activation
    NAME/histograms/LAYER/...    `ranges.Histogram.to_arrays`, of the smoothed activation
    NAME/largest/VALUE           float64 (),       largest |x| of a value of the smoothed graph

It belongs to the graphs whose hashes it holds, and to no others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..engines.package import InputError, hash_file
from .observe import Feed, Observation, observe, observe_channels
from .outliers import set_apart
from .ranges import Histogram
from .smooth import smooth
from .tokens import scale_tokens

FORMAT = "liteframe calibration 2"
# smoothing needs no more: it is exact whatever its factors are
SMOOTHING_FEEDS = 8


@dataclass
class Calibration:
    """
    Attributes:
        channels: linear layer -> largest absolute value of each channel of its activation.
        observation: of the graph after `even_out` with these channels.
    """

    channels: dict[str, NDArray[np.float32]]
    observation: Observation


def even_out(model: ir.Model, channels: Mapping[str, NDArray[np.float32]], by_token: Collection[str] = ()) -> list[str]:
    """Prepares an FP32 graph for INT8 activations, in place: `smooth`, `set_apart`, whose layers it returns, and
    `scale_tokens`, also before the layers `by_token`."""
    apart = set_apart(model, smooth(model, channels))
    scale_tokens(model, by_token)
    return apart


def calibrate(
    graph: Path, feeds: list[Feed], scratch: Path, progress: Callable[[int], None] | None = None
) -> Calibration:
    """Observes an FP32 graph on its calibration data.

    Args:
        feeds: each one call of the graph.
        scratch: folder for the smoothed graph, which is as large as the graph.
        progress: told how many feeds of the pass are done.
    """
    channels = observe_channels(graph, feeds[:SMOOTHING_FEEDS])
    model = ir.load(graph)
    even_out(model, channels)
    smoothed = scratch / f"{graph.stem}.smooth.onnx"
    ir.save(model, smoothed, external_data=f"{graph.stem}.smooth.data")
    observation = observe(smoothed, feeds, progress)
    for path in (smoothed, smoothed.with_suffix(".data")):
        path.unlink(missing_ok=True)
    return Calibration(channels, observation)


def hash_graph(graph: Path, weights: Path) -> str:
    """SHA-256 over those of the graph and of its weights, in hexadecimal."""
    return hashlib.sha256(f"{hash_file(graph)} {hash_file(weights)}".encode()).hexdigest()


def save_cache(
    path: Path, clips: NDArray[np.uint8], graphs: Mapping[str, str], calibrations: Mapping[str, Calibration]
) -> None:
    """Writes the cache described above.

    Args:
        graphs: name -> `hash_graph`.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray] = {"clips": clips}
    for name, calibration in calibrations.items():
        for layer, channels in calibration.channels.items():
            tensors[f"{name}/channels/{layer}"] = channels
        for layer, histogram in calibration.observation.histograms.items():
            for part, array in histogram.to_arrays().items():
                tensors[f"{name}/histograms/{layer}/{part}"] = array
        for value, largest in calibration.observation.largest.items():
            tensors[f"{name}/largest/{value}"] = np.array(largest, np.float64)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, {"format": FORMAT, "graphs": json.dumps(graphs, sort_keys=True)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_cache(path: Path, graphs: Mapping[str, str]) -> tuple[NDArray[np.uint8], dict[str, Calibration]]:
    """Clips and calibrations of a cache.

    Raises:
        InputError: not such a file, damaged, or observed on other graphs than these.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a calibration cache ({error}); calibrate again with --calib") from None
    if metadata.get("format") != FORMAT or "clips" not in tensors:
        raise InputError(
            f"{path}: no calibration cache of this version (format {metadata.get('format')!r}, expected {FORMAT!r}); "
            "calibrate again with --calib"
        )
    if metadata.get("graphs") != json.dumps(graphs, sort_keys=True):
        raise InputError(
            f"{path}: observed on another graph than this one; a cache belongs to one artifact and its weights, "
            "calibrate again with --calib and another --calib-cache"
        )
    calibrations = {name: Calibration({}, Observation()) for name in graphs}
    parts: dict[tuple[str, str], dict[str, NDArray]] = {}
    try:
        for key, array in tensors.items():
            if key == "clips":
                continue
            name, kind, rest = key.split("/", 2)
            if kind == "channels":
                calibrations[name].channels[rest] = array
            elif kind == "largest":
                calibrations[name].observation.largest[rest] = float(array)
            else:
                layer, _, part = rest.rpartition("/")
                parts.setdefault((name, layer), {})[part] = array
        for (name, layer), arrays in parts.items():
            calibrations[name].observation.histograms[layer] = Histogram.from_arrays(arrays)
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: a damaged calibration cache ({error}); calibrate again with --calib") from None
    return tensors["clips"], calibrations
