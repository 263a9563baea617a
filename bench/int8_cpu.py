"""INT8 against FP32 on a CPU, encoder and decoder, each beside named peers.

    python bench/int8_cpu.py [--rounds 15] [--threads 2]

Encoder: one clip of 4 x 448 x 448 through the full-size LiteFrame-B, random weights. Peers: our own FP32 engine, ONNX
Runtime FP32 and OpenVINO BF16 on torch's stock export, torch.compile.
Decoder: SmolLM2-135M-Instruct, prefill of 512 tokens in one piece, and single tokens after it. Peer: our own FP32
engine. The layers that a build left out of W8A8 are left out here, by the same scan.
The linear layers of one clip are 280 GFLOP; attention's products, which stay FP32, are 52 more.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import openvino
import torch
from encoder_cpu import stock_export
from full_size import random_encoder
from liteframe.calib import calibrate, placement, rewrite
from liteframe.calib.ranges import choose_range
from liteframe.engines import proof
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.engines.targets import TARGETS
from liteframe.export.artifact import load_artifact
from liteframe.export.precision import prepare
from liteframe.export.trace import WeightsFile, trace_decoder, trace_encoder
from liteframe.export.verify import cosine, sample_clips
from liteframe.runtime.ort_engine import OrtDecoder, OrtEncoder
from timing import in_turns, report

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from assets import fetch
from clip_smollm2 import assemble

CPU = "CPUExecutionProvider"
PROMPT, TOKENS = 512, 16


def encoder(folder: Path, rounds: int, threads: int) -> None:
    module = random_encoder()
    frames = sample_clips(module)[1:]
    graph = folder / "encoder.onnx"
    with WeightsFile(folder / "encoder.data") as weights:
        weights.save(trace_encoder(module, "fused"), graph)
    calibration = calibrate.calibrate(graph, [{"frames": frames}], folder)
    with WeightsFile(folder / "int8.data") as weights:
        model = ir.load(graph)
        calibrate.even_out(model, calibration.channels)
        plan = placement.plan(model, "fp32", "int8", calibration.observation.largest)
        histograms = calibration.observation.histograms
        ranges = {name: choose_range(histogram, "minmax") for name, histogram in histograms.items()}
        rewrite.apply(model, plan, ranges, signed_activations=False)
        weights.save(model, folder / "int8.onnx")
    fp32, _ = compile_graph(graph, folder / "encoder-fp32.onnx", CPU)
    int8, _ = compile_graph(folder / "int8.onnx", folder / "encoder-int8.onnx", CPU)
    assert not proof.prove_onnxruntime(folder / "int8.onnx", int8).wrong
    ours = {name: OrtEncoder(path, threads=threads) for name, path in (("FP32", fp32), ("INT8", int8))}
    stock = folder / "stock.onnx"
    stock_export(module, torch.from_numpy(frames), stock)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(stock, options)
    (name,) = (value.name for value in session.get_inputs())
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(stock, "CPU", settings).create_infer_request()
    compiled, tensor = torch.compile(module), torch.from_numpy(frames)
    peers = {
        "liteframe, INT8": lambda: ours["INT8"].encode(frames),
        "liteframe, FP32": lambda: ours["FP32"].encode(frames),
        "ONNX Runtime FP32, stock export": lambda: session.run(None, {name: frames})[0],
        "OpenVINO BF16, stock export": lambda: request.infer([frames])[0],
        "torch.compile, FP32": lambda: compiled(tensor).numpy(),
    }
    reference = peers["liteframe, FP32"]()
    for peer, run in peers.items():
        assert cosine(run(), reference) > 0.9, f"{peer} computes something else"
    title = f"LiteFrame-B encoder, one clip of 4 x 448 x 448, {threads} threads"
    report(title, in_turns(peers, rounds), "liteframe, INT8", ["onnxruntime", "openvino", "torch"])


@contextlib.contextmanager
def _quiet(what: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def decoder(folder: Path, rounds: int, threads: int) -> None:
    assemble(folder / "artifact")
    artifact = load_artifact(folder / "artifact")
    asked = {"encoder": "fp32", "decoder": "int8"}
    sources = [fetch("bikes"), fetch("bunny")]
    scratch = folder / "scratch"
    scratch.mkdir()
    lowering = prepare(artifact, asked, TARGETS["cpu"], sources, None, "minmax", True, scratch, _quiet)
    engines = {}
    for name in ("FP32", "INT8"):
        with WeightsFile(folder / f"decoder.{name}.data") as weights:
            model = trace_decoder(artifact.decoder, "fused")
            if name == "INT8":
                lowering.lower("decoder", "fused", model)
            weights.save(model, folder / f"decoder.{name}.onnx")
        path, _ = compile_graph(folder / f"decoder.{name}.onnx", folder / f"decoder-{name}.onnx", CPU)
        engines[name] = OrtDecoder(path, capacity=1024, threads=threads)
        print(name, lowering.check("decoder", path), flush=True)
    table = lowering.table
    ids = np.random.default_rng(0).integers(0, len(table), PROMPT + TOKENS)

    def prefill(engine: OrtDecoder) -> None:
        engine.rewind(0)
        engine.forward(table[ids[:PROMPT]])

    def decode(engine: OrtDecoder) -> None:
        engine.rewind(PROMPT)
        for token in ids[PROMPT:]:
            engine.forward(table[token : token + 1])

    for what, run in (("prefill of 512 tokens", prefill), (f"{TOKENS} single tokens", decode)):
        peers = {f"liteframe, {name}": lambda run=run, engine=engine: run(engine) for name, engine in engines.items()}
        title = f"SmolLM2-135M, {what}, {threads} threads"
        report(title, in_turns(peers, rounds), "liteframe, INT8", ["onnxruntime"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("encoder", "decoder"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, measure in (("encoder", encoder), ("decoder", decoder)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                measure(Path(folder), options.rounds, options.threads)


if __name__ == "__main__":
    main()
