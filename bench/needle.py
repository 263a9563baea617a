"""A needle in a video haystack: is it among the keyframes, are questions about it answered, at what cost.

    python bench/needle.py PACKAGE FOLDER [--frames 1000 2500 10000] [--needles 20]

PACKAGE was built with --long-video. Needles are the demo's made-up scenes, each over a photo that is not in the hay,
with a question about it; hay is other footage, over and over.

    recall-picture.png recall-text.png   share of needles of which a keyframe is kept, by depth and length, where the
                                         query is a picture of the needle, or its question
    answers.png                          the first needle's question, asked in a session of its own for each square
    memory.png seconds.png               of these sessions, beside the sampler that shows --frames of the video
    needle.json                          all of it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from liteframe.calib.accuracy import Asked
from liteframe.engines.package import InputError, new_folder, open_package
from liteframe.runtime.clips import read_clips
from liteframe.runtime.engine import open_engines
from liteframe.runtime.long_video import Query, check_long_frames, check_mode, key_candidates
from liteframe.runtime.plot import curves, heat_map
from liteframe.runtime.search import Searcher
from liteframe.runtime.session import VideoSession
from liteframe.runtime.text import ChatText
from liteframe.training import scenes
from liteframe.training.backgrounds import Backgrounds
from liteframe.training.haystack import Haystack
from liteframe.training.samples import Sample
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from assets import fetch
from footage import PHOTOS

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE = 8  # frames
NEW_TOKENS = 24


def footage() -> list[Path]:
    """Hay. No needle's background comes from it."""
    return [fetch("opencv") / "vtest.avi", fetch("opencv") / "tree.avi", fetch("bunny")]


def needle(number: int, size: int) -> Sample:
    """With exactly one question that can be answered; of the test's scenes, which the demo's model never saw."""
    scenery = Backgrounds([fetch("opencv") / name for name in PHOTOS["test"].split()])
    for seed in range(1000 * number, 1000 * (number + 1)):
        sample = scenes.sample(seed, "test", scenery, NEEDLE, size=size)
        questions = tuple(q for q in sample.questions if q.answer != scenes.UNKNOWN)
        if questions:
            return Sample(sample.frames, sample.fps, questions[:1])
    raise AssertionError("no scene of a thousand has a question")


