"""One clip through the full-size LiteFrame encoder, FP32, on a CPU: our engine against other ways to run the module.

    python bench/encoder_cpu.py [--rounds 15] [--threads 2]

Peers: ONNX Runtime on torch's stock export (the same module, no custom operators, opset 18, SDPA as torch writes it),
OpenVINO on that same file, and torch itself. All results are compared before anything is timed.
The work: 280 GFLOP of linear layers and convolutions and 24 of attention for 4 frames of 448 x 448.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime as ort
import openvino
import torch
from full_size import random_encoder
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.export.models import attention, liteframe
from liteframe.export.models.encoder import VideoEncoder
from liteframe.export.ops import depthwise_temporal_conv as operator
from liteframe.export.trace import WeightsFile, trace_encoder
from liteframe.export.verify import relative_difference, sample_clips
from liteframe.runtime.ort_engine import OrtEncoder
from timing import in_turns, report


def stock_export(encoder: VideoEncoder, frames: torch.Tensor, path: Path) -> None:
    """torch.onnx.export of the module as anybody would write it: plain torch operators only."""

    def convolution(x, weight, bias, grid, strides):
        clips, channels = x.shape[0], x.shape[3]
        axes = len(grid)
        x = x.reshape(clips, x.shape[1], *grid, channels).permute(0, axes + 2, *range(1, axes + 2))
        conv = torch.nn.functional.conv2d if axes == 1 else torch.nn.functional.conv3d
        out = conv(x, weight, bias, tuple(strides), [k // 2 for k in weight.shape[2:]], groups=channels)
        return out.permute(0, *range(2, axes + 3), 1).reshape(clips, out.shape[2], -1, channels)

    ours = liteframe.depthwise_temporal_conv, attention.scaled_dot_product_attention
    from liteframe.export.models import vit

    liteframe.depthwise_temporal_conv = convolution
    vit.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention
    try:
        dynamic = ({0: torch.export.Dim("clips", min=1, max=64)},)
        program = torch.onnx.export(
            encoder, (frames.repeat(2, 1, 1, 1, 1),), dynamo=True, dynamic_shapes=dynamic, verbose=False
        )
        program.save(path, external_data=True)
    finally:
        liteframe.depthwise_temporal_conv, vit.scaled_dot_product_attention = ours
        assert liteframe.depthwise_temporal_conv is operator.depthwise_temporal_conv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = random_encoder()
    frames = sample_clips(encoder)[1:]
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        with WeightsFile(folder / "graph.data") as weights:
            weights.save(trace_encoder(encoder, "fused"), folder / "graph.onnx")
        engine, _ = compile_graph(folder / "graph.onnx", folder / "engine.onnx", "CPUExecutionProvider")
        ours = OrtEncoder(engine, threads=options.threads)

        stock = folder / "stock.onnx"
        stock_export(encoder, torch.from_numpy(frames), stock)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        session = ort.InferenceSession(stock, settings)
        (input_name,) = (value.name for value in session.get_inputs())
        compiled = openvino.Core().compile_model(
            stock,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": options.threads,
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        request = compiled.create_infer_request()
        tensor = torch.from_numpy(frames)
        peers = {
            "liteframe, cpu engine": lambda: ours.encode(frames),
            "ONNX Runtime, torch's stock export": lambda: session.run(None, {input_name: frames})[0],
            "OpenVINO, torch's stock export": lambda: request.infer([frames])[0],
            "torch, eager": lambda: encoder(tensor).numpy(),
        }
        reference = encoder(tensor).numpy()
        for peer, run in peers.items():
            assert relative_difference(run(), reference) < 1e-4, f"{peer} computes something else"
        seconds = in_turns(peers, options.rounds)
    title = f"LiteFrame-B encoder, FP32, one clip of 4 x 448 x 448, {options.threads} threads"
    report(title, seconds, "liteframe, cpu engine", ["onnxruntime", "openvino", "torch"])


if __name__ == "__main__":
    main()
