"""INT8 against FP32 on a CPU, encoder and decoder, each beside named peers.

    python bench/int8_cpu.py [--rounds 15] [--threads 2]

Encoder: one clip of 4 x 448 x 448 through the full-size LiteFrame-B, random weights; and one of 4 x 224 x 224 through
CLIP ViT-B/16 with WAP. Peers: our own FP32 engine, torch.compile, and for LiteFrame-B, on torch's stock export, ONNX
Runtime FP32 and OpenVINO BF16.
Decoder: SmolLM2-135M-Instruct, prefill of 512 tokens in one piece, and single tokens after it. Peer: our own FP32
engine.
All are calibrated, scanned and lowered as a build does it. The linear layers of one clip of LiteFrame-B are 280 GFLOP;
attention's products, which stay FP32, are 52 more.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import openvino
import torch
from encoder_cpu import stock_export
from full_size import random_encoder
from liteframe.calib.clips import read_calibration_clips, save_clips
from liteframe.engines import proof
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.targets import TARGETS, Asked
from liteframe.export.artifact import Artifact, load_artifact
from liteframe.export.precision import GraphName, embedding_table, prepare
from liteframe.export.trace import WeightsFile, trace_decoder, trace_encoder
from liteframe.export.verify import cosine
from liteframe.runtime.ort_engine import OrtDecoder, OrtEncoder
from numpy.typing import NDArray
from timing import in_turns, report

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from assets import fetch
from clip_smollm2 import assemble
from recognition import calibration_stamps, load_stamps

CPU = "CPUExecutionProvider"
PROMPT, TOKENS = 512, 16

Engine = OrtEncoder | OrtDecoder


def engines(
    artifact: Artifact, name: GraphName, sources: list[Path], folder: Path, load: Callable[[Path], Engine]
) -> dict[str, Engine]:
    """The graph in FP32 and in INT8, lowered and compiled as a build does it, calibrated on the sources."""
    scratch = folder / "scratch"
    scratch.mkdir()
    asked: dict[GraphName, Asked] = {"encoder": "fp32", "decoder": "fp32"} | {name: "int8"}
    lowering = prepare(artifact, asked, TARGETS["cpu"], sources, None, "minmax", True, scratch, _quiet)
    loaded = {}
    trace = {
        "encoder": lambda: trace_encoder(artifact.encoder, "fused"),
        "decoder": lambda: trace_decoder(artifact.decoder, "fused"),
    }[name]
    for precision in ("FP32", "INT8"):
        graph = folder / f"{precision}.onnx"
        with WeightsFile(graph.with_suffix(".data")) as weights:
            model = trace()
            if precision == "INT8":
                lowering.lower(name, "fused", model)
            weights.save(model, graph)
        path, _ = compile_graph(graph, folder / f"{precision}.engine.onnx", CPU)
        loaded[precision] = load(path)
        print(precision, lowering.check(name, path), flush=True)
    assert not proof.prove_onnxruntime(graph, path).wrong
    kept, by_token = lowering.kept[name], sorted(lowering.by_token[name])
    print(f"{len(kept)} layers kept: {', '.join(kept)}; a scale for each token: {', '.join(by_token)}", flush=True)
    return loaded


@contextlib.contextmanager
def _quiet(what: str) -> Iterator[Callable[[int, int], None]]:
    print(what, flush=True)
    yield lambda done, total: None


def encoder(folder: Path, rounds: int, threads: int, full_size: bool) -> None:
    assemble(folder / "artifact")
    artifact = load_artifact(folder / "artifact")
    if full_size:
        artifact = replace(artifact, encoder=random_encoder(artifact.decoder.config.hidden_size))
    module = artifact.encoder
    sources = [fetch("bunny")]
    if not full_size:  # as bench/accuracy.py builds it
        pictures, _, _ = load_stamps(fetch("stamps"), module.config.vit.image_size)
        save_clips(folder / "stamps.npy", np.repeat(pictures[sorted(calibration_stamps(len(pictures)))][:, None], 4, 1))
        sources += [fetch("bikes"), folder / "stamps.npy"]
    ours = engines(artifact, "encoder", sources, folder, lambda path: OrtEncoder(path, threads=threads))
    height, width = module.config.vit.image_size
    frames = read_calibration_clips([fetch("bunny")], module.config.clip_length, (height, width), 2)[1:]
    compiled, tensor = torch.compile(module), torch.from_numpy(frames)
    peers = {
        "liteframe, INT8": lambda: ours["INT8"].encode(frames),
        "liteframe, FP32": lambda: ours["FP32"].encode(frames),
        "torch.compile, FP32": lambda: compiled(tensor).numpy(),
    }
    if full_size:  # WAP, which CLIP takes, has no stock export
        peers |= stock_peers(module, frames, folder, threads)
    reference = peers["liteframe, FP32"]()
    for peer, run in peers.items():
        assert cosine(run(), reference) > 0.9, f"{peer} computes something else"
    what = "LiteFrame-B, random weights" if full_size else "CLIP ViT-B/16 + WAP"
    title = f"{what}, one clip of {module.config.clip_length} x {height} x {width}, {threads} threads"
    report(title, in_turns(peers, rounds), "liteframe, INT8", ["onnxruntime", "openvino", "torch"])


def stock_peers(
    module: torch.nn.Module, frames: NDArray[np.uint8], folder: Path, threads: int
) -> dict[str, Callable[[], object]]:
    stock = folder / "stock.onnx"
    stock_export(module, torch.from_numpy(frames), stock)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(stock, options)
    (name,) = (value.name for value in session.get_inputs())
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(stock, "CPU", settings).create_infer_request()
    return {
        "ONNX Runtime FP32, stock export": lambda: session.run(None, {name: frames})[0],
        "OpenVINO BF16, stock export": lambda: request.infer([frames])[0],
    }


def decoder(folder: Path, rounds: int, threads: int) -> None:
    assemble(folder / "artifact")
    artifact = load_artifact(folder / "artifact")
    ours = engines(
        artifact,
        "decoder",
        [fetch("bikes"), fetch("bunny")],
        folder,
        lambda path: OrtDecoder(path, capacity=1024, threads=threads),
    )
    table = embedding_table(artifact, "int8").astype(np.float32)
    ids = np.random.default_rng(0).integers(0, len(table), PROMPT + TOKENS)

    def prefill(engine: OrtDecoder) -> None:
        engine.rewind(0)
        engine.forward(table[ids[:PROMPT]])

    def decode(engine: OrtDecoder) -> None:
        engine.rewind(PROMPT)
        for token in ids[PROMPT:]:
            engine.forward(table[token : token + 1])

    for what, run in (("prefill of 512 tokens", prefill), (f"{TOKENS} single tokens", decode)):
        peers = {f"liteframe, {name}": lambda run=run, engine=engine: run(engine) for name, engine in ours.items()}
        title = f"SmolLM2-135M, {what}, {threads} threads"
        report(title, in_turns(peers, rounds), "liteframe, INT8", ["onnxruntime"])


MEASURES = {
    "encoder": partial(encoder, full_size=True),
    "clip": partial(encoder, full_size=False),
    "decoder": decoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=MEASURES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, measure in MEASURES.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                measure(Path(folder), options.rounds, options.threads)


if __name__ == "__main__":
    main()
