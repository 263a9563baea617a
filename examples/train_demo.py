"""Trains the demo's model from CLIP and SmolLM2, in stages that go on where they were interrupted.

    python examples/train_demo.py FOLDER [--smoke] [--minutes 120]

    teach      CLIP's features of made-up scenes and real footage, through WAP           FOLDER/clips
    distil     a student of 7.8 M parameters learns them: CTD                            FOLDER/distil
    ground     student and projector learn to name what is where in SmolLM2's words      FOLDER/ground
    align      student, projector and a LoRA of SmolLM2 learn to answer questions: LMA   FOLDER/align
    write      the artifact, and its accuracy on questions that were held out            FOLDER/artifact

--smoke does all of it on next to nothing: it shows that everything runs, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from clip_smollm2 import assemble
from footage import backgrounds
from liteframe.calib.accuracy import Shown, accuracies, ask_all, print_accuracies, read_videos
from liteframe.engines.targets import TARGETS
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import describe_model
from liteframe.export.models.encoder import VideoEncoder
from liteframe.export.models.liteframe import Downsampling, LiteFrameConfig
from liteframe.export.torch_engine import respondent
from liteframe.runtime.cli import guard
from liteframe.training import scenes
from liteframe.training.align import add_lora, align
from liteframe.training.artifact import write_artifact
from liteframe.training.backgrounds import Backgrounds
from liteframe.training.distill import RATES, Objective, Taught, distil, evaluate, make_student, mean_target, teach
from liteframe.training.ground import Sight, ground, named_right
from liteframe.training.loop import TIME_IS_OVER, Recipe, best_device
from liteframe.training.samples import Sample, write_samples
from numpy.typing import NDArray
from rich.console import Console

TEACHER_BLOCKS = 4  # of CLIP's twelve: what later ones say, so small a student does not learn from so little footage
STRIDES = (Downsampling(1, (2, 2, 2)), Downsampling(3, (2, 1, 1)))
FRAMES, FPS = 8, 2.0
ALIGNED_FRAMES = (4, 8)  # of the videos of a step, in turns: in 4, one clip's tokens alone tell what happened
ENCODER_SHARE = 0.1  # of alignment's learning rate: what the tokens name by now, only the LoRA has to learn
ALIGNED_QUESTIONS = 6  # about a video, of which the answers are learned
FOOTAGE_VIDEO = 0.6  # of real footage, from videos; the rest are photos that are panned over
NOTICE = "trained on made-up videos of coloured shapes that move; of other videos it knows nothing"
Footage = Callable[[str], Backgrounds]


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        width, heads: of the student.
        clips, held_out: to distil from, and to judge the student on.
        tested: videos with questions.
        sights: videos without, to judge grounding on.
    """

    width: int
    heads: int
    clips: int
    held_out: int
    tested: int
    sights: int
    distil: Recipe
    ground: Recipe
    align: Recipe


FULL = Plan(
    width=384,
    heads=6,
    clips=10_240,
    held_out=256,
    tested=400,
    sights=64,
    distil=Recipe(steps=6000, batch=8, peak_lr=1e-3, warmup=100, save_every=200),
    ground=Recipe(steps=2400, batch=4, peak_lr=4e-4, warmup=50),
    align=Recipe(steps=1200, batch=4, peak_lr=1e-3, warmup=30),
)
SMOKE = replace(
    FULL,
    clips=64,
    held_out=64,
    tested=4,
    sights=2,
    distil=Recipe(steps=10, batch=8, peak_lr=1e-3, warmup=2),
    ground=Recipe(steps=4, batch=2, peak_lr=4e-4, warmup=1),
    align=Recipe(steps=4, batch=2, peak_lr=1e-3, warmup=1),
)


