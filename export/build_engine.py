"""Artifact in, engine package out: load, trace, verify, compile, verify again, package.

python export/build_engine.py ARTIFACT --target cpu
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # run as a script: this folder's modules must not shadow the standard library's
    sys.path.pop(0)
    from liteframe.export import build_engine

    sys.exit(build_engine.command())

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from ..engines import compile_onnxruntime, compile_tensorrt, package
from ..engines.package import Engine, File, GateError, Graph, InputError, Manifest, Precision, Profile, TensorSpec
from ..engines.targets import PLAIN_OPERATORS, PLAIN_OPSET, TARGETS, Dialect, Target
from ..runtime.cli import guard
from .artifact import Artifact, load_artifact
from .models.reducers import REDUCERS, WINDOWS
from .trace import OPSETS, WeightsFile, trace_decoder, trace_encoder
from .verify import Verifier

QUESTION_POSITIONS = 1024  # of the cache, beside the video: chat text, question, answer
UNIT_TEXT_POSITIONS = 16  # prompt text around one unit, at most
CHUNK = 512
GRAPHS: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
MAX_CLIPS = 16
VERSIONS = ("liteframe", "torch", "onnx", "onnxscript", "onnxruntime")
Progress = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


def build(
    artifact_path: Path,
    target_name: str,
    output: Path,
    frames: int = 64,
    reducer: str | None = None,
    ratio: int | None = None,
) -> package.Package:
    """Builds an engine package, or, for a target whose compiler runs on the device only, a bundle.

    Args:
        frames: the most frames of a video; with the text around them they size the KV cache.
        reducer, ratio: replace the reducer of an artifact with a frame-wise tower; see `load_artifact`.

    Raises:
        InputError: bad artifact or arguments.
        GateError: a graph or engine differs from its torch module by more than its gate allows.
    """
    target = TARGETS[target_name]
    with package.new_folder(output) as folder:
        with _step("load the artifact"):
            artifact = load_artifact(artifact_path, reducer, ratio)
        model = _describe_model(artifact, frames, target)
        with _step("run the torch modules"):
            verifier = Verifier(artifact.encoder, artifact.decoder)
        graphs = _make_graphs(artifact, model, target, verifier, folder / "graphs")
        engines = _make_engines(graphs, target, verifier, folder)
        if target.compiler == "onnxruntime":  # its engines are the graphs, optimised
            for path in sorted((folder / "graphs").iterdir()):
                path.unlink()
            (folder / "graphs").rmdir()
            graphs = []
        with _step("write embeddings, tokenizer and manifest"):
            manifest = Manifest(
                format=1,
                target=target.name,
                built_from=package.Origin(
                    artifact=artifact.name,
                    artifact_sha256=artifact.sha256,
                    versions={name: version(name) for name in VERSIONS},
                ),
                model=model,
                text=_write_text(artifact, folder),
                graphs=graphs,
                engines=engines,
                sha256="",
            )
            package.write_manifest(folder, manifest)
    return package.open_package(output)


@contextmanager
def _step(what: str) -> Iterator[None]:
    """A spinner while it lasts; a line with its time and the process's peak memory when done."""
    start = time.perf_counter()
    with Progress.status(f"{what} ..."):
        yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Progress.print(f"{time.perf_counter() - start:7.1f} s  {peak:5.2f} GB  {what}", highlight=False)


