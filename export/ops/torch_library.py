"""The operators in torch's library, liteframe::depthwise_temporal_conv and liteframe::weighted_average_pool, with
gradients: on CUDA by the kernels of engines/native, on a CPU by the torch functions they are held to.

    x, weight, bias ──▶ kernel for their shapes and type ──NVRTC, once──▶ machine code ──▶ launch on torch's stream

Importing registers both. Kernels take FP32, FP16 and BF16.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...engines import kernels
from ...engines.kernels import ConvolutionShape, Kernel
from . import depthwise_temporal_conv as convolution
from . import weighted_average_pool as pooling

TYPES: dict[torch.dtype, kernels.Type] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# -- DepthwiseTemporalConv


@torch.library.custom_op("liteframe::depthwise_temporal_conv", mutates_args=())
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, grid: list[int], strides: list[int], residual: Tensor | None
) -> Tensor:
    out = convolution.reference(x, weight, bias, grid, strides)
    return (out if residual is None else out + residual).contiguous()


@convolve.register_fake
def fake_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, grid: list[int], strides: list[int], residual: Tensor | None
) -> Tensor:
    return x.new_empty(convolution.output_shape(x.shape, grid, strides))


@convolve.register_kernel("cuda")
def convolve_on_cuda(
    x: Tensor, weight: Tensor, bias: Tensor, grid: list[int], strides: list[int], residual: Tensor | None
) -> Tensor:
    axes = len(grid) + 1
    fit = len(strides) == axes and weight.dim() == axes + 2 and weight.shape[:2] == (x.shape[3], 1)
    fit = fit and math.prod(grid) == x.shape[2] and bias.shape == (x.shape[3],)
    if not fit or (residual is not None and residual.shape != convolution.output_shape(x.shape, grid, strides)):
        given = [list(tensor.shape) for tensor in (x, weight, bias, *([] if residual is None else [residual]))]
        raise ValueError(
            f"DepthwiseTemporalConv of x, weight, bias and residual {given} with grid {grid} and strides {strides}; "
            "expected (clips, T, prod(grid), C), (C, 1, odd kernel sizes), (C,) and the output's shape"
        )
    out = x.new_empty(convolution.output_shape(x.shape, grid, strides))
    kernel = kernels.convolution(TYPES[x.dtype], _shape(x, weight, grid, strides), residual is not None)
    inputs = [x, weight.to(x.dtype), bias.to(x.dtype), *([] if residual is None else [residual.to(x.dtype)])]
    _launch(kernel, len(x), inputs, out)
    return out


@torch.library.custom_op("liteframe::depthwise_temporal_conv_backward", mutates_args=())
def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, grid: list[int], strides: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, of their types."""
    to_first, to_last = convolution.axes(grid)
    clips, time, _, channels = x.shape
    size = [math.ceil(n / s) for n, s in zip((time, *grid), strides, strict=True)]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.reshape(clips, *size, channels).permute(to_first),
        x.reshape(clips, time, *grid, channels).permute(to_first),
        weight,
        bias_sizes=[channels],
        stride=strides,
        padding=[k // 2 for k in weight.shape[2:]],
        dilation=[1] * len(size),
        transposed=False,
        output_padding=[0] * len(size),
        groups=channels,
        output_mask=[True, True, True],
    )
    return grad_x.permute(to_last).reshape(x.shape).contiguous(), grad_weight.contiguous(), grad_bias


@convolve_backward.register_fake
def fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, grid: list[int], strides: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