def _frames(seed: int, batch: int) -> int:
    return ALIGNED_FRAMES[seed // batch % len(ALIGNED_FRAMES)]


def _tower(name: str) -> bool:
    return name.startswith("backbone.")


def _none(name: str) -> bool:
    return False


class Stages:
    """
    Args:
        base: the teacher's artifact, with WAP behind its tower and the language model that is to be aligned.
        folder: of all that is made.
        footage: backgrounds of a split.
        minutes: after which a stage stops, to be gone on with.
    """

    def __init__(self, base: Path, folder: Path, plan: Plan, footage: Footage, minutes: float):
        self.base, self.folder, self.plan, self.footage = base, folder, plan, footage
        self._deadline = time.monotonic() + 60 * minutes
        self.teacher = load_artifact(base).encoder.to(best_device())
        self._console = Console(stderr=True)

    @property
    def _minutes(self) -> float:
        return (self._deadline - time.monotonic()) / 60

    def run(self) -> bool:
        """Returns whether it came to the end in time."""
        folder, student = self.folder, self.student()
        return (
            self.teach(self.teacher, folder / "clips")
            and self.distil(student, folder / "clips", folder / "distil")
            and self.ground(student, folder / "ground")
            and self.align(student, folder / "align", folder / "artifact")
            and self.judge(folder / "artifact")
        )

    def student(self) -> VideoEncoder:
        config = self.teacher.config
        vit = msgspec.structs.replace(
            config.vit,
            hidden_size=self.plan.width,
            num_attention_heads=self.plan.heads,
            intermediate_size=4 * self.plan.width,
        )
        backbone = LiteFrameConfig(vit=vit, downsampling=STRIDES, head_size=config.vit.hidden_size)
        return make_student(self.teacher, backbone).to(best_device())

    def teach(self, teacher: VideoEncoder, folder: Path, dense: bool = False) -> bool:
        for split, count in (("test", self.plan.held_out), ("train", self.plan.clips)):
            clips = partial(self._clip, split, self.footage(split), teacher.config.vit.image_size[0])
            for done in teach(teacher, clips, count, folder / split, dense):
                self._console.print(f"teach: {done} of {count} clips, {split}", end="\r")
                if self._minutes < 0:
                    return False
        return True

    def _clip(self, split: str, scenery: Backgrounds, size: int, number: int) -> NDArray[np.uint8]:
        """Of four clips two are the halves of a scene, two real footage."""
        seed, part = divmod(number, 4)
        if part < 2:
            return scenes.sample(seed, split, scenery, FRAMES, FPS, size).frames[4 * part : 4 * part + 4]
        random = np.random.default_rng((scenes.SPLITS.index(split), number, 1))
        return scenery.sample(random, 4, float(random.choice(RATES)), size, FOOTAGE_VIDEO, split == "train")

    def distil(self, student: VideoEncoder, clips: Path, folder: Path, objective: Objective = "ctd") -> bool:
        taught = Taught(clips / "train", "targets" if objective == "ctd" else "dense")
        if not distil(student, taught, folder, self.plan.distil, objective, minutes=self._minutes):
            return False
        if objective != "ctd":
            return True
        figures = evaluate(student, Taught(clips / "test"), mean_target(taught))
        share = figures["loss"] / figures["loss_of_mean"]
        self._console.print(f"distil: held-out loss {share:.3f} of predicting the mean, cosine {figures['cosine']:.3f}")
        return True

    def ground(self, encoder: VideoEncoder, folder: Path, frozen: bool = False) -> bool:
        """
        Args:
            frozen: the encoder's tower stays, only its projector learns.
        """
        artifact = load_artifact(self.base)
        artifact.encoder, artifact.decoder = encoder, artifact.decoder.to(best_device())
        draw = partial(self._seen, "train", self.footage("train"), encoder, self.plan.ground.batch)
        stays = _tower if frozen else _none
        if not ground(artifact, scenes.WORDS, draw, folder, self.plan.ground, stays, minutes=self._minutes):
            return False
        sights = [self._seen("test", self.footage("test"), encoder, 1, number) for number in range(self.plan.sights)]
        shares = named_right(artifact, scenes.WORDS, sights)
        told = zip(("colours", "shapes", "ways"), shares, strict=True)
        self._console.print(f"ground: right in testing, {', '.join(f'{100 * n:.0f} % of {what}' for what, n in told)}")
        return True

    def _seen(self, split: str, scenery: Backgrounds, encoder: VideoEncoder, batch: int, seed: int) -> Sight:
        rows, columns = (n // encoder.config.shuffle for n in encoder.projector.grid)
        grid, size = (encoder.units_per_clip, rows, columns), encoder.config.vit.image_size[0]
        return scenes.sight(seed, split, scenery, grid, _frames(seed, batch), FPS, size)

    def align(self, encoder: VideoEncoder, folder: Path, output: Path, frozen: bool = False) -> bool:
        """
        Args:
            frozen: the encoder's tower stays, only its projector learns.
        """
        artifact = load_artifact(self.base)
        artifact.encoder = encoder
        # of two cores, dropout on every linear layer takes a quarter; no scene comes twice, and nothing is overfitted
        lora = add_lora(artifact.decoder.to(best_device()), dropout=0.0)
        draw = partial(self._asked, self.footage("train"), encoder.config.vit.image_size[0])
        stays = _tower if frozen else _none
        rates = {"encoder_share": ENCODER_SHARE, "minutes": self._minutes}
        if not align(artifact, lora, draw, folder, self.plan.align, stays, **rates):
            return False
        if not output.exists():
            write_artifact(self.base, artifact, lora, output, NOTICE)
        return True

    def _asked(self, scenery: Backgrounds, size: int, seed: int) -> Sample:
        frames = _frames(seed, self.plan.align.batch)
        return scenes.sample(seed, "train", scenery, frames, FPS, size, ALIGNED_QUESTIONS)

    def judge(self, trained: Path) -> bool:
        artifact, questions = load_artifact(trained), self.questions()
        answering = respondent(artifact, describe_model(artifact, FRAMES, 1, TARGETS["cpu"]))
        videos = read_videos(
            questions, FRAMES, artifact.encoder.config.clip_length, artifact.encoder.config.vit.image_size
        )
        shown: tuple[Shown, ...] = ("video", "shuffled", "nothing")
        print_accuracies({s: accuracies(ask_all(answering, videos, s, progress=s)) for s in shown}, Console())
        return True

    def questions(self) -> Path:
        """The folder of the test's videos and questions."""
        folder, scenery = self.folder / "questions", self.footage("test")
        if not folder.exists():
            made = (scenes.sample(seed, "test", scenery, FRAMES, FPS) for seed in range(self.plan.tested))
            write_samples(made, folder)
        return folder


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--minutes", type=float, default=120.0, help="after which training ends for now")
    options = parser.parse_args(arguments)
    base = options.folder / "clip-smollm2"
    if not base.exists():
        assemble(base, TEACHER_BLOCKS)
    done = Stages(base, options.folder, SMOKE if options.smoke else FULL, backgrounds, options.minutes).run()
    print("done" if done else TIME_IS_OVER)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
