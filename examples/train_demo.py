"""Trains the demo's model from CLIP and SmolLM2, in stages that go on where they were interrupted.

    python examples/train_demo.py FOLDER [--smoke] [--minutes 120]

    teach      CLIP's features of made-up scenes and real footage, through WAP           FOLDER/clips
    distil     a student of 5.7 M parameters learns them: CTD                            FOLDER/distil
    align      student, projector and a LoRA of SmolLM2 learn to answer questions: LMA   FOLDER/align
    write      the artifact, and its accuracy on questions that were held out            FOLDER/artifact

--smoke does all of it on next to nothing: it shows that everything runs, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from clip_smollm2 import assemble
from footage import backgrounds
from liteframe.calib.accuracy import accuracies, ask_all, print_accuracies, read_videos
from liteframe.engines.targets import TARGETS
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import describe_model
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.liteframe import LiteFrameConfig
from liteframe.export.torch_engine import respondent
from liteframe.runtime.cli import guard
from liteframe.training import scenes
from liteframe.training.align import add_lora, align
from liteframe.training.artifact import write_artifact
from liteframe.training.backgrounds import Backgrounds
from liteframe.training.distill import Taught, clip_weights, distil, evaluate, teach
from liteframe.training.loop import Recipe
from liteframe.training.samples import write_samples
from numpy.typing import NDArray
from rich.console import Console

WIDTH, HEADS = 192, 3  # of the student; CLIP's are 768 and 12
FRAMES, FPS, SIZE = 8, 2.0, 224
RATES = (1.0, 2.0, 4.0)  # frames a second of real footage (LiteFrame, Appendix A: 1 to 4)
FOOTAGE_VIDEO = 0.6  # of real footage, from videos; the rest are photos that are panned over


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        clips, held_out: to distil from, and to judge the student on.
        tested: videos with questions.
    """

    clips: int
    held_out: int
    tested: int
    distil: Recipe
    align: Recipe


FULL = Plan(
    clips=4096,
    held_out=256,
    tested=400,
    distil=Recipe(steps=1600, batch=32, peak_lr=1e-3, warmup=100),
    align=Recipe(steps=6000, batch=4, peak_lr=5e-4, warmup=100),
)
SMOKE = Plan(
    clips=64,
    held_out=64,
    tested=4,
    distil=Recipe(steps=10, batch=8, peak_lr=1e-3, warmup=2),
    align=Recipe(steps=4, batch=2, peak_lr=5e-4, warmup=1),
)


def clip(split: str, scenery: Backgrounds, number: int) -> NDArray[np.uint8]:
    """Of four clips two are the halves of a scene, two real footage."""
    seed, part = divmod(number, 4)
    if part < 2:
        return scenes.sample(seed, split, scenery, FRAMES, FPS, SIZE).frames[4 * part : 4 * part + 4]
    random = np.random.default_rng((scenes.SPLITS.index(split), number, 1))
    return scenery.sample(random, 4, float(random.choice(RATES)), SIZE, FOOTAGE_VIDEO)


def student_config(teacher: EncoderConfig) -> EncoderConfig:
    vit = msgspec.structs.replace(
        teacher.vit, hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH
    )
    return msgspec.structs.replace(teacher, backbone=LiteFrameConfig(vit=vit, head_size=teacher.vit.hidden_size))


def run(folder: Path, plan: Plan, minutes: float) -> bool:
    """Returns whether it came to the end in time."""
    deadline = time.monotonic() + 60 * minutes
    console = Console(stderr=True)
    base = folder / "clip-smollm2"
    if not base.exists():
        assemble(base)
    teacher = load_artifact(base)
    for split, count in (("test", plan.held_out), ("train", plan.clips)):
        for done in teach(teacher.encoder, partial(clip, split, backgrounds(split)), count, folder / "clips" / split):
            console.print(f"teach: {done} of {count} clips, {split}", end="\r")
            if time.monotonic() > deadline:
                return False
    torch.manual_seed(0)
    student = VideoEncoder(student_config(teacher.encoder.config))
    clip_weights(student.backbone, teacher.encoder.backbone)
    taught = Taught(folder / "clips" / "train")
    if not distil(student, taught, folder / "distil", plan.distil, minutes=(deadline - time.monotonic()) / 60):
        return False
    _, targets = taught.batch(np.arange(0, len(taught), 4))
    figures = evaluate(student, Taught(folder / "clips" / "test"), targets.flatten(0, 1).mean(0))
    share = figures["loss"] / figures["of_mean"]
    console.print(f"distil: held-out loss {share:.3f} of predicting the mean, cosine {figures['cosine']:.3f}")
    teacher.encoder = student
    lora, scenery = add_lora(teacher.decoder), backgrounds("train")
    draw = partial(scenes.sample, split="train", backgrounds=scenery, frames=FRAMES, fps=FPS, size=SIZE)
    if not align(teacher, lora, draw, folder / "align", plan.align, minutes=(deadline - time.monotonic()) / 60):
        return False
    if not (folder / "artifact").exists():
        write_artifact(base, student, lora, folder / "artifact")
    questions = folder / "questions"
    if not questions.exists():
        scenery = backgrounds("test")
        write_samples((scenes.sample(n, "test", scenery, FRAMES, FPS, SIZE) for n in range(plan.tested)), questions)
    artifact = load_artifact(folder / "artifact")
    trained = respondent(artifact, describe_model(artifact, FRAMES, TARGETS["cpu"]))
    videos = read_videos(questions, FRAMES, 4, (SIZE, SIZE))
    rows = {how: accuracies(ask_all(trained, videos, how, progress=how)) for how in ("video", "shuffled", "nothing")}
    print_accuracies(rows, Console())
    return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--minutes", type=float, default=120.0, help="after which training ends for now")
    options = parser.parse_args(arguments)
    done = run(options.folder, SMOKE if options.smoke else FULL, options.minutes)
    print("done" if done else "time is over; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
