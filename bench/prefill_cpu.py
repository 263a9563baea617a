"""Prefill of 512 tokens through SmolLM2-135M-Instruct, FP32, on a CPU: our engine, in chunks, against transformers.

    python bench/prefill_cpu.py [--rounds 15] [--threads 2]

Peers: transformers in eager mode on the same weights, with each of its attention implementations. All start from
the same token ids and end with the logits of the last position, which are compared before anything is timed.
The work: 110 GFLOP of linear layers, 512 x 576 x 49152 for the head left out, since only one position needs it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from liteframe.engines.compile_onnxruntime import compile_graph
from liteframe.export.gguf_decoder import GGUFFile
from liteframe.export.models.decoder import Decoder
from liteframe.export.trace import WeightsFile, trace_decoder
from liteframe.export.verify import relative_difference
from liteframe.runtime.ort_engine import OrtDecoder
from timing import in_turns, report
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from assets import fetch

TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = fetch("smollm2")
    file = GGUFFile(path)
    module = Decoder(file.config()).eval()
    file.load(module)
    table = module.model.embed_tokens.weight.detach().numpy()
    ids = np.random.default_rng(0).integers(0, len(table), TOKENS)

    def ours(chunk: int) -> np.ndarray:
        engine.rewind(0)
        for start in range(0, TOKENS, chunk):
            logits = engine.forward(table[ids[start : start + chunk]])
        return logits

    def theirs(implementation: str) -> Callable[[], np.ndarray]:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation=implementation
        ).eval()
        return lambda: (
            model(input_ids=torch.from_numpy(ids)[None], use_cache=True, logits_to_keep=1).logits[0, -1].numpy()
        )

    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        with WeightsFile(folder / "graph.data") as weights:
            weights.save(trace_decoder(module, "fused"), folder / "graph.onnx")
        compiled, _ = compile_graph(folder / "graph.onnx", folder / "decoder.onnx", "CPUExecutionProvider")
        engine = OrtDecoder(compiled, capacity=TOKENS, threads=options.threads)
        peers = {
            "liteframe, one chunk of 512": lambda: ours(512),
            "liteframe, chunks of 128": lambda: ours(128),
            "transformers, attention eager": theirs("eager"),
            "transformers, attention sdpa": theirs("sdpa"),
        }
        reference = peers["transformers, attention eager"]()
        for peer, run in peers.items():
            assert relative_difference(run(), reference) < 1e-3, f"{peer} computes something else"
        seconds = in_turns(peers, options.rounds)
    for chunk in ("one chunk of 512", "chunks of 128"):
        title = f"SmolLM2-135M prefill of {TOKENS} tokens, FP32, {options.threads} threads; ours: {chunk}"
        report(title, seconds, f"liteframe, {chunk}", ["onnxruntime", "torch", "transformers"])


if __name__ == "__main__":
    main()
