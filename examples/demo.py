"""The demo: the trained model, two packages, questions about a made-up video and a real one, a latency table.

python examples/demo.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from assets import fetch
from liteframe.calib.questions import read_questions
from liteframe.export.build_engine import build, print_report
from liteframe.runtime.cli import guard
from liteframe.runtime.profile import measure, print_table
from liteframe.runtime.session import VideoSession
from liteframe.training import scenes
from liteframe.training.backgrounds import Backgrounds
from liteframe.training.samples import write_samples
from liteframe_smollm2 import assemble

MOST_FRAMES = 64
FRAMES = 8  # of a video that is asked about, as in training
SEEDS = (3, 4)  # of the test's scenes


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    bikes = fetch("bikes")
    shutil.rmtree(folder, ignore_errors=True)
    artifact = folder / "liteframe-smollm2"
    print(f"assembling {artifact}: a LiteFrame of 7.8 M parameters + SmolLM2-135M-Instruct", flush=True)
    assemble(artifact)
    for target in ("cpu", "a100"):
        print(f"\npython export/build_engine.py {artifact} --target {target}", flush=True)
        print_report(build(artifact, target, folder / f"{artifact.name}-{target}", MOST_FRAMES))
    scenery = Backgrounds([], [bikes])
    write_samples((scenes.sample(seed, "test", scenery, FRAMES) for seed in SEEDS), folder / "clips")
    session = VideoSession(folder / f"{artifact.name}-cpu")
    for video, questions in read_questions(folder / "clips").items():
        print(f"\n{video}")
        for question in questions:
            print(f"{question.text}\n> {_answer(session, video, question.text)}  (it is: {question.answer})")
    print(f"\n{bikes.name}")
    for question in ("What happens in the video?", "Which way does the red circle move?"):
        print(f"{question}\n> {_answer(session, bikes, question)}")
    print()
    iterations, warmup = 5, 1
    print_table(measure(session, [8, 16, 32], iterations, warmup), iterations, warmup)
    return 0


def _answer(session: VideoSession, video: Path, question: str) -> str:
    """As if it were the only question."""
    session.reset()
    session.watch(video, frames=FRAMES)
    return "".join(session.ask(question, max_new_tokens=40))


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
