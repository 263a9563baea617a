"""The paper's encoder variants at full size on a CPU: one clip of 4 x 448 x 448 through each, FP32, random weights.

    python bench/encoder_variants.py [--variant DWTempConv --variant TempAttn] [--rounds 5] [--threads 2] [--profile]

The encoder graphs with their projectors, as our CPU engines, in turns. Beside each stands what the paper measured on an
A100 for 256 frames; figures of a CPU and one clip are no prediction of it. DWTempConv is what the others are compared
with. With --profile each runs once more under ONNX Runtime's profiler: milliseconds by type of operator.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import onnxruntime as ort
import torch
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.export.models.encoder import VideoEncoder
from liteframe.export.models.variants import VARIANTS
from liteframe.export.trace import WeightsFile, trace_encoder
from liteframe.export.verify import relative_difference, sample_clips
from liteframe.runtime.ort_engine import OrtEncoder
from timing import in_turns, report

CPU, BASELINE, OPERATORS_SHOWN = "CPUExecutionProvider", "DWTempConv", 6


def write_engine(name: str, folder: Path) -> Path:
    """Of a variant with seeded random weights, none zero; what it computes is compared with torch first."""
    torch.manual_seed(0)
    encoder = VideoEncoder(VARIANTS[name].encoder(output_size=896)).eval()
    for parameter in encoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir()
    with WeightsFile(folder / "graph.data") as weights:
        weights.save(trace_encoder(encoder, "fused"), folder / "graph.onnx")
    engine, _ = compile_graph(folder / "graph.onnx", folder / "engine.onnx", CPU)
    frames = sample_clips(encoder)[1:]
    with torch.no_grad():
        expected = encoder(torch.from_numpy(frames)).numpy()
    assert relative_difference(OrtEncoder(engine).encode(frames), expected) < 1e-4, f"{name} computes something else"
    return engine


def milliseconds_by_operator(engine: Path, frames, threads: int) -> Counter[str]:
    """Of the second run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling, options.profile_file_prefix = True, str(engine.parent / "profile")
    session = ort.InferenceSession(engine, options, providers=[CPU])
    (name,) = (value.name for value in session.get_inputs())
    for _ in range(2):
        session.run(None, {name: frames})
    events = json.loads(Path(session.end_profiling()).read_text())
    runs = [event["ts"] for event in events if event["name"] == "model_run"]
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[-1]:
            spent[event["args"]["op_name"]] += event["dur"] / 1e3
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys([BASELINE, *(options.variant or VARIANTS)]))
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: write_engine(name, Path(folder) / name) for name in names}
        encoders = {name: OrtEncoder(path, threads=options.threads) for name, path in engines.items()}
        frames = torch.randint(0, 256, (1, 4, 448, 448, 3), dtype=torch.uint8).numpy()
        peers = {_title(name): (lambda encoder=encoder: encoder.encode(frames)) for name, encoder in encoders.items()}
        seconds = in_turns(peers, options.rounds, warmup=1)
        del encoders, peers
        if options.profile:
            for name, engine in engines.items():
                spent = milliseconds_by_operator(engine, frames, options.threads)
                shown = ", ".join(f"{op} {ms:.0f}" for op, ms in spent.most_common(OPERATORS_SHOWN))
                print(f"{name}: {shown}; all {spent.total():.0f} ms")
    title = f"encoder variants, FP32, one clip of 4 x 448 x 448, {options.threads} threads"
    report(title, seconds, _title(BASELINE), ["onnxruntime"])


def _title(name: str) -> str:
    paper = VARIANTS[name].paper
    return name if paper is None else f"{name} (paper, A100: {paper.a100_ms:g} ms)"


if __name__ == "__main__":
    main()
