"""What precision costs on real things: perplexity of a book, recognition of drawings, visual tokens, greedy text.

    python bench/accuracy.py [--only int8 ...] [--tokens 20480]

CLIP ViT-B/16 with WAP and SmolLM2-135M-Instruct, built for the CPU in each precision, calibrated on two videos and on
64 stamps that recognition does not ask about; text for the decoder it writes itself. Everything is measured on the
packages' engines. A figure that misses its gate makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from liteframe.calib.clips import save_clips
from liteframe.calib.perplexity import cost, token_losses
from liteframe.engines.package import Package, open_package
from liteframe.engines.targets import Asked
from liteframe.export.build_engine import build
from liteframe.runtime.clips import read_clips
from liteframe.runtime.ort_engine import OrtDecoder, OrtEncoder
from liteframe.runtime.video import open_video
from numpy.typing import NDArray
from tokenizers import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from assets import fetch, read_prose
from clip_smollm2 import assemble
from recognition import SIZE, calibration_stamps, features, load_stamps, nearest_neighbour_accuracy

WINDOW = 512
GREEDY = 512  # tokens, in texts of 64
PROMPT = 32
# name -> precision of the encoder, of the decoder, and how much the latter's perplexity may rise
PACKAGES: dict[str, tuple[Asked, Asked, float]] = {
    "fp16": ("fp16", "fp16", 0.001),
    "int8": ("int8", "int8", 0.02),
    "int8-weights": ("fp16", "int8-weights", 0.02),
    "int4-weights": ("fp16", "int4-weights", 0.08),
}
MEAN, WORST = {"fp16": 0.9995, "int8": 0.99}, {"fp16": 0.9995, "int8": 0.97}
RECOGNITION = 0.01


@dataclass
class Figures:
    perplexity: float
    perplexity_95: float
    mean_cosine: float
    worst_cosine: float
    unseen_mean_cosine: float
    recognition: float
    greedy_agreement: float
    kept: int
    encoder_mb: float
    decoder_mb: float


def decoder_inputs(package: Package) -> tuple[Path, NDArray[np.float32]]:
    manifest = package.manifest
    table = np.load(package.folder / manifest.text.embeddings.path, allow_pickle=False).astype(np.float32)
    return package.folder / "decoder.onnx", table


def greedy_texts(engine: OrtDecoder, table: NDArray[np.float32], prompts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The FP32 decoder's continuations (n, 64) of prompts (n, PROMPT)."""
    texts = np.empty((len(prompts), 64), np.int64)
    for prompt, text in zip(prompts, texts, strict=True):
        engine.rewind(0)
        logits = engine.forward(table[prompt])
        for position in range(text.size):
            text[position] = int(logits.argmax())
            logits = engine.forward(table[text[position : position + 1]])
    return texts


def agreement(
    engine: OrtDecoder, table: NDArray[np.float32], prompts: NDArray[np.int64], texts: NDArray[np.int64]
) -> float:
    """Of the tokens of these texts, how many the engine would have chosen too, after the same text."""
    same = 0
    for prompt, text in zip(prompts, texts, strict=True):
        engine.rewind(0)
        logits = engine.forward(table[prompt])
        for token in text:
            same += int(logits.argmax()) == token
            logits = engine.forward(table[token][None])
    return same / texts.size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--tokens", type=int, default=40 * WINDOW)
    options = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        assemble(folder / "artifact")
        pictures, labels, _ = load_stamps(fetch("stamps"), SIZE)
        calibration = calibration_stamps(len(pictures))
        clips = np.repeat(pictures[sorted(calibration)][:, None], 4, axis=1)
        save_clips(folder / "stamps.npy", clips)
        sources = [fetch("bikes"), fetch("bunny"), folder / "stamps.npy"]
        unseen = [clip.frames[None] for clip in read_clips(open_video(fetch("carphone")), 64, 4, SIZE)]

        reference = build(folder / "artifact", "cpu", folder / "fp32")
        decoder, table = decoder_inputs(reference)
        tokenizer = Tokenizer.from_file(str(reference.folder / reference.manifest.text.tokenizer.path))
        ids = np.array(tokenizer.encode(read_prose(fetch("holmes")), add_special_tokens=False).ids)
        losses = token_losses(decoder, table, ids[: options.tokens], WINDOW)
        prompts = ids[options.tokens :][: GREEDY // 64 * PROMPT].reshape(-1, PROMPT)
        texts = greedy_texts(OrtDecoder(decoder, capacity=256), table, prompts)
        recognised = nearest_neighbour_accuracy(
            features(reference.folder / "encoder.onnx", pictures), labels, calibration
        )
        tokens = np.concatenate([OrtEncoder(reference.folder / "encoder.onnx").encode(clip) for clip in unseen])
        print(
            f"fp32: perplexity {np.exp(losses.mean()):.3f} on {losses.size} tokens, recognition {recognised:.2%}",
            flush=True,
        )

        rows = {}
        for name in options.only:
            of_encoder, of_decoder, rise = PACKAGES[name]
            cache = folder / "calibration.safetensors"
            built = build(
                folder / "artifact",
                "cpu",
                folder / name,
                precision=of_encoder,
                decoder_precision=of_decoder,
                calib=[] if cache.exists() else sources,
                calib_cache=cache,
                allow_drift=True,
            )
            engines = {engine.name: engine for engine in open_package(built.folder).manifest.engines}
            decoder, table_of_it = decoder_inputs(built)
            increase, sure = cost(losses, token_losses(decoder, table_of_it, ids[: options.tokens], WINDOW))
            encoder = built.folder / "encoder.onnx"
            found = np.concatenate([OrtEncoder(encoder).encode(clip) for clip in unseen])
            cosine = (found * tokens).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(tokens, axis=-1)
            row = rows[name] = Figures(
                perplexity=increase,
                perplexity_95=sure,
                mean_cosine=engines["encoder"].parity["mean_cosine"],
                worst_cosine=engines["encoder"].parity["worst_cosine"],
                unseen_mean_cosine=float(cosine.mean()),
                recognition=nearest_neighbour_accuracy(features(encoder, pictures), labels, calibration) - recognised,
                greedy_agreement=agreement(OrtDecoder(decoder, capacity=256), table_of_it, prompts, texts),
                kept=sum(kept.reason.startswith("sensitivity") for kept in engines["decoder"].precision.kept),
                encoder_mb=sum(file.bytes for file in engines["encoder"].files) / 1e6,
                decoder_mb=sum(file.bytes for file in engines["decoder"].files) / 1e6,
            )
            print(name, row, flush=True)
            gates = {
                f"perplexity rises {row.perplexity:.2%}, allowed {rise:.1%}": row.perplexity <= rise,
                f"mean cosine {row.mean_cosine:.5f}": row.mean_cosine >= MEAN[of_encoder],
                f"worst cosine {row.worst_cosine:.5f}": row.worst_cosine >= WORST[of_encoder],
                f"recognition changes {row.recognition:.2%}": row.recognition >= -RECOGNITION,
            }
            missed += [f"{name}: {what}" for what, holds in gates.items() if not holds]
        print(json.dumps({name: vars(row) for name, row in rows.items()}))
    print("\n".join(missed) or "every gate holds")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
