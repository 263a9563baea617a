"""The custom operators in a TensorRT engine: as their function bodies or as kernels, whichever is faster on the device.

    graph ──without the plugins' namespace──▶ TensorRT ──▶ engine of bodies  ─┐
      └──without the bodies─────────────────▶ TensorRT ──▶ engine of kernels ─┴─▶ equal? timed ──▶ the faster one

Kernels come in two ways. "embedded": TensorRT 10.9 and later have ahead-of-time Python plugins, and the engine carries
PTX; nothing has to be there when it is loaded, which is tried. "library": for earlier ones libliteframe_plugins.so,
which CMake builds, goes into the package, and the runtime loads it before the engine.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import compile_tensorrt
from .compile_tensorrt import Compiled
from .kernels import missing_compiler
from .package import GateError, InputError, TensorSpec, Way

Choice = Literal["auto", "never", "require"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
DOMAIN = "liteframe"
EMBEDDED_SINCE = (10, 9)
LIBRARY = "libliteframe_plugins.so"
COSINE = {"fp32": 0.99999, "other": 0.999}  # of both engines' outputs, at least
WARMUP, ITERATIONS = 10, 50


@dataclass(frozen=True)
class Chosen:
    """
    Attributes:
        milliseconds: median of a run, of each way that was tried; empty if one was.
        why: nothing else was tried, if so.
    """

    compiled: Compiled
    way: Way
    milliseconds: dict[Way, float]
    why: str = ""


def has_operators(graph: Path) -> bool:
    import onnx

    return any(function.domain == DOMAIN for function in onnx.load(graph, load_external_data=False).functions)


def compile_either_way(
    graph: Path,
    inputs: Sequence[TensorSpec],
    capability: str,
    max_workspace: int | None,
    choice: Choice,
    library: Path | None,
) -> Chosen:
    """Compiles a graph that holds custom operators, on the device.

    Args:
        capability: the GPU's, as "8.7".
        choice: "auto" takes the faster of both ways, or bodies where kernels can't be had or are not taken; "never"
            bodies; "require" kernels.
        library: of plugins, for a TensorRT before 10.9.

    Raises:
        InputError: kernels are required and can't be had, or TensorRT refuses a graph.
        GateError: kernels compute something else than bodies, or are required and an engine needs what it should carry
            or does not run.
    """
    trt = compile_tensorrt.load("tensorrt")
    way, why = _way_of_kernels(trt.__version__, library)
    if choice == "require" and way is None:
        raise InputError(f"{graph}: kernels are required, and {why}")
    with _variant(graph, "bodies") as path:
        bodies = compile_tensorrt.compile_graph(path, inputs, "tensorrt", [], max_workspace)
    if choice == "never" or way is None:
        return Chosen(bodies, "bodies", {}, "" if choice == "never" else why)
    _register(trt, way, capability, library)
    expected, slow = run(bodies.engine, inputs)
    try:
        with _variant(graph, way) as path:
            kernels = compile_tensorrt.compile_graph(path, inputs, "tensorrt", [], max_workspace)
        if way == "embedded":
            check_stands_alone(graph, kernels.engine)
        found, fast = run(kernels.engine, inputs)
    except (InputError, GateError) as error:
        if choice == "require":
            raise
        return Chosen(bodies, "bodies", {}, f"with kernels: {error}")
    _check_equal(graph, expected, found, "fp32" if {*bodies.proof.found} == {"fp32"} else "other")
    milliseconds: dict[Way, float] = {"bodies": slow, way: fast}
    faster = choice == "require" or fast < slow
    return Chosen(kernels, way, milliseconds) if faster else Chosen(bodies, "bodies", milliseconds)


def _way_of_kernels(version: str, library: Path | None) -> tuple[Way | None, str]:
    """The way that a TensorRT has, or why none."""
    if tuple(int(part) for part in version.split(".")[:2]) >= EMBEDDED_SINCE:
        why = missing_compiler()
        return (None, why) if why else ("embedded", "")
    if library is None:
        since = ".".join(map(str, EMBEDDED_SINCE))
        return None, (
            f"TensorRT {version} takes them from a library, which was not named (--plugin-library {LIBRARY}, built by "
            f"CMake); from {since} on the engine carries them"
        )
    return "library", ""


@contextmanager
def _variant(graph: Path, way: Way) -> Iterator[Path]:
    """A copy of the graph that leaves a parser one way only, beside it for the sake of its weights.

    Where a node names a plugin's namespace and has a body, too, which of the two a parser takes depends on its age.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.domain == DOMAIN and way == "bodies":
            for attribute in [a for a in node.attribute if a.name == "plugin_namespace"]:
                node.attribute.remove(attribute)
        elif node.domain == DOMAIN and way == "embedded":
            numbers = {"aot": 1, **_one_by_one(node)}
            node.attribute.extend(onnx.helper.make_attribute(name, number) for name, number in numbers.items())
    if way != "bodies":
        for function in [f for f in model.functions if f.domain == DOMAIN]:
            model.functions.remove(function)
    path = graph.with_name(f".{graph.stem}.{way}.{os.getpid()}.onnx")
    try:
        path.write_bytes(model.SerializeToString())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _one_by_one(node: Any) -> dict[str, int]:
    """The numbers in an operator's attributes, by names that aot_plugins.py asks for; a grid of one axis is one row.

    TensorRT's Python bindings before 10.16 repeat an attribute's first number instead of the others, where NumPy is 2
    or later.
    """
    import onnx

    lists = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if "blocks" in lists:
        return dict(zip(("nt", "t", "nh", "h", "nw", "w"), lists["blocks"], strict=True))
    time, *strides = lists["strides"]
    one = [1] if len(strides) == 1 else []
    names = "rows", "columns", "stride_of_time", "stride_of_rows", "stride_of_columns"
    return dict(zip(names, (*one, *lists["grid"], time, *one, *strides), strict=True))


