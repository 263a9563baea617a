"""The CUDA kernels without a GPU: what the compiler makes of them for every capability, and which serve what."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import nvidia
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines import kernels
from liteframe.engines.kernels import ConvolutionShape, compile_kernel, convolution
from liteframe.engines.package import InputError

ALL = "OF_ALL_TYPES(INFERENCE) OF_ALL_TYPES(TRAINING)"
CAPABILITIES = ["8.0", "8.6", "8.7", "8.9", "9.0", "11.0", "12.0"]
TYPES = ["fp32", "fp16", "bf16"]
FORMS = ["temporal4", "temporal2", "strided222", "strided211", "any"]
TOOLS = Path(next(iter(nvidia.__path__))) / "cu13/bin"


def tool(name, *arguments):
    """A program of the CUDA wheels among the development requirements."""
    program = TOOLS / name
    assert program.exists(), f"{program} is missing: pip install nvidia-cuda-{name}"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def entries():
    """Names of all entry points."""
    names = {f"weighted_average_pool_{type_}" for type_ in TYPES}
    for type_ in TYPES:
        for lanes in (kernels.LANES[type_], 1):
            names.add(f"weighted_average_pool_any_{type_}_{lanes}")
            gradients = "input_gradient", "weight_gradient1", "weight_gradient3"
            forms = FORMS if lanes > 1 else ["any"]
            kinds = [*gradients, *forms, *(f"with_residual_{form}" for form in forms)]
            names |= {f"depthwise_temporal_conv_{kind}_{type_}_{lanes}" for kind in kinds}
    return names


@pytest.fixture(scope="session", params=["8.0", *(pytest.param(c, marks=pytest.mark.slow) for c in CAPABILITIES[1:])])
def machine_code(request, tmp_path_factory):
    """All kernels' for a capability; a warning is an error."""
    path = tmp_path_factory.mktemp("kernels") / f"{request.param}.cubin"
    path.write_bytes(compile_kernel(ALL, request.param, "cubin"))
    return path


def test_nothing_spills_and_memory_moves_by_16_bytes(machine_code):
    found = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        tool("cuobjdump", "--dump-resource-usage", machine_code),
    )
    assert {name for name, *_ in found} == entries()
    for name, registers, stack, shared, local in found:
        assert int(stack) == int(local) == 0, name
        # of a multiprocessor's 65,536 they let four thread blocks of 256 in, or two, or one where tokens are kept
        short = re.search(r"temporal[24]_|strided211_", name)
        kept = re.search("average_pool", name)
        assert int(registers) <= (64 if short else 255 if kept else 128), name
        assert int(shared) < 48 << 10, name
    instructions = {
        part.splitlines()[0].split()[0]: part
        for part in tool("nvdisasm", "--print-code", machine_code).split("//--------------------- .text.")[1:]
    }
    assert instructions.keys() == entries()
    for name, text in instructions.items():
        stores = {*re.findall(r"\bSTG[.\w]*", text)}
        loads = {*re.findall(r"\bLDG[.\w]*", text)}
        wide_loads, wide_stores = ({kind for kind in kinds if kind.endswith(".128")} for kinds in (loads, stores))
        narrow = name.endswith("_1")
        assert bool(wide_loads) != narrow, (name, loads)
        if "weight_gradient" in name:
            continue  # its results are few
        assert bool(wide_stores) != narrow and (narrow or stores == wide_stores), (name, stores)


@pytest.mark.parametrize("type_", TYPES)
def test_ptx_of_one_entry_is_found_by_its_name(type_):
    shape = ConvolutionShape.of(4, (1025,), 768, (3, 1), (1, 1))
    made = [
        convolution(type_, shape),
        convolution(type_, shape, residual=True),
        kernels.input_gradient(type_, shape),
        kernels.weight_gradient(type_, shape),
        kernels.pooling(type_, (1, 4, 16, 2, 16, 2), 1024),
        kernels.pooling(type_, (1, 4, 1, 4, 1, 4), 100),
    ]
    for kernel in made:
        ptx = compile_kernel(kernel.entry, "8.0", "ptx").decode()
        assert re.findall(r"\.visible \.entry (\w+)\(", ptx) == [kernel.name]
        parameters = ptx.partition(f"{kernel.name}(")[2].partition(")")[0]
        integers = len(re.findall(r"\.param \.(?:u32|s32|b32)", parameters))
        pointers = len(re.findall(r"\.param \.u64", parameters))
        assert integers == 1 + len(kernel.integers) and pointers in (2, 3, 4, 5)


