"""Artifact in, engine package out: load, trace, place precision, verify, compile, verify again, package.

python export/build_engine.py ARTIFACT --target cpu [--precision int8 --calib VIDEOS]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

if __package__ in (None, ""):  # run as a script: this folder's modules must not shadow the standard library's
    sys.path.pop(0)
    from liteframe.export import build_engine

    sys.exit(build_engine.command())

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from rich.table import Table

from ..calib.drift_report import summary, write_report
from ..calib.layers import LayerDrift
from ..calib.questions import read_questions
from ..calib.ranges import METHODS
from ..engines import compile_onnxruntime, compile_tensorrt, operators, package, proof
from ..engines.compile_bundle import LIBRARY_HELP, PLUGINS_HELP
from ..engines.device import find_gpus
from ..engines.inspect_package import describe_accuracy, describe_kept
from ..engines.package import (
    Engine,
    File,
    GateError,
    Graph,
    InputError,
    Kept,
    Manifest,
    Precision,
    Profile,
    TensorSpec,
)
from ..engines.targets import PRECISIONS, TARGETS, WEIGHTS_ONLY, Asked, Dialect, Target
from ..runtime.cli import guard
from ..runtime.long_video import MERGED_AT_ONCE
from ..runtime.text import numbered
from .artifact import Artifact, load_artifact
from .check_plain import check_plain
from .gate_accuracy import gate_accuracy
from .models.reducers import GRID_REDUCERS, REDUCERS, TokenReducer
from .polygraphy_commands import write_commands
from .precision import GraphName, Lowering, embedding_table, prepare
from .progress import Progress
from .progress import step as _step
from .query_encoder import DIMENSION as QUERY_DIMENSION
from .trace import WeightsFile, trace_decoder, trace_encoder, trace_merger
from .verify import Verifier, sample_clips

CHUNK = 512
CPU_LONG_CHUNK = 64  # ONNX Runtime's CPU attention takes memory for each position of a chunk with each of the cache
KEYFRAMES = 32
QUERY_TOKENS = 512
QUESTION = "What happens in this video?"  # in polygraphy's inputs
GRAPHS: tuple[GraphName, ...] = ("encoder", "decoder")
MAX_CLIPS = 16
CPU = "CPUExecutionProvider"
BODIES = package.Operators(way="bodies", milliseconds={}, library=None)  # ahead of time
STAND_IN = "{name}.{dialect}.stand-in.onnx"
VERSIONS = ("liteframe", "torch", "onnx", "onnxscript", "onnxruntime")


def build(
    artifact_path: Path,
    target_name: str,
    output: Path,
    frames: int = 64,
    tiles: int = 1,
    reducer: str | None = None,
    ratio: int | None = None,
    precision: Asked = "fp32",
    decoder_precision: Asked | None = None,
    calib: Sequence[Path] = (),
    calib_cache: Path | None = None,
    calib_method: str = "minmax",
    allow_drift: bool = False,
    max_workspace: int | None = None,
    questions: Path | None = None,
    plugins: operators.Choice = "auto",
    plugin_library: Path | None = None,
    long_video: int | None = None,
    keyframes: int | None = None,
) -> package.Package:
    """Builds an engine package, or, for a target whose compiler runs on the device only, a bundle; on that device the
    bundle is finished at once.

    Args:
        frames, tiles: the most frames of a video, and the most tiles of each; with a thumbnail, where there are several
            tiles, and the text around them they size the KV cache.
        reducer, ratio: replace the reducer of an artifact with a frame-wise tower; see `load_artifact`.
        precision: of linear layers; see calib/placement.py for what surrounds them.
        decoder_precision: of the decoder's alone; None means `precision`.
        calib, calib_cache, calib_method, allow_drift: see `precision.prepare`; for FP32 there is nothing to calibrate.
        max_workspace: bytes; see `compile_tensorrt.compile_graph`.
        questions: a folder of questions about videos, which what is built must answer as well; see `gate_accuracy`.
        plugins, plugin_library: see `operators.compile_either_way`; ahead of time operators are function bodies.
        long_video: the most frames of a video that is thinned out; see runtime/long_video.py. None: none can be.
        keyframes: how many of its clips, or frames, keep their visual tokens; by default KEYFRAMES.

    Raises:
        InputError: bad artifact or arguments.
        GateError: a graph or engine differs from its torch module by more than its gate allows, or computes in another
            precision than asked for.
    """
    target = TARGETS[target_name]
    asked: dict[GraphName, Asked] = {"encoder": precision, "decoder": decoder_precision or precision}
    _check_arguments(target, asked, calib, calib_cache, max_workspace)
    finish = _is_device_of(target)
    if plugins == "require" and not finish:
        raise InputError(
            f"--plugins require: kernels are compiled and timed on the device, and this is not {target.name} with "
            "TensorRT; build with --plugins auto, then run there: liteframe compile BUNDLE --plugins require"
        )
    if questions is not None:
        read_questions(questions)  # before anything takes its time
    with package.new_folder(output) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        with _step("load the artifact"):
            artifact = load_artifact(artifact_path, reducer, ratio)
        model = describe_model(artifact, frames, tiles, target, long_video, keyframes)
        with _step("run the torch modules"):
            verifier = Verifier(artifact.encoder, artifact.decoder)
        lowering = None
        if set(asked.values()) != {"fp32"}:
            lowering = prepare(
                artifact, asked, target, list(calib), calib_cache, calib_method, allow_drift, Path(scratch), _step
            )
        graphs = _make_graphs(artifact, model, target, verifier, lowering, folder / "graphs", Path(scratch))
        if long_video is not None:
            graphs += _make_long_video_graphs(artifact, target, verifier, folder / "graphs")
        engines = _make_engines(graphs, target, verifier, lowering, folder, max_workspace)
        drift = _report_drift(lowering, folder) if lowering is not None else []
        table, accuracy = embedding_table(artifact, asked["decoder"]), None
        if questions is not None:
            runnable = {name: _runnable(name, target, folder, Path(scratch)) for name in GRAPHS}
            with _step(f"answer {questions}") as progress:
                accuracy = gate_accuracy(
                    questions, artifact, model, runnable, table, sorted(set(asked.values())), progress
                )
        if target.compiler == "onnxruntime":  # its engines are the graphs, optimised
            for path in sorted((folder / "graphs").iterdir()):
                path.unlink()
            (folder / "graphs").rmdir()
            graphs = []
        with _step("write embeddings, tokenizer, polygraphy's commands and manifest"):
            clips = sample_clips(artifact.encoder)[1:] if lowering is None else lowering.clips[:1]
            prompt = table[artifact.text.tokenizer.encode(QUESTION).ids][None].astype(np.float32)
            parts: list[Graph | Engine] = [*graphs, *engines]
            commanded = [part for part in parts if part.name in GRAPHS]
            manifest = Manifest(
                format=1,
                target=target.name,
                built_from=package.Origin(
                    artifact=artifact.name,
                    artifact_sha256=artifact.sha256,
                    versions={name: version(name) for name in VERSIONS},
                ),
                model=model,
                text=_write_text(artifact, model, table, folder),
                graphs=graphs,
                engines=engines,
                commands=write_commands(folder, target, commanded, clips, prompt),
                drift=drift,
                allowed_drift=lowering.allowed if lowering is not None else [],
                accuracy=accuracy,
                sha256="",
            )
            package.write_manifest(folder, manifest)
    if finish:
        _finish(output, max_workspace, plugins, plugin_library)
    return package.open_package(output)


def _is_device_of(target: Target) -> bool:
    """Whether this machine has a GPU of the target's, and the TensorRT that compiles for it."""
    gpus, _ = find_gpus()
    on_device = target.compiler == "tensorrt" and bool(gpus) and gpus[0].capability in target.capabilities
    return on_device and compile_tensorrt.available("tensorrt")


