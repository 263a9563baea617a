"""Training artifacts: a folder with config.json becomes an encoder, a decoder and their text.

    LiteFrame folder     config.json ("model_type": "liteframe"), model.safetensors, tokenizer; docs/artifact.md
    InternVL3 folder     as OpenGVLab publishes it, or its -hf form; WAP 16x is put behind the tower
    any of them          with adapter/ beside, a LoRA adapter in PEFT's format, which is merged

Nothing is unpickled: weights are safetensors or GGUF.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import msgspec
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from ..engines.package import InputError, hash_file, inside
from ..runtime.text import parse_template
from .checkpoint import Checkpoint, load_parameters
from .gguf_decoder import GGUFFile
from .layouts import (
    HfNames,
    LiteFrameNames,
    OriginalNames,
    decoder_config,
    internvl_decoder_config,
    internvl_encoder_config,
)
from .lora import merge_adapter
from .models.decoder import Decoder, DecoderConfig
from .models.encoder import EncoderConfig, VideoEncoder
from .models.liteframe import LiteFrameConfig
from .models.reducers import TOKEN_REDUCERS, window_of
from .models.vit import interpolate_position_embedding
from .query_encoder import QueryEncoder, load_query_encoder
from .tokenizer import byte_level_bpe, parse_merges


class PromptConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Text around the visual tokens of one unit; {first} and {last} are the 1-based numbers of its frames.
    `run_prefix`: in front of a run of merged frames of a long video, where that is not `unit_prefix`."""

    unit_prefix: str
    unit_suffix: str
    run_prefix: str | None = None


class LongVideoConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a video of thousands of frames is thinned out, if the model was trained so; the defaults are those of
    ViLaMP's code. See package.LongVideo."""

    similar: float = 0.85
    redundancy_weight: float = 1.0
    temperature: float = 0.01

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"long_video.temperature is {self.temperature}, expected more than 0")


class LiteFrameFolder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="model_type", tag="liteframe"):
    """config.json of a LiteFrame folder. `decoder` is a transformers config, or {"gguf": file}."""

    version: int
    encoder: EncoderConfig
    decoder: dict[str, Any]
    prompt: PromptConfig | None = None
    notice: str = ""
    long_video: LongVideoConfig = LongVideoConfig()


class _Token(msgspec.Struct):
    content: str
    special: bool = False
    normalized: bool = False


