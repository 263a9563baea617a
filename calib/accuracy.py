"""Accuracy by kind of question, with confidence intervals, of anything that answers questions about videos.

folder of questions ─▶ what is shown: the video, its frames shuffled, one of them, nothing ─▶ answers ─▶ accuracy
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..engines.package import Model, Package, open_package
from ..runtime.conversation import Conversation
from ..runtime.engine import Decoder, Encoder, open_engines
from ..runtime.text import ChatText, Sampler
from .questions import Question, read_frames, read_questions

Shown = Literal["video", "shuffled", "frame", "nothing"]
LONGEST = 12  # tokens of an answer
RESAMPLED = 2000  # times, for confidence intervals


class Respondent:
    """Answers about videos: an encoder and a decoder, put together as the runtime does.

    Args:
        encoder, decoder: engines of a package, or what stands for them; see runtime/engine.py.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, text: ChatText, model: Model):
        self._encoder, self._text = encoder, text
        self._conversation = Conversation(decoder, text, model)

    @classmethod
    def of(cls, package: Package) -> Respondent:
        """Raises InputError when the package is not for this machine."""
        return cls(*open_engines(package, None), ChatText.of(package), package.manifest.model)

    def answer(self, clips: NDArray[np.uint8] | None, questions: Sequence[str]) -> list[str]:
        """To each question as if it were the only one, greedily.

        Args:
            clips: uint8 (clips, T, H, W, 3); None shows nothing.
        """
        self._conversation.refill([])
        for clip in [] if clips is None else clips:
            self._conversation.add(self._encoder.encode(clip[None])[0])
        answers = []
        for question in questions:
            answers.append("".join(self._text.stream(self._conversation.ask(question, LONGEST, Sampler()))))
            self._conversation.cut_answer(0)
        return answers


@dataclass(frozen=True)
class Asked:
    """One question of a video, and what was answered."""

    video: int
    question: Question
    answer: str

    @property
    def right(self) -> bool:
        return _plain(self.answer) == _plain(self.question.answer)


def _plain(answer: str) -> str:
    """Without case, articles and what ends a sentence."""
    return re.sub(r"^(the|a|an)\s+", "", answer.strip().lower().rstrip("."))


def ask_all(
    respondent: Respondent,
    videos: Iterable[tuple[NDArray[np.uint8], Sequence[Question]]],
    shown: Shown = "video",
    seed: int = 0,
    progress: str = "",
) -> list[Asked]:
    """Every question, about clips uint8 (clips, T, H, W, 3).

    Args:
        shown: "shuffled": the frames in another order, which is drawn from the seed; "frame": the middle one alone, as
            a clip that stands still; "nothing": no video.
    """
    out = []
    for number, (clips, questions) in enumerate(
        track(videos, progress, disable=not progress, console=Console(stderr=True))
    ):
        seen = show(clips, shown, np.random.default_rng((seed, number)))
        answers = respondent.answer(seen, [question.text for question in questions])
        out += [Asked(number, question, answer) for question, answer in zip(questions, answers, strict=True)]
    return out


def show(clips: NDArray[np.uint8], shown: Shown, random: np.random.Generator) -> NDArray[np.uint8] | None:
    frames = clips.reshape(-1, *clips.shape[2:])
    if shown == "shuffled":
        return frames[_another_order(len(frames), random)].reshape(clips.shape)
    if shown == "frame":
        return np.repeat(frames[len(frames) // 2][None, None], clips.shape[1], 1)
    return clips if shown == "video" else None


def _another_order(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    order = random.permutation(count)
    return order if count < 2 or (order != np.arange(count)).any() else _another_order(count, random)


def percent_right(asked: Sequence[Asked]) -> float:
    return 100 * sum(one.right for one in asked) / len(asked)


@dataclass(frozen=True)
class Accuracy:
    """In percent, with a 95 % confidence interval from resampling whole videos (bootstrap, percentiles)."""

    percent: float
    low: float
    high: float
    questions: int

    def __str__(self) -> str:
        return f"{self.percent:.1f} ({self.low:.0f}-{self.high:.0f})"


def accuracies(asked: Sequence[Asked]) -> dict[str, Accuracy]:
    """Of all questions together, "all", and of each kind."""
    kinds = sorted({one.question.kind for one in asked})
    return {"all": _accuracy(asked)} | {k: _accuracy([one for one in asked if one.question.kind == k]) for k in kinds}


def _accuracy(asked: Sequence[Asked]) -> Accuracy:
    videos = sorted({one.video for one in asked})
    place = {video: i for i, video in enumerate(videos)}
    right, count = np.zeros(len(videos)), np.zeros(len(videos))
    for one in asked:
        right[place[one.video]] += one.right
        count[place[one.video]] += 1
    drawn = np.random.default_rng(0).integers(len(videos), size=(RESAMPLED, len(videos)))
    resampled = 100 * right[drawn].sum(1) / count[drawn].sum(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Accuracy(percent_right(asked), float(low), float(high), int(count.sum()))


def read_videos(
    folder: Path, most: int, clip_length: int, size: tuple[int, int]
) -> list[tuple[NDArray[np.uint8], tuple[Question, ...]]]:
    """A folder's videos and questions, for `ask_all`. Raises InputError; see `read_questions`."""
    return [(read_frames(path, most, clip_length, size), asked) for path, asked in read_questions(folder).items()]


def print_accuracies(rows: dict[str, dict[str, Accuracy]], console: Console) -> None:
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    table = Table(box=None, header_style="")
    table.add_column("")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(str(row[k]) for k in kinds))
    console.print(table)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="liteframe evaluate", description="How many questions about videos a package answers right."
    )
    parser.add_argument("package", type=Path)
    parser.add_argument("questions", type=Path, help="a folder with questions.jsonl and the videos it names")
    parser.add_argument("--shown", nargs="+", choices=get_args(Shown), default=["video"])
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    options = parser.parse_args(arguments)
    package = open_package(options.package)
    model, respondent = package.manifest.model, Respondent.of(package)
    videos = read_videos(options.questions, model.max_frames, model.clip_length, model.image_size)
    rows = {shown: accuracies(ask_all(respondent, videos, shown, progress=shown)) for shown in options.shown}
    print_accuracies(rows, Console())
    if options.json:
        print(json.dumps({name: {k: vars(a) for k, a in row.items()} for name, row in rows.items()}))
    return 0
