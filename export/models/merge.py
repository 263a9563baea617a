"""Differential feature merging (ViLaMP, equations 5-10): the patches of a clip become one token.

    D(p) = cos(p, query) - lambda cos(p, key at p)  ->  w = softmax over patches of D / alpha  ->  sum of w p
                                                                              -> connector: LayerNorm, MLP -> token

What resembles the query and is not in the preceding keyframe already gets the weight. Where a model has a connector of
its own for merged tokens (equation 11), patches are the features before the projector's MLP; otherwise they are visual
tokens, and so is what they are merged into.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from .projector import Projector


class MergerConfig(msgspec.Struct, frozen=True):
    """patches: of a clip, P. feature_size: of a patch, C. connected_size: what the connector makes of a merged token,
    D; None without a connector."""

    patches: int
    feature_size: int
    connected_size: int | None = None

    @property
    def output_size(self) -> int:
        return self.feature_size if self.connected_size is None else self.connected_size


class FeatureMerger(nn.Module):
    def __init__(self, config: MergerConfig):
        super().__init__()
        self.config = config
        self.connector = None
        if config.connected_size is not None:  # as a projector of single tokens
            self.connector = Projector(config.feature_size, config.connected_size, grid=(1, 1), shuffle=1)

    def extra_repr(self) -> str:
        return f"patches={self.config.patches}, feature_size={self.config.feature_size}"

    def weights(
        self, features: Tensor, query: Tensor, key_features: Tensor, redundancy_weight: Tensor, temperature: Tensor
    ) -> Tensor:
        """Equations 5-8 and 10: (clips, P), which sum to one over a clip. Arguments as of `forward`."""
        features, query, key_features = (_at_least_single(x) for x in (features, query, key_features))
        relevance = (features @ query.T).squeeze(-1) / _norm(query)
        redundancy = (features * key_features).sum(-1) / _norm(key_features)
        saliency = (relevance - redundancy_weight * redundancy) / _norm(features)
        return torch.softmax(saliency / temperature, dim=-1)

    def forward(
        self, features: Tensor, query: Tensor, key_features: Tensor, redundancy_weight: Tensor, temperature: Tensor
    ) -> Tensor:
        """Merged tokens (clips, D); in FP32 up to the connector, whatever the type of the features.

        features: (clips, P, C)
        query: (1, C)
        key_features: (1, P, C), of the keyframe that precedes all clips; zeros where there is none, for the cosine with
            a zero vector is 0.
        redundancy_weight: FP32 (1,), lambda.
        temperature: FP32 (1,), alpha, above 0.
        """
        weights = self.weights(features, query, key_features, redundancy_weight, temperature)
        merged = (weights[:, None] @ _at_least_single(features)).squeeze(1).to(features.dtype)
        return merged if self.connector is None else self.connector(merged)


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor) -> Tensor:
    """Of the last axis; above 0, so that a zero vector's product divided by it is 0. In operators of both dialects."""
    return (x * x).sum(-1).sqrt().clamp_min(1e-12)