def _finish(output: Path, max_workspace: int | None, plugins: operators.Choice, plugin_library: Path | None) -> None:
    """By `liteframe compile` in a process of its own: polygraphy here drives TensorRT-RTX."""
    command = [sys.executable, "-c", "import sys; from liteframe.runtime.cli import main; sys.exit(main())", "compile"]
    command += [str(output), "--plugins", plugins]
    if plugin_library is not None:
        command += ["--plugin-library", str(plugin_library)]
    if max_workspace is not None:
        command += ["--max-workspace", str(max_workspace >> 20)]
    with _step("compile on this device with TensorRT"):
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise (GateError if done.returncode == 1 else InputError)(
            f"{output}: the bundle is written, and was not finished, for the reason above; try again with: "
            f"liteframe compile {output}"
        )


def _check_arguments(
    target: Target,
    asked: dict[GraphName, Asked],
    calib: Sequence[Path],
    calib_cache: Path | None,
    max_workspace: int | None,
) -> None:
    for name, precision in asked.items():
        if precision not in target.precisions:
            raise InputError(
                f"{name} in {precision}: the target {target.name} lacks it; it has {', '.join(target.precisions)}"
            )
    if max_workspace is not None and target.compiler == "onnxruntime":
        raise InputError(f"--max-workspace limits TensorRT's compiler, which packages for {target.name} do without")
    if set(asked.values()) == {"fp32"} and (calib or calib_cache):
        raise InputError("--calib and --calib-cache are for fp16 and int8; add --precision int8, or leave them out")


