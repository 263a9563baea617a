"""Language model alignment (LMA): encoder, projector and a LoRA of the language model learn to answer questions.

    video ─▶ clips ──encoder──▶ visual tokens ──┐ one prefix
    questions, answers ──chat template──▶ ids ──┴─▶ a branch for each question ─▶ cross-entropy of its answer

All questions about a video share what comes before them, and see nothing of each other: each is learned as if it had
been asked alone, in the text that the runtime lays out.

    python -m liteframe.training.align ARTIFACT QUESTIONS --output FOLDER [--frames 128 256 512] [--steps N] ...
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..calib.questions import Question, read_frames, read_questions
from ..engines.package import InputError
from ..export.artifact import Artifact, load_artifact
from ..export.models.decoder import Decoder, DecoderLayer
from ..export.models.encoder import EncoderConfig, VideoEncoder
from ..export.torch_engine import chat_text
from ..runtime.cli import guard
from ..runtime.text import ChatText
from .artifact import check_base, write_artifact
from .loop import TIME_IS_OVER, Recipe, add_options, best_device, recipe_of, train, unfrozen
from .samples import Sample

RANK, ALPHA, DROPOUT = 4, 8, 0.05  # LiteFrame, Appendix A
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISUAL, PREFIX = -1, 0


def add_lora(decoder: Decoder, seed: int = 0, dropout: float = DROPOUT) -> peft.LoraModel:
    """Freezes the decoder but for a LoRA on every linear layer of its blocks, which starts as no change."""
    torch.manual_seed(seed)
    decoder.requires_grad_(False)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(ADAPTED))
    return peft.LoraModel(decoder, config, "default")


@dataclass(frozen=True)
class Row:
    """One video with its questions.

    Attributes:
        ids: int64 (S,), VISUAL where a visual token stands.
        positions: int64 (S,), as in the KV cache of who asks that question.
        branches: int64 (S,), PREFIX, or the question's number from 1.
        labels: int64 (S,), of an answer the id that follows, elsewhere -100.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    branches: NDArray[np.int64]
    labels: NDArray[np.int64]


def lay_out(
    text: ChatText, encode: Callable[[str], list[int]], questions: Sequence[Question], encoder: VideoEncoder, clips: int
) -> Row:
    """A video of so many clips, as `runtime.conversation.Cache` lays it out.

    Args:
        encode: an answer's ids.
    """
    lead, _ = text.turn("?", with_video=True)
    prefix, tokens = list(lead), encoder.projector.tokens
    frames = encoder.config.clip_length // encoder.units_per_clip
    for unit in range(clips * encoder.units_per_clip):
        before, after = text.unit(unit * frames + 1, (unit + 1) * frames)
        prefix += [*before, *[VISUAL] * tokens, *after]
    ids, labels = list(prefix), [-100] * len(prefix)
    positions, branches = list(range(len(prefix))), [PREFIX] * len(prefix)
    for number, question in enumerate(questions, start=1):
        _, asked = text.turn(question.text, with_video=True)
        answer = [*encode(question.answer), min(text.end_of_turn)]
        ids += [*asked, *answer[:-1]]
        labels += [*[-100] * (len(asked) - 1), *answer]
        length = len(asked) + len(answer) - 1
        positions += range(len(prefix), len(prefix) + length)
        branches += [number] * length
    return Row(*map(np.array, (ids, positions, branches, labels)))


def answer_loss(decoder: Decoder, rows: Sequence[Row], visual_tokens: Tensor) -> Tensor:
    """Mean cross-entropy of all answers' ids.

    Args:
        visual_tokens: (clips, tokens, D) of all videos, for where the rows have VISUAL.
    """
    length = max(len(row.ids) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        values = [getattr(row, name) for row in rows]
        array = np.stack([np.pad(v, (0, length - len(v)), constant_values=value) for v in values])
        return torch.from_numpy(array).to(visual_tokens.device)

    ids, positions = padded("ids", 0), padded("positions", 0)
    branches, labels = padded("branches", -1), padded("labels", -100)
    embedded = decoder.model.embed_tokens(ids.clamp(min=0))
    embedded = embedded.masked_scatter((ids == VISUAL).unsqueeze(-1), visual_tokens.to(embedded.dtype))
    hidden = read(decoder, embedded, positions, visible(branches))
    asked = labels != -100
    return F.cross_entropy(decoder.lm_head(hidden[asked]).float(), labels[asked])


def visible(branches: Tensor) -> Tensor:
    """Which positions each may attend to: those before it, of the prefix and its own branch. (B, S) -> (B, 1, S, S)"""
    before = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool, device=branches.device).tril()
    same = branches[:, :, None] == branches[:, None, :]
    return (before & (same | (branches == PREFIX)[:, None, :]))[:, None]