@convolve_backward.register_kernel("cuda")
def convolve_backward_on_cuda(
    grad: Tensor, x: Tensor, weight: Tensor, grid: list[int], strides: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    type_, shape, clips = TYPES[x.dtype], _shape(x, weight, grid, strides), len(x)
    grad, narrow = grad.to(x.dtype), weight.to(x.dtype)
    grad_x = x.new_empty(x.shape)
    if shape.strides == (1, 1, 1):  # a convolution of the output's gradient, with the taps the other way round
        flipped = narrow.flip([*range(2, weight.dim())])
        _launch(kernels.convolution(type_, shape), clips, [grad, flipped, narrow.new_zeros(len(weight))], grad_x)
    else:
        _launch(kernels.input_gradient(type_, shape), clips, [grad, narrow], grad_x)
    kernel = kernels.weight_gradient(type_, shape)
    taps = weight[0].numel()
    parts = x.new_empty((kernel.blocks(clips), taps + 1, len(weight)), dtype=torch.float32)
    _launch(kernel, clips, [x, grad], parts)
    sums = parts.sum(0).to(weight.dtype)
    grad_weight = sums[:taps].T.reshape(weight.shape).clone(memory_format=torch.contiguous_format)
    return grad_x, grad_weight, sums[taps].clone()  # what an operator returns may not share memory


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.grid, ctx.strides, residual = inputs
    ctx.types = bias.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bias_type, residual_type = ctx.types
    grad_x, grad_weight, grad_bias = torch.ops.liteframe.depthwise_temporal_conv_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.grid, ctx.strides
    )
    residual = None if residual_type is None else grad.to(residual_type)
    return grad_x, grad_weight, grad_bias.to(bias_type), None, None, residual


convolve.register_autograd(_backward, setup_context=_keep_for_backward)


def _shape(x: Tensor, weight: Tensor, grid: Sequence[int], strides: Sequence[int]) -> ConvolutionShape:
    return ConvolutionShape.of(x.shape[1], grid, x.shape[3], weight.shape[2:], strides)


# -- WeightedAveragePool


@torch.library.custom_op("liteframe::weighted_average_pool", mutates_args=())
def pool(x: Tensor, blocks: list[int]) -> Tensor:
    return pooling.reference(x, blocks)


@pool.register_fake
def fake_pool(x: Tensor, blocks: list[int]) -> Tensor:
    return x.new_empty(pooling.output_shape(x.shape, blocks))


@pool.register_kernel("cuda")
def pool_on_cuda(x: Tensor, blocks: list[int]) -> Tensor:
    out = x.new_empty(pooling.output_shape(x.shape, blocks))
    nt, t, nh, h, nw, w = blocks
    if x.shape[1:3] != (nt * t, 1 + nh * h * nw * w):
        raise ValueError(
            f"WeightedAveragePool of {list(x.shape)} in blocks {blocks}; expected (clips, {nt * t}, "
            f"{1 + nh * h * nw * w}, C), CLS first"
        )
    _launch(kernels.pooling(TYPES[x.dtype], blocks, x.shape[3]), len(x), [x], out)
    return out


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.blocks = inputs
    ctx.save_for_backward(x)


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By torch, from the tokens: a teacher's features are seldom trained through."""
    with torch.enable_grad():
        x = ctx.saved_tensors[0].detach().requires_grad_()
        out = pooling.reference(x, ctx.blocks)
    return *torch.autograd.grad(out, x, grad), None


pool.register_autograd(_pool_backward, setup_context=_keep_input)


# -- launches


def _launch(kernel: Kernel, clips: int, inputs: Sequence[Tensor], out: Tensor) -> None:
    """On torch's current stream. Inputs are copied where they are not contiguous, or begin between 16 bytes."""
    if not out.numel():
        return
    from cuda.core import Device, LaunchConfig, Stream, launch

    device = out.device
    with torch.cuda.device(device):
        Device(device.index).set_current()
        aligned = [tensor.contiguous() for tensor in inputs]
        aligned = [tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in aligned]
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        config = LaunchConfig(grid=kernel.grid(clips), block=kernel.threads, shmem_size=kernel.shared)
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        integers = [ctypes.c_int(number) for number in (clips, *kernel.integers)]
        arguments = [*(tensor.data_ptr() for tensor in aligned), *integers, out.data_ptr()]
        launch(stream, config, _loaded(kernel.entry, kernel.name, capability, device.index), *arguments)


@lru_cache
def _loaded(entry: str, name: str, capability: str, device: int) -> Any:
    """The kernel on the current device, of this index."""
    from cuda.core import ObjectCode

    code = kernels.compile_kernel(entry, capability, "cubin")
    return ObjectCode.from_cubin(code).get_kernel(name)
