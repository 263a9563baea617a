"""The accuracy gate: what is built answers questions about videos as well as the torch modules it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..calib.accuracy import Respondent, ask_all, percent_right, read_videos
from ..calib.questions import Question
from ..engines.package import Accuracy, GateError, Model
from ..runtime.ort_engine import OrtDecoder, OrtEncoder
from .artifact import Artifact
from .precision import GraphName
from .torch_engine import chat_text, respondent

# points that may be lost; in FP32 no answer may be another
ALLOWED: dict[str, float] = {"fp32": 0.0, "fp16": 0.5, "int8": 2.0, "int8-weights": 2.0, "int4-weights": 2.0}


def gate_accuracy(
    questions: Path,
    artifact: Artifact,
    model: Model,
    engines: Mapping[GraphName, Path],
    table: NDArray,
    asked: list[str],
    progress: Callable[[int, int], None],
) -> Accuracy:
    """
    Args:
        questions: a folder; see calib/questions.py.
        engines: of "encoder" and "decoder" the graph that ONNX Runtime runs on a CPU.
        table: the package's embeddings.
        asked: precisions of both.
        progress: told how many videos of how many have been asked about, by modules and engines together.

    Raises:
        InputError: the folder holds no questions.
        GateError: too many answers are wrong that the modules got right; names some.
    """
    videos = read_videos(questions, model.max_frames, model.clip_length, model.image_size)
    built = Respondent(
        OrtEncoder(engines["encoder"]),
        OrtDecoder(engines["decoder"], capacity=model.capacity),
        chat_text(artifact, table),
        model,
    )

    def told(before: int) -> Iterator[tuple[NDArray[np.uint8], tuple[Question, ...]]]:
        for done, video in enumerate(videos, start=before):
            progress(done, 2 * len(videos))
            yield video

    expected = ask_all(respondent(artifact, model), told(0))
    found = ask_all(built, told(len(videos)))
    different = [(a, b) for a, b in zip(expected, found, strict=True) if a.answer != b.answer]
    accuracy = Accuracy(
        questions=len(found), modules=percent_right(expected), engines=percent_right(found), different=len(different)
    )
    allowed = max(ALLOWED[precision] for precision in asked)
    lost = accuracy.modules - accuracy.engines
    if lost > allowed or (different and not allowed):
        examples = "; ".join(f'"{a.question.text}": {a.answer!r} became {b.answer!r}' for a, b in different[:3])
        raise GateError(
            f"{questions}: {len(different)} of {len(found)} answers are others than those of the torch modules, "
            f"{accuracy.engines:.2f} % are right instead of {accuracy.modules:.2f} %; in {' and '.join(asked)} "
            f"{f'at most {allowed} points may be lost' if allowed else 'all must be equal'}. {examples}"
        )
    return accuracy
