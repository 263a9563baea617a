"""For every graph of a package: real inputs, and ready command lines for polygraphy and trtexec.

    clip, prompt ──▶ frames.npy, inputs_embeds.npy ──helpers.py──▶ feeds, one function a graph, caches empty
    tensor specs ──▶ profiles ─────────────────────commands.txt──▶ polygraphy run ..., trtexec ...

Everything lies in the package's folder `polygraphy`, and the commands run from the package's folder. The inputs are a
script and two arrays instead of polygraphy's JSON, which would hold every zero of the caches: hundreds of megabytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ..engines.package import Engine, File, Graph, InputError, TensorSpec, describe_file
from ..engines.targets import Asked, Compiler, Target

FOLDER = "polygraphy"
HELPERS = f"{FOLDER}/helpers.py"
COMMANDS = f"{FOLDER}/commands.txt"
# Least cosine of every output between two runtimes, over all of it: the gates that the engines pass. In weights-only
# precisions both runtimes multiply the same weights, and differ as in FP16.
COSINE: dict[Asked, float] = {
    "fp32": 0.99999,
    "fp16": 0.9995,
    "int8": 0.99,
    "int8-weights": 0.9995,
    "int4-weights": 0.9995,
}
TRTEXEC = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}  # as TensorRT and TensorRT-RTX name it
RTX = "POLYGRAPHY_USE_TENSORRT_RTX=1 "

SCRIPT_HEAD = '''\
"""What commands.txt hands to polygraphy: inputs of every graph, a clip, or a prompt with empty KV caches."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
'''
WITHOUT_TF32 = '''

def without_tf32(builder, network, config):
    """TensorRT-RTX multiplies FP32 in TF32 unless told not to; this package's engines do not."""
    import tensorrt_rtx

    config.clear_flag(tensorrt_rtx.BuilderFlag.TF32)
