"""What NVIDIA GPUs this machine has, through the driver; importable and honest where there is none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`capability` is the compute capability, such as "8.7"; `memory` is in bytes."""

    name: str
    capability: str
    memory: int


def find_gpus() -> tuple[list[Gpu], str]:
    """The GPUs, and, when there are none, why."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return [], "not examined: cuda-bindings is not installed (pip install 'liteframe[tensorrt]')"
    try:
        (error,) = driver.cuInit(0)
    except Exception as missing:  # the bindings raise their own types when the driver's library is absent
        return [], f"no NVIDIA driver ({type(missing).__name__})"
    if error != driver.CUresult.CUDA_SUCCESS:
        return [], f"the NVIDIA driver answers {error.name}"
    gpus = []
    for index in range(driver.cuDeviceGetCount()[1]):
        device = driver.cuDeviceGet(index)[1]
        attribute = driver.CUdevice_attribute
        major, minor = (
            driver.cuDeviceGetAttribute(which, device)[1]
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = driver.cuDeviceGetName(128, device)[1].decode().strip("\0 ")
        gpus.append(Gpu(name, f"{major}.{minor}", driver.cuDeviceTotalMem(device)[1]))
    return gpus, "" if gpus else "the driver finds no GPU"
