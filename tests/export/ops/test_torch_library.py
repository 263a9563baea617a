"""The operators in torch's library: their contracts on a CPU, and CUDA's side with its kernels run on this CPU."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from liteframe.export.models.liteframe import Downsampling, LiteFrame, LiteFrameConfig
from liteframe.export.models.vit import ViTConfig
from liteframe.export.ops import depthwise_temporal_conv, torch_library, weighted_average_pool

TYPES = ["fp32", "fp16", "bf16"]
TORCH = {name: type_ for type_, name in torch_library.TYPES.items()}
TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}  # of the largest value
CASES = [
    (4, (9,), 24, (3, 1), (1, 1)),
    (4, (4, 6), 16, (3, 3, 3), (2, 2, 2)),
    (2, (3, 5), 8, (3, 1, 1), (2, 1, 1)),
    (5, (7,), 5, (5, 3), (1, 1)),
]
BLOCKS = [(1, 4, 2, 2, 3, 2), (2, 1, 1, 3, 2, 2)]


def tensors(case, clips=2, dtype=torch.float64, seed=0):
    time, grid, channels, kernel, strides = case
    random = torch.Generator().manual_seed(seed)
    positions = int(np.prod(grid))
    x = torch.randn(clips, time, positions, channels, generator=random, dtype=torch.float64)
    weight = torch.randn(channels, 1, *kernel, generator=random, dtype=torch.float64) / 2
    bias = torch.randn(channels, generator=random, dtype=torch.float64)
    shape = depthwise_temporal_conv.output_shape(x.shape, grid, strides)
    residual = torch.randn(*shape, generator=random, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias, residual)], list(grid), list(strides)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_keeps_torchs_contracts(case):
    (x, weight, bias, residual), grid, strides = tensors(case)
    for last in (None, residual):
        arguments = (x, weight, bias, grid, strides, last)
        torch.library.opcheck(torch_library.convolve, arguments)
        assert torch.autograd.gradcheck(torch_library.convolve, arguments)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_pooling_keeps_torchs_contracts(blocks):
    nt, t, nh, h, nw, w = blocks
    x = torch.randn(2, nt * t, 1 + nh * h * nw * w, 8, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch_library.pool, (x, [*blocks]))
    assert torch.autograd.gradcheck(torch_library.pool, (x, [*blocks]))


# CUDA's side


class OnThisCpu:
    """Stands for `_launch`."""

    def __init__(self, emulated):
        self.emulated, self.launched = emulated, []

    def __call__(self, kernel, clips, inputs, out):
        self.launched.append(kernel.name)
        inputs = [tensor.contiguous() for tensor in inputs]
        assert all(tensor.dtype == inputs[0].dtype for tensor in inputs) and out.is_contiguous()
        out.fill_(float("nan"))
        assert self.emulated(kernel, clips, [tensor.data_ptr() for tensor in inputs], out.data_ptr()) == 0


@pytest.fixture
def on_this_cpu(emulated, monkeypatch):
    stand_in = OnThisCpu(emulated)
    monkeypatch.setattr(torch_library, "_launch", stand_in)
    return stand_in


def as_operator(function, fake):
    """The function as an operator of its own, of which torch asks what it asks on CUDA, at each call that its outputs
    share no memory."""
    op = torch.library.custom_op(f"liteframe_test::{function.__name__}", function, mutates_args=())
    op.register_fake(fake)
    return op


CONVOLVE = as_operator(torch_library.convolve_on_cuda, torch_library.fake_convolve)
CONVOLVE_BACKWARD = as_operator(torch_library.convolve_backward_on_cuda, torch_library.fake_backward)
POOL = as_operator(torch_library.pool_on_cuda, torch_library.fake_pool)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_comes_from_cuda_is_laid_out_as_torch_was_told(on_this_cpu, case):
    (x, weight, bias, residual), grid, strides = tensors(case, dtype=torch.float32)
    x, weight, bias, residual = (tensor.detach() for tensor in (x, weight, bias, residual))
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(CONVOLVE, (x, weight, bias, grid, strides, residual), test_utils=tests)
    torch.library.opcheck(CONVOLVE_BACKWARD, (residual, x, weight, grid, strides), test_utils=tests)
    torch.library.opcheck(POOL, (torch.ones(2, 4, 13, 16), [2, 2, 2, 2, 3, 1]), test_utils=tests)


def close(found, expected, type_):
    assert found.shape == expected.shape
    error, scale = ((found.double() - expected).abs().max(), expected.abs().max())
    assert float(error.detach()) <= TOLERANCE[type_] * (float(scale.detach()) + 1e-6)


@given(case=st.sampled_from(CASES), clips=st.integers(1, 3), type_=st.sampled_from(TYPES), seed=st.integers(0, 99))
def test_convolutions_and_their_gradients(emulated, case, clips, type_, seed):
    wanted, grid, strides = tensors(case, clips, TORCH[type_], seed)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        stand_in = OnThisCpu(emulated)
        patch.setattr(torch_library, "_launch", stand_in)
        x, weight, bias, residual = wanted
        grad = torch.randn(residual.shape, generator=torch.Generator().manual_seed(seed)).to(TORCH[type_])
        out = CONVOLVE(x, weight.float(), bias.float(), grid, strides, residual)
        gradients = CONVOLVE_BACKWARD(grad, x, weight.float(), grid, strides)
    assert out.dtype == TORCH[type_] and [g.dtype for g in gradients] == [TORCH[type_], torch.float32, torch.float32]
    inputs = [tensor.detach().double().requires_grad_() for tensor in wanted[:3]]
    expected = depthwise_temporal_conv.reference(*inputs, grid, strides)
    close(out, expected + wanted[3].double(), type_)
    for found, one in zip(gradients, torch.autograd.grad(expected, inputs, grad.double()), strict=True):
        close(found, one, type_)
    by_gathering = any("input_gradient" in name for name in stand_in.launched)
    assert by_gathering == (set(strides) != {1})  # with stride 1 it is its own gradient
    assert all(re.search(rf"_{type_}_[148]$", name) for name in stand_in.launched)


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_pooling(on_this_cpu, blocks, type_):
    nt, t, nh, h, nw, w = blocks
    x = torch.randn(3, nt * t, 1 + nh * h * nw * w, 16).to(TORCH[type_])
    out = POOL(x, [*blocks])
    close(out, weighted_average_pool.reference(x.double(), blocks), type_)
    assert {*on_this_cpu.launched} == {f"weighted_average_pool_{type_}"}


@pytest.mark.parametrize(
    ("change", "value"),
    [("grid", [2, 4]), ("strides", [1, 1]), ("weight", (16, 1, 3, 3)), ("bias", (15,)), ("residual", (1, 2, 6, 16))],
)
def test_shapes_that_do_not_match_are_refused(on_this_cpu, change, value):
    given = {
        "x": torch.ones(2, 4, 24, 16), "weight": torch.ones(16, 1, 3, 3, 3), "bias": torch.ones(16), "grid": [4, 6],
        "strides": [2, 2, 2], "residual": torch.ones(2, 2, 6, 16),
    }  # fmt: skip
    torch_library.convolve_on_cuda(**given)
    given[change] = torch.ones(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=r"DepthwiseTemporalConv of x, weight, bias and residual .* expected"):
        torch_library.convolve_on_cuda(**given)
    assert len(on_this_cpu.launched) == 1


@pytest.mark.parametrize("blocks", [[1, 4, 2, 2, 2, 2], [1, 2, 2, 2, 3, 2]])
def test_blocks_that_do_not_cover_the_tokens_are_refused(on_this_cpu, blocks):
    with pytest.raises(ValueError, match=r"WeightedAveragePool of \[2, 4, 25, 16\] in blocks .*CLS first"):
        torch_library.pool_on_cuda(torch.ones(2, 4, 25, 16), blocks)
    assert not on_this_cpu.launched


def test_no_clips_are_no_launch():
    out = torch_library.convolve_on_cuda(
        torch.ones(0, 4, 9, 8), torch.ones(8, 1, 3, 1), torch.ones(8), [9], [1, 1], None
    )
    assert out.shape == (0, 4, 9, 8) and torch_library.pool_on_cuda(torch.ones(0, 1, 2, 8), [1] * 6).numel() == 0


def test_a_training_step_of_the_student_is_the_same_through_them(on_this_cpu, monkeypatch):
    """Loss and gradients of every parameter, with the tensors taken for a GPU's."""
    vit = ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=(32, 32),
        patch_size=4,
    )
    torch.manual_seed(0)
    downsampling = Downsampling(2, (2, 2, 2)), Downsampling(3, (2, 1, 1))
    student = LiteFrame(LiteFrameConfig(vit=vit, head_size=8, downsampling=downsampling))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    frames = torch.randn(8, 32, 32, 3)

    def step():
        student.zero_grad()
        loss = student(frames).square().mean()
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in student.parameters())]

    expected = step()

    class Through(torch.autograd.Function):
        """What torch.library does on CUDA: the kernels forward, and the registered formula backward."""

        @staticmethod
        def forward(ctx, *inputs):
            torch_library._keep_for_backward(ctx, inputs, None)
            return torch_library.convolve_on_cuda(*inputs)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            gradients = torch_library.convolve_backward_on_cuda(grad.contiguous(), x, weight, ctx.grid, ctx.strides)
            return *gradients, None, None, grad if ctx.types[1] else None

    def on_cuda(x, weight, bias, grid, strides, residual=None):
        return Through.apply(x, weight, bias, [*grid], [*strides], residual)

    monkeypatch.setattr("liteframe.export.models.liteframe.depthwise_temporal_conv", on_cuda)
    for found, one in zip(step(), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-6)
    kinds = {name.removeprefix("depthwise_temporal_conv_").removesuffix("_fp32_4") for name in on_this_cpu.launched}
    assert kinds == {
        "with_residual_temporal4", "with_residual_temporal2", "strided222", "strided211", "temporal4", "temporal2",
        "input_gradient", "weight_gradient3",
    }  # fmt: skip
