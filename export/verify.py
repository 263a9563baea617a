"""Every graph and every compiled engine against the torch module it came from, with gates that decide.

encoder   tokens of two clips, one of noise and one of a moving pattern: cosine of each token, and of each feature
          where it gives features
merger    tokens of random clips behind a keyframe and before the first: cosine of each token
decoder   logits of a prompt of real token embeddings, in one piece and in chunks; then greedy tokens
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.package import GateError
from ..runtime.ort_engine import OrtDecoder, OrtEncoder, OrtMerger
from .models.attention import use_dialect
from .models.decoder import Decoder
from .models.encoder import VideoEncoder

# FP32's gates
COSINE = 0.99999
CHUNKED_DIFFERENCE = 1e-4  # of the logits' scale: one-shot and chunked prefill sum in different orders
MERGED_CLIPS, MERGED_WITH = 3, ((1.0, 0.1), (0.5, 0.01))  # redundancy weight, temperature
PROMPT, CHUNKS, GREEDY_TOKENS = 48, (7, 32, 9), 16


def cosine(a: NDArray, b: NDArray) -> float:
    """Smallest cosine between corresponding vectors along the last axis, in double precision."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / np.maximum(norms, 1e-300)).min())


def relative_difference(a: NDArray, reference: NDArray) -> float:
    """Largest absolute difference over the reference's largest magnitude."""
    return float(np.abs(a - reference).max() / max(np.abs(reference).max(), 1e-300))


def sample_clips(encoder: VideoEncoder) -> NDArray[np.uint8]:
    """Two clips uint8 (2, T, H, W, 3): noise, and a pattern that moves."""
    height, width = encoder.config.vit.image_size
    shape = (encoder.config.clip_length, height, width, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    t, y, x, c = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij")
    pattern = 127.5 + 127.5 * np.sin(2 * np.pi * (x / width * (c + 1) + y / height + t / 8))
    return np.stack([noise, pattern.astype(np.uint8)])


class Verifier:
    """Holds the torch side of the comparisons, computed once for any number of graphs and engines."""

    def __init__(self, encoder: VideoEncoder, decoder: Decoder):
        self._frames = sample_clips(encoder)
        with torch.no_grad():
            tokens, features = encoder.with_features(torch.from_numpy(self._frames))
        self._tokens, self._features = tokens.numpy(), features.numpy()
        self._merger = encoder.merger
        ids = np.random.default_rng(1).integers(0, decoder.config.vocab_size, PROMPT)
        self._table = decoder.model.embed_tokens.weight.detach().numpy()
        self._prompt = self._table[ids]
        self._logits, self._greedy = _torch_greedy(decoder, self._prompt, self._table)

    def encoder(self, path: Path, provider: str = "CPUExecutionProvider") -> dict[str, float]:
        """Figures of an encoder graph run by ONNX Runtime. Raises GateError when it misses the gate."""
        tokens, features = OrtEncoder(path, provider).encode_with_features(self._frames)
        figures = {
            "cosine": _rounded(np.min([cosine(tokens, self._tokens), cosine(features, self._features)])),
            "relative_difference": _rounded(relative_difference(tokens, self._tokens)),
        }
        if not figures["cosine"] >= COSINE:
            raise GateError(f"{path.name}: cosine {figures['cosine']} to the torch module, the gate is {COSINE}")
        return figures

    def merger(self, path: Path, provider: str = "CPUExecutionProvider") -> dict[str, float]:
        """Figures of a merger graph run by ONNX Runtime. Raises GateError when it misses the gate."""
        engine, config = OrtMerger(path, provider), self._merger.config
        rng = np.random.default_rng(2)
        features = rng.standard_normal((MERGED_CLIPS, config.patches, config.feature_size), np.float32)
        query = rng.standard_normal(config.feature_size, np.float32)
        got, expected = [], []
        for key in (np.zeros_like(features[0]), features[0] + rng.standard_normal(features[0].shape, np.float32) / 2):
            for weight, temperature in MERGED_WITH:
                got.append(engine.merge(features, query, key, weight, temperature))
                numbers = [np.array([number], np.float32) for number in (weight, temperature)]
                with torch.no_grad():
                    tensors = map(torch.from_numpy, (features, query[None], key[None], *numbers))
                    expected.append(self._merger(*tensors).numpy())
        figures = {
            "cosine": _rounded(cosine(np.stack(got), np.stack(expected))),
            "relative_difference": _rounded(relative_difference(np.stack(got), np.stack(expected))),
        }
        if not figures["cosine"] >= COSINE:
            raise GateError(f"{path.name}: cosine {figures['cosine']} to the torch module, the gate is {COSINE}")
        return figures

    def decoder(self, path: Path, provider: str = "CPUExecutionProvider") -> dict[str, float]:
        """Figures of a decoder graph run by ONNX Runtime. Raises GateError when it misses a gate."""
        decoder = OrtDecoder(path, provider, capacity=PROMPT + GREEDY_TOKENS)
        logits = decoder.forward(self._prompt)
        decoder.rewind(0)
        start = 0
        for size in CHUNKS:
            chunked = decoder.forward(self._prompt[start : start + size])
            start += size
        tokens, step = [], chunked
        for _ in range(GREEDY_TOKENS):
            tokens.append(int(step.argmax()))
            if len(tokens) < GREEDY_TOKENS:
                step = decoder.forward(self._table[tokens[-1:]])
        figures = {
            "cosine": _rounded(cosine(logits, self._logits)),
            "relative_difference": _rounded(relative_difference(logits, self._logits)),
            "chunked_difference": _rounded(relative_difference(chunked, logits)),
            "greedy_tokens_equal": float(sum(a == b for a, b in zip(tokens, self._greedy, strict=True))),
        }
        if not figures["cosine"] >= COSINE:
            raise GateError(f"{path.name}: cosine {figures['cosine']} to the torch module, the gate is {COSINE}")
        if not figures["chunked_difference"] <= CHUNKED_DIFFERENCE:
            raise GateError(
                f"{path.name}: chunked prefill differs from one-shot by {figures['chunked_difference']}, "
                f"the gate is {CHUNKED_DIFFERENCE}"
            )
        if tokens != self._greedy:
            raise GateError(f"{path.name}: greedy tokens {tokens} differ from the torch module's {self._greedy}")
        return figures


def _torch_greedy(decoder: Decoder, prompt: NDArray, table: NDArray) -> tuple[NDArray, list[int]]:
    tokens: list[int] = []
    with torch.no_grad(), use_dialect("plain"):
        caches, embeddings, position = decoder.empty_caches(0), torch.from_numpy(prompt)[None], 0
        while len(tokens) < GREEDY_TOKENS:
            logits, caches = decoder(embeddings, torch.tensor([position]), caches)
            if not tokens:
                first = logits[0].numpy()
            position += embeddings.shape[1]
            tokens.append(int(logits.argmax()))
            embeddings = torch.from_numpy(table[tokens[-1:]])[None]
    return first, tokens


def _rounded(value: float) -> float:
    """Figures go into the manifest; six digits keep it equal from build to build."""
    return float(f"{value:.6g}")
