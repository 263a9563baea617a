"""The engine package: a folder of plain files and one strict manifest. docs/package.md specifies it field by field.

    manifest.json               what this file describes
    encoder.onnx|.engine ...    engines, readable by ONNX Runtime, trtexec and polygraphy as they are
    graphs/                     for TensorRT targets: the ONNX graphs, from which `liteframe compile` makes engines
    embeddings.npy              the language model's token embeddings, memory-mapped by the runtime
    tokenizer.json chat_template.jinja

Nothing in a package is loaded before `open_package` has checked all of it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from .targets import TARGETS, Asked, Compiler, Dialect

FORMAT = 1
Part = Literal["encoder", "decoder", "merger", "query"]  # what graphs and engines there may be
Way = Literal["bodies", "embedded", "library"]  # in which custom operators get into an engine
MANIFEST = "manifest.json"
QUESTION_POSITIONS = 1024  # of the cache, beside the video: chat text, question, answer
UNIT_TEXT_POSITIONS = 16  # for the prompt text around one unit, where a build does not find that it takes more


class InputError(Exception):
    """Wrong use or bad input. The message says what happened, where, what was expected and what to do; exit code 2."""


class GateError(Exception):
    """A comparison came out worse than its gate allows; exit code 1."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class File(_Strict, frozen=True):
    """A file of the package: its path relative to the manifest, with forward slashes."""

    path: str
    bytes: int
    sha256: str


class Profile(_Strict, frozen=True):
    """Smallest, most common and largest shape of an input (a TensorRT optimization profile)."""

    min: list[int]
    opt: list[int]
    max: list[int]


class TensorSpec(_Strict, frozen=True):
    """An input or output; a dimension is a number or, where it varies, a name."""

    name: str
    dtype: str
    shape: list[int | str]
    profile: Profile | None


class Kept(_Strict, frozen=True):
    """A node that was left in a higher precision than the one asked for, and why."""

    node: str
    type: str
    reason: str


class Precision(_Strict, frozen=True):
    """What was asked for, how many tensors of each type the network has, and which nodes are exceptions."""

    asked: Asked
    found: dict[str, int]
    kept: list[Kept]


class Operators(_Strict, frozen=True):
    """How the custom operators got into an engine; see engines/operators.py.

    Attributes:
        milliseconds: median of a run of the engine, by each way that was tried on the device; empty if one was.
        library: what is loaded before the engine, if its kernels come from one.
    """

    way: Way
    milliseconds: dict[Way, float]
    library: File | None


class Graph(_Strict, frozen=True):
    """An ONNX graph. `files`: the graph, then the weights beside it. `parity`: figures against the torch module."""

    name: Part
    dialect: Dialect
    opset: int
    files: list[File]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: Precision
    parity: dict[str, float]


class Engine(_Strict, frozen=True):
    """A compiled graph. `parity` is null where the engine could not be run on the machine that compiled it, `operators`
    where the graph holds no custom ones."""

    name: Part
    dialect: Dialect
    files: list[File]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precision: Precision
    compiler: Compiler
    compiler_version: str
    capabilities: list[str]
    operators: Operators | None
    parity: dict[str, float] | None


def views_of(tiles: int, thumbnail: bool = True) -> int:
    """Pictures of a frame that the encoder is given: its tiles and, where there are several, the whole as another."""
    return tiles + (thumbnail and tiles > 1)


def positions(clips: int, views: int, tokens_per_clip: int, units_per_clip: int, unit_text: int) -> int:
    """Of the cache that clips take, whose frames the encoder is given in so many views, with their text and a
    question's; see `Model`."""
    return clips * (views * tokens_per_clip + units_per_clip * unit_text) + QUESTION_POSITIONS


class LongVideo(_Strict, frozen=True):
    """How a video of many frames is kept in few positions; see runtime/long_video.py.

    Attributes:
        max_frames: of such a video.
        keyframes: how many clips, or frames, keep all their visual tokens.
        similar: cosine from which on a candidate repeats a keyframe that is kept.
        redundancy_weight, temperature: lambda and alpha of differential feature merging.
    """

    max_frames: int
    keyframes: int
    similar: float
    redundancy_weight: float
    temperature: float


