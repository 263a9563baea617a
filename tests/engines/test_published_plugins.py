"""The embedded plugins through TensorRT's published Python bindings, and their launches on this CPU.

The bindings' compiled part needs nine functions of TensorRT's libraries to be loaded, of which none is called here.
"""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import assets
import onnx.helper as oh
import pytest
from liteframe.engines import operators
from operator_cases import TYPES, Convolution, at, close, expected_pooling, poisoned, tokens

SCRIPT = Path(__file__).with_name("published_plugins.py")
# by version: the SHA-256 of the package's folder in the wheel for CPython 3.11 on x86-64
BINDINGS = {
    "10.9.0.34": "17a173982566b2496eac3d5e7e972a02914171aa9cec09ac3c38505e490d9103",
    "10.15.1.29": "a19b1c6a837574d3ad8374bf2d6eba850de0ed13c95bd71be3e22ab4280a47a2",
    "11.4.0.106": "6bdaa0a55c2226db027974e7691625003201514d5b277c919bee3f331d0b8fd4",
}
MEMBERS = (
    "__init__.py tensorrt.so plugin/__init__.py plugin/_autotune.py plugin/_export.py plugin/_lib.py "
    "plugin/_plugin_class.py plugin/_tensor.py plugin/_top_level.py plugin/_utils.py plugin/_validate.py"
)
FUNCTIONS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry getNvOnnxParserVersion "
    "getPluginRegistry initLibNvInferPlugins"
)
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
CONVOLUTIONS = [
    ("fp16", 3, 4, (65,), 72, (3, 1), (1, 1)),
    ("fp32", 2, 4, (8, 6), 72, (3, 3, 3), (2, 2, 2)),
    ("bf16", 2, 2, (5, 9), 24, (3, 1, 1), (2, 1, 3)),
    ("fp16", 2, 3, (7, 9), 5, (1, 3, 5), (1, 2, 1)),
]
POOLINGS = [("fp16", (1, 4, 3, 2, 2, 2), 1024), ("fp32", (2, 2, 2, 1, 1, 3), 77), ("bf16", (1, 2, 2, 2, 1, 2), 3200)]


@pytest.fixture(params=BINDINGS)
def bindings(request, tmp_path, monkeypatch):
    """A folder with the package, and where what it loads is."""
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        pytest.skip("the bindings' hashes are known for Python 3.11 on x86-64")
    package = f"tensorrt-cu12-bindings=={request.param}"
    pinned = assets.WheelFolder(package, "tensorrt_bindings", BINDINGS[request.param], "NVIDIA's", files=MEMBERS)
    monkeypatch.setitem(assets.ASSETS, "bindings", pinned)
    folder = assets.fetch("bindings").parent
    source, major = tmp_path / "nothing.c", request.param.split(".")[0]
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS.split()))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", tmp_path / library, source], check=True
        )
    return SimpleNamespace(folder=folder, libraries=tmp_path)


def one_by_one(name, **lists):
    return operators._one_by_one(oh.make_node(name, [], [], domain="liteframe", **lists))


def test_plugins_are_registered_described_and_launched(bindings, emulated):
    drawn = [Convolution(number, *case) for number, case in enumerate(CONVOLUTIONS)]
    given = [tokens(0, 2, blocks, channels, 1.0, TYPES[type_]) for type_, blocks, channels in POOLINGS]
    cases = [
        {
            "name": "DepthwiseTemporalConv",
            "attributes": one_by_one("DepthwiseTemporalConv", grid=[*case.grid], strides=[*case.strides]),
            "inputs": [array.shape for array in (case.x, case.weight, case.bias)],
            "type_": NAMES[case.type],
        }
        for case in drawn
    ] + [
        {
            "name": "WeightedAveragePool",
            "attributes": one_by_one("WeightedAveragePool", blocks=[*blocks]),
            "inputs": [x.shape],
            "type_": NAMES[type_],
        }
        for (type_, blocks, _), x in zip(POOLINGS, given, strict=True)
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.fspath(bindings.libraries)}
    command = [sys.executable, SCRIPT, bindings.folder, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(done.stdout.splitlines()[-1])

    def launched(plan, inputs, dtype):
        out = poisoned(plan["output"], dtype)
        (threads, *ones), (clips, *integers) = plan["block"], plan["arguments"]
        kernel = SimpleNamespace(
            name=plan["kernel"], integers=integers, threads=threads, shared=plan["shared"], grid=lambda _: plan["grid"]
        )
        assert ones == [1, 1] and emulated(kernel, clips, map(at, inputs), at(out)) == 0
        return out

    for case, plan in zip(drawn, made, strict=False):
        assert math.prod(plan["output"]) == math.prod(case.out_shape)
        out = launched(plan, (case.x, case.weight, case.bias), TYPES[case.type])
        close(out, *case.expected(False), case.type)
    for (type_, blocks, _), x, plan in zip(POOLINGS, given, made[len(drawn) :], strict=True):
        close(launched(plan, [x], TYPES[type_]), *expected_pooling(x, blocks), type_)
