"""Keyframes of a long video, on one core: the walk down the ranking in blocks beside the same walk frame by frame.

    python bench/keyframes.py [--frames 10000] [--rounds 20]

Embeddings are 768 wide and lie in scenes, as a video's do: cosines of about 0.9 within a scene. All 32 keyframes are
found near the top of the ranking (many scenes), or the whole ranking is walked (fewer scenes than keyframes).
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported

import numpy as np
from liteframe.runtime.keyframes import select
from numpy.typing import NDArray
from timing import in_turns, report

WIDTH, COUNT, SIMILAR = 768, 32, 0.85


def video(frames: int, scenes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Embeddings (frames, WIDTH) of equally long scenes, and their relevance (frames,)."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((scenes, WIDTH))
    rows = centres[np.arange(frames) * scenes // frames] + rng.standard_normal((frames, WIDTH)) / 3
    query = rng.standard_normal(WIDTH)
    return rows.astype(np.float32), (rows @ query / np.linalg.norm(rows, axis=1)).astype(np.float32)


def frame_by_frame(embeddings: NDArray[np.float32], relevance: NDArray[np.float32]) -> list[int]:
    """Algorithm 1 as it is written."""
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    kept: list[int] = []
    for frame in np.argsort(-relevance, kind="stable"):
        if len(kept) < COUNT and (not kept or (units[kept] @ units[frame]).max() < SIMILAR):
            kept.append(int(frame))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    for scenes in (200, 20):
        embeddings, relevance = video(arguments.frames, scenes)
        ours = select(embeddings, relevance, COUNT, SIMILAR).tolist()
        assert ours == frame_by_frame(embeddings, relevance)
        seconds = in_turns(
            {
                "blocks": lambda e=embeddings, r=relevance: select(e, r, COUNT, SIMILAR),  # type: ignore[misc]
                "frame by frame": lambda e=embeddings, r=relevance: frame_by_frame(e, r),  # type: ignore[misc]
            },
            arguments.rounds,
        )
        title = f"keyframes: {len(ours)} of {arguments.frames} frames in {scenes} scenes, {WIDTH} wide, one core"
        report(title, seconds, "blocks", ["numpy"])


if __name__ == "__main__":
    main()
