"""`liteframe compile`: the graphs in a package become engines, on the device, with TensorRT alone.

The dialect follows from TensorRT's version. Engines that were compiled ahead of time are replaced. Custom operators
become kernels where that is faster; see operators.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import get_args

import msgspec

from . import compile_tensorrt, operators, proof
from .device import find_gpus
from .inspect_package import describe_operators
from .package import (
    Engine,
    File,
    Graph,
    InputError,
    Operators,
    Package,
    Part,
    describe_file,
    open_package,
    write_manifest,
)
from .targets import FUSED_SINCE, TARGETS, dialect_for_tensorrt

PARTS: tuple[Part, ...] = get_args(Part)
OPTIONAL: tuple[Part, ...] = ("merger", "query")  # of packages for long videos
PLUGINS_HELP = (
    "custom operators as CUDA kernels: auto takes them where they are faster (default), never, require fails where "
    "they can't be had"
)
LIBRARY_HELP = f"{operators.LIBRARY}, for TensorRT before {'.'.join(map(str, operators.EMBEDDED_SINCE))}"


def compile_bundle(
    folder: Path,
    max_workspace: int | None = None,
    plugins: operators.Choice = "auto",
    library: Path | None = None,
) -> Package:
    """Compiles the engines into the package; the manifest changes only when all are done.

    Args:
        max_workspace: bytes; see `compile_tensorrt.compile_graph`.
        plugins, library: see `operators.compile_either_way`.

    Raises:
        InputError: not a package for TensorRT, no TensorRT, no GPU, another GPU than the target's, or a graph that
            this TensorRT does not take.
        GateError: the compiled network has other types than asked for, or kernels differ from function bodies.
    """
    bundle = open_package(folder)
    target = TARGETS[bundle.manifest.target]
    if target.compiler == "onnxruntime":
        raise InputError(f"{folder}: a package for {target.name}, which needs no compiling; run it with: liteframe run")
    if target.compiler == "tensorrt-rtx":
        raise InputError(f"{folder}: a package for {target.name}, compiled ahead of time; there is nothing to finish")
    trt = compile_tensorrt.load("tensorrt")
    gpus, why = find_gpus()
    if not gpus:
        raise InputError(f"{folder}: TensorRT compiles on the device it is for, and there is no GPU here: {why}")
    if gpus[0].capability not in target.capabilities:
        raise InputError(
            f"{folder}: made for {target.machine} (compute capability {', '.join(target.capabilities)}); this is "
            f"{gpus[0].name} ({gpus[0].capability}), build for the target that fits it"
        )
    dialect = dialect_for_tensorrt(trt.__version__)
    if dialect not in target.dialects:
        needed = ".".join(map(str, FUSED_SINCE))
        raise InputError(
            f"{folder}: TensorRT {trt.__version__} takes graphs in the {dialect} dialect, and packages for "
            f"{target.name} carry {', '.join(target.dialects)} ones; install TensorRT {needed} or later"
        )
    if library is not None and not library.is_file():
        raise InputError(f"{library}: no such file; expected {operators.LIBRARY}, which CMake builds")
    engines = []
    temporary: list[tuple[Path, Path]] = []

    def partial_of(name: str) -> Path:
        partial = folder / f".{name}.{os.getpid()}"
        temporary.append((partial, folder / name))
        return partial

    def described(partial: Path) -> File:
        final = dict(temporary)[partial]
        return msgspec.structs.replace(describe_file(folder, partial), path=final.name)

    try:
        for name in PARTS:
            if name in OPTIONAL and not bundle.has(name):
                continue
            graph = bundle.graph(name, dialect)
            path, capability = bundle.path(graph.files[0]), gpus[0].capability
            told = None
            if operators.has_operators(path):
                chosen = operators.compile_either_way(path, graph.inputs, capability, max_workspace, plugins, library)
                compiled, file = chosen.compiled, None
                if chosen.way == "library":
                    assert library is not None
                    partial = partial_of(operators.LIBRARY)
                    shutil.copyfile(library, partial)
                    file = described(partial)
                told = Operators(way=chosen.way, milliseconds=chosen.milliseconds, library=file)
                if chosen.why:
                    print(f"{name}: custom operators as function bodies; {chosen.why}", file=sys.stderr)
            else:
                compiled = compile_tensorrt.compile_graph(path, graph.inputs, "tensorrt", [], max_workspace)
            proof.check(name, graph.precision, compiled.proof)
            partial = partial_of(f"{name}.engine")
            partial.write_bytes(compiled.engine)
            engines.append(describe_engine(graph, described(partial), "tensorrt", compiled, capability, told))
        for partial, final in temporary:
            partial.replace(final)
        if not any(final.name == operators.LIBRARY for _, final in temporary):
            (folder / operators.LIBRARY).unlink(missing_ok=True)  # of engines that were here before
    finally:
        for partial, _ in temporary:
            partial.unlink(missing_ok=True)
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, engines=engines))
    return open_package(folder)


def describe_engine(
    graph: Graph,
    file: File,
    flavour: compile_tensorrt.Flavour,
    compiled: compile_tensorrt.Compiled,
    capability: str,
    told: Operators | None,
) -> Engine:
    """A manifest's entry for an engine that was compiled of a graph, on a device."""
    return Engine(
        name=graph.name,
        dialect=graph.dialect,
        files=[file],
        inputs=graph.inputs,
        outputs=graph.outputs,
        precision=msgspec.structs.replace(graph.precision, found=compiled.proof.found),
        compiler=flavour,
        compiler_version=compiled.version,
        capabilities=[capability],
        operators=told,
        parity=None,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="liteframe compile", description="Finish a bundle on its device.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--max-workspace", type=compile_tensorrt.mebibytes, metavar="MIB", help=compile_tensorrt.WORKSPACE_HELP
    )
    parser.add_argument("--plugins", choices=operators.CHOICES, default="auto", help=PLUGINS_HELP)
    parser.add_argument("--plugin-library", type=Path, metavar="FILE", help=LIBRARY_HELP)
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    made = compile_bundle(options.bundle, options.max_workspace, options.plugins, options.plugin_library)
    for engine in made.manifest.engines:
        size, told = engine.files[0].bytes / 1e6, describe_operators(engine)
        print(
            f"{engine.name}: {size:.0f} MB, {engine.dialect}, TensorRT {engine.compiler_version}{told and f'; {told}'}"
        )
    if options.json:
        print(msgspec.json.encode(made.manifest).decode())
    return 0
