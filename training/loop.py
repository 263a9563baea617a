"""The loop of all stages: AdamW with a cosine after a warm-up, checkpoints that are gone on from, a guard.

    step ─▶ loss ─▶ gradients, clipped ─▶ parameters      every `save_every` steps ─▶ folder/checkpoint.pt
                                                          each step a line         ─▶ folder/log.jsonl ─▶ loss.png

What a step does follows from its number and the seed alone, so a run that was interrupted goes on to the same losses.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..engines.package import GateError, InputError
from ..runtime.plot import Picture

PEAK_LR = 4e-5  # LiteFrame, Appendix A
WINDOW = 25  # steps, whose median is looked at
TIME_IS_OVER = "time is over; the same command goes on"
DIVERGED = 3.0  # times the lowest median so far, and nearer to the first than to that


class Diverged(GateError):
    """The loss is no number, or far above what it was; says which step, and what was kept."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Attributes:
        peak_lr: learning rate behind the warm-up; cosine to 0 from there (LiteFrame, Appendix A: 4e-5).
        gradient_norm: to which gradients are clipped (Appendix A: 1.0).
        save_every: steps between checkpoints.
    """

    steps: int
    batch: int
    peak_lr: float = PEAK_LR
    warmup: int = 100
    weight_decay: float = 0.05
    gradient_norm: float = 1.0
    seed: int = 0
    save_every: int = 50

    def lr(self, step: int) -> float:
        """Linear from 0 over the warm-up, cosine to 0 at the last step."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_options(parser: argparse.ArgumentParser, batch: int) -> None:
    """What every stage's command asks of a recipe; the paper's batch differs from stage to stage."""
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=PEAK_LR)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which training ends for now")


def recipe_of(options: argparse.Namespace) -> Recipe:
    return Recipe(options.steps, options.batch, options.lr)