def _register(trt: Any, way: Way, capability: str, library: Path | None) -> None:
    """Makes the plugins known to TensorRT, once in a process. Raises InputError when it does not take the library."""
    registry = trt.get_plugin_registry()
    if registry.get_creator("DepthwiseTemporalConv", "1", DOMAIN) is not None:
        return
    if way == "embedded":
        from . import aot_plugins

        aot_plugins.register(capability)
    elif registry.load_library(str(library)) is None:
        raise InputError(
            f"{library}: TensorRT {trt.__version__} does not load it; expected {LIBRARY}, which CMake builds on this "
            "device against its TensorRT's headers"
        )


def check_stands_alone(graph: Path, engine: bytes) -> None:
    """Deserialises an engine in a process that knows no plugins. Raises GateError when that fails."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        if not process.submit(_deserialises, engine).result():
            raise GateError(
                f"{graph}: the engine, which should carry its kernels, is not loaded without plugins; see TensorRT's "
                "messages above, or build with --plugins never"
            )


def _deserialises(engine: bytes) -> bool:
    trt = compile_tensorrt.load("tensorrt")
    return trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine) is not None


def run(engine: bytes, inputs: Sequence[TensorSpec]) -> tuple[dict[str, NDArray[Any]], float]:
    """What an engine makes of random inputs of the most common shape, and the median of its time in milliseconds.

    Raises:
        GateError: it is not loaded, or does not run.
    """
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.exception import PolygraphyException

    _name_cudart()

    random = np.random.default_rng(0)
    feed = {}
    for spec in inputs:
        shape = spec.profile.opt if spec.profile is not None else [int(size) for size in spec.shape]
        dtype = np.dtype(spec.dtype)
        drawn = random.integers(0, 256, shape) if dtype.kind in "ui" else random.standard_normal(shape)
        feed[spec.name] = drawn.astype(dtype)
    times = []
    try:
        with TrtRunner(EngineFromBytes(engine)) as runner:
            for number in range(WARMUP + ITERATIONS):
                outputs = runner.infer(feed, copy_outputs_to_host=True)
                if number >= WARMUP:
                    times.append(1000 * runner.last_inference_time())
            made = {name: np.array(value) for name, value in outputs.items()}
    except PolygraphyException as error:
        raise GateError(f"the engine does not run: {' '.join(str(error).split())}") from None
    return made, statistics.median(times)


def _name_cudart() -> None:
    """Tells polygraphy where CUDA's runtime is; it does not look where the wheels of CUDA 13 have it."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cudart").abs_path
    except (ImportError, RuntimeError):  # polygraphy looks by itself
        return
    folders = [str(Path(path).parent) if path else "", *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(dict.fromkeys(folder for folder in folders if folder))


def _check_equal(
    graph: Path, bodies: dict[str, NDArray[Any]], kernels: dict[str, NDArray[Any]], precision: str
) -> None:
    for name, expected in bodies.items():
        found = cosine(expected, kernels[name])
        if not found >= COSINE[precision]:  # or NaN
            raise GateError(
                f"{graph}: with kernels {name} differs from that with function bodies, cosine {found:.7f}, expected "
                f"{COSINE[precision]}; build with --plugins never, and report it with the output of: "
                "liteframe doctor --self-test"
            )


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Of all elements, in double precision; 0 where one is zero throughout."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.maximum(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
