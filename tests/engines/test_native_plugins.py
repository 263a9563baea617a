"""What CMake makes of the kernels where there is nvcc, and of TensorRT's plugins where its headers are."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here; test_kernels.py compiles with NVRTC"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DCAPABILITIES=80;999"]
    told = subprocess.run(configure, capture_output=True, text=True, check=True).stdout
    done = subprocess.run(["cmake", "--build", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "engines/native", told


def test_kernels_are_compiled_for_what_nvcc_knows_and_the_rest_is_told(built):
    folder, told = built
    assert "too old for compute capabilities 999 (tenths), which are left out" in told
    assert (folder / "kernels_80.cubin").read_bytes()[:4] == b"\x7fELF"
    assert b".entry weighted_average_pool_fp16(" in (folder / "kernels_80.ptx").read_bytes()
    if not (folder / "libliteframe_plugins.so").exists():
        assert "no TensorRT headers (NvInferRuntime.h): TensorRT's plugin library is left out" in told


def test_plugins_do_what_tensorrt_asks_and_launch_what_they_should(built):
    folder, _ = built
    if not (folder / "libliteframe_plugins.so").exists():
        pytest.skip("no TensorRT headers here (set TensorRT_ROOT)")
    done = subprocess.run(["ctest", "--test-dir", folder.parents[1], "--output-on-failure"], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    assert all(f" {name} ." in done.stdout.decode() for name in ("host", "plugins", "plugins_launch"))
    trt = pytest.importorskip("tensorrt_rtx")
    registry = trt.get_plugin_registry()
    handle = registry.load_library(os.fspath(folder / "libliteframe_plugins.so"))
    try:
        convolution, pool = {"grid": [1025], "strides": [1, 1]}, {"blocks": [1] * 6}
        fields = {"DepthwiseTemporalConv": convolution, "WeightedAveragePool": pool}
        for name, attributes in fields.items():
            creator = registry.get_creator(name, "1", "liteframe")
            assert [field.name for field in creator.field_names] == [*attributes]
            given = [
                trt.PluginField(key, np.array(value, np.int32), trt.PluginFieldType.INT32)
                for key, value in attributes.items()
            ]
            collection = trt.PluginFieldCollection(given)
            assert creator.create_plugin("node", collection, trt.TensorRTPhase.BUILD) is not None
    finally:
        registry.deregister_library(handle)
