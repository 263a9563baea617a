"""GPUs as the driver names them; here a stand-in for its library answers, by the signatures of cuda.h."""

import ctypes

import pytest
from liteframe.engines import device
from liteframe.engines.device import Gpu, find_gpus

ERRORS = {100: b"CUDA_ERROR_NO_DEVICE", 803: b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", 9999: None}
MAJOR, MINOR = 75, 76  # of CUdevice_attribute
FIRST = 40  # a device's handle is not its index


class Driver:
    """Devices are (name, major, minor, memory); `failures` are results by function."""

    def __init__(self, *devices, **failures):
        self.devices, self.failures, self.started = devices, failures, False

    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        if not name.startswith("cu") or name == "cuGetErrorName":
            return method
        assert name == "cuInit" or self.started

        def call(*arguments):
            return self.failures.get(name) or method(*arguments) or 0

        return call

    def cuInit(self, flags):
        assert flags == 0
        self.started = True

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.devices)

    def cuDeviceGet(self, handle, index):
        handle._obj.value = FIRST + index

    def cuDeviceGetName(self, name, length, handle):
        name.value = self.devices[handle.value - FIRST][0][: length - 1]

    def cuDeviceTotalMem_v2(self, memory, handle):
        assert isinstance(memory._obj, ctypes.c_size_t)
        memory._obj.value = self.devices[handle.value - FIRST][3]

    def cuDeviceGetAttribute(self, value, attribute, handle):
        value._obj.value = self.devices[handle.value - FIRST][{MAJOR: 1, MINOR: 2}[attribute]]

    def cuGetErrorName(self, error, text):
        text._obj.value = ERRORS[error]


@pytest.fixture
def driver(monkeypatch):
    def install(*devices, **failures):
        def load(name):
            assert name == "libcuda.so.1"
            return Driver(*devices, **failures)

        monkeypatch.setattr(device.ctypes, "CDLL", load)

    return install


def test_every_gpu_is_found_with_capability_and_memory(driver):
    driver((b"NVIDIA A100-SXM4-80GB", 8, 0, 80 << 30), (b"Orin", 8, 7, 32 << 30), (b"NVIDIA Thor", 11, 0, 1))
    assert find_gpus() == (
        [Gpu("NVIDIA A100-SXM4-80GB", "8.0", 80 << 30), Gpu("Orin", "8.7", 32 << 30), Gpu("NVIDIA Thor", "11.0", 1)],
        "",
    )


def test_a_driver_without_a_gpu_is_said(driver):
    driver()
    assert find_gpus() == ([], "the driver finds no GPU")


@pytest.mark.parametrize("result", [100, 803])
@pytest.mark.parametrize(
    "function",
    ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute"],
)
def test_a_drivers_refusal_is_named(driver, function, result):
    driver((b"Orin", 8, 7, 1), **{function: result})
    assert find_gpus() == ([], f"the NVIDIA driver answers {function}: {ERRORS[result].decode()}")


def test_a_refusal_without_a_name_is_said_by_number(driver):
    driver((b"Orin", 8, 7, 1), cuInit=9999)
    assert find_gpus() == ([], "the NVIDIA driver answers cuInit: error 9999")


def test_a_missing_driver_is_said(monkeypatch):
    monkeypatch.setattr(device, "LIBRARY", "libnowhere.so.1")
    assert find_gpus() == ([], "no NVIDIA driver (libnowhere.so.1 cannot be loaded)")


def test_this_machine_is_examined_without_an_error():
    gpus, why = find_gpus()
    assert bool(gpus) != bool(why)
