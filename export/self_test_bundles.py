"""Makes what `liteframe doctor --self-test` carries: small bundles in FP32 and FP16, and their results on a CPU.

python -m liteframe.export.self_test_bundles

The artifact is random and seeded: an encoder of two blocks with temporal convolutions, a decoder of two layers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..engines import self_test
from ..engines.package import Package, write_manifest
from ..engines.targets import Asked
from ..runtime.ort_engine import OrtDecoder, OrtEncoder
from .build_engine import build
from .layouts import decoder_config
from .models.decoder import Decoder
from .models.encoder import EncoderConfig, VideoEncoder
from .models.liteframe import Downsampling, LiteFrameConfig
from .models.vit import ViTConfig

SIZE, FRAMES, WIDTH = (56, 56), 16, 64
DECODER = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 258,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def write_artifact(folder: Path) -> None:
    vit = ViTConfig(image_size=SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    backbone = LiteFrameConfig(vit=vit, downsampling=(Downsampling(1, (2, 2, 2)),), head_size=32)
    encoder = EncoderConfig(backbone=backbone, output_size=WIDTH)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for prefix, module in (("encoder", VideoEncoder(encoder)), ("decoder", Decoder(decoder_config(DECODER)))):
        for name, parameter in module.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensors[f"{prefix}.{name}"] = around + 0.2 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "liteframe", "version": 1, "encoder": msgspec.to_builtins(encoder), "decoder": DECODER}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and a chat template, as an artifact has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))


def make(folder: Path) -> None:
    """Writes a bundle and `expected.npz` for each precision into the folder, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as name:
        artifact, clips = Path(name) / "self-test", Path(name) / "clips.npy"
        write_artifact(artifact)
        np.save(clips, np.random.default_rng(0).integers(0, 256, (8, 4, *SIZE, 3), dtype=np.uint8))
        for precision in self_test.PRECISIONS:
            asked: Asked = precision
            calib = [] if precision == "fp32" else [clips]
            bundle = build(
                artifact, "jetson-orin", folder / precision, FRAMES, precision=asked, calib=calib, allow_drift=True
            )
            _keep_the_graphs(bundle)
            graphs = {part: bundle.path(bundle.graph(part, "fused").files[0]) for part in ("encoder", "decoder")}
            model = bundle.manifest.model
            made = self_test.run(
                OrtEncoder(graphs["encoder"], threads=1), OrtDecoder(graphs["decoder"], threads=1), model
            )
            np.savez_compressed(folder / f"{precision}.npz", allow_pickle=False, **made)


def _keep_the_graphs(bundle: Package) -> None:
    """Commands and reports are for people who look at a package."""
    for name in ("polygraphy", "drift"):
        shutil.rmtree(bundle.folder / name, ignore_errors=True)
    write_manifest(bundle.folder, msgspec.structs.replace(bundle.manifest, commands=[], drift=[]))


if __name__ == "__main__":
    make(self_test.FOLDER)
