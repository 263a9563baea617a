"""What `liteframe compare` compares: every reducer behind one frame-wise tower, the paper's encoder variants, FastVLM's
encoder; with an artifact's weights, or with seeded random ones at two sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, TypeVar

import msgspec
import torch
from torch import nn

from ..engines.package import InputError
from .artifact import Artifact, internvl_prompt, with_reducer
from .layouts import decoder_config
from .models.decoder import Decoder
from .models.encoder import EncoderConfig, VideoEncoder
from .models.liteframe import Downsampling, LiteFrameConfig
from .models.reducers import REDUCERS
from .models.variants import FRAMES, VARIANTS
from .models.vit import ViTConfig
from .peers import NO_TIMM, FastVLMEncoder, has_timm
from .torch_engine import chat_text

Kind = Literal["reducer", "encoder", "peer"]
Size = Literal["small", "full"]
_Module = TypeVar("_Module", bound=nn.Module)
QUESTION = "What happens in this video?"
TEACHER, STUDENT = "ViT-L-24L", "DWTempConv"  # of VARIANTS
TABLE_2 = {  # milliseconds on an A100, slowest first; the teacher is the uncompressed tower
    "none" if name == TEACHER else name: paper.a100_ms
    for name, paper in sorted(
        ((name, variant.paper) for name, variant in VARIANTS.items() if variant.paper is not None),
        key=lambda item: -item[1].a100_ms,
    )
    if paper.table == "Table 2"
}
QWEN = {  # config.json of Qwen/Qwen2.5-0.5B-Instruct
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
SMALL_QWEN = QWEN | {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1024,
}


@dataclass(frozen=True)
class Prompt:
    """Positions that text takes: around each unit of a clip, and once."""

    unit: int
    once: int


# of random weights, which have no tokenizer: about what "Frame12: <img>...</img>" and a chat's turn take
RANDOM_PROMPT = Prompt(unit=8, once=40)


@dataclass
class Contender:
    """
    Attributes:
        config: None of a peer.
        make: the module, frames uint8 (clips, T, H, W, 3) -> visual tokens (clips, tokens_per_clip, D); None where
            there is none, for the reason in `note`.
        tokens_per_clip, units_per_clip: 0 where there is none.
        weights: whose.
        paper: the paper's milliseconds, and of what; "" where it has none.
    """

    name: str
    kind: Kind
    config: EncoderConfig | None
    make: Callable[[], nn.Module] | None
    tokens_per_clip: int
    units_per_clip: int
    weights: Literal["artifact", "random"]
    paper: str = ""
    note: str = ""


@dataclass
class Field:
    """
    Attributes:
        title: what is compared, in a line.
        reference: the contender whose total the others have at equal latency.
        ratio: of the reducers; None without any.
        hidden_size, max_positions: of the language model.
        prompt: by how many units a clip has.
        teacher: makes the frame-wise tower with `none` behind it; None where there is none.
    """

    title: str
    contenders: list[Contender]
    reference: str
    image_size: tuple[int, int]
    clip_length: int
    ratio: int | None
    decoder: Callable[[], Decoder]
    hidden_size: int
    max_positions: int
    prompt: Callable[[int], Prompt]
    teacher: Callable[[], VideoEncoder] | None
    artifact: Artifact | None


def random_field(size: Size, ratio: int) -> Field:
    """All methods with seeded random weights: the paper's sizes, or the same families in small.

    Raises:
        InputError: the ratio does not divide the teacher's grid.
    """
    language_model = decoder_config(QWEN if size == "full" else SMALL_QWEN)
    variants = {
        name: variant.backbone if size == "full" else _small(variant.backbone) for name, variant in VARIANTS.items()
    }
    teacher = EncoderConfig(backbone=variants[TEACHER], output_size=language_model.hidden_size)

    def make(config: EncoderConfig) -> VideoEncoder:
        return _random(VideoEncoder, config)

    contenders = _reducers(teacher, ratio, make, "random")
    contenders[0].paper = _paper_ms(TEACHER)
    for name, backbone in variants.items():
        if name != TEACHER:
            config = msgspec.structs.replace(teacher, backbone=backbone)
            contenders.append(_contender(name, "encoder", config, make, "random", _paper_ms(name)))
    contenders.append(_fastvlm(size, teacher))
    return Field(
        title=f"{size} size, random weights",
        contenders=contenders,
        reference=STUDENT,
        image_size=teacher.vit.image_size,
        clip_length=teacher.clip_length,
        ratio=ratio,
        decoder=lambda: _random(Decoder, language_model),
        hidden_size=language_model.hidden_size,
        max_positions=language_model.max_position_embeddings,
        prompt=lambda units: RANDOM_PROMPT,
        teacher=partial(make, with_reducer(teacher, "none", 1)),
        artifact=None,
    )


def artifact_field(artifact: Artifact, ratio: int | None, frames: int) -> Field:
    """Every reducer on an artifact's frame-wise tower, or its LiteFrame student as it is; and FastVLM's encoder.

    Args:
        ratio: None is 16, the paper's, for a tower, and the student's own.
        frames: of a video, whose prompt is measured.

    Raises:
        InputError: a ratio for a student, or one that does not divide the tower's grid.
    """
    config = msgspec.structs.replace(artifact.encoder.config, merge_connector=False)
    weights = artifact.encoder.state_dict()

    def make(config: EncoderConfig) -> VideoEncoder:
        with torch.device("meta"):
            encoder = VideoEncoder(config)
        encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()}, assign=True)
        encoder.mean, encoder.std = artifact.encoder.mean, artifact.encoder.std
        return encoder.eval()

    tower = isinstance(config.backbone, ViTConfig)
    if tower:
        contenders = _reducers(config, ratio or 16, make, "artifact")
    elif ratio is not None:
        raise InputError(f"--ratio {ratio} is for frame-wise towers; {artifact.name} compresses inside, leave it out")
    else:
        contenders = [_contender("LiteFrame", "encoder", config, make, "artifact")]
    reference = "wap" if tower else "LiteFrame"
    contenders.append(_fastvlm("full", config))
    return Field(
        title=artifact.name,
        contenders=contenders,
        reference=reference,
        image_size=config.vit.image_size,
        clip_length=config.clip_length,
        ratio=(ratio or 16) if tower else None,
        decoder=lambda: artifact.decoder,
        hidden_size=artifact.decoder.config.hidden_size,
        max_positions=artifact.decoder.config.max_position_embeddings,
        prompt=cache(partial(_prompt, artifact, frames)),
        teacher=partial(make, with_reducer(config, "none", 1)) if tower else None,
        artifact=artifact,
    )


def _reducers(
    config: EncoderConfig,
    ratio: int,
    make: Callable[[EncoderConfig], VideoEncoder],
    weights: Literal["artifact", "random"],
) -> list[Contender]:
    """`none` first. One that does not admit the ratio is there with its reason, unless WAP does not."""
    found = []
    for name in sorted(REDUCERS, key=lambda name: name != "none"):
        try:
            reduced = with_reducer(config, name, 1 if name == "none" else ratio)
            found.append(_contender(name, "reducer", reduced, make, weights))
        except ValueError as error:
            if name in ("none", "wap"):
                raise InputError(f"--ratio {ratio}: {error}") from None
            found.append(Contender(name, "reducer", None, None, 0, 0, weights, note=str(error)))
    return found


def _contender(
    name: str,
    kind: Kind,
    config: EncoderConfig,
    make: Callable[[EncoderConfig], VideoEncoder],
    weights: Literal["artifact", "random"],
    paper: str = "",
) -> Contender:
    with torch.device("meta"):
        shape = VideoEncoder(config)
    counts = shape.tokens_per_clip, shape.units_per_clip
    return Contender(name, kind, config, partial(make, config), *counts, weights, paper)


def _fastvlm(size: Size, config: EncoderConfig) -> Contender:
    if not has_timm():
        return Contender("FastVLM", "peer", None, None, 0, 0, "random", note=NO_TIMM)
    shape = "fastvit_mci3" if size == "full" else "fastvit_t8", config.vit.image_size, config.clip_length
    make = partial(_random, FastVLMEncoder, *shape, config.output_size)
    with torch.device("meta"):
        encoder = FastVLMEncoder(*shape, config.output_size)
    counts = encoder.tokens_per_clip, encoder.units_per_clip
    return Contender(
        "FastVLM", "peer", None, make, *counts, "random", "98.3 (32 frames, Table 4)", f"timm's {shape[0]}"
    )


def _random(kind: Callable[..., _Module], *arguments: object) -> _Module:
    """The same random weights each time, none zero."""
    torch.manual_seed(0)
    module = kind(*arguments).eval()
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return module


def _small(backbone: ViTConfig | LiteFrameConfig) -> ViTConfig | LiteFrameConfig:
    """A quarter of the blocks, an eighth of the width, 112 pixels in 16 x 16 patches: half the paper's grid."""
    if isinstance(backbone, LiteFrameConfig):
        downsampling = tuple(Downsampling(d.after // 4, d.stride) for d in backbone.downsampling)
        vit = _small(backbone.vit)
        return msgspec.structs.replace(backbone, vit=vit, downsampling=downsampling, head_size=backbone.head_size // 8)
    return msgspec.structs.replace(
        backbone,
        image_size=(112, 112),
        patch_size=7,
        hidden_size=backbone.hidden_size // 8,
        num_hidden_layers=backbone.num_hidden_layers // 4,
        num_attention_heads=backbone.num_attention_heads // 4,
        intermediate_size=backbone.intermediate_size // 8,
    )


def _paper_ms(name: str) -> str:
    paper = VARIANTS[name].paper
    if paper is None:
        return ""
    run = "" if paper.table == "Table 2" else ", where LiteFrame takes 204"  # that table is another run
    return f"{paper.a100_ms:g} ({FRAMES} frames, {paper.table}{run})"


def _prompt(artifact: Artifact, frames: int, units: int) -> Prompt:
    """As the artifact's template and tokenizer lay it out around the last unit, of which a clip has so many."""
    clip_length = artifact.encoder.config.clip_length
    text = chat_text(replace(artifact, own_prompt=artifact.own_prompt or internvl_prompt(units == clip_length)))
    unit = text.unit(frames - clip_length // units + 1, frames)
    once = text.turn(QUESTION, with_video=True)
    return Prompt(sum(map(len, unit)), sum(map(len, once)))