def describe_model(
    artifact: Artifact,
    frames: int,
    tiles: int,
    target: Target,
    long_frames: int | None = None,
    keyframes: int | None = None,
) -> package.Model:
    encoder, decoder = artifact.encoder, artifact.decoder.config
    clip = encoder.config.clip_length
    for option, value in (("--frames", frames), ("--long-video", long_frames)):
        if value is not None and (value < clip or value % clip):
            raise InputError(f"{option} {value}: expected a multiple of {clip}, the frames of a clip")
    if tiles < 1:
        raise InputError(f"--tiles {tiles}: expected 1 or more")
    if keyframes is not None and long_frames is None:
        raise InputError(f"--keyframes {keyframes} is for long videos; add --long-video FRAMES, or leave it out")
    long_video = None
    if long_frames is not None:
        long_video = _describe_long_video(artifact, long_frames, KEYFRAMES if keyframes is None else keyframes)
    # what can't fit is refused before text is laid out around each of its frames
    _capacity(artifact, frames, tiles, long_video, lambda frames: package.UNIT_TEXT_POSITIONS)
    unit_text = cache(partial(_unit_text_positions, artifact))
    capacity = _capacity(artifact, frames, tiles, long_video, unit_text)
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
        max_tiles=tiles,
        unit_text=unit_text(frames),
        capacity=capacity,
        # a CPU gains nothing from batches of clips, and holds one clip's activations instead of many
        max_clips=1 if target.name == "cpu" else min(frames // clip * package.views_of(tiles), MAX_CLIPS),
        chunk=CPU_LONG_CHUNK if target.name == "cpu" and long_video is not None else CHUNK,
        long_video=long_video,
    )


def _describe_long_video(artifact: Artifact, frames: int, keyframes: int) -> package.LongVideo:
    encoder, config = artifact.encoder, artifact.long_video
    if isinstance(encoder.reducer, TokenReducer):
        raise InputError(
            f"--long-video {frames}: merging compares each token with the one at its place in the keyframe before, and "
            f"{encoder.config.reducer} leaves none at a place of its own; expected --reducer {', '.join(GRID_REDUCERS)}"
        )
    if encoder.config.merge_connector and artifact.query_encoder is None:
        raise InputError(
            f"--long-video {frames}: the artifact merges features {encoder.merger.config.feature_size} wide, which "
            "only a query encoder's vectors can be compared with, and has none; put model.onnx and tokenizer.json into "
            "its folder query_encoder/"
        )
    return package.LongVideo(
        max_frames=frames,
        keyframes=keyframes,
        similar=config.similar,
        redundancy_weight=config.redundancy_weight,
        temperature=config.temperature,
    )