class _Template(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    """What is read of tokenizer_config.json; a token is a string or an object, a template may be several by name."""

    tokenizer_class: str | None = None
    chat_template: str | list[_Template] | None = None
    added_tokens_decoder: dict[int, _Token] = msgspec.field(default_factory=dict)
    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    pad_token: str | _Token | None = None
    unk_token: str | _Token | None = None


class _Ends(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


_Config = TypeVar("_Config", EncoderConfig, DecoderConfig)
_Module = TypeVar("_Module", VideoEncoder, Decoder)
_Read = TypeVar("_Read")


@dataclass
class TextFiles:
    """
    Attributes:
        tokenizer: tokenizer.json of the `tokenizers` library.
        special_tokens: what a chat template may ask for by name, such as bos_token.
        end_of_turn: token ids that end an answer.
    """

    tokenizer: Tokenizer
    chat_template: str
    special_tokens: dict[str, str]
    end_of_turn: list[int]


@dataclass
class Artifact:
    """
    Attributes:
        own_prompt: None where the artifact has none; see `prompt`.
    """

    name: str
    sha256: str
    encoder: VideoEncoder
    decoder: Decoder
    text: TextFiles
    own_prompt: PromptConfig | None
    notice: str
    long_video: LongVideoConfig
    query_encoder: QueryEncoder | None

    @property
    def prompt(self) -> PromptConfig:
        return self.own_prompt or internvl_prompt(self.encoder.units_per_clip == self.encoder.config.clip_length)


def internvl_prompt(frames_apart: bool) -> PromptConfig:
    """InternVL's text around visual tokens, with a range where they are of several frames."""
    several = "Frames {first}-{last}: <img>"
    if not frames_apart:
        return PromptConfig(several, "</img>\n")
    return PromptConfig("Frame{first}: <img>", "</img>\n", run_prefix=several)


def load_artifact(folder: Path, reducer: str | None = None, ratio: int | None = None) -> Artifact:
    """Reads and checks an artifact.

    Args:
        reducer: a key of REDUCERS that replaces the artifact's own, for frame-wise towers.
        ratio: how many tokens become one, as far as the reducer admits it; None keeps the artifact's own.

    Raises:
        InputError: anything is missing, damaged, contradictory or unknown; names the file and the tensor.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected an artifact with a config.json")
    config = _read_json(path)
    model_type = config.get("model_type")
    try:
        if model_type == "liteframe":
            return _load_liteframe(folder, path, reducer, ratio)
        if model_type in ("internvl", "internvl_chat"):
            return _load_internvl(folder, path, config, model_type == "internvl", reducer, ratio)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {_field_problem(error)}") from None
    except ZeroDivisionError:
        raise InputError(f"{path}: a size, stride or window is 0, expected at least 1") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    raise InputError(
        f"{path}: model_type {model_type!r} is not supported, expected liteframe, internvl or internvl_chat"
    )


def _field_problem(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else f"a field has the wrong type ({error})"


def _load_liteframe(folder: Path, path: Path, reducer: str | None, ratio: int | None) -> Artifact:
    config = msgspec.json.decode(path.read_bytes(), type=LiteFrameFolder)
    if config.version != 1:
        raise InputError(f"{path}: version {config.version}, this version of liteframe reads 1")
    encoder = _build_encoder(config.encoder, reducer, ratio)
    checkpoint = Checkpoint(folder)
    names = LiteFrameNames()
    used = load_parameters(encoder, checkpoint, names.encoder, _resampling(encoder))
    files = _files_of(checkpoint)
    if "gguf" in config.decoder:
        gguf = GGUFFile(inside(folder, config.decoder["gguf"]))
        decoder = _build(Decoder, gguf.config())
        gguf.load(decoder)
        files.append(gguf.path)
        text = TextFiles(gguf.tokenizer(), gguf.chat_template(), {}, gguf.end_of_turn())
    else:
        decoder, decoder_used = _load_decoder(decoder_config(config.decoder), checkpoint, names.decoder)
        used |= decoder_used
        text, text_files = _load_text(folder, config.decoder, path)
        files += text_files
    checkpoint.refuse_extra(used, lambda name: False)
    if config.encoder.output_size != decoder.config.hidden_size:
        raise InputError(
            f"{path}: encoder.output_size {config.encoder.output_size} differs from the language model's "
            f"hidden size {decoder.config.hidden_size}"
        )
    return _finish(folder, encoder, decoder, text, [path, *files], config.prompt, config.notice, config.long_video)


def _load_internvl(
    folder: Path, path: Path, config: dict[str, Any], hf: bool, reducer: str | None, ratio: int | None
) -> Artifact:
    language_model = internvl_decoder_config(config, hf)
    encoder = _build_encoder(internvl_encoder_config(config, hf), reducer, ratio)
    checkpoint = Checkpoint(folder)
    names = HfNames(checkpoint.files) if hf else OriginalNames()
    used = load_parameters(encoder, checkpoint, names.encoder, _resampling(encoder))
    decoder, decoder_used = _load_decoder(language_model, checkpoint, names.decoder)
    checkpoint.refuse_extra(used | decoder_used, lambda name: name.endswith("rotary_emb.inv_freq"))
    text, text_files = _load_text(folder, config["text_config" if hf else "llm_config"], path)
    return _finish(folder, encoder, decoder, text, [path, *_files_of(checkpoint), *text_files], None, "")


def _build_encoder(config: EncoderConfig, reducer: str | None, ratio: int | None) -> VideoEncoder:
    if reducer is not None or ratio is not None:
        if isinstance(config.backbone, LiteFrameConfig):
            raise ValueError("--reducer and --ratio are for frame-wise towers; a LiteFrame student compresses inside")
        reducer = reducer or config.reducer
        if ratio is None and reducer != "none":
            ratio = config.ratio
        config = with_reducer(config, reducer, ratio)
    return _build(VideoEncoder, config)


def with_reducer(config: EncoderConfig, reducer: str, ratio: int | None) -> EncoderConfig:
    """The same with another reducer and, unless None, another ratio. Raises ValueError when it does not admit that."""
    window = config.window
    if ratio is not None and reducer not in TOKEN_REDUCERS:
        if reducer == "none" and ratio != 1:
            raise ValueError(
                f"ratio {ratio}: reducer none keeps every token, 1; expected another --reducer or no --ratio"
            )
        window, ratio = window_of(ratio, (config.clip_length, *config.vit.grid), config.shuffle), None
    return msgspec.structs.replace(config, reducer=reducer, window=window, ratio=ratio)


def _build(kind: Callable[[_Config], _Module], config: _Config) -> _Module:
    """A module of the sizes that a config asks for. Raises ValueError for sizes below zero or beyond memory."""
    try:
        return kind(config)
    except RuntimeError:
        part = "decoder" if kind is Decoder else "encoder"
        raise ValueError(f"sizes of the {part} are below zero, or beyond this machine's memory") from None


def _resampling(encoder: VideoEncoder) -> dict[str, Callable[[Tensor], Tensor]]:
    """Position embeddings stored for another image size are resampled to the one the encoder runs at."""
    vit = encoder.config.vit
    if vit.pretrained_image_size is None:
        return {}
    old = tuple(side // vit.patch_size for side in vit.pretrained_image_size)

    def resample(embedding: Tensor) -> Tensor:
        if embedding.ndim != 2 or embedding.shape[0] != 1 + old[0] * old[1]:
            return embedding  # the shape check that follows names the tensor
        return interpolate_position_embedding(embedding, old, vit.grid)

    prefix = "backbone.vit." if isinstance(encoder.config.backbone, LiteFrameConfig) else "backbone."
    return {f"{prefix}position_embedding": resample}


def _load_decoder(
    config: DecoderConfig, checkpoint: Checkpoint, naming: Callable[[str], list[str]]
) -> tuple[Decoder, set[str]]:
    """A head in the file is used, whatever the config says of tying; without one it is tied if the config says so."""
    (head,) = naming("lm_head.weight")
    (embedding,) = naming("model.embed_tokens.weight")
    tied = config.tie_word_embeddings and head not in checkpoint
    decoder = _build(Decoder, msgspec.structs.replace(config, tie_word_embeddings=tied))
    used = load_parameters(
        decoder, checkpoint, lambda name: [embedding] if tied and name == "lm_head.weight" else naming(name)
    )
    return decoder, used


def _load_text(folder: Path, language_model: dict[str, Any], source: Path) -> tuple[TextFiles, list[Path]]:
    """Tokenizer, chat template, and the tokens that end an answer; `source` is where `language_model` was read."""
    path, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    files = [file for file in (path, generation) if file.exists()]
    config = _read_as(_TokenizerConfig, path) if path in files else _TokenizerConfig()
    tokenizer, tokenizer_files = _load_tokenizer(folder, config)
    template, template_files = _load_template(folder, config)
    try:
        parse_template(template)
    except jinja2.TemplateError as error:
        where = template_files[0] if template_files else path
        raise InputError(f"{where}: the chat template does not parse ({error})") from None
    tokens = {name: getattr(config, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special = {name: token if isinstance(token, str) else token.content for name, token in tokens.items() if token}
    ends: set[int] = set()
    for found in (
        _read_as(_Ends, generation) if generation in files else _Ends(),
        _convert(_Ends, language_model, source),
    ):
        value = found.eos_token_id
        ends.update(value if isinstance(value, list) else [value] if value is not None else [])
    if "eos_token" in special and (eos := tokenizer.token_to_id(special["eos_token"])) is not None:
        ends.add(eos)
    if not ends:
        raise InputError(f"{folder}: no eos_token_id in generation_config.json, config.json or tokenizer_config.json")
    return TextFiles(tokenizer, template, special, sorted(ends)), [*files, *tokenizer_files, *template_files]


def _load_tokenizer(folder: Path, config: _TokenizerConfig) -> tuple[Tokenizer, list[Path]]:
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return Tokenizer.from_file(str(path)), [path]
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: not a tokenizer ({error}); fetch it again") from None
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.exists() and merges.exists()):
        raise InputError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; expected a tokenizer there")
    if "Qwen2" not in (config.tokenizer_class or "Qwen2"):
        raise InputError(f"{folder}: {config.tokenizer_class} without a tokenizer.json; save the fast tokenizer there")
    added = sorted(config.added_tokens_decoder.items())
    special = [AddedToken(token.content, special=token.special, normalized=token.normalized) for _, token in added]
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = parse_merges(line for line in lines if line and not line.startswith("#version"))
    except ValueError as error:
        raise InputError(f"{merges}: {error}; fetch it again") from None
    try:
        tokenizer = byte_level_bpe(_read_as(dict[str, int], vocabulary), pairs, "qwen2", special)
    except ValueError as error:
        raise InputError(f"{vocabulary}: {error}; fetch it and {merges.name} again") from None
    for number, token in added:
        if tokenizer.token_to_id(token.content) != number:
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: added token {token.content} is number {number}, but "
                f"{tokenizer.token_to_id(token.content)} by {vocabulary.name}; save the fast tokenizer there"
            )
    return tokenizer, [vocabulary, merges]


def _load_template(folder: Path, config: _TokenizerConfig) -> tuple[str, list[Path]]:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8"), [path]
        except ValueError as error:
            raise InputError(f"{path}: not text ({error}); fetch it again") from None
    path = folder / "chat_template.json"
    found = (_read_as(_TokenizerConfig, path) if path.exists() else config).chat_template
    if isinstance(found, list):
        found = next((entry.template for entry in found if entry.name == "default"), None)
    if not found:
        raise InputError(
            f"{folder}: the tokenizer has no chat template; expected chat_template.jinja or tokenizer_config.json"
        )
    return found, [path] if path.exists() else []


def _finish(
    folder: Path,
    encoder: VideoEncoder,
    decoder: Decoder,
    text: TextFiles,
    files: list[Path],
    prompt: PromptConfig | None,
    notice: str,
    long_video: LongVideoConfig = LongVideoConfig(),  # noqa: B008 - frozen
) -> Artifact:
    query_encoder = None
    if (folder / "query_encoder").is_dir():
        query_encoder, query_files = load_query_encoder(folder / "query_encoder", encoder)
        files = [*files, *query_files]
    adapter = folder / "adapter"
    if adapter.is_dir():
        files = [*files, *merge_adapter(decoder, adapter)]
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return Artifact(
        folder.resolve().name,
        digest.hexdigest(),
        encoder.eval(),
        decoder.eval(),
        text,
        prompt,
        notice,
        long_video,
        query_encoder,
    )


def _files_of(checkpoint: Checkpoint) -> list[Path]:
    return sorted({checkpoint.source, *checkpoint.files.values()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected it in an artifact's folder") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def _read_as(kind: type[_Read], path: Path) -> _Read:
    return _convert(kind, _read_json(path), path)


def _convert(kind: type[_Read], content: dict[str, Any], path: Path) -> _Read:
    try:
        return msgspec.convert(content, kind, str_keys=True)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
