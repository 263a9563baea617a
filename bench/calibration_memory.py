"""Peak memory and time of calibrating the full-size LiteFrame-B encoder, 4 x 448 x 448, on 64 clips of real video.

    python bench/calibration_memory.py [--clips 64]

The graph, with random weights, is exported by another process first, which also cuts the clips, five squares out of
each frame of the video: torch's memory is not calibration's. The clips are held in memory throughout, and are passed
over once, after 8 of them have told the factors of smoothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from liteframe.calib.calibrate import calibrate
from liteframe.calib.clips import read_calibration_clips, save_clips

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from assets import fetch

SIZE, CLIP_LENGTH = (448, 448), 4
SQUARES = 5
LIMIT = 4.0  # GB


def prepare(graph: Path, saved: Path) -> None:
    import cv2
    from full_size import random_encoder
    from liteframe.export.trace import WeightsFile, trace_encoder

    module = random_encoder()
    with WeightsFile(graph.with_suffix(".data")) as weights:
        weights.save(trace_encoder(module, "fused"), graph)
    video, squares = cv2.VideoCapture(str(fetch("bunny"))), []
    while (read := video.read())[0]:
        frame = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        height, width = frame.shape[:2]
        lefts = np.linspace(0, width - height, SQUARES, dtype=int)
        squares.append([cv2.resize(frame[:, left : left + height], SIZE) for left in lefts])
    whole = len(squares) // CLIP_LENGTH * CLIP_LENGTH
    clips = np.array(squares[:whole]).reshape(-1, CLIP_LENGTH, SQUARES, *SIZE, 3).swapaxes(1, 2)
    save_clips(saved, clips.reshape(-1, CLIP_LENGTH, *SIZE, 3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    count = parser.parse_args().clips
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "encoder.onnx"
        preparing = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(graph, Path(folder) / "clips.npy")
        )
        preparing.start()
        preparing.join()
        assert preparing.exitcode == 0, "the export failed"
        clips = read_calibration_clips([Path(folder) / "clips.npy"], CLIP_LENGTH, SIZE, count * 3 // 2)[:count]
        assert len(clips) == count, f"the video has {len(clips)} different clips"
        start, passes = time.perf_counter(), []
        calibrate(graph, [{"frames": clip[None]} for clip in clips], Path(folder), passes.append)
        seconds = time.perf_counter() - start
    assert "torch" not in sys.modules and passes == list(range(1, len(clips) + 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{len(clips)} clips in one pass: {seconds:.0f} s, peak memory {peak:.2f} GB of {LIMIT} GB")
    print(json.dumps({"clips": len(clips), "s": round(seconds), "gb": round(peak, 2), "ort": version("onnxruntime")}))
    return peak > LIMIT


if __name__ == "__main__":
    sys.exit(main())