class Model(_Strict, frozen=True):
    """What the runtime must know of the model.

    Attributes:
        image_size: height and width of the frames that the encoder takes.
        clip_length: frames a clip.
        units_per_clip: time steps left after compression; each is introduced by its own prompt text.
        tokens_per_clip: visual tokens a clip, all units together.
        max_frames, max_tiles: what the package was built for; tiles are a frame's, its thumbnail not counted, and 1 is
            the whole frame. Fewer frames may come in more tiles, as far as they fit `capacity`.
        unit_text: positions of the cache that are reckoned for the text around one unit.
        capacity: positions that the KV cache may hold.
        max_clips, chunk: the most clips and the most positions that one call of the engines may take.
        long_video: null where the package was not built for such.
    """

    image_size: tuple[int, int]
    clip_length: int
    units_per_clip: int
    tokens_per_clip: int
    hidden_size: int
    vocabulary: int
    layers: int
    kv_heads: int
    head_dim: int
    max_frames: int
    max_tiles: int
    unit_text: int
    capacity: int
    max_clips: int
    chunk: int
    long_video: LongVideo | None

    def positions(self, frames: int, views: int) -> int:
        """Of the cache that frames take in so many views each, with their text and a question's."""
        clips = frames // self.clip_length
        return positions(clips, views, self.tokens_per_clip, self.units_per_clip, self.unit_text)

    def most_frames(self, views: int) -> int:
        """How many frames fit the cache in so many views each: whole clips, at most `max_frames`."""
        clip = self.positions(self.clip_length, views) - QUESTION_POSITIONS
        clips = max(0, self.capacity - QUESTION_POSITIONS) // clip
        return min(clips * self.clip_length, self.max_frames)

    def most_tiles(self, frames: int, thumbnail: bool = True) -> int:
        """In how many tiles so many frames fit the cache; 0 if not even in one."""
        clips = frames // self.clip_length
        views = max(0, self.capacity - self.positions(frames, 0)) // (clips * self.tokens_per_clip)
        return max(min(views, 1), views - 1) if thumbnail else views


class Text(_Strict, frozen=True):
    """Prompt and tokenizer. `unit_prefix` may hold {first} and {last}, the 1-based numbers of the frames of a unit;
    `run_prefix`, of a run of merged frames, too, and where it is null that has the unit's. `query_tokenizer` is the
    query encoder's, where there is one."""

    tokenizer: File
    chat_template: File
    embeddings: File
    query_tokenizer: File | None
    end_of_turn: list[int]
    special_tokens: dict[str, str]
    unit_prefix: str
    unit_suffix: str
    run_prefix: str | None
    notice: str


class Origin(_Strict, frozen=True):
    artifact: str
    artifact_sha256: str
    versions: dict[str, str]


class Accuracy(_Strict, frozen=True):
    """Questions about videos, answered by the torch modules and by the engines, or by ONNX Runtime in their place.

    Attributes:
        modules, engines: percent right.
        different: answers that are not the same.
    """

    questions: int
    modules: float
    engines: float
    different: int


class Manifest(_Strict, frozen=True):
    """
    Attributes:
        commands: polygraphy's command lines and their inputs.
        drift: the report of how far layers are from FP32; none in FP32.
        allowed_drift: gates that failed and were overridden.
        accuracy: if it was asked for.
        sha256: of the manifest itself with this field left empty.
    """

    format: Literal[1]
    target: str
    built_from: Origin
    model: Model
    text: Text
    graphs: list[Graph]
    engines: list[Engine]
    commands: list[File]
    drift: list[File]
    allowed_drift: list[str]
    accuracy: Accuracy | None
    sha256: str

    def files(self) -> Iterator[File]:
        parts: list[Graph | Engine] = [*self.graphs, *self.engines]
        for part in parts:
            yield from part.files
        for engine in self.engines:
            if engine.operators is not None and engine.operators.library is not None:
                yield engine.operators.library
        yield from (*self.commands, *self.drift)
        yield from (self.text.tokenizer, self.text.chat_template, self.text.embeddings)
        if self.text.query_tokenizer is not None:
            yield self.text.query_tokenizer