def unfrozen(module: nn.Module, frozen: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; all others get no gradient."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen(name))
    return {name: parameter for name, parameter in module.named_parameters() if not frozen(name)}


def train(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    minutes: float = math.inf,
    share: Callable[[str], float] = lambda name: 1.0,
) -> bool:
    """Trains to the recipe's end, going on from the folder's checkpoint if there is one. Parameters hold the result.

    Args:
        parameters: what is trained, by name; matrices and larger decay, others do not.
        loss: of a step, by its number from 0; draws its batch by that and the recipe's seed. Torch is seeded.
        minutes: after which a checkpoint is written and training ends for now.
        share: of the recipe's learning rate, by a parameter's name.

    Returns:
        Whether it came to the end.

    Raises:
        InputError: the checkpoint is of another recipe, or of other parameters.
        Diverged: parameters are those of the last checkpoint again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups, shares = [], list[float]()
    for part in dict.fromkeys(map(share, parameters)):
        ours = [parameter for name, parameter in parameters.items() if share(name) == part]
        groups.append({"params": [p for p in ours if p.ndim > 1], "weight_decay": recipe.weight_decay})
        groups.append({"params": [p for p in ours if p.ndim <= 1], "weight_decay": 0.0})
        shares += [part, part]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    log = _Log(folder / "log.jsonl")
    step = _resume(folder, parameters, optimizer, recipe)
    log.cut(step)
    if step == 0:
        _save(folder, parameters, optimizer, recipe, 0)
    deadline = time.monotonic() + minutes * 60
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as progress:
        bar = progress.add_task(folder.name, total=recipe.steps, completed=step, loss=log.median())
        while step < recipe.steps and time.monotonic() < deadline:
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            for group, part in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = part * recipe.lr(step)
            with _attention_to_train(next(iter(parameters.values())).device):
                value = loss(step)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), recipe.gradient_norm)
            log.add(step, value.item(), norm.item(), recipe.lr(step))
            if log.diverged or not math.isfinite(norm.item()):
                kept = _resume(folder, parameters, optimizer, recipe)
                raise Diverged(
                    f"{folder}: the loss diverged at step {step}: {value.item():.4g}, gradient norm {norm.item():.4g}; "
                    f"the checkpoint of step {kept} was kept. Lower peak_lr, or lengthen the warm-up"
                )
            optimizer.step()
            step += 1
            if step % recipe.save_every == 0:
                _save(folder, parameters, optimizer, recipe, step)
            progress.update(bar, completed=step, loss=log.median())
    _save(folder, parameters, optimizer, recipe, step)
    log.plot(folder / "loss.png")
    return step == recipe.steps


@contextmanager
def _attention_to_train(device: torch.device) -> Iterator[None]:
    """On a CPU without the fused kernel, whose backward pass takes two to eight times as long as plain products."""
    if device.type != "cpu":
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # for all devices, whatever its module
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class _Log:
    """A line of JSON for each step."""

    def __init__(self, path: Path):
        self._path = path
        self._losses: list[float] = []
        self._lowest, self._first = math.inf, math.nan

    def cut(self, step: int) -> None:
        """Keeps what is before a step."""
        lines = self._path.read_text().splitlines()[:step] if self._path.exists() else []
        self._path.write_text("".join(line + "\n" for line in lines))
        self._losses, self._lowest, self._first = [], math.inf, math.nan
        for line in lines:
            self._note(float(json.loads(line)["loss"]))

    def add(self, step: int, loss: float, norm: float, lr: float) -> None:
        self._note(loss)
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, "gradient_norm": norm, "lr": lr}) + "\n")

    def _note(self, loss: float) -> None:
        self._losses.append(loss)
        if len(self._losses) == WINDOW:
            self._first = self.median()
        if len(self._losses) >= WINDOW:
            self._lowest = min(self._lowest, self.median())

    def median(self) -> float:
        return statistics.median(self._losses[-WINDOW:] or [math.nan])

    @property
    def diverged(self) -> bool:
        """Small losses scatter by more than DIVERGED; what has fallen far is to have risen far, too."""
        most = max(DIVERGED * self._lowest, (self._first + self._lowest) / 2)
        return not math.isfinite(self._losses[-1]) or self.median() > most

    def plot(self, path: Path) -> None:
        if len(self._losses) < 2:
            return
        width, height, edge = 640, 320, 40
        picture = Picture(width, height, "loss")
        each = max(1, len(self._losses) // 200)
        values = [statistics.median(self._losses[i : i + each]) for i in range(0, len(self._losses), each)]
        top = max(values)
        across, down = (width - 2 * edge) / max(len(values) - 1, 1), (height - 2 * edge) / top
        picture.line([(edge, edge), (edge, height - edge), (width - edge, height - edge)])
        picture.line([(edge + i * across, height - edge - value * down) for i, value in enumerate(values)], "#0369a1")
        picture.text(f"loss, {top:.3g} at the top, {values[-1]:.3g} at the end", edge, edge - 12)
        picture.text(f"step {len(self._losses)}", width - edge, height - edge + 18, anchor="end")
        path.write_bytes(picture.png())


def _save(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, recipe: Recipe, step: int
) -> None:
    partial = folder / "checkpoint.partial"
    content = {
        "recipe": msgspec.json.encode(recipe).decode(),
        "step": step,
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, partial)
    partial.replace(folder / "checkpoint.pt")


def _resume(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, recipe: Recipe
) -> int:
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        theirs, step, optimizer_state = content["parameters"], int(content["step"]), content["optimizer"]
        made_by = msgspec.json.decode(content["recipe"], type=Recipe)
    except Exception as error:  # of many kinds, whichever way a file is damaged
        raise InputError(f"{path}: can't be read ({error}); delete it to begin anew") from None
    if made_by != recipe:
        raise InputError(f"{path}: made with {made_by}, now it is {recipe}; delete it to begin anew")
    if theirs.keys() != parameters.keys() or any(theirs[n].shape != p.shape for n, p in parameters.items()):
        raise InputError(f"{path}: made of another model; delete it to begin anew")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(theirs[name])
    optimizer.load_state_dict(optimizer_state)
    return step