def _capacity(
    artifact: Artifact,
    frames: int,
    tiles: int,
    long_video: package.LongVideo | None,
    unit_text: Callable[[int], int],
) -> int:
    """Positions of the KV cache, for the longer of both kinds of video.

    Args:
        unit_text: positions of the text around one unit, where frames are numbered up to so many.

    Raises:
        InputError: the language model was trained for fewer.
    """
    encoder, most = artifact.encoder, artifact.decoder.config.max_position_embeddings
    clips, views = frames // encoder.config.clip_length, package.views_of(tiles)
    positions = package.positions(clips, views, encoder.tokens_per_clip, encoder.units_per_clip, unit_text(frames))
    tiled = f" --tiles {tiles}" if tiles > 1 else ""
    needs, fewer = f"--frames {frames}{tiled}", f"fewer frames{tiled and ' or tiles'}"
    if long_video is not None:
        long_positions = _long_video_positions(artifact, long_video, unit_text(long_video.max_frames))
        if long_positions > positions:
            positions, fewer = long_positions, "fewer --keyframes, a shorter --long-video"
            needs = f"--long-video {long_video.max_frames} with --keyframes {long_video.keyframes}"
    capacity = -(-positions // 256) * 256
    if capacity > most:
        raise InputError(
            f"{needs} needs a KV cache of {capacity} positions, the language model was trained for {most}; "
            f"build with {fewer} or a stronger --ratio"
        )
    return capacity


def _unit_text_positions(artifact: Artifact, frames: int) -> int:
    """For the text around visual tokens of frames that are numbered up to `frames`."""
    prompt, tokenizer = artifact.prompt, artifact.text.tokenizer
    texts = [prompt.unit_prefix, prompt.run_prefix or ""]
    prefixes = [numbered(text, number, number) for text in texts for number in range(1, frames + 1)]
    before = max(len(prefix.ids) for prefix in tokenizer.encode_batch(prefixes, add_special_tokens=False))
    after = len(tokenizer.encode(prompt.unit_suffix, add_special_tokens=False).ids)
    return max(package.UNIT_TEXT_POSITIONS, before + after)


def _long_video_positions(artifact: Artifact, settings: package.LongVideo, unit_text: int) -> int:
    """Of key candidates with all their tokens, and runs of merged ones between them, each with its text, and of a
    question; in the mode that takes most: `vilamp`, too, chooses where the encoder keeps frames apart."""
    encoder, keys = artifact.encoder, settings.keyframes
    clip, units, tokens = encoder.config.clip_length, encoder.units_per_clip, encoder.tokens_per_clip
    modes = [(settings.max_frames // clip, units, tokens)]  # candidates, and units and tokens of each
    if units == clip:
        modes.append((settings.max_frames, 1, tokens // clip))
    most = max(candidates for candidates, _, _ in modes)
    if not 1 <= keys <= most:
        raise InputError(
            f"--keyframes {keys}: a video of --long-video {settings.max_frames} frames has {most} to choose from; "
            "expected from 1 to as many"
        )
    needed = [
        keys * tokens + candidates - keys + (keys * units + min(candidates - keys, keys + 1)) * unit_text
        for candidates, units, tokens in modes
        if keys <= candidates
    ]
    return max(needed) + package.QUESTION_POSITIONS


def _make_long_video_graphs(artifact: Artifact, target: Target, verifier: Verifier, folder: Path) -> list[Graph]:
    """The merger, and the artifact's query encoder, in FP32 whatever the precision: both are small."""
    made = []
    for dialect in target.dialects:
        path = folder / f"merger.{dialect}.onnx"
        with _step(f"export and verify the merger graph, {dialect}"):
            traced = trace_merger(artifact.encoder.merger, dialect)
            ir.save(traced, path)
            tokens = artifact.encoder.tokens_per_clip
            ranges = {"clips": (1, MERGED_AT_ONCE, MERGED_AT_ONCE), "patches": (1, tokens, tokens)}
            made.append(_small_graph("merger", dialect, traced, path, ranges, verifier.merger(path)))
        if artifact.query_encoder is not None:
            path = folder / f"query.{dialect}.onnx"
            with _step(f"take the query encoder, {dialect}"):
                query = artifact.query_encoder.graph
                ir.save(query, path)
                ranges = {QUERY_DIMENSION: (1, QUERY_TOKENS // 16, QUERY_TOKENS)}
                made.append(_small_graph("query", dialect, query, path, ranges, {}))
        if dialect == "plain":
            for graph in made:
                if graph.dialect == "plain":
                    check_plain(folder.parent / graph.files[0].path)
    return made


def _small_graph(
    name: package.Part,
    dialect: Dialect,
    model: ir.Model,
    path: Path,
    ranges: dict[str, tuple[int, int, int]],
    parity: dict[str, float],
) -> Graph:
    return Graph(
        name=name,
        dialect=dialect,
        opset=model.graph.opset_imports[""],
        files=[package.describe_file(path.parent.parent, path)],
        inputs=_tensor_specs(model.graph.inputs, ranges),
        outputs=_tensor_specs(model.graph.outputs, ranges),
        precision=Precision(asked="fp32", found=proof.types_found(path), kept=[]),
        parity=parity,
    )


def _make_graphs(
    artifact: Artifact,
    model: package.Model,
    target: Target,
    verifier: Verifier,
    lowering: Lowering | None,
    folder: Path,
    scratch: Path,
) -> list[Graph]:
    """Both graphs in every dialect of the target; the dialects of a graph share one file of weights."""
    folder.mkdir()
    # TensorRT wants the cache's capacity fixed; ONNX Runtime computes over all of it, so there it grows while running
    capacity = None if target.compiler == "onnxruntime" else model.capacity
    made = []
    for name in GRAPHS:
        data = folder / f"{name}.data"
        drafts: list[tuple[Path, Graph]] = []
        with WeightsFile(data) as weights:
            for dialect in target.dialects:
                path = folder / f"{name}.{dialect}.onnx"
                kept: list[Kept] = []
                with _step(f"export the {name} graph, {dialect}"):
                    if lowering is not None and dialect == "fused":
                        traced = lowering.reference(name, capacity)
                    elif name == "encoder":
                        traced = trace_encoder(artifact.encoder, dialect)
                    else:
                        traced = trace_decoder(artifact.decoder, dialect, capacity)
                    if lowering is not None:
                        kept = lowering.lower(name, dialect, traced)
                    opset = traced.graph.opset_imports[""]
                    inputs, outputs = (_specs(values, model) for values in (traced.graph.inputs, traced.graph.outputs))
                    weights.save(traced, path)
                    del traced
                    if dialect == "plain":
                        check_plain(path)
                parity: dict[str, float] = {}
                if lowering is None:
                    with _step(f"verify the {name} graph, {dialect}"):
                        parity = verifier.encoder(path) if name == "encoder" else verifier.decoder(path)
                elif target.name != "cpu":  # whose engine itself will be checked
                    with _step(f"check the {name} graph, {dialect}, on what was held out"):
                        stand_in = scratch / STAND_IN.format(name=name, dialect=dialect)
                        parity = lowering.check(name, compile_onnxruntime.compile_graph(path, stand_in, CPU)[0])
                graph = Graph(
                    name=name,
                    dialect=dialect,
                    opset=opset,
                    files=[],
                    inputs=inputs,
                    outputs=outputs,
                    precision=Precision(
                        asked="fp32" if lowering is None else lowering.asked[name],
                        found=proof.types_found(path),
                        kept=kept,
                    ),
                    parity=parity,
                )
                drafts.append((path, graph))
        shared = package.describe_file(folder.parent, data)
        for path, graph in drafts:
            files = [package.describe_file(folder.parent, path), shared]
            made.append(msgspec.structs.replace(graph, files=files))
    return made


def _runnable(name: GraphName, target: Target, folder: Path, scratch: Path) -> Path:
    """What ONNX Runtime runs here: the engine, or the graph of an engine for another machine."""
    if target.name == "cpu":
        return folder / f"{name}.onnx"
    stand_in = scratch / STAND_IN.format(name=name, dialect="fused")
    if not stand_in.exists():
        compile_onnxruntime.compile_graph(folder / "graphs" / f"{name}.fused.onnx", stand_in, CPU)
    return stand_in


def _specs(values: Sequence[ir.Value], model: package.Model) -> list[TensorSpec]:
    """Graph inputs or outputs with the range of each dimension that varies."""
    ranges = {
        "clips": (1, min(4, model.max_clips), model.max_clips),
        "sequence": (1, 64, model.chunk),
        "past": (0, model.capacity // 2, model.capacity - 1),
        "capacity": (1, model.capacity, model.capacity),
    }
    return _tensor_specs(values, ranges)


def _tensor_specs(values: Sequence[ir.Value], ranges: dict[str, tuple[int, int, int]]) -> list[TensorSpec]:
    """`ranges`: smallest, most common and largest size of each dimension that varies."""
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


def _make_engines(
    graphs: list[Graph],
    target: Target,
    verifier: Verifier,
    lowering: Lowering | None,
    folder: Path,
    max_workspace: int | None,
) -> list[Engine]:
    compiler = target.ahead_of_time or target.compiler
    fused = [graph for graph in graphs if graph.dialect == "fused"]
    if target.proof is not None:
        for graph in fused:
            with _step(f"prove the {graph.name} graph: TensorRT-RTX compiles it for {target.proof}"):
                path = folder / graph.files[0].path
                compiled = compile_tensorrt.compile_graph(
                    path, graph.inputs, "tensorrt-rtx", [target.proof], max_workspace
                )
                proof.check(graph.name, graph.precision, compiled.proof)
        return []
    engines = []
    for graph in fused:
        path = folder / graph.files[0].path
        parity: dict[str, float] | None = None
        with _step(f"compile the {graph.name} for {target.name} with {compiler}"):
            if target.provider is not None:
                files = compile_onnxruntime.compile_graph(path, folder / f"{graph.name}.onnx", target.provider)
                proven = proof.prove_onnxruntime(path, files[0])
                made_by, inputs = version("onnxruntime"), _without_profiles(graph.inputs)
            else:
                assert compiler == "tensorrt-rtx"
                compiled = compile_tensorrt.compile_graph(
                    path, graph.inputs, compiler, target.capabilities, max_workspace
                )
                files = [folder / f"{graph.name}.engine"]
                files[0].write_bytes(compiled.engine)
                proven, made_by, inputs = compiled.proof, compiled.version, graph.inputs
            proof.check(graph.name, graph.precision, proven)
        if target.name == "cpu":
            with _step(f"verify the compiled {graph.name}"):
                if graph.name == "query":
                    parity = {}
                elif graph.name == "merger":
                    parity = verifier.merger(files[0])
                elif lowering is not None:
                    parity = lowering.check(graph.name, files[0])
                else:
                    parity = verifier.encoder(files[0]) if graph.name == "encoder" else verifier.decoder(files[0])
        engines.append(
            Engine(
                name=graph.name,
                dialect=graph.dialect,
                files=[package.describe_file(folder, file) for file in files],
                inputs=inputs,
                outputs=graph.outputs,
                precision=msgspec.structs.replace(graph.precision, found=proven.found),
                compiler=compiler,
                compiler_version=made_by,
                capabilities=list(target.capabilities),
                operators=BODIES if operators.has_operators(path) else None,
                parity=parity,
            )
        )
    return engines


def _report_drift(lowering: Lowering, folder: Path) -> list[File]:
    """Layer by layer, how far the package's graphs are from their FP32 references."""
    rows: dict[str, list[LayerDrift]] = {}
    for graph in GRAPHS:
        with _step(f"compare the {graph}'s layers with FP32") as progress:
            rows[graph] = lowering.drift(graph, folder / "graphs" / f"{graph}.fused.onnx", progress)
        Progress.print(f"{'':20}{summary(rows[graph])}", highlight=False, markup=False)
    asked = " and ".join(f"{name} in {lowering.asked[name]}" for name in GRAPHS)
    title = f"Drift of {lowering.artifact.name} for {lowering.target.name} from FP32: {asked}"
    write_report(folder / "drift", title, rows)
    return [package.describe_file(folder, path) for path in sorted((folder / "drift").iterdir())]


def _without_profiles(specs: list[TensorSpec]) -> list[TensorSpec]:
    """ONNX Runtime takes any size."""
    return [msgspec.structs.replace(spec, profile=None) for spec in specs]


def _write_text(artifact: Artifact, model: package.Model, table: NDArray, folder: Path) -> package.Text:
    text, prompt = artifact.text, artifact.prompt
    np.save(folder / "embeddings.npy", table, allow_pickle=False)
    (folder / "tokenizer.json").write_text(text.tokenizer.to_str(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text.chat_template, encoding="utf-8")

    def file(name: str) -> File:
        return package.describe_file(folder, folder / name)

    query_tokenizer = None
    if artifact.query_encoder is not None and model.long_video is not None:
        (folder / "query_tokenizer.json").write_text(artifact.query_encoder.tokenizer.to_str(), encoding="utf-8")
        query_tokenizer = file("query_tokenizer.json")
    return package.Text(
        tokenizer=file("tokenizer.json"),
        query_tokenizer=query_tokenizer,
        chat_template=file("chat_template.jinja"),
        embeddings=file("embeddings.npy"),
        end_of_turn=text.end_of_turn,
        special_tokens=text.special_tokens,
        unit_prefix=prompt.unit_prefix,
        unit_suffix=prompt.unit_suffix,
        run_prefix=prompt.run_prefix,
        notice=artifact.notice,
    )


def print_report(made: package.Package) -> None:
    parts: list[Engine | Graph] = [*made.manifest.engines, *made.manifest.graphs]
    table = Table("", "compiler", "capability", "tensors found", "MB", "against FP32", box=None, pad_edge=False)
    for part in parts:
        found = ", ".join(f"{count} {name}" for name, count in part.precision.found.items())
        size = f"{sum(file.bytes for file in part.files) / 1e6:.0f}"
        figures = "not run: no such device here"
        if part.parity is not None:
            figures = ", ".join(f"{name.replace('_', ' ')} {value:.6f}" for name, value in part.parity.items())
        if isinstance(part, Engine):
            capability = " ".join(part.capabilities) or "any"
            table.add_row(f"{part.name} engine", part.compiler, capability, found, size, figures)
        else:
            table.add_row(f"{part.name} graph, {part.dialect}", "", "", found, size, figures)
    Progress.print(table)
    for part in parts:
        if lines := describe_kept(part.precision.kept):
            Progress.print(f"{part.name}, {part.dialect}, {part.precision.asked}:", highlight=False)
            Progress.print("\n".join(f"  {line}" for line in lines), highlight=False, markup=False)
    if (told := made.manifest.accuracy) is not None:
        Progress.print(describe_accuracy(told), highlight=False)
    for line in made.manifest.allowed_drift:
        Progress.print(f"drift allowed: {line}", highlight=False, markup=False)
    Progress.print(f"{'engine package' if made.manifest.engines else 'bundle'}: {made.folder}", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="liteframe build", description="Build an engine package from an artifact.")
    parser.add_argument("artifact", type=Path, help="folder with config.json and weights")
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--frames", type=int, default=64, help="the most frames of a video (default: %(default)s)")
    parser.add_argument(
        "--tiles",
        type=int,
        default=1,
        help="the most tiles of a frame, a thumbnail beside them (default: %(default)s, the whole frame)",
    )
    parser.add_argument("--reducer", choices=REDUCERS, help="replaces the reducer behind a frame-wise tower")
    parser.add_argument("--ratio", type=int, help="how many tokens become one; default: the artifact's, else 16")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of linear layers (default: fp32)")
    parser.add_argument(
        "--decoder-precision",
        choices=(*PRECISIONS, *WEIGHTS_ONLY),
        help="of the decoder's alone, where weights only may be quantised (default: as --precision)",
    )
    parser.add_argument(
        "--calib",
        type=Path,
        nargs="+",
        default=[],
        metavar="VIDEO|DIR",
        help="calibration data for fp16 and int8: videos, folders, saved clips (.npy); .txt for the language model",
    )
    parser.add_argument(
        "--calib-cache", type=Path, metavar="FILE", help="what was observed: read if there, else written"
    )
    parser.add_argument("--calib-method", choices=METHODS, default="minmax", help="of INT8 ranges (default: minmax)")
    parser.add_argument("--allow-drift", action="store_true", help="accept failed drift gates; the manifest records it")
    parser.add_argument(
        "--max-workspace", type=compile_tensorrt.mebibytes, metavar="MIB", help=compile_tensorrt.WORKSPACE_HELP
    )
    parser.add_argument(
        "--gate-accuracy", type=Path, metavar="DIR", help="questions about videos, to be answered as well as by torch"
    )
    parser.add_argument("--plugins", choices=operators.CHOICES, default="auto", help=PLUGINS_HELP)
    parser.add_argument("--plugin-library", type=Path, metavar="FILE", help=LIBRARY_HELP)
    parser.add_argument(
        "--long-video",
        type=int,
        metavar="FRAMES",
        help="the most frames of a video that is thinned out (default: none)",
    )
    parser.add_argument(
        "--keyframes", type=int, metavar="K", help=f"of a long video that keep all their tokens (default: {KEYFRAMES})"
    )
    parser.add_argument("--output", type=Path, help="default: ARTIFACT-TARGET[-PRECISION] here")
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    suffix = "" if options.precision == "fp32" else f"-{options.precision}"
    output = options.output or Path(f"{options.artifact.resolve().name}-{options.target}{suffix}")
    made = build(
        options.artifact,
        options.target,
        output,
        options.frames,
        options.tiles,
        options.reducer,
        options.ratio,
        options.precision,
        options.decoder_precision,
        options.calib,
        options.calib_cache,
        options.calib_method,
        options.allow_drift,
        options.max_workspace,
        options.gate_accuracy,
        options.plugins,
        options.plugin_library,
        options.long_video,
        options.keyframes,
    )
    print_report(made)
    if options.json:
        print(msgspec.json.encode({"package": str(made.folder), "manifest": made.manifest}).decode())
    return 0


def command() -> int:
    """The script's entry point: `main` with the exit codes and messages of the `liteframe` command."""
    return guard(main, sys.argv[1:])