'''
COMMANDS_HEAD = """\
# Commands for polygraphy 0.53.6 and trtexec, to be run in the package's folder (the one with manifest.json).
# The first of each graph needs no GPU and saves the outputs that others compare with; see docs/package.md.
"""


def write_commands(
    folder: Path,
    target: Target,
    parts: Sequence[Graph | Engine],
    frames: NDArray[np.uint8],
    prompt: NDArray[np.float32],
) -> list[File]:
    """Writes `polygraphy/` into a package that is being built; the same arguments give the same bytes.

    Args:
        folder: the package's, with the files of `parts` in it.
        target: decides which compilers there are commands for.
        parts: graphs and engines, as the manifest lists them.
        frames: uint8 (1, T, H, W, 3), RGB: one clip.
        prompt: float32 (1, S, D): embeddings of S tokens, no more than one call of the decoder takes.

    Returns:
        The files written, for the manifest.

    Raises:
        InputError: the clip or the prompt does not fit an input of `parts`.
    """
    arrays: dict[str, NDArray] = {"frames": frames, "inputs_embeds": prompt}
    feeds = [part for part in parts if _is_onnx(part)]
    for part in feeds:
        for spec in part.inputs:
            if spec.name in arrays:
                _check(arrays[spec.name], spec, _path(part))
    (folder / FOLDER).mkdir(exist_ok=True)
    written = []
    for name, array in arrays.items():
        written.append(folder / FOLDER / f"{name}.npy")
        np.save(written[-1], np.ascontiguousarray(array), allow_pickle=False)
    functions = [_feed_function(part, prompt.shape[1]) for part in feeds]
    if "tensorrt-rtx" in _compilers(target):
        functions.append(WITHOUT_TF32)
    sections = ["\n".join(_commands(part, parts, target)) + "\n" for part in parts]
    for path, text in (
        (HELPERS, "".join([SCRIPT_HEAD, *functions])),
        (COMMANDS, "\n".join([COMMANDS_HEAD, *sections])),
    ):
        written.append(folder / path)
        written[-1].write_text(text, encoding="utf-8", newline="\n")
    return [describe_file(folder, path) for path in written]


def _check(array: NDArray, spec: TensorSpec, where: str) -> None:
    """Raises InputError when the array is of another type or shape than the input, or outside its profile."""
    limits = (spec.profile.min, spec.profile.max) if spec.profile is not None else ([1] * array.ndim, array.shape)
    fits = len(array.shape) == len(spec.shape) and all(
        size == wanted if isinstance(wanted, int) else low <= size <= high
        for size, wanted, low, high in zip(array.shape, spec.shape, *limits, strict=True)
    )
    if not fits or array.dtype != spec.dtype:
        profile = "" if spec.profile is None else f", {spec.profile.min} to {spec.profile.max}"
        raise InputError(
            f"{where}: the sample for {spec.name} is {array.dtype} {list(array.shape)}, expected {spec.dtype} "
            f"{spec.shape}{profile}; give one that fits"
        )


def _feed_function(part: Graph | Engine, positions: int) -> str:
    """Source of a function that returns one feed: arrays from their files, and zeros, with which a conversation
    starts, for write_index and caches."""
    sizes = {"clips": 1, "sequence": positions, "capacity": positions, "past": 0}
    lines = []
    for spec in part.inputs:
        value = f'np.load(FOLDER / "{spec.name}.npy", allow_pickle=False)'
        if spec.name not in ("frames", "inputs_embeds"):
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            value = f'np.zeros({shape}, "{spec.dtype}")'
        lines.append(f'            "{spec.name}": {value},\n')
    return f"\n\ndef {_function(part)}():\n    return [\n        {{\n{''.join(lines)}        }}\n    ]\n"


def _commands(part: Graph | Engine, parts: Sequence[Graph | Engine], target: Target) -> list[str]:
    """The lines of one graph or engine, each with a comment."""
    path, asked = _path(part), part.precision.asked
    compare = ["--compare", "cosine_similarity", "--cosine-similarity-threshold", str(COSINE[asked])]
    title = f"# {path}, {asked}: "
    if isinstance(part, Engine) and not _is_onnx(part):
        # no other runtime opens it, so it is compared with what its graph gave
        graph = next(g for g in parts if _is_onnx(g) and (g.name, g.dialect) == (part.name, part.dialect))
        run = ["polygraphy", "run", path, "--trt", *_inputs(graph), "--load-outputs", _outputs(graph), *compare]
        prefix = RTX if part.compiler == "tensorrt-rtx" else ""
        timed = [TRTEXEC[part.compiler], f"--loadEngine={path}", *_trtexec_shapes(part, {"shapes": "opt"})]
        return [
            f"{title}the engine on its GPU against the saved outputs of {_path(graph)}",
            prefix + shlex.join(run),
            f"{title}the engine's latency",
            shlex.join(timed),
        ]
    run = ["polygraphy", "run", path]
    saved = ["--onnxrt", *_inputs(part), "--validate", "--save-outputs", _outputs(part)]
    lines = [f"{title}ONNX Runtime on the CPU", shlex.join(run + saved)]
    if target.provider == "CUDAExecutionProvider":
        cuda = ["--onnxrt", "--providers", "cuda", *_inputs(part), "--load-outputs", _outputs(part), *compare]
        lines += [f"{title}ONNX Runtime on the GPU against the CPU's outputs", shlex.join(run + cuda)]
    for compiler in _compilers(target):
        built = ["--trt", *_build_arguments(part, compiler), "--onnxrt", *_inputs(part), *compare]
        prefix, name = (RTX, "TensorRT-RTX") if compiler == "tensorrt-rtx" else ("", "TensorRT")
        lines += [f"{title}{name} on a GPU against ONNX Runtime", prefix + shlex.join(run + built)]
        shapes = _trtexec_shapes(part, {"minShapes": "min", "optShapes": "opt", "maxShapes": "max"})
        typed = ["--stronglyTyped"] if compiler == "tensorrt" else []  # which TensorRT 11 and TensorRT-RTX always do
        timed = [TRTEXEC[compiler], f"--onnx={path}", *typed, *shapes]
        lines += [f"{title}built by {name}, and its latency", shlex.join(timed)]
    return lines


def _trtexec_shapes(part: Graph | Engine, options: dict[str, str]) -> list[str]:
    """trtexec's option -> which of a profile's shapes it takes."""
    profiles = {spec.name: spec.profile for spec in part.inputs if spec.profile is not None}
    if not profiles:
        return []
    return [
        f"--{option}="
        + ",".join(f"{name}:{'x'.join(map(str, getattr(profile, which)))}" for name, profile in profiles.items())
        for option, which in options.items()
    ]


def _build_arguments(part: Graph | Engine, compiler: Compiler) -> list[str]:
    """As engines/compile_tensorrt.py builds: strongly typed, with one optimization profile."""
    arguments = ["--strongly-typed"]
    if part.dialect == "fused":
        arguments.append("--decomposable-attentions")  # FP32 has no fused kernel
    if compiler == "tensorrt-rtx":
        arguments += ["--trt-config-postprocess-script", f"{HELPERS}:without_tf32"]
    profiles = {spec.name: spec.profile for spec in part.inputs if spec.profile is not None}
    for which in ("min", "opt", "max") if profiles else ():
        shapes = [f"{name}:[{','.join(map(str, getattr(profile, which)))}]" for name, profile in profiles.items()]
        arguments += [f"--trt-{which}-shapes", *shapes]
    return arguments


def _compilers(target: Target) -> list[Compiler]:
    """The TensorRTs that a target's graphs are for."""
    return [name for name in (target.compiler, target.ahead_of_time) if name in ("tensorrt", "tensorrt-rtx")]


def _path(part: Graph | Engine) -> str:
    return part.files[0].path


def _is_onnx(part: Graph | Engine) -> bool:
    return _path(part).endswith(".onnx")


def _inputs(part: Graph | Engine) -> list[str]:
    return ["--data-loader-script", f"{HELPERS}:{_function(part)}"]


def _outputs(part: Graph | Engine) -> str:
    return f"{FOLDER}/{PurePosixPath(_path(part)).stem}.outputs.json"


def _function(part: Graph | Engine) -> str:
    return PurePosixPath(_path(part)).stem.replace(".", "_")
