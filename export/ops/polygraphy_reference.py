"""Registers the custom operators with polygraphy's `pluginref` runner, so that its debugger can compare graphs that
hold them: import this module before the runner works."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.pluginref.references import register

from . import depthwise_temporal_conv, weighted_average_pool


@register(depthwise_temporal_conv.NAME)
def _depthwise_temporal_conv(attributes: dict[str, Any], x: NDArray, weight: NDArray, bias: NDArray) -> list[NDArray]:
    out = depthwise_temporal_conv.numpy_reference(x, weight, bias, attributes["grid"], attributes["strides"])
    return [out.astype(np.asarray(x).dtype)]


@register(weighted_average_pool.NAME)
def _weighted_average_pool(attributes: dict[str, Any], x: NDArray) -> list[NDArray]:
    return [weighted_average_pool.numpy_reference(x, attributes["blocks"]).astype(np.asarray(x).dtype)]
