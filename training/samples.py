"""Videos that are made up, with what is asked about them; and the folder they are written to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from ..calib.questions import QUESTIONS, Line, Question
from ..engines.package import InputError, new_folder


@dataclass(frozen=True, eq=False)
class Sample:
    """
    Attributes:
        frames: uint8 (N, H, W, 3), RGB.
        fps: frames a second.
    """

    frames: NDArray[np.uint8]
    fps: float
    questions: tuple[Question, ...]


def write_samples(samples: Iterable[Sample], output: Path) -> None:
    """A folder with a video each, in MPEG-4. Raises InputError when the folder exists, or OpenCV can't write video."""
    with new_folder(output) as folder, (folder / QUESTIONS).open("w", encoding="utf-8") as lines:
        for number, sample in enumerate(samples):
            name = f"{number:05}.mp4"
            height, width = sample.frames.shape[1:3]
            writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter.fourcc(*"mp4v"), sample.fps, (width, height))
            if not writer.isOpened():
                raise InputError(f"{folder / name}: this OpenCV can't write MPEG-4; install opencv-python-headless")
            for frame in sample.frames:
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            writer.release()
            for question in sample.questions:
                line = Line(name, question.kind, question.text, question.answer)
                lines.write(msgspec.json.encode(line).decode() + "\n")
