"""`liteframe doctor --self-test`: every executor that can run here runs small engines, and is held to ONNX Runtime.

    small bundles, FP32 and FP16 ──compiled here──▶ engines ──executor──▶ visual tokens, logits ─┬─▶ cosines, verdict
    what ONNX Runtime made of them on a CPU, kept with the bundles ──────────────────────────────┘

The bundles are made by export/self_test_bundles.py. Each executor runs in a process of its own, for one may crash, and
polygraphy drives one TensorRT in a process.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import compile_tensorrt, operators, proof
from .compile_bundle import describe_engine
from .device import find_gpus
from .inspect_package import describe_operators
from .package import Model, Operators, Package, describe_file, open_package
from .targets import TENSORRT_MODULES, Dialect, dialect_for_tensorrt

if TYPE_CHECKING:
    from ..runtime.engine import Decoder, Encoder

FOLDER = Path(__file__).with_name("self_test_bundles")
Precise = Literal["fp32", "fp16"]
PRECISIONS: tuple[Precise, ...] = ("fp32", "fp16")
COSINE = {"fp32": 0.99999, "fp16": 0.999}  # of all that comes out, at least
EXECUTORS = {
    "ONNX Runtime, CPU": "CPUExecutionProvider",
    "ONNX Runtime, CUDA": "CUDAExecutionProvider",
    "TensorRT": "tensorrt",
    "TensorRT-RTX": "tensorrt-rtx",
}


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        passed: None if it could not be tried.
        detail: the least cosines, or why not.
    """

    executor: str
    what: str
    passed: bool | None
    detail: str


