"""`liteframe compile`: the graphs in a package become engines, on the device, with TensorRT alone.

The dialect follows from TensorRT's version. Engines that were compiled ahead of time are replaced.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import msgspec

from . import compile_tensorrt, proof
from .device import find_gpus
from .package import Engine, File, Graph, InputError, Package, describe_file, open_package, write_manifest
from .targets import FUSED_SINCE, TARGETS, dialect_for_tensorrt


def compile_bundle(folder: Path, max_workspace: int | None = None) -> Package:
    """Compiles both engines into the package; the manifest changes only when both are done.

    Args:
        max_workspace: bytes; see `compile_tensorrt.compile_graph`.

    Raises:
        InputError: not a package for TensorRT, no TensorRT, no GPU, another GPU than the target's, or a graph that
            this TensorRT does not take.
        GateError: the compiled network has other types than asked for.
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
    engines = []
    temporary = []
    try:
        for name in ("encoder", "decoder"):
            graph = bundle.graph(name, dialect)
            path = bundle.path(graph.files[0])
            compiled = compile_tensorrt.compile_graph(path, graph.inputs, "tensorrt", [], max_workspace)
            proof.check(name, graph.precision, compiled.proof)
            final = folder / f"{name}.engine"
            partial = folder / f".{name}.engine.{os.getpid()}"
            temporary.append((partial, final))
            partial.write_bytes(compiled.engine)
            described = msgspec.structs.replace(describe_file(folder, partial), path=final.name)
            engines.append(describe_engine(graph, described, "tensorrt", compiled, gpus[0].capability))
        for partial, final in temporary:
            partial.replace(final)
    finally:
        for partial, _ in temporary:
            partial.unlink(missing_ok=True)
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, engines=engines))
    return open_package(folder)


def describe_engine(
    graph: Graph, file: File, flavour: compile_tensorrt.Flavour, compiled: compile_tensorrt.Compiled, capability: str
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
        parity=None,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="liteframe compile", description="Finish a bundle on its device.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--max-workspace", type=compile_tensorrt.mebibytes, metavar="MIB", help=compile_tensorrt.WORKSPACE_HELP
    )
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    made = compile_bundle(options.bundle, options.max_workspace)
    for engine in made.manifest.engines:
        size = engine.files[0].bytes / 1e6
        print(f"{engine.name}: {size:.0f} MB, {engine.dialect}, TensorRT {engine.compiler_version}")
    if options.json:
        print(msgspec.json.encode(made.manifest).decode())
    return 0
