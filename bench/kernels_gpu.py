"""The kernels on a GPU: bandwidth beside the machine's own copies, times beside torch's, and a training step.

    python bench/kernels_gpu.py [--rounds 50]

At the student's sizes: 256 frames in clips of 4, 1024 patches and CLS, 768 channels, FP16; the teacher's pooling at
1024 channels. Bandwidth counts every input once and every output once, and is compared with that of a copy on the
device of as many bytes. All peers take turns; times are CUDA events' around one call, which waits in the queue behind
reads of some GB: so it finds nothing of its own in the caches, and what launching it costs the CPU is not counted. A
training step is many calls, of which launching counts. There autocast leaves our convolutions in FP32, as their inputs
are, and computes torch's in BF16.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from liteframe.export.models import liteframe as student_module
from liteframe.export.models.liteframe import LiteFrame, LiteFrameConfig
from liteframe.export.ops import depthwise_temporal_conv as convolution
from liteframe.export.ops import weighted_average_pool as pooling
from torch import Tensor

CLIPS, TIME, GRID, STUDENT, TEACHER = 64, 4, (32, 32), 768, 1024
TOKENS = 1 + GRID[0] * GRID[1]
BLOCKS = (1, 4, 16, 2, 16, 2)
Peers = dict[str, Callable[[], object]]


def in_turns(peers: Peers, rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    other = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    for turn in range(rounds + 5):
        for name, run in list(peers.items())[:: 1 if turn % 2 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(4):
                other.max()
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 5:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(all_) for name, all_ in times.items()}


def show(title: str, moved: int, peers: Peers, rounds: int) -> dict[str, float]:
    """Peers beside a copy that moves as many bytes, half of them read and half written."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = in_turns({"copy on the device": lambda: target.copy_(source), **peers}, rounds)
    copy = times["copy on the device"]
    print(f"{title}: {moved / 1e6:.0f} MB read and written")
    for name, time in times.items():
        print(f"  {name:44}{time:9.3f} ms{moved / time / 1e6:9.0f} GB/s{100 * copy / time:7.1f} % of copying")
    return times


CONVOLUTIONS = {
    "temporal convolution, 4 steps": (TIME, (TOKENS,), (3, 1), (1, 1)),
    "temporal convolution, 2 steps": (2, (257,), (3, 1), (1, 1)),
    "strided 2 x 2 x 2": (TIME, GRID, (3, 3, 3), (2, 2, 2)),
    "strided 2 x 1 x 1": (2, (16, 16), (3, 1, 1), (2, 1, 1)),
}


def convolve(name: str, rounds: int) -> dict[str, float]:
    time, grid, kernel, strides = CONVOLUTIONS[name]
    x = torch.randn(CLIPS, time, math.prod(grid), STUDENT, device="cuda", dtype=torch.float16)
    weight = torch.randn(STUDENT, 1, *kernel, device="cuda", dtype=torch.float16)
    bias = torch.randn(STUDENT, device="cuda", dtype=torch.float16)
    arguments = x, weight, bias, grid, strides
    to_first, _ = convolution.axes(grid)
    planes = x.reshape(CLIPS, time, *grid, STUDENT).permute(to_first).contiguous()
    conv, pads = F.conv2d if len(grid) == 1 else F.conv3d, tuple(k // 2 for k in kernel)
    cudnn = functools.partial(
        torch.ops.aten.cudnn_convolution, planes, weight, pads, strides, (1,) * len(pads), STUDENT, True, False, False
    )
    compiled = torch.compile(convolution.reference, dynamic=False)
    out = convolution.depthwise_temporal_conv(*arguments)
    peers: Peers = {
        "liteframe": lambda: convolution.depthwise_temporal_conv(*arguments),
        "torch eager, permute-convolve-permute": lambda: convolution.reference(*arguments),
        "torch.compile of it": lambda: compiled(*arguments),
        "torch's convolution alone, permuted before": lambda: conv(
            planes, weight, bias, stride=strides, padding=pads, groups=STUDENT
        ),
    }
    try:
        cudnn()
        peers["cuDNN's, permuted before, without bias"] = cudnn
    except RuntimeError as error:
        print(f"cuDNN does not take the {name}: {error}")
    return show(name, 2 * (x.numel() + out.numel()), peers, rounds)


def pool(rounds: int) -> dict[str, float]:
    x = torch.randn(CLIPS, TIME, TOKENS, TEACHER, device="cuda", dtype=torch.float16)
    compiled = torch.compile(pooling.reference, dynamic=False)
    peers: Peers = {
        "liteframe": lambda: pooling.weighted_average_pool(x, BLOCKS),
        "torch eager": lambda: pooling.reference(x, BLOCKS),
        "torch.compile of it": lambda: compiled(x, BLOCKS),
    }
    moved = 2 * (x.numel() + CLIPS * 256 * TEACHER)
    return show("weighted average pooling", moved, peers, rounds)


def training_step(rounds: int) -> dict[str, float]:
    """Of LiteFrame-B at 448 px on 4 clips in BF16 autocast, with the kernels and with torch's convolutions."""
    torch.manual_seed(0)
    student = LiteFrame(LiteFrameConfig()).cuda()
    frames = torch.randn(16, 448, 448, 3, device="cuda")
    kernels = student_module.depthwise_temporal_conv

    def torchs(
        x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, ...], strides: tuple[int, ...],
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        out = convolution.reference(x, weight, bias, grid, strides)
        return out if residual is None else out + residual

    def step(by: Callable[..., Tensor]) -> None:
        student_module.depthwise_temporal_conv = by
        student.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = student(frames).float().square().mean()
        loss.backward()

    try:
        peers: Peers = {"liteframe": lambda: step(kernels), "torch's convolutions": lambda: step(torchs)}
        times = in_turns(peers, max(rounds // 5, 5))
    finally:
        student_module.depthwise_temporal_conv = kernels
    print("training step of LiteFrame-B, 4 clips of 4 frames at 448 px, BF16 autocast")
    for name, time in times.items():
        print(f"  {name:44}{time:9.1f} ms")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use here; bench/kernels_cpu.py measures the same arithmetic on a CPU")
    with torch.inference_mode():
        results = {name: convolve(name, rounds) for name in CONVOLUTIONS} | {"weighted average pooling": pool(rounds)}
    results["training step"] = training_step(rounds)
    device = torch.cuda.get_device_properties(0)
    told = {"device": device.name, "torch": torch.__version__, "cuda": torch.version.cuda, "milliseconds": results}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
