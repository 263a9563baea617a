"""The native part built by CMake, and kernels launched on this CPU."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[1]


def cmake(*arguments):
    assert shutil.which("cmake") and shutil.which("c++"), "the native tests need cmake and a C++ compiler"
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_emulated(folder, flags="", sources=SOURCES):
    """The kernels as a library that runs them on this CPU, by CMake with C++ flags: its path."""
    cmake("-S", sources, "-B", folder, "-DNVCC=OFF", f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    cmake("--build", folder, "--target", "liteframe_emulated")
    return folder / "engines/native/libliteframe_emulated.so"


class Emulated:
    """Launches a Kernel on this CPU, each of its threads, with pointers as a GPU would have them."""

    def __init__(self, library):
        self.library = ctypes.CDLL(os.fspath(library))

    def __call__(self, kernel, clips, inputs, out, falling=False):
        integers = [ctypes.c_int(number) for number in (clips, *kernel.integers)]
        values = [*map(ctypes.c_void_p, inputs), *integers, ctypes.c_void_p(out)]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        grid = (ctypes.c_uint * 3)(*kernel.grid(clips))
        return self.library.liteframe_launch(
            kernel.name.encode(), grid, kernel.threads, kernel.shared, addresses, len(values), falling
        )
