"""The kernels' arithmetic on a CPU beside torch's own grouped convolution.

    cmake -S . -B build/native -DNVCC=OFF && cmake --build build/native
    python bench/kernels_cpu.py [--library build/native/engines/native/libliteframe_host.so] [--rounds 20] [--threads 2]

DepthwiseTemporalConv of one full-size clip, 4 frames of 1024 patches and CLS, 768 channels, FP32, three taps. torch
gets its input in each layout that it has kernels for, transposed ahead of time; "as tokens" is what the model does.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from liteframe.export.ops.depthwise_temporal_conv import reference
from timing import in_turns, report

TIME, TOKENS, CHANNELS = 4, 1025, 768
HOST = Path("build/native/engines/native/libliteframe_host.so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=HOST)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    convolve = ctypes.CDLL(str(options.library.resolve())).liteframe_depthwise_temporal_conv
    convolve.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 12]

    torch.manual_seed(0)
    x = torch.randn(1, TIME, TOKENS, CHANNELS)
    weight, bias, out = torch.randn(CHANNELS, 1, 3, 1), torch.randn(CHANNELS), torch.empty_like(x)
    pointers = [x.data_ptr(), weight.data_ptr(), bias.data_ptr(), None, out.data_ptr()]
    sizes = [1, TIME, 1, TOKENS, CHANNELS, 3, 1, 1, 1, 1, 1, options.threads]

    def ours() -> None:
        assert convolve(0, *pointers, *sizes) == 0

    planes = x.permute(0, 3, 1, 2)  # (1, C, T, N)
    rows = x.permute(0, 2, 3, 1).reshape(TOKENS, CHANNELS, TIME)  # (N, C, T)
    layouts = {
        "torch, conv2d, contiguous": (F.conv2d, planes.contiguous(), weight, (1, 0)),
        "torch, conv2d, channels last": (
            F.conv2d,
            planes.contiguous(memory_format=torch.channels_last),
            weight,
            (1, 0),
        ),
        "torch, conv1d over tokens": (F.conv1d, rows.contiguous(), weight[..., 0], 1),
    }
    peers = {"liteframe, host library": ours, "torch, as tokens": lambda: reference(x, weight, bias, (TOKENS,), (1, 1))}
    for name, (conv, tensor, taps, padding) in layouts.items():
        peers[name] = lambda conv=conv, tensor=tensor, taps=taps, padding=padding: conv(
            tensor, taps, bias, padding=padding, groups=CHANNELS
        )
    with torch.inference_mode():
        ours()
        np.testing.assert_allclose(out.numpy(), peers["torch, as tokens"]().numpy(), atol=1e-5)
        seconds = in_turns(peers, options.rounds)
    megabytes = 2 * x.numel() * 4 / 1e6
    report(
        f"DepthwiseTemporalConv, one clip of {TIME} x {TOKENS} x {CHANNELS}, FP32, {options.threads} threads, "
        f"{megabytes:.0f} MB moved at least",
        seconds,
        "liteframe, host library",
        ["torch"],
    )


if __name__ == "__main__":
    main()
