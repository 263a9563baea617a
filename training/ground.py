"""Grounding: before alignment, encoder and projector learn to name what they see, in the language model's own words.

    clip ──encoder──▶ visual tokens ──· word embeddings──▶ cross-entropy of each group of words, where a thing is
                                                           elsewhere tokens learn to say none of them

An answer is a few ids behind hundreds of visual tokens. As long as a language model can make nothing of those, its
answers follow the question alone, and tell the encoder next to nothing. Its own words it understands from the start.
The papers align on hundreds of thousands of videos and have no such stage; with a few thousand it is what makes the
difference (docs/training.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..export.artifact import Artifact
from ..export.models.encoder import VideoEncoder
from .loop import Recipe, train, unfrozen

NOTHING = -1
QUIET, SMALL = 0.05, 0.1  # weights of the squares of what is said where nothing is, and of all tokens


@dataclass(frozen=True, eq=False)
class Sight:
    """
    Attributes:
        clips: uint8 (clips, T, H, W, 3), RGB.
        words: int64 (clips, tokens, groups), of each group the number of the word for what is there, or NOTHING.
    """

    clips: NDArray[np.uint8]
    words: NDArray[np.int64]


def embeddings(artifact: Artifact, words: Sequence[Sequence[str]]) -> list[Tensor]:
    """Of each group (words, D) float32, less the mean of all: what the words have in common names none of them."""
    table = artifact.decoder.model.embed_tokens.weight.detach().float()

    def embedding(word: str) -> Tensor:
        return table[artifact.text.tokenizer.encode(f" {word}", add_special_tokens=False).ids].mean(0)

    groups = [torch.stack([embedding(word) for word in group]) for group in words]
    mean = torch.cat(groups).mean(0)
    return [group - mean for group in groups]


def grounding_loss(tokens: Tensor, groups: Sequence[Tensor], words: Tensor) -> Tensor:
    """
    Args:
        tokens: float (clips, tokens, D).
        groups: see `embeddings`.
        words: int64 (clips, tokens, groups), see `Sight`.
    """
    named = words[..., 0] != NOTHING
    loss = SMALL * tokens.square().mean() + QUIET * (tokens[~named] @ torch.cat(list(groups)).T).square().mean()
    if named.any():
        for group, right in zip(groups, words[named].unbind(-1), strict=True):
            loss = loss + F.cross_entropy(tokens[named] @ group.T, right)
    return loss


def ground(
    artifact: Artifact,
    words: Sequence[Sequence[str]],
    draw: Callable[[int], Sight],
    folder: Path,
    recipe: Recipe,
    frozen: Callable[[str], bool] = lambda name: False,
    minutes: float = math.inf,
) -> bool:
    """Trains the artifact's encoder and projector; see `loop.train`.

    Args:
        words: in groups, one word of each for every thing.
        draw: the sight of a number from 0. Each is drawn once.
        frozen: which of the encoder's parameters are not trained, by name.
    """
    encoder, groups = artifact.encoder, embeddings(artifact, words)

    def loss(step: int) -> Tensor:
        sights = [draw(step * recipe.batch + i) for i in range(recipe.batch)]
        right = torch.from_numpy(np.concatenate([sight.words for sight in sights])).to(encoder.mean.device)
        return grounding_loss(_tokens(encoder, sights), groups, right)

    return train(folder, unfrozen(encoder, frozen), loss, recipe, minutes)


@torch.inference_mode()
def named_right(artifact: Artifact, words: Sequence[Sequence[str]], sights: Sequence[Sight]) -> list[float]:
    """Of each group of words the share of tokens, of those where a thing is, that say the right one."""
    groups, said = embeddings(artifact, words), []
    for sight in sights:
        right = torch.from_numpy(sight.words)
        tokens = _tokens(artifact.encoder, [sight]).cpu()[right[..., 0] != NOTHING]
        best = torch.stack([(tokens @ group.cpu().T).argmax(-1) for group in groups], -1)
        said.append(best == right[right[..., 0] != NOTHING])
    return torch.cat(said).float().mean(0).tolist()


def _tokens(encoder: VideoEncoder, sights: Sequence[Sight]) -> Tensor:
    """float32 (clips, tokens, D)"""
    frames, device = torch.from_numpy(np.concatenate([sight.clips for sight in sights])), encoder.mean.device
    with torch.autocast(device.type, torch.bfloat16):
        return encoder(frames.to(device)).float()
