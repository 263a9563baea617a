"""The paper's ablations in miniature: what else could stand where the student stands, and the model in each precision.

    python examples/train_demo.py FOLDER                        first: it leaves the teacher and questions there
    python examples/ablations.py FOLDER [--minutes 120]         leaves FOLDER/ablations/page

Each was distilled, grounded and aligned in as many steps, fewer than the demo's, from a quarter of its clips:

    CTD              the demo's student
    RTD              the same student, which learned to reconstruct the teacher's features from its tokens
    in space only    a student that compresses 16x in space, at 256 pixels, and mixes nothing through time
    WAP, average     the teacher as it is, compressed behind it; projector and LoRA learn, the tower does not
    CTD without LMA  the distilled student before the projector and the LoRA that were aligned to WAP
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from assets import fetch, read_prose
from footage import backgrounds
from liteframe.calib.accuracy import Shown
from liteframe.engines.package import InputError, Package, open_package
from liteframe.engines.targets import Asked
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import build
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.liteframe import Downsampling, LiteFrameConfig
from liteframe.export.models.vit import interpolate_position_embedding
from liteframe.runtime.cli import guard
from liteframe.training import scenes
from liteframe.training.align import add_lora
from liteframe.training.artifact import load_adapter, write_artifact
from liteframe.training.distill import Objective, make_student
from liteframe.training.evaluate import WITHOUT, Row, judge, write_page
from liteframe.training.loop import TIME_IS_OVER, Recipe, best_device
from liteframe.training.samples import write_samples
from train_demo import FPS, FRAMES, FULL, STRIDES, Stages

PLAN = replace(
    FULL,
    clips=2_560,
    distil=Recipe(steps=1500, batch=8, peak_lr=1e-3, warmup=50),
    ground=Recipe(steps=600, batch=4, peak_lr=4e-4, warmup=50),
    align=Recipe(steps=400, batch=4, peak_lr=1e-3, warmup=30),
)
SPACE_SIZE = 256  # pixels; 16 x 16 patches, which 4 divides
PRECISIONS: tuple[Asked, ...] = ("fp32", "fp16", "int8")
CALIBRATION_SEED, CALIBRATION_VIDEOS = 10**6, 32


class Ablations(Stages):
    """
    Args:
        base, folder: of the demo's training, which has come to its end.
    """

    def run(self) -> bool:
        """Returns whether it came to the end in time."""
        average = msgspec.structs.replace(self.teacher.config, reducer="average")
        return (
            self._with_student("CTD", self.teacher, self.student(), "clips")
            and self._with_student("RTD", self.teacher, self.student(), "clips", "rtd")
            and self._with_student("in space only", *self._in_space(), "wide-clips")
            and self._with_teacher("WAP", self.teacher.config)
            and self._with_teacher("average", average)
            and self._without_alignment()
            and self._page()
        )

    def _folder(self, name: str) -> Path:
        return self.folder / "ablations" / name.replace(" ", "-")

    def _with_student(
        self, name: str, teacher: VideoEncoder, student: VideoEncoder, clips: str, objective: Objective = "ctd"
    ) -> bool:
        folder = self._folder(name)
        return (
            self.teach(teacher, self._folder(clips), dense=objective == "rtd")
            and self.distil(student, self._folder(clips), folder / "distil", objective)
            and self.ground(student, folder / "ground")
            and self.align(student, folder / "align", folder / "artifact")
        )

    def _in_space(self) -> tuple[VideoEncoder, VideoEncoder]:
        """The teacher at SPACE_SIZE with WAP over each frame alone, and its student."""
        config, size = self.teacher.config, (SPACE_SIZE, SPACE_SIZE)
        vit = msgspec.structs.replace(config.vit, image_size=size)
        teacher = VideoEncoder(msgspec.structs.replace(config, backbone=vit, window=(1, 4, 4)))
        state = self.teacher.state_dict()
        name = "backbone.position_embedding"
        state[name] = interpolate_position_embedding(state[name], config.vit.grid, vit.grid)
        teacher.load_state_dict(state)
        ours = msgspec.structs.replace(self.student().config.vit, image_size=size)
        strides = tuple(Downsampling(stage.after, (1, 2, 2)) for stage in STRIDES)
        backbone = LiteFrameConfig(vit=ours, temporal_kernel=1, downsampling=strides, head_size=vit.hidden_size)
        return teacher.to(best_device()), make_student(teacher, backbone).to(best_device())

    def _with_teacher(self, name: str, config: EncoderConfig) -> bool:
        encoder = VideoEncoder(config).to(best_device())
        encoder.load_state_dict(self.teacher.state_dict())
        folder = self._folder(name)
        return self.ground(encoder, folder / "ground", frozen=True) and self.align(
            encoder, folder / "align", folder / "artifact", frozen=True
        )

    def _without_alignment(self) -> bool:
        """The student of "CTD" as it was distilled, with what was aligned to "WAP"."""
        output, aligned = self._folder("CTD without LMA") / "artifact", self._folder("WAP") / "artifact"
        if not output.exists():
            student, artifact = self.student(), load_artifact(self.base)
            self.distil(student, self._folder("clips"), self._folder("CTD") / "distil")
            student.projector.load_state_dict(load_artifact(aligned).encoder.projector.state_dict())
            artifact.encoder, lora = student, add_lora(artifact.decoder)
            load_adapter(lora, aligned / "adapter")
            write_artifact(self.base, artifact, lora, output)
        return True

    def _page(self) -> bool:
        questions, calibration = self.questions(), self._calibration()
        rows = []
        for precision in PRECISIONS:
            calib = () if precision == "fp32" else calibration
            package = self._package("demo", self.folder / "artifact", precision, calib, questions)
            rows.append(self._row(f"demo, {precision}", package))
            if precision == "fp32":
                rows += [self._row(f"demo, {what}", package, shown, False) for shown, what in WITHOUT.items()]
        for name in ("CTD", "RTD", "in space only", "WAP", "average", "CTD without LMA"):
            rows.append(self._row(name, self._package(name, self._folder(name) / "artifact")))
        shutil.rmtree(self._folder("page"), ignore_errors=True)
        write_page(rows, self._folder("page"))
        print((self._folder("page") / "accuracy.md").read_text(), end="")
        return True

    def _row(self, name: str, package: Package, shown: Shown = "video", timed: bool = True) -> Row:
        path = self._folder("rows") / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            row = judge(name, package, self.questions(), shown, timed)
            partial = path.with_suffix(".partial")
            partial.write_bytes(msgspec.json.encode(row))
            partial.replace(path)
        return msgspec.json.decode(path.read_bytes(), type=Row)

    def _package(
        self,
        name: str,
        artifact: Path,
        precision: Asked = "fp32",
        calib: Sequence[Path] = (),
        questions: Path | None = None,
    ) -> Package:
        output = self._folder("packages") / f"{name.replace(' ', '-')}-{precision}"
        if not output.exists():
            build(artifact, "cpu", output, FRAMES, precision=precision, calib=calib, questions=questions)
        return open_package(output)

    def _calibration(self) -> tuple[Path, Path]:
        """Scenes of the training's pairs and footage, and a book."""
        folder, scenery, book = self._folder("calibration"), self.footage("train"), self._folder("book.txt")
        if not folder.exists():
            seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION_VIDEOS)
            write_samples((scenes.sample(seed, "train", scenery, FRAMES, FPS) for seed in seeds), folder)
        book.write_text(read_prose(fetch("holmes")), encoding="utf-8")
        return folder, book


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=120.0, help="after which training ends for now")
    options = parser.parse_args(arguments)
    if not (options.folder / "artifact").exists():
        raise InputError(f"{options.folder}: no artifact; run examples/train_demo.py on it first, to its end")
    done = Ablations(options.folder / "clip-smollm2", options.folder, PLAN, backgrounds, options.minutes).run()
    print("done" if done else TIME_IS_OVER)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
