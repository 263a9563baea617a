"""Compressed-token distillation (CTD): the student learns what WAP makes of its teacher's features.

    python -m liteframe.training.distill TEACHER VIDEO|DIR ... --output FOLDER [--student CONFIG.json] [--steps N] ...

    clips ──teacher──▶ features ──WAP──▶ targets ──┐
      └─────────student──────▶ tokens ─────────────┴─▶ mean squared error, of differences clipped

The teacher is the larger by far and always says the same, so what it says is computed once, and kept in shards. The
paper's two ablations are the other objectives: reconstructing the teacher's features from compressed tokens (RTD), and
learning them without compression.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..calib.clips import find_videos
from ..engines.package import InputError
from ..export.artifact import load_artifact
from ..export.models.encoder import VideoEncoder
from ..export.models.liteframe import LiteFrame, LiteFrameConfig
from ..export.models.vit import VisionTransformer
from ..runtime.cli import guard
from ..runtime.clips import resize
from ..runtime.video import open_video
from .artifact import check_base, write_artifact
from .loop import TIME_IS_OVER, Recipe, add_options, best_device, recipe_of, train

SHARD = 32  # clips
RATES = (1.0, 2.0, 4.0)  # frames of a clip a second (LiteFrame, Appendix A: 1 to 4)
MIN_CLIPS, HELD_OUT_EVERY = 64, 10
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
        drawn, wanted = folder / f"{shard:05}-frames.npy", ["targets", *["dense"] * dense]
        if not all((folder / f"{shard:05}-{what}.npy").exists() for what in wanted):
            if not drawn.exists():
                _save(drawn, np.stack([clips(shard * SHARD + i) for i in range(SHARD)]))
            features = [_features(teacher, part) for part in np.split(np.load(drawn), SHARD // 8)]
            if dense:
                _save(folder / f"{shard:05}-dense.npy", np.concatenate([whole[:, :, 1:] for whole, _ in features]))
            _save(folder / f"{shard:05}-targets.npy", np.concatenate([compressed for _, compressed in features]))
        yield (shard + 1) * SHARD


@torch.inference_mode()
def _features(teacher: VideoEncoder, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    assert teacher.reducer is not None
    device = teacher.mean.device
    with torch.autocast(device.type, torch.bfloat16):
        dense = teacher.dense(torch.from_numpy(frames).to(device)).float()
    return dense.half().cpu().numpy(), teacher.reducer(dense).flatten(1, 2).half().cpu().numpy()


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


def clips_from(videos: Sequence[Path], clip_length: int, size: tuple[int, int], seed: int = 0) -> Clips:
    """Clips at a random time of a random video, at a random one of RATES.

    Raises, when a clip is read:
        InputError: a video can't be read.
    """

    def clip(number: int) -> NDArray[np.uint8]:
        random = np.random.default_rng((seed, number))
        path = videos[int(random.integers(len(videos)))]
        with open_video(path) as source:
            count = source.frame_count or 0
            step = source.fps / float(random.choice(RATES))
            start = random.uniform(0, max(count - (clip_length - 1) * step, 1))
            wanted = np.minimum(start + step * np.arange(clip_length), max(count - 1, 0)).astype(int).tolist()
            taken = {}
            for index, (_, decode) in enumerate(source.frames()):
                if index in wanted:
                    taken[index] = resize(decode(), size)
                if index >= wanted[-1]:
                    break
        if len(taken) < len(set(wanted)):
            raise InputError(f"{path}: ended before frame {wanted[-1] + 1} of {count}; copy or record it again")
        return np.stack([taken[index] for index in wanted])

    return clip


# -- the student -------------------------------------------------------------------------------------------------------


def make_student(teacher: VideoEncoder, backbone: LiteFrameConfig, seed: int = 0) -> VideoEncoder:
    """A student behind which the teacher's projector fits, with its weights clipped from the teacher's.

    Raises:
        InputError: see `clip_weights`; or the student's tokens are not as many or as wide as the teacher's.
    """
    assert isinstance(teacher.backbone, VisionTransformer)
    torch.manual_seed(seed)
    try:
        student = VideoEncoder(msgspec.structs.replace(teacher.config, backbone=backbone))
    except ValueError as error:
        raise InputError(f"the student: {error}") from None
    ours, theirs = student.projector, teacher.projector
    if (ours.grid, ours.fc1.weight.shape) != (theirs.grid, theirs.fc1.weight.shape):
        raise InputError(
            f"the student's tokens are {list(ours.grid)} of {backbone.head_size}, the teacher's compressed ones "
            f"{list(theirs.grid)} of {teacher.config.vit.hidden_size}; change its strides or head_size"
        )
    assert isinstance(student.backbone, LiteFrame)
    clip_weights(student.backbone, teacher.backbone)
    ours.load_state_dict(theirs.state_dict())
    return student


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


def clipped_error(difference: Tensor, limit: Tensor) -> Tensor:
    """Mean squared error, where differences beyond the limit count as if they were just that large, and push nowhere.

    A few of a transformer's tokens are large in a few channels and say nothing of where they stand; unclipped they are
    most of the error.
    """
    return difference.clamp(-limit, limit).square().mean()


def limit_of(difference: Tensor) -> Tensor:
    """DEVIATIONS standard deviations. The paper does not say of what; here of all differences of a batch."""
    return DEVIATIONS * difference.detach().std()


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
    device = student.mean.device
    _, example = taught.batch(np.array([0]))
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        backbone.head.bias.copy_(example.flatten(0, -2).mean(0))
    if objective == "rtd":
        t, h, w = backbone.config.grids()[0]
        trained["decoder"] = Reconstruction(example.shape[-1], backbone.config.grids()[-1], (t, h, w)).to(device)
    parameters = {f"{name}.{n}": p for name, module in trained.items() for n, p in module.named_parameters()}

    def loss(step: int) -> Tensor:
        frames, targets = (x.to(device) for x in taught.batch(taught.drawn(step, recipe.batch, recipe.seed)))
        with torch.autocast(device.type, torch.bfloat16):
            tokens = student.dense(frames)
            if objective == "rtd":
                tokens = trained["decoder"](tokens.flatten(1, 2))
        difference = tokens.float().reshape(targets.shape) - targets
        return clipped_error(difference, limit_of(difference))

    return train(folder, parameters, loss, recipe, minutes)


@torch.inference_mode()
def evaluate(student: VideoEncoder, held_out: Taught, mean: Tensor) -> dict[str, float]:
    """On clips that were not trained on.

    Args:
        mean: of targets (C,), which the simplest student predicts.

    Returns:
        `loss` and `loss_of_mean`, clipped where those of the mean are; `error` and `error_of_mean`, not clipped;
        `cosine` between tokens and targets, on average.
    """
    device, tokens, targets = student.mean.device, [], []
    for start in range(0, len(held_out), SHARD):
        frames, wanted = held_out.batch(np.arange(start, min(start + SHARD, len(held_out))))
        tokens.append(student.dense(frames.to(device)).flatten(1, 2).cpu())
        targets.append(wanted)
    found, wanted = torch.cat(tokens), torch.cat(targets)
    limit = limit_of(mean - wanted)
    return {
        "loss": clipped_error(found - wanted, limit).item(),
        "loss_of_mean": clipped_error(mean - wanted, limit).item(),
        "error": (found - wanted).square().mean().item(),
        "error_of_mean": (mean - wanted).square().mean().item(),
        "cosine": nn.functional.cosine_similarity(found, wanted, dim=-1).mean().item(),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="distill", description="Teaches a student its teacher's features (CTD).")
    parser.add_argument("teacher", type=Path, help="an artifact with a frame-wise tower and WAP")
    parser.add_argument("videos", type=Path, nargs="+", help="videos, and folders of such")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; the artifact is put there, too")
    parser.add_argument("--student", type=Path, help="a LiteFrameConfig as JSON (default: LiteFrame-B)")
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--held-out", type=int, default=256, help="clips that the student is judged on")
    add_options(parser, batch=512)
    options = parser.parse_args(arguments)
    check_base(options.teacher)
    artifact = load_artifact(options.teacher)
    teacher = artifact.encoder
    if not isinstance(teacher.backbone, VisionTransformer):
        raise InputError(f"{options.teacher}: is a LiteFrame student; a teacher has a frame-wise tower")
    student = make_student(teacher, _student_config(options.student, teacher)).to(best_device())
    teacher.to(best_device())
    videos = [video for source in options.videos for video in find_videos(source)]
    if len(videos) < 2:
        raise InputError(f"{len(videos)} videos, at least 2 are needed: every tenth is held out")
    held_out, shown = videos[::HELD_OUT_EVERY], [v for i, v in enumerate(videos) if i % HELD_OUT_EVERY]
    deadline = time.monotonic() + 60 * options.minutes
    for split, sources, count in (("held-out", held_out, options.held_out), ("train", shown, options.clips)):
        clips = clips_from(sources, teacher.config.clip_length, teacher.config.vit.image_size)
        for _ in teach(teacher, clips, count, options.output / split):
            if time.monotonic() > deadline:
                print(TIME_IS_OVER)
                return 0
    taught, recipe = Taught(options.output / "train"), recipe_of(options)
    if not distil(student, taught, options.output / "run", recipe, minutes=(deadline - time.monotonic()) / 60):
        print(TIME_IS_OVER)
        return 0
    figures = evaluate(student, Taught(options.output / "held-out"), mean_target(taught))
    print(", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    artifact.encoder = student
    write_artifact(options.teacher, artifact, None, options.output / "artifact")
    print(options.output / "artifact")
    return 0


def mean_target(taught: Taught) -> Tensor:
    """(C,), of every fourth clip."""
    _, targets = taught.batch(np.arange(0, len(taught), 4))
    return targets.flatten(0, -2).mean(0)


def _student_config(path: Path | None, teacher: VideoEncoder) -> LiteFrameConfig:
    if path is not None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=LiteFrameConfig)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no LiteFrameConfig ({error}); see docs/artifact.md") from None
    vit = msgspec.structs.replace(
        teacher.config.vit, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    return LiteFrameConfig(vit=vit, head_size=teacher.config.vit.hidden_size)


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
