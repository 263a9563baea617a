"""One table: what each target is, what compiles for it, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dialect = Literal["fused", "plain"]
Compiler = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
# what a build may be asked for; "-weights": of the decoder, whose activations stay FP16
Asked = Literal["fp32", "fp16", "int8", "int8-weights", "int4-weights"]
PRECISIONS: tuple[Asked, ...] = ("fp32", "fp16", "int8")
WEIGHTS_ONLY: tuple[Asked, ...] = ("int8-weights", "int4-weights")

TENSORRT_MODULES: dict[Compiler, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

# the first TensorRT whose parser takes TensorScatter and RMSNormalization: the `fused` dialect
FUSED_SINCE = (10, 15)


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        capabilities: compute capabilities that engines are compiled for; none for a CPU.
        compiler: what makes the engine; "tensorrt" runs on the device only.
        ahead_of_time: what makes an engine anywhere, without a GPU, where the compiler itself can't.
        proof: capability that the `fused` graph is compiled for, as a proof, before a bundle leaves.
        dialects: graphs that a package for this target carries.
        provider: ONNX Runtime's execution provider, for ONNX Runtime targets.
        precisions: what it has kernels for. On a CPU FP16 is stored, and computed in FP32.
    """

    name: str
    machine: str
    compiler: Compiler
    capabilities: tuple[str, ...] = ()
    ahead_of_time: Compiler | None = None
    proof: str | None = None
    dialects: tuple[Dialect, ...] = ("fused",)
    provider: str | None = None
    precisions: tuple[Asked, ...] = (*PRECISIONS, *WEIGHTS_ONLY)


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "any CPU", "onnxruntime", provider="CPUExecutionProvider"),
        Target(
            "cuda",
            "any NVIDIA GPU",
            "onnxruntime",
            provider="CUDAExecutionProvider",
            precisions=("fp32", "fp16"),  # its CUDA provider dequantises and multiplies in floating point
        ),
        Target("a100", "x86-64 with an A100", "tensorrt", capabilities=("8.0",), ahead_of_time="tensorrt-rtx"),
        Target("rtx", "x86-64 with an RTX GPU", "tensorrt-rtx", capabilities=("8.6", "8.9", "12.0", "12.1")),
        Target(
            "jetson-orin",
            "Jetson Orin (JetPack 6.1 or later)",
            "tensorrt",
            capabilities=("8.7",),
            proof="8.6",
            dialects=("fused", "plain"),
        ),
        Target(
            "jetson-thor",
            "Jetson Thor (JetPack 7.1 or later)",
            "tensorrt",
            capabilities=("11.0",),
            proof="12.0",
            dialects=("fused", "plain"),
        ),
    )
}


def dialect_for_tensorrt(version: str) -> Dialect:
    """The dialect that a TensorRT of this version takes."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return "fused" if (major, minor) >= FUSED_SINCE else "plain"


# The `plain` floor: operators and the types of what they compute on, as TensorRT 10.x's parser documents them for
# opsets 9 to 20 (onnx-tensorrt, docs/operators.md, branch 10.1-GA; JetPack 6's 10.3 is later). Only operators that
# graphs of this project may hold are listed; anything else is refused before a bundle leaves. That parser takes INT4
# too, for which ONNX has operators since opset 21; it reads the size of blocks off the scales, and wants these positive
# (QuantDequantLinearHelper in its onnxOpImporters.cpp).
PLAIN_OPSET, PLAIN_OPSET_INT4 = 20, 21
_FLOATS = frozenset({"fp32", "fp16", "bf16"})
_NUMBERS = _FLOATS | {"int32", "int64"}
PLAIN_TYPES: dict[str, frozenset[str]] = {
    operator: types
    for types, operators in (
        (frozenset({"bool"}), "And Not Or"),
        (
            _FLOATS,
            """Clip Conv Cos CumSum Einsum Erf Exp Gelu Gemm LayerNormalization Log MatMul Pow QuantizeLinear Reciprocal
            Sigmoid Sin Softmax Sqrt Tanh""",
        ),
        (
            _NUMBERS,
            """Abs Add Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Neg Pad Range ReduceMax ReduceMean
            ReduceMin ReduceSum Relu ScatterElements ScatterND Sub TopK""",
        ),
        (
            _NUMBERS | {"bool"},
            """Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity Reshape Shape
            Slice Split Squeeze Transpose Trilu Unsqueeze Where""",
        ),
        (_NUMBERS | {"bool", "uint8"}, "Cast CastLike"),
        (frozenset({"int8", "int4"}), "DequantizeLinear"),
    )
    for operator in operators.split()
}
