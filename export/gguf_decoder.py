"""A language model from one GGUF file: weights dequantised by the gguf library, config, tokenizer, chat template.

blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight; llama.cpp interleaves the rotary pairs of the query
and key rows of Llama models, which is undone here
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from ..engines.package import InputError
from .models.decoder import Decoder, DecoderConfig
from .tokenizer import byte_level_bpe, parse_merges

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# tokenizer.ggml.token_type of tokens that are matched before anything else: <|im_end|>, and <think>
_CONTROL, _USER_DEFINED = 3, 4


class GGUFFile:
    """Raises InputError when the file is missing, truncated, or holds an architecture that the decoder has not."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; config.json names it as the language model") from None
        except Exception as error:  # the reader walks raw memory and raises whatever it stumbles over
            raise InputError(f"{path}: truncated or not a GGUF file ({error}); fetch it again") from None
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = self.field("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{path}: architecture {self.architecture!r} is not supported, expected one of "
                f"{', '.join(ARCHITECTURES)}"
            )

    def field(self, name: str, default: Any = None) -> Any:
        name = name.replace("{arch}", getattr(self, "architecture", ""))
        field = self._reader.get_field(name)
        if field is None:
            if default is None:
                raise InputError(f"{self.path}: metadata {name} is missing; convert the model again")
            return default
        return field.contents()

    def config(self) -> DecoderConfig:
        """Raises InputError for fields that are missing or that no decoder can have."""
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise InputError(f"{self.path}: tensor token_embd.weight is missing")
        scaling = self.field("{arch}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.tensors:
            raise InputError(f"{self.path}: scaled RoPE is not read from GGUF; use the safetensors checkpoint")
        heads, size = self.field("{arch}.attention.head_count"), self.field("{arch}.embedding_length")
        fields = {
            "hidden_size": size,
            "num_hidden_layers": self.field("{arch}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("{arch}.attention.head_count_kv", heads),
            "intermediate_size": self.field("{arch}.feed_forward_length"),
            "vocab_size": embedding.shape[-1].item(),
            "max_position_embeddings": self.field("{arch}.context_length"),
            "rms_norm_eps": self.field("{arch}.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.field("{arch}.rope.freq_base", 10000.0),
            "qkv_bias": "blk.0.attn_q.bias" in self.tensors,
            "qk_norm": "blk.0.attn_q_norm.weight" in self.tensors,
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }
        try:
            fields["head_dim"] = self.field("{arch}.attention.key_length", 0) or size // heads
            return msgspec.convert(fields, DecoderConfig)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"{self.path}: metadata that no decoder can have ({error})") from None

    def load(self, decoder: Decoder) -> None:
        """Fills the decoder. Raises InputError for missing and extra tensors, wrong shapes, and values not finite."""
        used = set()
        for name, parameter in decoder.state_dict().items():
            if name == "lm_head.weight" and decoder.config.tie_word_embeddings:
                continue
            theirs = _gguf_name(name)
            if theirs not in self.tensors:
                raise InputError(f"{self.path}: tensor {theirs} is missing")
            tensor = self._read(theirs)
            if list(tensor.shape) != list(parameter.shape):
                raise InputError(
                    f"{self.path}: tensor {theirs} has shape {list(tensor.shape)}, expected {list(parameter.shape)}"
                )
            if self.architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
                tensor = _halves_from_pairs(tensor, decoder.config.head_dim)
            with torch.no_grad():
                parameter.copy_(tensor)
            used.add(theirs)
        for extra in sorted(set(self.tensors) - used):
            raise InputError(f"{self.path}: tensor {extra} has no place in a {self.architecture} decoder")

    def _read(self, name: str) -> Tensor:
        stored = self.tensors[name]
        try:
            values = np.array(gguf.quants.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        except NotImplementedError:
            raise InputError(f"{self.path}: tensor {name} holds {stored.tensor_type.name}, expected weights") from None
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: tensor {name} holds NaN or infinity; the file is damaged")
        return torch.from_numpy(values)

    def tokenizer(self) -> Tokenizer:
        """Raises InputError for a tokenizer that is not byte-level BPE of a known family."""
        if self.field("tokenizer.ggml.model") != "gpt2":
            raise InputError(f"{self.path}: tokenizer {self.field('tokenizer.ggml.model')!r}, expected byte-level BPE")
        tokens, merges = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.merges")
        kinds, family = self.field("tokenizer.ggml.token_type"), self.field("tokenizer.ggml.pre", "gpt-2")
        try:
            special = [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
            vocabulary = {token: i for i, token in enumerate(tokens)}
            return byte_level_bpe(vocabulary, parse_merges(merges), family, special)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.path}: not a tokenizer ({error})") from None

    def chat_template(self) -> str:
        return self.field("tokenizer.chat_template")

    def end_of_turn(self) -> list[int]:
        return [self.field("tokenizer.ggml.eos_token_id")]


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    layer = re.match(r"model\.layers\.(\d+)\.(.+)", module)
    if layer:
        return f"blk.{layer[1]}.{_NAMES[layer[2]]}.{kind}"
    return f"{_NAMES[module]}.{kind}"


def _halves_from_pairs(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from (0, 1), (2, 3), ... pairs to a first half and a second half."""
    rows = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)