class Package(msgspec.Struct, frozen=True):
    """A checked package."""

    folder: Path
    manifest: Manifest

    def path(self, file: File) -> Path:
        return inside(self.folder, file.path)

    def engine(self, name: str) -> Engine:
        """Raises InputError when the package is a bundle that has no engines yet."""
        for engine in self.manifest.engines:
            if engine.name == name:
                return engine
        raise InputError(
            f"{self.folder}: a bundle for {self.manifest.target}, without engines; "
            f"on the device run: liteframe compile {self.folder}"
        )

    def has(self, name: Part) -> bool:
        """Whether it was built with such a graph or engine."""
        parts: list[Graph | Engine] = [*self.manifest.graphs, *self.manifest.engines]
        return any(part.name == name for part in parts)

    def graph(self, name: str, dialect: Dialect) -> Graph:
        for graph in self.manifest.graphs:
            if (graph.name, graph.dialect) == (name, dialect):
                return graph
        raise InputError(f"{self.folder}: holds no {name} graph in the {dialect} dialect; build the package again")


def inside(folder: Path, relative: str) -> Path:
    """A path from untrusted text, held within its folder; links that lead out of it count as outside.

    Raises:
        InputError: the path is absolute, has a `..`, or ends up elsewhere.
    """
    parts = PurePosixPath(relative)
    path = folder / parts
    outside = not relative or parts.is_absolute() or ".." in parts.parts or "\\" in relative
    try:
        outside = outside or not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, a NUL
        outside = True
    if outside:
        raise InputError(
            f"{folder}: refers to {relative!r}, which lies outside the folder; expected a path in it, put it there"
        )
    return path


def hash_file(path: Path) -> str:
    """SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def describe_file(folder: Path, path: Path) -> File:
    relative = path.relative_to(folder).as_posix()
    return File(path=relative, bytes=path.stat().st_size, sha256=hash_file(path))


def open_package(folder: str | Path) -> Package:
    """Reads and checks a package: the manifest's form and hash, then presence, size and SHA-256 of every file.

    Raises:
        InputError: says what was found, what was expected, and what mends it.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir() or not path.is_file():
        raise InputError(f"{folder}: not an engine package (no {MANIFEST}); build one with: liteframe build ARTIFACT")
    manifest = _read_manifest(path)
    for file in manifest.files():
        found = inside(folder, file.path)
        if not _is_file(found):
            raise InputError(f"{found}: missing, although {MANIFEST} lists it; copy the whole package again")
        if found.stat().st_size != file.bytes:
            raise InputError(
                f"{found}: {found.stat().st_size} bytes, {MANIFEST} says {file.bytes}; truncated or replaced, "
                "copy the package again"
            )
        if hash_file(found) != file.sha256:
            raise InputError(
                f"{found}: SHA-256 differs from {MANIFEST}; changed since it was built, build or copy it again"
            )
    return Package(folder=folder, manifest=manifest)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _read_manifest(path: Path) -> Manifest:
    content = path.read_bytes()
    try:
        version = msgspec.json.decode(content, type=dict)["format"]
    except KeyError:
        raise InputError(f"{path}: not a manifest (no field format); copy or build the package again") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest ({_printable(error)}); copy or build the package again") from None
    if version != FORMAT:
        raise InputError(
            f"{path}: package format {version!r}, this version of liteframe reads {FORMAT}; "
            "build the package again with this version, or install the one that built it"
        )
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: {_printable(error)}; build the package again with this version of liteframe"
        ) from None
    if _self_hash(manifest) != manifest.sha256:
        raise InputError(
            f"{path}: changed since it was built (its own SHA-256 does not match); build the package again"
        )
    if manifest.target not in TARGETS:
        raise InputError(
            f"{path}: target {manifest.target!r}, expected one of {', '.join(TARGETS)}; build the package again"
        )
    return manifest


def _printable(error: Exception) -> str:
    """An error's text, which may quote what it stumbled over, on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


def _self_hash(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, sha256="")
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Signs the manifest with its own hash and writes it, complete or not at all."""
    signed = msgspec.structs.replace(manifest, sha256=_self_hash(manifest))
    text = msgspec.json.format(msgspec.json.encode(signed, order="deterministic"), indent=1) + b"\n"
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        temporary.write_bytes(text)
        temporary.replace(folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes it when all went well, and vanishes when not.

    Raises:
        InputError: `output` exists, now or at the end, its parent can't be written, or the disk is full.
    """
    try:
        if output.exists() or output.is_symlink():
            raise InputError(f"{output}: already exists; remove it or choose another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output.parent}: cannot be written ({error.strerror}); choose another --output") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(output)
        except OSError as error:
            raise InputError(
                f"{output}: cannot take the finished folder ({error.strerror}); remove what came there meanwhile"
            ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); nothing of it was kept, make room or choose another "
            "--output"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