def read(decoder: Decoder, embedded: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The last layer's states (B, S, D) of whole sequences, without a cache.

    Args:
        embedded: (B, S, D). positions: (B, S). mask: bool (B, 1, S, S), true where a row attends to a column.
    """
    model, x = decoder.model, embedded
    cos, sin = model.rotation(positions, x.dtype)
    group = decoder.config.num_attention_heads // decoder.config.num_key_value_heads
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        x = x + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x)


def answer_ids(artifact: Artifact) -> Callable[[str], list[int]]:
    return lambda text: artifact.text.tokenizer.encode(text, add_special_tokens=False).ids


def align(
    artifact: Artifact,
    lora: peft.LoraModel,
    draw: Callable[[int], Sample],
    folder: Path,
    recipe: Recipe,
    frozen: Callable[[str], bool] = lambda name: False,
    minutes: float = math.inf,
    encoder_share: float = 1.0,
) -> bool:
    """Trains the artifact's encoder and projector, and a LoRA of its language model; see `loop.train`.

    Args:
        lora: of the artifact's decoder; see `add_lora`.
        draw: the sample of a number from 0; its frames in whole clips of the encoder's size. Each is drawn once.
        frozen: which of the encoder's parameters are not trained, by name.
        encoder_share: of the recipe's learning rate, that the encoder has; the LoRA has all of it.
    """
    encoder, decoder = artifact.encoder, artifact.decoder
    lora.train()
    parameters = {f"encoder.{n}": p for n, p in unfrozen(encoder, frozen).items()}
    parameters |= {f"decoder.{n}": p for n, p in decoder.named_parameters() if p.requires_grad}
    text, encode = chat_text(artifact), answer_ids(artifact)
    device = encoder.mean.device

    def loss(step: int) -> Tensor:
        samples = [draw(step * recipe.batch + i) for i in range(recipe.batch)]
        clips = [sample.frames.reshape(-1, encoder.config.clip_length, *sample.frames.shape[1:]) for sample in samples]
        frames = torch.from_numpy(np.concatenate(clips)).to(device)
        rows = [lay_out(text, encode, s.questions, encoder, len(c)) for s, c in zip(samples, clips, strict=True)]
        with torch.autocast(device.type, torch.bfloat16):
            return answer_loss(decoder, rows, encoder(frames))

    def share(name: str) -> float:
        return encoder_share if name.startswith("encoder.") else 1.0

    return train(folder, parameters, loss, recipe, minutes, share)


def draw_from(folder: Path, encoder: EncoderConfig, frames: Sequence[int], seed: int) -> Callable[[int], Sample]:
    """Samples of a folder of questions: each epoch takes every video once, in an order of its own, and of each as many
    frames as one of `frames` says, at random (LiteFrame, Appendix A).

    Raises:
        InputError: the folder holds no questions, or a number of frames is not in whole clips.
    """
    videos = list(read_questions(folder).items())
    for count in frames:
        if count < 1 or count % encoder.clip_length:
            raise InputError(f"{count} frames, expected a multiple of {encoder.clip_length}, the frames of a clip")

    def draw(number: int) -> Sample:
        epoch, place = divmod(number, len(videos))
        random = np.random.default_rng((seed, epoch))
        path, questions = videos[random.permutation(len(videos))[place]]
        most = int(np.random.default_rng((seed, epoch, place)).choice(frames))
        clips = read_frames(path, most, encoder.clip_length, encoder.vit.image_size)
        return Sample(clips.reshape(-1, *clips.shape[2:]), 1.0, questions)

    return draw


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="align", description="Teaches an artifact to answer questions about videos (LMA)."
    )
    parser.add_argument("artifact", type=Path, help="an artifact, as export/build_engine.py takes it")
    parser.add_argument("questions", type=Path, help="a folder with questions.jsonl and the videos it names")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; the artifact is put there, too")
    parser.add_argument("--frames", type=int, nargs="+", default=[128, 256, 512], help="(default: %(default)s)")
    add_options(parser, batch=128)
    options = parser.parse_args(arguments)
    check_base(options.artifact)
    artifact = load_artifact(options.artifact)
    recipe = recipe_of(options)
    draw = draw_from(options.questions, artifact.encoder.config, options.frames, recipe.seed)
    artifact.encoder.to(best_device())
    artifact.decoder.to(best_device())
    lora = add_lora(artifact.decoder)
    if not align(artifact, lora, draw, options.output / "run", recipe, minutes=options.minutes):
        print(TIME_IS_OVER)
    else:
        write_artifact(options.artifact, artifact, lora, options.output / "artifact")
        print(options.output / "artifact")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
