"""The demo: real weights, two packages, a real video, a question without one, and a latency table.

python examples/demo.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from assets import fetch
from clip_smollm2 import assemble
from liteframe.export.build_engine import build, print_report
from liteframe.runtime.cli import guard
from liteframe.runtime.profile import measure, print_table
from liteframe.runtime.session import VideoSession

FRAMES = 64


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    video = fetch("bikes")
    shutil.rmtree(folder, ignore_errors=True)
    artifact = folder / "clip-smollm2"
    print(f"assembling {artifact}: CLIP ViT-B/16 + WAP 16x + SmolLM2-135M-Instruct", flush=True)
    assemble(artifact)
    for target in ("cpu", "a100"):
        print(f"\npython export/build_engine.py {artifact} --target {target}", flush=True)
        print_report(build(artifact, target, folder / f"clip-smollm2-{target}", FRAMES))
    session = VideoSession(folder / "clip-smollm2-cpu")
    question = "What is the capital of France?"
    print(f"\n{question}\n> {''.join(session.ask(question, max_new_tokens=40))}")
    session.watch(video, frames=FRAMES)
    question = "What is happening in this video?"
    print(f"\n{video.name}, {session.stats().frames} frames: {question}\n> ", end="")
    for piece in session.ask(question, max_new_tokens=40):
        print(piece, end="", flush=True)
    print(f"\nnote: {session.package.manifest.text.notice}\n")
    iterations, warmup = 5, 1
    print_table(measure(session, [8, 16, 32], iterations, warmup), iterations, warmup)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
