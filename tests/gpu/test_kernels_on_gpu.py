"""The operators' kernels on a GPU, against double precision on the CPU.

Under compute-sanitizer: compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_kernels_on_gpu.py
"""

import secrets

import numpy as np
import pytest
import torch
from liteframe.export.ops import depthwise_temporal_conv, torch_library, weighted_average_pool

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

TYPES = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}  # of the sum of magnitudes
CASES = {
    "student, 4 steps": (3, 4, (1025,), 768, (3, 1), (1, 1)),
    "student, 2 steps": (3, 2, (257,), 768, (3, 1), (1, 1)),
    "student, 1 step": (3, 1, (257,), 768, (3, 1), (1, 1)),
    "student, strided": (2, 4, (32, 32), 768, (3, 3, 3), (2, 2, 2)),
    "student, strided in time": (3, 2, (16, 16), 768, (3, 1, 1), (2, 1, 1)),
    "odd sizes": (2, 5, (7, 9), 24, (5, 3, 3), (2, 1, 3)),
    "odd channels": (2, 4, (33,), 77, (3, 3), (1, 2)),
    "many clips": (700, 4, (3,), 8, (3, 1), (1, 1)),
}
BLOCKS = {
    "teacher": (2, (1, 4, 16, 2, 16, 2), 1024),
    "8x": (2, (2, 2, 16, 2, 16, 2), 768),
    "large blocks": (2, (1, 4, 2, 8, 2, 8), 256),
    "odd channels": (2, (1, 4, 3, 2, 2, 3), 77),
    "many channels": (1, (1, 2, 2, 2, 2, 2), 4096),
}


@pytest.fixture
def random():
    """Fresh numbers in each run; the seed is in the report when a test fails."""
    seed = secrets.randbits(32)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs hold NaN before a kernel writes them."""
    launch = torch_library._launch

    def poison_and_launch(kernel, clips, inputs, out):
        out.fill_(float("nan"))
        launch(kernel, clips, inputs, out)

    monkeypatch.setattr(torch_library, "_launch", poison_and_launch)


def within(found, expected, magnitude, dtype):
    error = (found.double().cpu() - expected).abs()
    assert bool((error <= TYPES[dtype] * (magnitude + 1e-3)).all()), float((error / (magnitude + 1e-3)).max())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_convolution_and_its_gradients(case, dtype, random):
    clips, time, grid, channels, kernel, strides = CASES[case]
    sizes = [(clips, time, int(np.prod(grid)), channels), (channels, 1, *kernel), (channels,)]
    values = [torch.randn(size, generator=random).to(dtype) for size in sizes]
    shape = depthwise_temporal_conv.output_shape(values[0].shape, grid, strides)
    residual, grad = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    inputs = [value.cuda().requires_grad_() for value in (*values, residual)]
    out = depthwise_temporal_conv.depthwise_temporal_conv(*inputs[:3], grid, strides, inputs[3])
    gradients = torch.autograd.grad(out, inputs, grad.cuda())

    def in_double(change):
        doubles = [change(value.double()).requires_grad_() for value in (*values, residual)]
        made = depthwise_temporal_conv.reference(*doubles[:3], grid, strides) + doubles[3]
        return made.detach(), torch.autograd.grad(made, doubles, change(grad.double()))

    (expected, expected_gradients), (magnitude, magnitudes) = in_double(lambda v: v), in_double(torch.abs)
    within(out.detach(), expected, magnitude, dtype)
    for number, gradient in enumerate(gradients):
        within(gradient, expected_gradients[number], magnitudes[number], dtype)
    again = torch.autograd.grad(
        depthwise_temporal_conv.depthwise_temporal_conv(*inputs[:3], grid, strides, inputs[3]), inputs, grad.cuda()
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", BLOCKS)
def test_pooling_and_its_gradient(case, dtype, random):
    clips, blocks, channels = BLOCKS[case]
    nt, t, nh, h, nw, w = blocks
    x = torch.randn(clips, nt * t, 1 + nh * h * nw * w, channels, generator=random).to(dtype)
    on_gpu = x.cuda().requires_grad_()
    out = weighted_average_pool.weighted_average_pool(on_gpu, blocks)
    expected = torch.from_numpy(weighted_average_pool.numpy_reference(x.double().numpy(), blocks))
    within(out.detach(), expected, x.double().abs().max() * torch.ones_like(expected), dtype)
    double = x.double().requires_grad_()
    grad = torch.randn(out.shape, generator=random).to(dtype)
    (wanted,) = torch.autograd.grad(weighted_average_pool.reference(double, blocks), double, grad.double())
    (found,) = torch.autograd.grad(out, on_gpu, grad.cuda())
    within(found, wanted, 20 * wanted.abs().max() * torch.ones_like(wanted), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scores_that_exp_can_not_hold(dtype, random):
    blocks = (1, 4, 2, 2, 2, 2)
    x = (60 * torch.randn(2, 4, 17, 64, generator=random)).to(dtype)
    out = weighted_average_pool.weighted_average_pool(x.cuda(), blocks)
    expected = torch.from_numpy(weighted_average_pool.numpy_reference(x.double().numpy(), blocks))
    assert bool(out.isfinite().all())
    within(out, expected, expected.abs() + 1, dtype)


def test_tensors_that_begin_anywhere_and_are_not_contiguous(random):
    x = torch.randn(2, 4, 35, 24, generator=random)
    weight, bias = torch.randn(24, 1, 3, 1, generator=random), torch.randn(24, generator=random)
    expected = depthwise_temporal_conv.reference(x[:, :, 2:], weight, bias, (33,), (1, 1))
    out = depthwise_temporal_conv.depthwise_temporal_conv(x.cuda()[:, :, 2:], weight.cuda(), bias.cuda(), (33,), (1, 1))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)
    shifted = torch.empty(x.numel() + 1, device="cuda")[1:].copy_(x.flatten()).view(x.shape)
    out = depthwise_temporal_conv.depthwise_temporal_conv(shifted, weight.cuda(), bias.cuda(), (35,), (1, 1))
    torch.testing.assert_close(
        out.cpu(), depthwise_temporal_conv.reference(x, weight, bias, (35,), (1, 1)), rtol=1e-5, atol=1e-5
    )


def test_on_torchs_current_stream_and_under_torch_compile(random):
    x = torch.randn(2, 4, 257, 768, generator=random).cuda()
    weight, bias = torch.randn(768, 1, 3, 1, generator=random).cuda(), torch.zeros(768).cuda()

    def twice(x):
        for _ in range(2):
            x = depthwise_temporal_conv.depthwise_temporal_conv(x, weight, bias, (257,), (1, 1), x)
        return x

    expected = twice(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = twice(x)
    stream.synchronize()
    assert torch.equal(found, expected)
    torch.testing.assert_close(torch.compile(twice)(x), expected)