def recall(package_folder: Path, lengths: list[int], count: int) -> dict[str, list[list[float]]]:
    """Share of needles of which a clip is kept: by what they are searched by, then by depth and length."""
    package = open_package(package_folder)
    model, settings = package.manifest.model, package.manifest.model.long_video
    assert settings is not None
    encoder, _ = open_engines(package)
    searcher = Searcher(package, ChatText.of(package), encoder, None)
    needles = [needle(number, model.image_size[0]) for number in range(count)]
    source = Haystack(footage(), needles[0].frames, max(lengths), 0.0)
    hay = []
    for clip in read_clips(source, max(lengths), model.clip_length, model.image_size):
        hay.append(encoder.encode_with_features(clip.frames[None])[1][0])
        print(f"\r{len(hay) * model.clip_length} frames of hay encoded", end="", file=sys.stderr)
    # the first needle stood at its beginning
    lead = NEEDLE // model.clip_length
    hay[:lead] = hay[lead : 2 * lead]
    embeddings = np.stack([tokens.mean(0) for tokens in hay])
    found: dict[str, NDArray[np.float64]] = {
        name: np.zeros((len(DEPTHS), len(lengths))) for name in ("picture", "text")
    }
    for number, sample in enumerate(needles):
        shape = (lead, model.clip_length, *sample.frames.shape[1:])
        tokens = [encoder.encode_with_features(clip[None])[1][0] for clip in sample.frames.reshape(shape)]
        queries: dict[str, Query] = {
            "picture": searcher.query(sample.frames[NEEDLE // 2]),
            "text": searcher.query(sample.questions[0].text),
        }
        for name, query in queries.items():
            relevance = np.array([query.relevance(clip) for clip in hay], np.float32)
            own = np.array([query.relevance(clip) for clip in tokens], np.float32)
            for row, depth in enumerate(DEPTHS):
                for column, length in enumerate(lengths):
                    clips = length // model.clip_length
                    first = round(depth * (clips - lead))
                    places = slice(first, first + lead)
                    vectors, ranks = embeddings[:clips].copy(), relevance[:clips].copy()
                    vectors[places], ranks[places] = [clip.mean(0) for clip in tokens], own
                    kept = key_candidates(vectors, ranks, settings, searcher.trained)
                    found[name][row, column] += bool(set(kept.tolist()) & set(range(first, first + lead)))
        print(f"\rneedle {number + 1} of {count} searched for", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {name: (counts / count).tolist() for name, counts in found.items()}


def ask_once(package: Path, length: int, depth: float, mode: str) -> dict[str, object]:
    """Watches a haystack and asks about the needle, in this process, and says what that took."""
    session = VideoSession(package)
    sample = needle(0, session.model.image_size[0])
    question = sample.questions[0]
    start = time.perf_counter()
    source = Haystack(footage(), sample.frames, length, depth)
    if mode == "uniform":
        session.watch(source, min(length, session.model.max_frames))
    else:
        session.watch(source, length, long_video=mode, query=question.text)
    answer = "".join(session.ask(question.text, NEW_TOKENS))
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    stats = session.stats()
    return {
        "mode": mode,
        "frames": length,
        "depth": depth,
        "question": question.text,
        "expected": question.answer,
        "answer": answer,
        "right": Asked(0, question, answer).right,
        "visual_tokens": stats.visual_tokens,
        "positions": stats.prompt_tokens,
        "seconds": round(seconds, 1),
        "vision_seconds": round(stats.vision_ms / 1e3, 1),
        "resident_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "peak_mb": round(int(status["VmHWM"].split()[0]) / 1024, 1),
    }


def ask_apart(package: Path, length: int, depth: float, mode: str) -> dict[str, object]:
    """The same in a process of its own, whose memory is that of nothing else."""
    command = [sys.executable, __file__, str(package), "-", "--once", str(length), str(depth), mode]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode} and said nothing"]
        raise InputError(f"{' '.join(command)}: {said[-1]}")
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, nargs="+", default=[1000, 2500, 10000])
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--answer-depths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        length, depth, mode = options.once
        print(json.dumps(ask_once(options.package, int(length), float(depth), mode)))
        return
    model = open_package(options.package).manifest.model
    check_mode("hybrid", model)
    for length in options.frames:
        check_long_frames("hybrid", length, length, model)
    lengths = [str(length) for length in options.frames]
    with new_folder(options.folder) as folder:
        rates = recall(options.package, options.frames, options.needles)
        for name, values in rates.items():
            title = f"needles found by {name}"
            rows = [f"{depth:g}" for depth in DEPTHS]
            picture = heat_map(title, "frames", "depth", lengths, rows, values)
            (folder / f"recall-{name}.png").write_bytes(picture.png())
        asked = {
            (depth, length): ask_apart(options.package, length, depth, "hybrid")
            for length in options.frames
            for depth in options.answer_depths
        }
        uniform = [ask_apart(options.package, length, 0.5, "uniform") for length in options.frames]
        right = [[float(bool(asked[depth, n]["right"])) for n in options.frames] for depth in options.answer_depths]
        rows = [f"{depth:g}" for depth in options.answer_depths]
        picture = heat_map("the first needle's question answered", "frames", "depth", lengths, rows, right)
        (folder / "answers.png").write_bytes(picture.png())
        middle = options.answer_depths[len(options.answer_depths) // 2]
        counts = [float(n) for n in options.frames]
        for name, figure, unit in (("memory", "peak_mb", "peak memory, MB"), ("seconds", "seconds", "seconds")):
            lines = {
                "hybrid": [float(str(asked[middle, n][figure])) for n in options.frames],
                "uniform": [float(str(row[figure])) for row in uniform],
            }
            (folder / f"{name}.png").write_bytes(curves(name, "frames", unit, counts, lines).png())
        told = {"depths": DEPTHS, "frames": options.frames, "needles": options.needles, "recall": rates}
        (folder / "needle.json").write_text(json.dumps({**told, "sessions": [*asked.values(), *uniform]}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"needle: {error}")
