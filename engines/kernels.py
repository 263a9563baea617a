"""The operators' CUDA kernels: which entry point serves a tensor, how it is launched, its PTX or machine code.

    shapes, type ──convolution, pooling, ...──▶ Kernel ──compile_kernel──▶ PTX or machine code
                                                  └──units, per_block──▶ the launch's grid

Sources are in native/ and include nothing from elsewhere: NVRTC compiles them as they are, one entry at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from .package import InputError

SOURCES = Path(__file__).parent / "native"
# as native/kernels.cu has them: threads of a thread block, and channels of one that convolves
THREADS, SLAB = 256, 64
MOST_TAPS = 125
ROUNDS = 4  # positions that a thread convolves one after the other, with the weights it has
ALIGNED = 8  # of which channels are a multiple where more than one is moved at once
MOST_POOLED = 11264  # of which the sums fit its shared memory, 48 KB, beside 3 KB of other things
PARTIAL_SUMS = 256  # thread blocks at most that sum up gradients of weights, each on its own
Type = Literal["fp32", "fp16", "bf16"]
LANES: dict[Type, int] = {"fp32": 4, "fp16": 8, "bf16": 8}  # channels that are moved at once: 16 bytes

# of the assembler: a register that spills is an error
OPTIONS = (
    "--ptxas-options=--warn-on-spills",
    "--ptxas-options=--warn-on-local-memory-usage",
    "--ptxas-options=--warning-as-error",
)

# (frames, kernel, strides) that are compiled as a form of their own; see native/depthwise_temporal_conv.h
FORMS = {
    (4, (3, 1, 1), (1, 1, 1)): ("temporal4", "TemporalOf4"),
    (2, (3, 1, 1), (1, 1, 1)): ("temporal2", "TemporalOf2"),
    (4, (3, 3, 3), (2, 2, 2)): ("strided222", "Strided222"),
    (2, (3, 1, 1), (2, 1, 1)): ("strided211", "Strided211"),
}


@dataclass(frozen=True)
class Kernel:
    """
    Attributes:
        name: of the entry point.
        entry: what instantiates it alone; see the end of native/kernels.cu.
        integers: arguments behind the number of clips, between inputs and output.
        units: of work, of a clip.
        per_block: of those, what a thread block is for.
        slabs: thread blocks for the same units, each for some of the channels.
        places: the grid's second size.
        most_blocks: of each slab, if there is a limit; thread blocks then do more each.
        threads: of a thread block.
        shared: bytes of dynamic shared memory.
    """

    name: str
    entry: str
    integers: tuple[int, ...]
    units: int
    per_block: int
    slabs: int
    threads: int
    places: int = 1
    most_blocks: int | None = None
    shared: int = 0

    def blocks(self, clips: int) -> int:
        """Of a slab."""
        blocks = math.ceil(clips * self.units / self.per_block)
        return min(blocks, self.most_blocks or blocks)

    def grid(self, clips: int) -> tuple[int, int, int]:
        return self.blocks(clips) * self.slabs, self.places, 1


@dataclass(frozen=True)
class ConvolutionShape:
    """Of a DepthwiseTemporalConv, a grid of one axis as one row; see export/ops/depthwise_temporal_conv.py."""

    time: int
    grid: tuple[int, int]
    channels: int
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]

    @classmethod
    def of(
        cls, time: int, grid: Sequence[int], channels: int, kernel: Sequence[int], strides: Sequence[int]
    ) -> ConvolutionShape:
        """
        Args:
            grid: (N,) or (H, W).
            kernel, strides: time first, one more than the grid has axes.

        Raises:
            InputError: the kernel is too large.
        """
        if math.prod(kernel) > MOST_TAPS:
            raise InputError(
                f"a depth-wise convolution of {math.prod(kernel)} taps; the CUDA kernels take {MOST_TAPS} at most"
            )
        if len(grid) == 1:
            grid, kernel, strides = (1, *grid), (kernel[0], 1, kernel[1]), (strides[0], 1, strides[1])
        (h, w), (kt, kh, kw), (st, sh, sw) = grid, kernel, strides
        return cls(time, (h, w), channels, (kt, kh, kw), (st, sh, sw))

    @property
    def integers(self) -> tuple[int, ...]:
        return (self.time, *self.grid, self.channels, *self.kernel, *self.strides)

    @property
    def positions(self) -> int:
        """Of a frame of the output."""
        return math.prod(math.ceil(n / s) for n, s in zip(self.grid, self.strides[1:], strict=True))

    def lanes(self, type_: Type) -> int:
        return 1 if self.channels % ALIGNED else LANES[type_]


def convolution(type_: Type, shape: ConvolutionShape, residual: bool = False) -> Kernel:
    """x, weight, bias[, residual] -> out."""
    form, struct_ = FORMS.get((shape.time, shape.kernel, shape.strides), ("any", "AnyForm"))
    lanes = shape.lanes(type_)
    if lanes == 1:
        form, struct_ = "any", "AnyForm"
    name, macro = ("_with_residual", "CONV_WITH_RESIDUAL") if residual else ("", "CONV")
    return _over_positions(
        f"depthwise_temporal_conv{name}_{form}", f"{macro}({form},{struct_},", type_, shape, shape.positions
    )


def input_gradient(type_: Type, shape: ConvolutionShape) -> Kernel:
    """Gradient of the output, weight -> that of x."""
    return _over_positions(
        "depthwise_temporal_conv_input_gradient", "INPUT_GRADIENT(", type_, shape, math.prod(shape.grid)
    )


def weight_gradient(type_: Type, shape: ConvolutionShape) -> Kernel:
    """x, gradient of the output -> FP32 (blocks(clips), taps + 1, channels): the bias's gradient is the last of each,
    and the gradient is the sum over the blocks."""
    at_once = 3 if shape.kernel[0] == 3 else 1  # taps through time
    made = _over_positions(
        f"depthwise_temporal_conv_weight_gradient{at_once}",
        f"WEIGHT_GRADIENT({at_once},",
        type_,
        shape,
        shape.positions,
    )
    return Kernel(**{**vars(made), "places": math.prod(shape.kernel) // at_once, "most_blocks": PARTIAL_SUMS})


def _over_positions(name: str, macro: str, type_: Type, shape: ConvolutionShape, positions: int) -> Kernel:
    lanes = shape.lanes(type_)
    return Kernel(
        name=f"{name}_{type_}_{lanes}",
        entry=f"{macro}{type_},{type_.upper()},{lanes})",
        integers=shape.integers,
        units=positions,
        per_block=THREADS * lanes // SLAB * ROUNDS,
        slabs=math.ceil(shape.channels / SLAB),
        threads=THREADS,
    )


def pooling(type_: Type, blocks: Sequence[int], channels: int) -> Kernel:
    """For WeightedAveragePool, x -> out; see export/ops/weighted_average_pool.py.

    Raises:
        InputError: there are too many channels.
    """
    nt, _, nh, _, nw, _ = blocks
    if channels > MOST_POOLED:
        raise InputError(f"pooling of {channels} channels; the CUDA kernels take {MOST_POOLED} at most")
    lanes = 1 if channels % ALIGNED else LANES[type_]
    at_once = lanes > 1 and channels <= lanes * THREADS  # which its registers hold
    (scale,) = struct.unpack("<i", struct.pack("<f", channels**-0.5))  # a float's bits: integers only are passed
    return Kernel(
        name=f"weighted_average_pool_{type_}" if at_once else f"weighted_average_pool_any_{type_}_{lanes}",
        entry=f"{'POOL' if at_once else 'POOL_ANY'}({type_},{type_.upper()},{lanes})",
        integers=(*blocks, channels, scale),
        units=nt * nh * nw,
        per_block=1,
        slabs=1,
        threads=32 * math.ceil(channels / lanes / 32) if at_once else THREADS,
        shared=0 if at_once else 4 * channels,
    )


def missing_compiler() -> str:
    """Why NVRTC can't be used here; empty if it can."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        return (
            f"NVRTC, which compiles the CUDA kernels, is not here ({reason}); install CUDA's toolkit, or with pip "
            "cuda-bindings and nvidia-cuda-nvrtc, of the driver's generation of CUDA"
        )
    return ""


