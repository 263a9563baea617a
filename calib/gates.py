"""How far a candidate may be from its FP32 reference, in each precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..engines.targets import Asked

# cosines of visual tokens, a clip's the mean of its tokens'; how much perplexity may rise
MEAN_COSINE: dict[Asked, float] = {"fp32": 0.99999, "fp16": 0.9995, "int8": 0.99}
WORST_COSINE: dict[Asked, float] = {"fp32": 0.99999, "fp16": 0.9995, "int8": 0.97}
PERPLEXITY: dict[Asked, float] = {
    "fp32": 0.00001,
    "fp16": 0.001,
    "int8": 0.02,
    "int8-weights": 0.02,
    "int4-weights": 0.08,
}


def clip_cosines(tokens: NDArray, reference: NDArray) -> NDArray[np.float64]:
    """Mean cosine (n,) of the tokens (n, tokens, D) of each clip."""
    a, b = tokens.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return ((a * b).sum(-1) / np.maximum(norms, 1e-300)).mean(axis=-1)
