"""The full-size build: LiteFrame-B at 448 px and a decoder of Qwen2.5-0.5B's shape, random weights, for cpu and SM80.

    python bench/build_full_size.py [--target cpu --target a100] [--frames 256]

Each target is built as a user would, by export/build_engine.py in a process of its own, whose time and peak memory are
printed. The artifact and the packages (about 7 GB) live in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import torch
from liteframe.export.contenders import QWEN
from liteframe.export.layouts import decoder_config
from liteframe.export.models.decoder import Decoder
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.liteframe import LiteFrameConfig
from liteframe.export.self_test_bundles import write_tokenizer
from safetensors.torch import save_file


def write_artifact(folder: Path) -> int:
    """A LiteFrame folder with seeded random weights in BF16; returns the number of parameters."""
    folder.mkdir()
    encoder = EncoderConfig(backbone=LiteFrameConfig(), output_size=QWEN["hidden_size"])
    config = {"model_type": "liteframe", "version": 1, "encoder": msgspec.to_builtins(encoder), "decoder": QWEN}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for prefix, build in (
        ("encoder", lambda: VideoEncoder(encoder)),
        ("decoder", lambda: Decoder(decoder_config(QWEN))),
    ):
        with torch.device("meta"):
            module = build()
        for name, parameter in module.named_parameters():
            scale = 0.02 if parameter.ndim > 1 else 0.1
            values = torch.randn(parameter.shape, generator=generator) * scale
            tensors[f"{prefix}.{name}"] = (values + (name.endswith("norm.weight"))).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", help="default: cpu and a100")
    parser.add_argument("--frames", type=int, default=256)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        artifact = Path(name) / "liteframe-b-qwen2.5-0.5b"
        print(f"{write_artifact(artifact) / 1e6:.1f} million parameters", flush=True)
        for target in options.target or ("cpu", "a100"):
            script = Path(__file__).parents[1] / "export/build_engine.py"
            command = [sys.executable, script, artifact, "--target", target, "--frames", str(options.frames)]
            print(f"\npython export/build_engine.py {artifact.name} --target {target}", flush=True)
            start = time.perf_counter()
            process = subprocess.Popen([*command, "--output", Path(name) / target])
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"the build for {target} failed")
            seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 2**20
            print(f"{target}: {seconds:.0f} s, peak memory {peak:.2f} GB", flush=True)
            rows[target] = {"seconds": round(seconds, 1), "peak_memory_gb": round(peak, 2)}
    print(json.dumps({"title": f"build of LiteFrame-B + Qwen2.5-0.5B's shape, {options.frames} frames", "rows": rows}))


if __name__ == "__main__":
    main()