@lru_cache
def compile_kernel(entry: str, capability: str, form: Literal["ptx", "cubin"]) -> bytes:
    """By NVRTC, through cuda-bindings; needs no GPU and no driver.

    Args:
        entry: of a Kernel, or several, separated by blanks.
        capability: as "8.0".
        form: PTX, or machine code.

    Raises:
        InputError: NVRTC is not here, or does not know the capability, or has something to say of the sources.
    """
    if why := missing_compiler():
        raise InputError(why)
    from cuda.bindings import nvrtc

    def check(result: Any, *values: Any) -> Any:
        if int(result) != 0:
            raise InputError(f"{SOURCES}: NVRTC does not compile {entry} for {capability}: {result.name}; {log()}")
        return values[0] if values else None

    def log() -> str:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        text = b" " * size
        nvrtc.nvrtcGetProgramLog(program, text)
        return " ".join(text.decode(errors="replace").strip("\0").split())[:600]

    names = [path.name for path in sorted(SOURCES.glob("*.h"))]
    sources = [(SOURCES / name).read_bytes() for name in names]
    kernels = (SOURCES / "kernels.cu").read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(kernels, b"kernels.cu", len(names), sources, [n.encode() for n in names])
    options = [
        f"--gpu-architecture={'compute' if form == 'ptx' else 'sm'}_{capability.replace('.', '')}",
        "--std=c++17",
        f"--define-macro=LITEFRAME_ENTRIES={entry}",
        *OPTIONS,
    ]
    try:
        check(*nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
        if warnings := log():
            raise InputError(f"{SOURCES}: NVRTC warns of {entry} for {capability}: {warnings}")
        get_size, get = {
            "ptx": (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX),
            "cubin": (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN),
        }[form]
        code = b" " * check(*get_size(program))
        check(*get(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code
