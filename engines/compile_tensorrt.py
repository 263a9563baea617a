"""ONNX graph -> TensorRT engine, through polygraphy: by TensorRT on its device, or ahead of time by TensorRT-RTX.

    graph --parse (strongly typed)--> network --read back--> proof of precision
                                              --build with one profile--> engine bytes

TensorRT-RTX needs no GPU to build; TensorRT does. Which of the two polygraphy drives is decided when it is imported,
so one process uses one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .package import InputError, TensorSpec
from .proof import Proof, prove_network
from .targets import TENSORRT_MODULES

Flavour = Literal["tensorrt", "tensorrt-rtx"]
WORKSPACE_HELP = "memory that TensorRT may use for a layer beside its tensors, in MiB (default: all there is)"
_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "INT4": "int4", "FP8": "fp8"}


@dataclass(frozen=True)
class Compiled:
    """An engine's bytes, what its network computes, and the compiler's version."""

    engine: bytes
    proof: Proof
    version: str


def mebibytes(text: str) -> int:
    """An argument in MiB, in bytes. Raises ArgumentTypeError if it is no positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of MiB; expected one such as 1024")
    return int(text) * 2**20


def available(flavour: Flavour) -> bool:
    """Whether the compiler is installed. TensorRT proper also needs a GPU, which only building tells."""
    return importlib.util.find_spec(TENSORRT_MODULES[flavour]) is not None


def load(flavour: Flavour) -> Any:
    """Imports polygraphy for the wanted compiler, and the compiler.

    Raises:
        InputError: one of them is not installed, or this process already uses the other one.
    """
    if not available(flavour):
        hint = {
            "tensorrt": "on a Jetson it comes with JetPack, elsewhere from NVIDIA's package index",
            "tensorrt-rtx": "install liteframe[export] on x86-64 Linux",
        }[flavour]
        raise InputError(f"{flavour} is not installed here; {hint}")
    if importlib.util.find_spec("polygraphy") is None:
        raise InputError(
            f"polygraphy, which drives {flavour}, is not installed; run: pip install 'liteframe[tensorrt]'"
        )
    if "polygraphy.config" not in sys.modules:  # which reads it once
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if flavour == "tensorrt-rtx" else "0"
    from polygraphy import config
    from polygraphy.logger import G_LOGGER

    drives_rtx: bool = config.USE_TENSORRT_RTX
    if drives_rtx != (flavour == "tensorrt-rtx"):
        raise InputError(f"this process already uses the other TensorRT; compile with {flavour} in a new one")
    G_LOGGER.module_severity = G_LOGGER.ERROR
    return importlib.import_module(TENSORRT_MODULES[flavour])


def compile_graph(
    graph: Path,
    inputs: Sequence[TensorSpec],
    flavour: Flavour,
    capabilities: Sequence[str],
    max_workspace: int | None = None,
) -> Compiled:
    """Parses and builds one graph with one optimization profile.

    Args:
        inputs: with profiles where a dimension varies.
        capabilities: for TensorRT-RTX, what the engine must run on, such as "8.0"; TensorRT takes the GPU it finds.
        max_workspace: bytes that a layer may use beside its tensors, while it is tried out and later; None leaves it to
            the compiler, which takes all there is.

    Raises:
        InputError: the compiler is missing, an input that varies has no profile, or the compiler does not take the
            graph; with its own messages.
    """
    trt = load(flavour)
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        PostprocessConfig,
        Profile,
        network_from_onnx_path,
    )
    from polygraphy.exception import PolygraphyException

    profile = Profile()
    for spec in inputs:
        if spec.profile is None and any(isinstance(size, str) for size in spec.shape):
            raise InputError(f"{graph}: input {spec.name} varies and has no profile of shapes; build the graph again")
        if spec.profile is not None:
            profile.add(spec.name, spec.profile.min, spec.profile.opt, spec.profile.max)
    limits = None if max_workspace is None else {trt.MemoryPoolType.WORKSPACE: max_workspace}
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            builder, network, parser = network_from_onnx_path(str(graph), strongly_typed=True)
            _let_attention_decompose(trt, network)
            if flavour == "tensorrt-rtx":
                from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

                pairs = [tuple(int(part) for part in capability.split(".")) for capability in capabilities]
                config = PostprocessConfig(
                    CreateConfigRTX(profiles=[profile], compute_capabilities=pairs, memory_pool_limits=limits),
                    # on by default, and FP32 asked for is FP32; for TensorRT polygraphy does it
                    lambda builder, network, config: config.clear_flag(trt.BuilderFlag.TF32),
                )
            else:
                config = CreateConfig(profiles=[profile], memory_pool_limits=limits)
            proof = prove_network(graph, _layer_types(trt, network))
            engine = EngineBytesFromNetwork((builder, network, parser), config=config)()
    except PolygraphyException as error:
        details = _errors(log.getvalue()) or " ".join(str(error).split())
        raise InputError(f"{graph}: {flavour} {trt.__version__} cannot compile it: {details}") from None
    return Compiled(engine=bytes(engine), proof=proof, version=trt.__version__)


def _errors(log: str) -> str:
    """The compiler's own first errors, which explain a failure; without those about the GPU that is not there, and
    without the parser's frames around each."""
    lines = [line.partition("[E]")[2].strip() for line in log.splitlines() if "[E]" in line and "cudaError" not in line]
    telling = dict.fromkeys(line[:400] for line in lines if line and not line.startswith("ModelImporter.cpp:"))
    return "; ".join([*telling][:3])


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Attention for which there is no fused kernel (FP32 has none) may be built from its parts instead of failing."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # the binding hands out the base class
            layer.attention.decomposable = True


def _layer_types(trt: Any, network: Any) -> Iterator[tuple[str, str]]:
    """For each output of each layer of a parsed network that holds numbers: ONNX node, type."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.CONSTANT:
            continue
        for output in range(layer.num_outputs):
            name = _TYPES.get(layer.get_output_type(output).name)
            if name:
                yield _onnx_node(layer.metadata), name


def _onnx_node(metadata: str) -> str:
    """The node of the main graph in `[ONNX Layer: inner node | node (Function)]`; "" for layers of the parser's own."""
    if not metadata.startswith("[ONNX Layer: "):
        return ""
    outermost = metadata.removeprefix("[ONNX Layer: ").removesuffix("]").split(" | ")[-1]
    return outermost.rpartition(" (")[0] if outermost.endswith(")") else outermost