def _describe_model(artifact: Artifact, frames: int, target: Target) -> package.Model:
    encoder, decoder = artifact.encoder, artifact.decoder.config
    clip = encoder.config.clip_length
    if frames < clip or frames % clip:
        raise InputError(f"--frames {frames}: expected a multiple of {clip}, the frames of a clip")
    clips = frames // clip
    positions = clips * (encoder.tokens_per_clip + encoder.units_per_clip * UNIT_TEXT_POSITIONS) + QUESTION_POSITIONS
    capacity = -(-positions // 256) * 256
    if capacity > decoder.max_position_embeddings:
        raise InputError(
            f"--frames {frames} needs a KV cache of {capacity} positions, the language model was trained for "
            f"{decoder.max_position_embeddings}; build with fewer frames or a stronger --ratio"
        )
    return package.Model(
        image_size=encoder.config.vit.image_size,
        clip_length=clip,
        units_per_clip=encoder.units_per_clip,
        tokens_per_clip=encoder.tokens_per_clip,
        hidden_size=decoder.hidden_size,
        vocabulary=decoder.vocab_size,
        layers=decoder.num_hidden_layers,
        kv_heads=decoder.num_key_value_heads,
        head_dim=decoder.head_dim,
        max_frames=frames,
        capacity=capacity,
        # a CPU gains nothing from batches of clips, and holds one clip's activations instead of many
        max_clips=1 if target.name == "cpu" else min(clips, MAX_CLIPS),
        chunk=CHUNK,
    )


def _make_graphs(
    artifact: Artifact, model: package.Model, target: Target, verifier: Verifier, folder: Path
) -> list[Graph]:
    """Both graphs in every dialect of the target; the dialects of a graph share one file of weights."""
    folder.mkdir()
    # TensorRT wants the cache's capacity fixed; ONNX Runtime computes over all of it, so there it grows while running
    capacity = None if target.compiler == "onnxruntime" else model.capacity
    made = []
    for name in GRAPHS:
        data = folder / f"{name}.data"
        drafts: list[tuple[Dialect, Path, list[TensorSpec], list[TensorSpec], dict[str, float]]] = []
        with WeightsFile(data) as weights:
            for dialect in target.dialects:
                path = folder / f"{name}.{dialect}.onnx"
                with _step(f"export the {name} graph, {dialect}"):
                    if name == "encoder":
                        traced = trace_encoder(artifact.encoder, dialect)
                    else:
                        traced = trace_decoder(artifact.decoder, dialect, capacity)
                    inputs, outputs = (_specs(values, model) for values in (traced.graph.inputs, traced.graph.outputs))
                    weights.save(traced, path)
                    del traced
                    if dialect == "plain":
                        _check_plain(path)
                with _step(f"verify the {name} graph, {dialect}"):
                    parity = verifier.encoder(path) if name == "encoder" else verifier.decoder(path)
                drafts.append((dialect, path, inputs, outputs, parity))
        shared = package.describe_file(folder.parent, data)
        made += [
            Graph(
                name=name,
                dialect=dialect,
                opset=OPSETS[dialect],
                files=[package.describe_file(folder.parent, path), shared],
                inputs=inputs,
                outputs=outputs,
                parity=parity,
            )
            for dialect, path, inputs, outputs, parity in drafts
        ]
    return made


def _specs(values: Sequence[ir.Value], model: package.Model) -> list[TensorSpec]:
    """Graph inputs or outputs with the range of each dimension that varies."""
    ranges = {
        "clips": (1, min(4, model.max_clips), model.max_clips),
        "sequence": (1, 64, model.chunk),
        "past": (0, model.capacity // 2, model.capacity - 1),
        "capacity": (1, model.capacity, model.capacity),
    }
    specs = []
    for value in values:
        assert value.shape is not None and value.dtype is not None
        shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
        profile = None
        if value.is_graph_input() and any(isinstance(d, str) for d in shape):
            low, common, high = ([d if isinstance(d, int) else ranges[d][i] for d in shape] for i in range(3))
            profile = Profile(min=low, opt=common, max=high)
        dtype = value.dtype.numpy().name
        specs.append(TensorSpec(name=str(value.name), dtype=dtype, shape=shape, profile=profile))
    return specs


def _check_plain(path: Path) -> None:
    """Raises GateError when a `plain` graph needs more than TensorRT 10's first parsers have."""
    model = onnx.load(path, load_external_data=False)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    functions = {function.name for function in model.functions}
    foreign = sorted({node.op_type for node in nodes} - PLAIN_OPERATORS - functions)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if foreign or opset > PLAIN_OPSET:
        raise GateError(f"{path.name}: opset {opset} with {', '.join(foreign)}, which TensorRT 10.3 may not parse")


def _make_engines(graphs: list[Graph], target: Target, verifier: Verifier, folder: Path) -> list[Engine]:
    compiler = target.ahead_of_time or target.compiler
    fused = [graph for graph in graphs if graph.dialect == "fused"]
    if target.proof is not None:
        for graph in fused:
            with _step(f"prove the {graph.name} graph: TensorRT-RTX compiles it for {target.proof}"):
                path = folder / graph.files[0].path
                compiled = compile_tensorrt.compile_graph(path, graph.inputs, "tensorrt-rtx", [target.proof])
                _check_precision(graph, compiled.found)
        return []
    engines = []
    for graph in fused:
        path = folder / graph.files[0].path
        parity: dict[str, float] | None = None
        with _step(f"compile the {graph.name} for {target.name} with {compiler}"):
            if target.provider is not None:
                files = compile_onnxruntime.compile_graph(path, folder / f"{graph.name}.onnx", target.provider)
                found, made_by, inputs = _types_found(files[0]), version("onnxruntime"), _without_profiles(graph.inputs)
            else:
                assert compiler == "tensorrt-rtx"
                compiled = compile_tensorrt.compile_graph(path, graph.inputs, compiler, target.capabilities)
                files = [folder / f"{graph.name}.engine"]
                files[0].write_bytes(compiled.engine)
                found, made_by, inputs = compiled.found, compiled.version, graph.inputs
            _check_precision(graph, found)
        if target.name == "cpu":
            with _step(f"verify the compiled {graph.name}"):
                parity = verifier.encoder(files[0]) if graph.name == "encoder" else verifier.decoder(files[0])
        engines.append(
            Engine(
                name=graph.name,
                dialect=graph.dialect,
                files=[package.describe_file(folder, file) for file in files],
                inputs=inputs,
                outputs=graph.outputs,
                precision=Precision(asked="fp32", found=found),
                compiler=compiler,
                compiler_version=made_by,
                capabilities=list(target.capabilities),
                parity=parity,
            )
        )
    return engines


def _without_profiles(specs: list[TensorSpec]) -> list[TensorSpec]:
    """ONNX Runtime takes any size."""
    return [msgspec.structs.replace(spec, profile=None) for spec in specs]


def _types_found(path: Path) -> dict[str, int]:
    """How many floating-point tensors of each type an ONNX graph computes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    found: dict[str, int] = {}
    for value in (*model.graph.value_info, *model.graph.output):
        name = names.get(value.type.tensor_type.elem_type)
        if name:
            found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def _check_precision(graph: Graph, found: dict[str, int]) -> None:
    if set(found) != {"fp32"}:
        raise GateError(f"{graph.name}: asked for fp32, the compiled network computes tensors of {found}")


def _write_text(artifact: Artifact, folder: Path) -> package.Text:
    text, prompt = artifact.text, artifact.prompt
    table = artifact.decoder.model.embed_tokens.weight.detach().numpy()
    np.save(folder / "embeddings.npy", table, allow_pickle=False)
    (folder / "tokenizer.json").write_text(text.tokenizer.to_str(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text.chat_template, encoding="utf-8")

    def file(name: str) -> File:
        return package.describe_file(folder, folder / name)

    return package.Text(
        tokenizer=file("tokenizer.json"),
        chat_template=file("chat_template.jinja"),
        embeddings=file("embeddings.npy"),
        end_of_turn=text.end_of_turn,
        special_tokens=text.special_tokens,
        unit_prefix=prompt.unit_prefix,
        unit_suffix=prompt.unit_suffix,
        notice=artifact.notice,
    )


def print_report(made: package.Package) -> None:
    table = Table("", "compiler", "capability", "precision found", "MB", "against torch", box=None, pad_edge=False)
    parts: list[Engine | Graph] = [*made.manifest.engines, *made.manifest.graphs]
    for part in parts:
        size = f"{sum(file.bytes for file in part.files) / 1e6:.0f}"
        figures = "not run: no such device here"
        if part.parity is not None:
            figures = f"cosine {part.parity['cosine']:.7f}"
        if isinstance(part, Engine):
            found = ", ".join(f"{count} {name}" for name, count in part.precision.found.items())
            capability = " ".join(part.capabilities) or "any"
            table.add_row(f"{part.name} engine", part.compiler, capability, found, size, figures)
        else:
            table.add_row(f"{part.name} graph, {part.dialect}", "", "", "", size, figures)
    Progress.print(table)
    Progress.print(f"{'engine package' if made.manifest.engines else 'bundle'}: {made.folder}", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="liteframe build", description="Build an engine package from an artifact.")
    parser.add_argument("artifact", type=Path, help="folder with config.json and weights")
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--frames", type=int, default=64, help="the most frames of a video (default: %(default)s)")
    parser.add_argument("--reducer", choices=REDUCERS, help="replaces the reducer behind a frame-wise tower")
    parser.add_argument("--ratio", type=int, choices=WINDOWS, help="how much the reducer compresses")
    parser.add_argument("--output", type=Path, help="default: ARTIFACT-TARGET in the current folder")
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    output = options.output or Path(f"{options.artifact.resolve().name}-{options.target}")
    made = build(options.artifact, options.target, output, options.frames, options.reducer, options.ratio)
    print_report(made)
    if options.json:
        print(msgspec.json.encode({"package": str(made.folder), "manifest": made.manifest}).decode())
    return 0


def command() -> int:
    """The script's entry point: `main` with the exit codes and messages of the `liteframe` command."""
    return guard(main, sys.argv[1:])