def run(encoder: Encoder, decoder: Decoder, model: Model) -> dict[str, NDArray[np.float32]]:
    """What engines make of clips, and of a conversation in which everything happens that happens to a decoder: whole
    chunks and single tokens, often enough to be recorded and replayed, other lengths, going back, a second cache."""
    random = np.random.default_rng(0)
    clips = random.integers(0, 256, (model.max_clips, model.clip_length, *model.image_size, 3), dtype=np.uint8)
    made = {f"clips {number}: {count}": encoder.encode(clips[:count]) for number, count in enumerate(
        (1, model.max_clips, model.max_clips, model.max_clips, 2)
    )}  # fmt: skip
    embeddings = random.standard_normal((2 * model.chunk, model.hidden_size)).astype(np.float32) * 0.3
    twin, chunk = decoder.twin(), model.chunk
    steps = [(decoder, 0, chunk), *((decoder, chunk + number, 1) for number in range(4)), (decoder, chunk // 2, 30)]
    steps += [(twin, 0, 100), (twin, 100, 1), (decoder, chunk // 2 + 30, 1), (decoder, 0, chunk), (decoder, 0, chunk)]
    steps += [(twin, 50, 7), (decoder, chunk - 1, 1)]
    for number, (each, start, length) in enumerate(steps):
        each.rewind(start)
        made[f"step {number}: {length} behind {start}"] = each.forward(embeddings[start : start + length])
    return made


def self_test(executors: Iterable[str] = EXECUTORS) -> list[Result]:
    """Tries executors, of those in EXECUTORS."""
    results = []
    for executor in executors:
        if (why := missing(executor)) is not None:
            results.append(Result(executor, "", None, why))
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                results += process.submit(try_executor, executor).result()
            except BrokenProcessPool:
                results.append(Result(executor, "", False, "the process crashed; see its messages above"))
    return results


def missing(executor: str) -> str | None:
    """Why an executor can't be tried here."""
    name = EXECUTORS[executor]
    if name.endswith("Provider"):
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed"
        import onnxruntime

        return None if name in onnxruntime.get_available_providers() else f"{name} is not there"
    gpus, why = find_gpus()
    if not gpus:
        return why
    for module in (TENSORRT_MODULES[_flavour(executor)], "polygraphy", "cuda"):
        if importlib.util.find_spec(module) is None:
            return f"{'cuda-python' if module == 'cuda' else module} is not installed"
    return None


def try_executor(executor: str) -> list[Result]:
    """One executor on both precisions and both dialects, as far as it takes them."""
    results = []
    for precision in PRECISIONS:
        bundle = open_package(FOLDER / precision)
        with np.load(FOLDER / f"{precision}.npz", allow_pickle=False) as kept:
            expected = dict(kept)
        dialects: tuple[Dialect, ...] = ("fused", "plain")
        for dialect in dialects:
            what = f"{precision}, {dialect}"
            try:
                made, told = _run_on(executor, bundle, dialect)
            except NotTaken as why:
                results.append(Result(executor, what, None, str(why)))
            except Exception as error:  # whatever goes wrong on a device is the verdict
                results.append(Result(executor, what, False, f"{type(error).__name__}: {error}"))
            else:
                results.append(compare(executor, what, made, expected, COSINE[precision], told))
    return results


def _flavour(executor: str) -> compile_tensorrt.Flavour:
    return "tensorrt" if EXECUTORS[executor] == "tensorrt" else "tensorrt-rtx"


class NotTaken(Exception):
    """A TensorRT that is too old for a dialect."""


def _run_on(executor: str, bundle: Package, dialect: Dialect) -> tuple[dict[str, NDArray[np.float32]], str]:
    """What comes out, and how custom operators were compiled."""
    name, model = EXECUTORS[executor], bundle.manifest.model
    if name.endswith("Provider"):
        from ..runtime.ort_engine import OrtDecoder, OrtEncoder

        encoder, decoder = (bundle.path(bundle.graph(part, dialect).files[0]) for part in ("encoder", "decoder"))
        return run(OrtEncoder(encoder, name), OrtDecoder(decoder, name, model.capacity), model), ""
    from ..runtime.trt_engine import open_trt

    with tempfile.TemporaryDirectory() as folder:
        package = compile_here(bundle, dialect, _flavour(executor), Path(folder))
        return run(*open_trt(package), model), describe_operators(package.engine("encoder"))


def compile_here(bundle: Package, dialect: Dialect, flavour: compile_tensorrt.Flavour, folder: Path) -> Package:
    """A package of engines that are compiled of a bundle's graphs for the first GPU here, and proved.

    Args:
        folder: where the engines go.

    Raises:
        NotTaken: TensorRT is too old for the dialect, or TensorRT-RTX is not for this GPU.
        InputError: TensorRT refuses a graph.
    """
    trt = compile_tensorrt.load(flavour)
    version = trt.__version__
    gpus, _ = find_gpus()
    capability = gpus[0].capability
    if flavour == "tensorrt-rtx" and not hasattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"):
        raise NotTaken(f"TensorRT-RTX {version} does not compile for compute capability {capability}")
    if flavour == "tensorrt" and (dialect, dialect_for_tensorrt(version)) == ("fused", "plain"):
        raise NotTaken(f"TensorRT {version} does not take this dialect")
    engines = []
    for part in ("encoder", "decoder"):
        graph = bundle.graph(part, dialect)
        path = bundle.path(graph.files[0])
        told = None
        if flavour == "tensorrt" and operators.has_operators(path):  # both ways, which must agree
            chosen = operators.compile_either_way(path, graph.inputs, capability, None, "auto", None)
            compiled, told = chosen.compiled, Operators(way=chosen.way, milliseconds=chosen.milliseconds, library=None)
        else:
            compiled = compile_tensorrt.compile_graph(path, graph.inputs, flavour, [capability])
        proof.check(part, graph.precision, compiled.proof)
        file = folder / f"{part}.engine"
        file.write_bytes(compiled.engine)
        engines.append(describe_engine(graph, describe_file(folder, file), flavour, compiled, capability, told))
    return Package(folder, msgspec.structs.replace(bundle.manifest, engines=engines))


def compare(
    executor: str,
    what: str,
    made: dict[str, NDArray[Any]],
    expected: dict[str, NDArray[Any]],
    least: float,
    told: str = "",
) -> Result:
    """The least cosine between what an executor made and what was expected, step by step; `told` goes with it."""
    cosines = {name: operators.cosine(made[name], value) for name, value in expected.items()}
    worst = min(cosines, key=lambda name: cosines[name] if np.isfinite(cosines[name]) else -2.0)
    detail = f"least cosine {cosines[worst]:.7f} ({worst}), expected {least:g}{told and f'; {told}'}"
    return Result(executor, what, bool(cosines[worst] >= least), detail)
