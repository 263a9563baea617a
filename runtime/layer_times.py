"""What each module of an engine takes: per-node times of a profiler, added up by the PyTorch modules they came from.

backbone.blocks.3.attn.qkv/MatMul ─▶ block 3 attention          nodes that a compiler made, which have no module's
backbone.blocks.3.mlp.fc1/MatMul ──▶ block 3 MLP                name, count where they run: with the node before
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# a module's name -> what its time counts as; the first that matches
GROUPS = [
    (re.compile(pattern), group)
    for pattern, group in (
        (r"blocks\.(\d+)\.(?:attn|norm1|ls1)\b", r"block \1 attention"),
        (r"blocks\.(\d+)\.(?:mlp|norm2|ls2)\b", r"block \1 MLP"),
        (r"blocks\.(\d+)\.temporal\b", r"block \1 temporal"),
        (r"downsampling\.(\d+)\b", r"down-sampling \1"),
        (r"layers\.(\d+)\.(?:self_attn|input_layernorm)\b", r"layer \1 attention"),
        (r"layers\.(\d+)\.(?:mlp|post_attention_layernorm)\b", r"layer \1 MLP"),
        (r"(?:patch_embedding|pre_norm)$", "patch embedding"),
        (r"^backbone(?:\.vit)?\.(?:head|norm|post_norm)\b", "head"),
        (r"^reducer\b|^_inlfunc_WeightedAveragePool_", "reducer"),
        (r"^projector\b", "projector"),
        (r"^(?:lm_head|model\.norm)\b", "head"),
    )
]


def group(node: str, before: str) -> str:
    """What a node counts as; modules that contain others, and nodes without one, count as `before`."""
    module = node.rpartition("/")[0] or node
    for pattern, name in GROUPS:
        if match := pattern.search(module):
            return match.expand(name)
    return before


def by_module(runs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Adds up (node, time) in the order in which nodes ran, in the order in which modules first do."""
    times: dict[str, float] = {}
    now = "input"
    for node, time in runs:
        now = group(node, now)
        times[now] = times.get(now, 0.0) + time
    return times


def by_kind(times: dict[str, float]) -> dict[str, float]:
    """Adds up the blocks: "block 3 MLP" counts as "MLP"."""
    kinds: dict[str, float] = {}
    for name, time in times.items():
        kind = re.sub(r"^(?:block|layer) \d+ |(?<=down-sampling) \d+$", "", name)
        kinds[kind] = kinds.get(kind, 0.0) + time
    return kinds
