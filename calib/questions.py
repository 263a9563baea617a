"""Questions about videos with their answers: a folder that anyone can make.

folder/questions.jsonl    {"video": "00012.mp4", "kind": "order", "question": "Which ...?", "answer": "red circle"}
folder/00012.mp4          whatever the runtime reads
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError, inside
from ..runtime.clips import read_clips
from ..runtime.video import open_video

QUESTIONS = "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        kind: by which accuracies are told apart.
    """

    kind: str
    text: str
    answer: str


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    video: str
    kind: str
    question: str
    answer: str


def read_questions(folder: Path) -> dict[Path, tuple[Question, ...]]:
    """Of each video of a folder, in the order of its file.

    Raises:
        InputError: the file is missing, empty or damaged, or a video is not there; names the line.
    """
    path = folder / QUESTIONS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error}); expected one JSON object a line") from None
    found: dict[Path, list[Question]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            read = msgspec.json.decode(line, type=Line)
        except msgspec.DecodeError as error:
            raise InputError(f"{path}, line {number}: {error}; expected video, kind, question and answer") from None
        video = inside(folder, read.video)
        if not video.exists():
            raise InputError(f"{path}, line {number}: no video {video}")
        found.setdefault(video, []).append(Question(read.kind, read.question, read.answer))
    if not found:
        raise InputError(f"{path}: holds no questions")
    return {video: tuple(questions) for video, questions in found.items()}


def read_frames(video: Path, most: int, clip_length: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """At most so many frames, in whole clips, uint8 (clips, T, H, W, 3); as the runtime samples and resizes them."""
    with open_video(video) as source:
        wanted = min(most, -(-(source.frame_count or most) // clip_length) * clip_length)
        return np.stack([clip.frames for clip in read_clips(source, wanted, clip_length, size)])
