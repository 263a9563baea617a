"""The operators as TensorRT's ahead-of-time Python plugins: an engine carries their kernels, and needs nothing beside.

    node ──register: its output's shape──▶ network ──aot_impl: a kernel's PTX, launch, integers──▶ engine

For TensorRT 10.9 and later, in the process that builds. Running such an engine needs neither this module nor Python.
TensorRT reads these functions' annotations, which must not be text. Attributes are one number each; see operators.py.
"""

import math

import numpy as np
import numpy.typing as npt
import tensorrt as trt
import tensorrt.plugin as trtp

from .kernels import ConvolutionShape, Kernel, Type, compile_kernel, convolution, pooling
from .operators import DOMAIN

TYPES: dict[trt.DataType, Type] = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}
# with one element, not int: bindings before 10.16 make no int of an attribute where NumPy is 2.4 or later
Number = npt.NDArray[np.int32]
ALIKE = "FP32|FP16|BF16"  # at several places: one of them throughout
Implementation = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]


def register(capability: str) -> None:
    """Both operators, once in a process.

    Args:
        capability: for which PTX is compiled, as "8.0".

    The functions raise InputError when NVRTC is not here.
    """

    def implementation(kernel: Kernel, clips: trtp.ShapeExpr) -> Implementation:
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(clips * kernel.units, kernel.per_block) * kernel.slabs
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared
        integers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(n) for n in (clips, *kernel.integers)])
        return kernel.name, compile_kernel(kernel.entry, capability, "ptx"), launch, integers

    @trtp.register(f"{DOMAIN}::DepthwiseTemporalConv")
    def convolved(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        rows: Number,
        columns: Number,
        stride_of_time: Number,
        stride_of_rows: Number,
        stride_of_columns: Number,
    ) -> trtp.TensorDesc:
        out = x.like()
        out.shape_expr[1] = trtp.cdiv(x.shape_expr[1], int(stride_of_time[0]))
        axes = (rows, stride_of_rows), (columns, stride_of_columns)
        out.shape_expr[2] = math.prod(math.ceil(size[0] / stride[0]) for size, stride in axes)
        return out

    @trtp.autotune(f"{DOMAIN}::DepthwiseTemporalConv")
    def convolution_types(
        x: trtp.TensorDesc, weight: trtp.TensorDesc, bias: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination(", ".join([ALIKE] * 4), "LINEAR")]

    @trtp.aot_impl(f"{DOMAIN}::DepthwiseTemporalConv")
    def convolution_kernel(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        rows: Number,
        columns: Number,
        stride_of_time: Number,
        stride_of_rows: Number,
        stride_of_columns: Number,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> Implementation:
        time, channels = (x.shape_expr[axis].constant_value() for axis in (1, 3))
        kt, *taps = (weight.shape_expr[axis].constant_value() for axis in range(2, weight.ndim))
        kernel = kt, *([1] if len(taps) == 1 else []), *taps
        grid, strides = _numbers(rows, columns), _numbers(stride_of_time, stride_of_rows, stride_of_columns)
        shape = ConvolutionShape.of(time, grid, channels, kernel, strides)
        return implementation(convolution(TYPES[x.dtype], shape), x.shape_expr[0])

    @trtp.register(f"{DOMAIN}::WeightedAveragePool")
    def pooled(
        x: trtp.TensorDesc, nt: Number, t: Number, nh: Number, h: Number, nw: Number, w: Number
    ) -> trtp.TensorDesc:
        count = math.prod(_numbers(nt, nh, nw))
        return trtp.from_shape_expr((x.shape_expr[0], count, x.shape_expr[3]), x.dtype)

    @trtp.autotune(f"{DOMAIN}::WeightedAveragePool")
    def pooling_types(x: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]) -> list[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination(", ".join([ALIKE] * 2), "LINEAR")]

    @trtp.aot_impl(f"{DOMAIN}::WeightedAveragePool")
    def pooling_kernel(
        x: trtp.TensorDesc,
        nt: Number,
        t: Number,
        nh: Number,
        h: Number,
        nw: Number,
        w: Number,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> Implementation:
        blocks = _numbers(nt, t, nh, h, nw, w)
        kernel = pooling(TYPES[x.dtype], blocks, x.shape_expr[3].constant_value())
        return implementation(kernel, x.shape_expr[0])


def _numbers(*attributes: Number) -> list[int]:
    return [int(attribute[0]) for attribute in attributes]
