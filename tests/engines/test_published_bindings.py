"""TensorRT's published Python bindings: they have what is used of them, and take the embedded plugins, whose launches
then run on this CPU.

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
    "10.3.0": "418b162bc55576c5d44f8e6be2167a07bb4a50fe01445e127ec05a8b702ec15c",
    "10.9.0.34": "17a173982566b2496eac3d5e7e972a02914171aa9cec09ac3c38505e490d9103",
    "10.15.1.29": "a19b1c6a837574d3ad8374bf2d6eba850de0ed13c95bd71be3e22ab4280a47a2",
    "11.4.0.106": "6bdaa0a55c2226db027974e7691625003201514d5b277c919bee3f331d0b8fd4",
}
WITHOUT_PLUGINS = "__init__.py tensorrt.so"
MEMBERS = (
    f"{WITHOUT_PLUGINS} plugin/__init__.py plugin/_autotune.py plugin/_export.py plugin/_lib.py "
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


# by class, or "" for the module, what compile_tensorrt.py, operators.py and runtime/trt_engine.py use
USED = {
    "": "IProfiler LayerType Logger Runtime get_plugin_registry __version__",
    "BuilderFlag": "TF32",
    "IExecutionContext": "execute_async_v3 profiler set_input_shape set_tensor_address",
    "ICudaEngine": "create_execution_context",
    "ILayer": "get_output_type metadata num_outputs type",
    "INetworkDefinition": "get_layer num_layers",
    "IPluginRegistry": "get_creator load_library",
    "LayerType": "CONSTANT",
    "Logger": "ERROR",
    "MemoryPoolType": "WORKSPACE",
    "Runtime": "deserialize_cuda_engine",
}
SHOW_MISSING = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as trt
used = json.loads(sys.argv[2])
if hasattr(trt.LayerType, "ATTENTION_INPUT"):
    used |= {"": used[""] + " IAttentionInputLayer", "IAttentionInputLayer": "attention", "IAttention": "decomposable"}
owners = {name: getattr(trt, name) if name else trt for name in used}
print(trt.__version__, [(name, one) for name in used for one in used[name].split() if not hasattr(owners[name], one)])
"""


@pytest.fixture(params=BINDINGS)
def bindings(request, tmp_path, monkeypatch):
    """A folder with the package, and where what it loads is."""
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        pytest.skip("the bindings' hashes are known for Python 3.11 on x86-64")
    package = f"tensorrt-cu12-bindings=={request.param}"
    files = WITHOUT_PLUGINS if request.param == "10.3.0" else MEMBERS
    pinned = assets.WheelFolder(package, "tensorrt_bindings", BINDINGS[request.param], "NVIDIA's", files=files)
    monkeypatch.setitem(assets.ASSETS, "bindings", pinned)
    folder = assets.fetch("bindings").parent
    source, major = tmp_path / "nothing.c", request.param.split(".")[0]
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS.split()))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", tmp_path / library, source], check=True
        )
    environment = {**os.environ, "LD_LIBRARY_PATH": os.fspath(tmp_path)}

    def run(*command):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    return SimpleNamespace(version=request.param, folder=folder, run=run)


def test_bindings_have_what_is_used_of_them(bindings):
    assert bindings.run("-c", SHOW_MISSING, bindings.folder, json.dumps(USED)) == f"{bindings.version} []"


def one_by_one(name, **lists):
    return operators._one_by_one(oh.make_node(name, [], [], domain="liteframe", **lists))


@pytest.mark.parametrize("bindings", [*BINDINGS][1:], indirect=True)
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
    made = json.loads(bindings.run(SCRIPT, bindings.folder, json.dumps(cases)))

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
