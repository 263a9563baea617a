"""What NVIDIA GPUs this machine has. The driver's own library is asked, so that any installation can tell."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

LIBRARY = "libcuda.so.1"
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_CAPABILITY = (75, 76)


@dataclass(frozen=True)
class Gpu:
    """`capability` is the compute capability, such as "8.7"; `memory` is in bytes."""

    name: str
    capability: str
    memory: int


class _DriverError(Exception):
    pass


def find_gpus() -> tuple[list[Gpu], str]:
    """The GPUs, and, when there are none, why."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return [], f"no NVIDIA driver ({LIBRARY} cannot be loaded)"
    try:
        _call(driver, "cuInit", 0)
        count = ctypes.c_int()
        _call(driver, "cuDeviceGetCount", ctypes.byref(count))
        gpus = [_describe(driver, index) for index in range(count.value)]
    except _DriverError as error:
        return [], f"the NVIDIA driver answers {error}"
    return gpus, "" if gpus else "the driver finds no GPU"


def _describe(driver: Any, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_size_t()
    _call(driver, "cuDeviceGet", ctypes.byref(device), index)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    numbers = []
    for attribute in _CAPABILITY:
        number = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        numbers.append(str(number.value))
    return Gpu(name.value.decode(), ".".join(numbers), memory.value)


def _call(driver: Any, function: str, *arguments: Any) -> None:
    result = getattr(driver, function)(*arguments)
    if result != 0:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(result, ctypes.byref(name))
        raise _DriverError(f"{function}: {name.value.decode() if name.value else f'error {result}'}")
