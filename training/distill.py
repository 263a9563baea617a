"""Compressed-token distillation (CTD): the student learns what WAP makes of its teacher's features.

    clips ──teacher──▶ features ──WAP──▶ targets ──┐
      └─────────student──────▶ tokens ─────────────┴─▶ mean squared error, of differences clipped

The teacher is the larger by far and always says the same, so what it says is computed once, and kept in shards. The
paper's two ablations are the other objectives: reconstructing the teacher's features from compressed tokens (RTD), and
learning them without compression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engines.package import InputError
from ..export.models.encoder import VideoEncoder
from ..export.models.liteframe import LiteFrame
from ..export.models.vit import VisionTransformer
from .loop import Recipe, train

SHARD = 32  # clips
MIN_CLIPS = 64
DEVIATIONS = 3.0  # beyond which differences are clipped (LiteFrame, Appendix A)
Objective = Literal["ctd", "rtd", "dense"]
Clips = Callable[[int], NDArray[np.uint8]]  # number -> uint8 (T, H, W, 3), RGB


# -- the teacher -------------------------------------------------------------------------------------------------------


def teach(teacher: VideoEncoder, clips: Clips, count: int, folder: Path, dense: bool = False) -> Iterator[int]:
    """Writes shards of clips and the teacher's targets, float16 (clips, tokens, C), leaving out those that are there;
    yields how many clips are done.

    Args:
        dense: also what the teacher says of each frame before compression, (clips, T, H*W, C).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(-(-count // SHARD)):
        targets = folder / f"{shard:05}-targets.npy"
        if not targets.exists():
            frames = np.stack([clips(shard * SHARD + i) for i in range(SHARD)])
            _save(folder / f"{shard:05}-frames.npy", frames)
            features = [_features(teacher, part) for part in np.split(frames, SHARD // 8)]
            if dense:
                _save(folder / f"{shard:05}-dense.npy", np.concatenate([whole[:, :, 1:] for whole, _ in features]))
            _save(targets, np.concatenate([compressed for _, compressed in features]))
        yield (shard + 1) * SHARD


@torch.inference_mode()
def _features(teacher: VideoEncoder, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    assert teacher.reducer is not None
    with torch.autocast("cpu", torch.bfloat16):
        dense = teacher.dense(torch.from_numpy(frames)).float()
    return dense.half().numpy(), teacher.reducer(dense).flatten(1, 2).half().numpy()


def _save(path: Path, array: NDArray) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


class Taught:
    """Clips and what the teacher says of them, from a folder of shards.

    Args:
        what: "targets" or "dense"; see `teach`.

    Raises:
        InputError: there are too few.
    """

    def __init__(self, folder: Path, what: str = "targets"):
        paths = sorted(folder.glob(f"*-{what}.npy"))
        if len(paths) * SHARD < MIN_CLIPS:
            raise InputError(f"{folder}: {len(paths) * SHARD} clips with {what}, at least {MIN_CLIPS} are needed")
        self._targets = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        self._frames = [np.load(f"{str(path)[: -len(what) - 4]}frames.npy", mmap_mode="r") for path in paths]

    def __len__(self) -> int:
        return len(self._targets) * SHARD

    def batch(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Frames uint8 (clips, T, H, W, 3), and targets float32 (clips, ..., C)."""
        frames = np.stack([self._frames[n // SHARD][n % SHARD] for n in numbers])
        targets = np.stack([self._targets[n // SHARD][n % SHARD] for n in numbers])
        return torch.from_numpy(frames), torch.from_numpy(targets.astype(np.float32))

    def drawn(self, step: int, batch: int, seed: int) -> NDArray[np.int64]:
        """The numbers of a step's batch: every epoch takes each clip once, in an order of its own."""
        first = step * batch
        epochs = range(first // len(self), (first + batch - 1) // len(self) + 1)
        order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(len(self)) for epoch in epochs])
        return order[first - epochs[0] * len(self) :][:batch]


# -- the student -------------------------------------------------------------------------------------------------------


def clip_weights(student: LiteFrame, teacher: VisionTransformer) -> None:
    """Gives the student of each of the teacher's parameters as much as it has room for, from the beginning: the first
    blocks, heads and channels (LiteFrame, Appendix A). What only the student has stays.

    Raises:
        InputError: the student is larger than the teacher, or its heads are of another size.
    """
    ours, theirs = student.config.vit, teacher.config
    sizes = [
        (name, getattr(ours, name), getattr(theirs, name))
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ]
    for name, of_student, of_teacher in sizes:
        if of_student > of_teacher:
            raise InputError(f"the student's {name} is {of_student}, the teacher's only {of_teacher}")
    if ours.hidden_size // ours.num_attention_heads != theirs.hidden_size // theirs.num_attention_heads:
        raise InputError(
            f"the student's heads are {ours.hidden_size // ours.num_attention_heads} wide, the teacher's "
            f"{theirs.hidden_size // theirs.num_attention_heads}; its weights can't be clipped to them"
        )
    given = teacher.state_dict()
    with torch.no_grad():
        for name, parameter in student.vit.named_parameters():
            if name in given:
                parts = 3 if ".attn.qkv." in name else 1
                for room, weights in zip(parameter.chunk(parts), given[name].chunk(parts), strict=True):
                    if room.ndim != weights.ndim:
                        raise InputError(f"{name}: the student's is {list(room.shape)}, not as the teacher's")
                    room.copy_(weights[tuple(slice(n) for n in room.shape)])


class Reconstruction(nn.Module):
    """RTD's small decoder: the features of every position that a token stands for, from the token.

    tokens (clips, T' * H' * W', C) -> (clips, T, H * W, C)
    """

    def __init__(self, size: int, compressed: tuple[int, int, int], dense: tuple[int, int, int], hidden: int = 512):
        super().__init__()
        self.compressed = compressed
        self.block = tuple(n // m for n, m in zip(dense, compressed, strict=True))
        self.fc1 = nn.Linear(size, hidden)
        self.position = nn.Parameter(torch.zeros(math.prod(self.block), hidden))
        self.fc2 = nn.Linear(hidden, size)
        nn.init.normal_(self.position, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        (t, h, w), (a, b, c) = self.compressed, self.block
        x = self.fc2(nn.functional.gelu(self.fc1(tokens).unsqueeze(2) + self.position))
        x = x.reshape(-1, t, h, w, a, b, c, x.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(-1, t * a, h * b * w * c, x.shape[-1])


def clipped_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of (..., C), where differences beyond DEVIATIONS standard deviations count as if they were
    just that large, and push nowhere. The paper does not say of what; here of the batch's differences in a channel."""
    difference = (found - wanted).flatten(0, -2)
    limit = DEVIATIONS * difference.detach().std(dim=0)
    return difference.clamp(-limit, limit).square().mean()


def distil(
    student: VideoEncoder, taught: Taught, folder: Path, recipe: Recipe, objective: Objective = "ctd", minutes=math.inf
) -> bool:
    """Trains the student's backbone; see `loop.train`.

    Args:
        taught: for "ctd" targets, otherwise dense.
        objective: "ctd"; "rtd"; or "dense", for a student that does not compress.
    """
    backbone = student.backbone
    assert isinstance(backbone, LiteFrame)
    trained: dict[str, nn.Module] = {"student": backbone}
    _, example = taught.batch(np.array([0]))
    if recipe.seed is not None:
        torch.manual_seed(recipe.seed)
    with torch.no_grad():
        backbone.head.bias.copy_(example.flatten(0, -2).mean(0))
    if objective == "rtd":
        t, h, w = backbone.config.grids()[0]
        trained["decoder"] = Reconstruction(example.shape[-1], backbone.config.grids()[-1], (t, h, w))
    parameters = {f"{name}.{n}": p for name, module in trained.items() for n, p in module.named_parameters()}

    def loss(step: int) -> Tensor:
        frames, targets = taught.batch(taught.drawn(step, recipe.batch, recipe.seed))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = student.dense(frames)
            if objective == "rtd":
                tokens = trained["decoder"](tokens.flatten(1, 2))
        return clipped_error(tokens.float().reshape(targets.shape), targets)

    return train(folder, parameters, loss, recipe, minutes)


@torch.inference_mode()
def evaluate(student: VideoEncoder, held_out: Taught, mean: Tensor) -> dict[str, float]:
    """On clips that were not trained on.

    Args:
        mean: of targets (C,), which the simplest student predicts.

    Returns:
        `loss`, mean squared error; `of_mean`, of predicting the mean; `cosine` between tokens and targets, on average.
    """
    errors, of_mean, cosines = [], [], []
    for start in range(0, len(held_out), SHARD):
        frames, targets = held_out.batch(np.arange(start, min(start + SHARD, len(held_out))))
        tokens = student.dense(frames).flatten(1, 2)
        errors.append((tokens - targets).square().mean().item())
        of_mean.append((mean - targets).square().mean().item())
        cosines.append(nn.functional.cosine_similarity(tokens, targets, dim=-1).mean().item())
    figures = {"loss": errors, "of_mean": of_mean, "cosine": cosines}
    return {name: float(np.mean(values)) for name, values in figures.items()}