shapes = st.builds(
    ConvolutionShape,
    time=st.integers(1, 8),
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.integers(1, 300),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
    strides=st.tuples(*[st.integers(1, 3)] * 3),
)


@given(shape=shapes, type_=st.sampled_from(TYPES), clips=st.integers(1, 70))
def test_grids_cover_the_work_and_names_exist(shape, type_, clips):
    for kernel in (
        convolution(type_, shape),
        convolution(type_, shape, residual=True),
        kernels.input_gradient(type_, shape),
        kernels.weight_gradient(type_, shape),
    ):
        blocks, slabs = kernel.blocks(clips), kernel.slabs
        assert kernel.name in entries()
        assert kernel.grid(clips) == (blocks * slabs, kernel.places, 1) and kernel.places < 65536
        assert slabs * kernels.SLAB >= shape.channels > (slabs - 1) * kernels.SLAB
        assert blocks * kernel.per_block >= clips * kernel.units or blocks == kernels.PARTIAL_SUMS
        assert (blocks - 1) * kernel.per_block < clips * kernel.units
    taps = math.prod(shape.kernel)
    assert kernel.places * (3 if "gradient3" in kernel.name else 1) == taps
    out = [math.ceil(n / s) for n, s in zip(shape.grid, shape.strides[1:], strict=True)]
    assert convolution(type_, shape).units == math.prod(out)


def test_the_students_layers_have_forms_of_their_own():
    forms = [
        (4, (1025,), (3, 1), (1, 1), "temporal4"),
        (2, (257,), (3, 1), (1, 1), "temporal2"),
        (4, (32, 32), (3, 3, 3), (2, 2, 2), "strided222"),
        (2, (16, 16), (3, 1, 1), (2, 1, 1), "strided211"),
        (1, (257,), (3, 1), (1, 1), "any"),
    ]
    for (time, grid, kernel, strides, form), type_ in itertools.product(forms, TYPES):
        wide, narrow = (
            convolution(type_, ConvolutionShape.of(time, grid, channels, kernel, strides)) for channels in (768, 100)
        )
        assert wide.name == f"depthwise_temporal_conv_{form}_{type_}_{kernels.LANES[type_]}"
        assert narrow.name == f"depthwise_temporal_conv_any_{type_}_1"


def test_the_library_of_plugins_launches_alike():
    """plugins.cu has the launches' arithmetic in C++."""
    text = (kernels.SOURCES / "kernels.cu").read_text() + (kernels.SOURCES / "plugins.cu").read_text()
    text += (kernels.SOURCES / "depthwise_temporal_conv.h").read_text()
    for name in ("THREADS", "SLAB", "ROUNDS", "MOST_TAPS", "MOST_POOLED"):
        assert re.findall(rf"constexpr int {name} = (\d+);", text) == [str(getattr(kernels, name))]
    assert re.findall(r"constexpr int LANES = (\d+);", text) == [str(kernels.ALIGNED)]
    for type_, lanes in kernels.LANES.items():
        assert re.findall(rf"KERNELS\(\w+, {type_}, \w+, (\d+)\)", text) == [str(lanes)]


def test_a_kernel_that_is_too_large_is_refused():
    with pytest.raises(InputError, match="343 taps; the CUDA kernels take 125 at most"):
        ConvolutionShape.of(4, (8, 8), 16, (7, 7, 7), (1, 1, 1))


def test_what_nvrtc_does_not_take_is_told():
    kernel = kernels.pooling("fp16", (1, 4, 16, 2, 16, 2), 1024)
    with pytest.raises(InputError, match=r"NVRTC does not compile POOL.* for 1\.0: .*--gpu-architecture"):
        compile_kernel(kernel.entry, "1.0", "ptx")
    with pytest.raises(InputError, match="NVRTC does not compile NOTHING"):
        compile_kernel("NOTHING(fp16)", "8.0", "ptx")


def test_without_nvrtc_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InputError, match="with pip cuda-bindings and nvidia-cuda-nvrtc"):
        compile_kernel("POOL(fp32,FP32,4)", "8.7", "ptx")
