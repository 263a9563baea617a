"""`liteframe doctor` on this machine, and on ones it might be."""

import importlib.metadata
import importlib.util
import json
import platform
import sys

import onnxruntime
import pytest
from liteframe.engines import doctor
from liteframe.engines.device import Gpu
from liteframe.engines.targets import TARGETS

WITHOUT_TORCH = "no: torch is not installed, to export"


@pytest.fixture
def machine(monkeypatch):
    """Pretends that only some modules are installed, and these GPUs and providers are there."""

    def pretend(modules="", gpus=(), providers=("CPUExecutionProvider",)):
        found = set(modules.split())
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name if name in found else None)
        monkeypatch.setattr(doctor, "find_gpus", lambda: (list(gpus), "" if gpus else "no NVIDIA driver"))
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(providers))

    return pretend


def verdicts(part):
    return {name: verdict[part] for name, verdict in doctor.examine()["targets"].items()}


def test_the_report_is_of_this_machine():
    report = doctor.examine()
    assert report["python"] == platform.python_version()
    assert report["machine"] == f"{sys.platform} {platform.machine()}"
    assert {"liteframe", "onnxruntime", "torch"} <= report["libraries"].keys()
    for name, found in report["libraries"].items():
        assert found == importlib.metadata.version(name)
    assert report["targets"].keys() == TARGETS.keys()


def test_an_exporting_machine_without_a_gpu(machine):
    machine("torch onnxruntime tensorrt_rtx")
    assert verdicts("compile") == {
        "cpu": "yes",
        "cuda": "yes",
        "a100": "ahead of time, by TensorRT-RTX",
        "rtx": "ahead of time, by TensorRT-RTX",
        "jetson-orin": "a bundle, finished on the device",
        "jetson-thor": "a bundle, finished on the device",
    }
    assert verdicts("run") == {
        "cpu": "yes",
        "cuda": "no: CUDAExecutionProvider is not there",
        "a100": "no: no GPU of compute capability 8.0",
        "rtx": "no: no GPU of compute capability 8.6 or 8.9 or 12.0 or 12.1",
        "jetson-orin": "no: no GPU of compute capability 8.7",
        "jetson-thor": "no: no GPU of compute capability 11.0",
    }
    assert doctor.examine()["no_gpu"] == "no NVIDIA driver"


def test_an_exporting_machine_without_tensorrt_rtx(machine):
    machine("torch onnxruntime")
    found = verdicts("compile")
    assert found["cpu"] == found["cuda"] == "yes"
    assert {found[name] for name in ("a100", "rtx", "jetson-orin", "jetson-thor")} == {
        "no: tensorrt-rtx is not installed"
    }


def test_a_jetson_with_tensorrt_and_nothing_to_export(machine):
    machine("onnxruntime tensorrt polygraphy", [Gpu("Orin", "8.7", 32 << 30)])
    found = verdicts("compile")
    assert found.pop("jetson-orin") == "yes, by TensorRT on this GPU (liteframe compile)"
    assert set(found.values()) == {WITHOUT_TORCH}
    assert doctor.examine()["gpus"] == [{"name": "Orin", "capability": "8.7", "memory": 32 << 30}]


def test_tensorrt_compiles_for_the_gpu_that_is_there_only(machine):
    machine("torch onnxruntime polygraphy tensorrt tensorrt_rtx", [Gpu("NVIDIA A100", "8.0", 1)])
    found = verdicts("compile")
    assert found["a100"] == "yes, by TensorRT on this GPU (liteframe compile)"
    assert found["jetson-orin"] == "a bundle, finished on the device"


def test_tensorrt_without_polygraphy_does_not_compile(machine):
    machine("onnxruntime tensorrt", [Gpu("Orin", "8.7", 1)])
    assert verdicts("compile")["jetson-orin"] == "no: polygraphy is not installed"


def test_a_gpu_without_tensorrt_does_not_compile(machine):
    machine("", [Gpu("Orin", "8.7", 1)])
    assert set(verdicts("compile").values()) == {WITHOUT_TORCH}


def test_onnx_runtime_with_cuda_runs_the_cuda_target(machine):
    machine("onnxruntime", providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert verdicts("run")["cuda"] == "yes"
    machine("")
    assert verdicts("run")["cpu"] == verdicts("run")["cuda"] == "no: onnxruntime is not installed"


def test_tensorrt_engines_run_where_gpu_tensorrt_and_cuda_python_are(machine):
    orin, a100 = Gpu("Orin", "8.7", 1), Gpu("NVIDIA A100", "8.0", 1)
    machine("tensorrt cuda", [orin])
    assert verdicts("run")["jetson-orin"] == "yes, by tensorrt"
    assert verdicts("run")["jetson-thor"] == "no: no GPU of compute capability 11.0"
    machine("tensorrt", [orin])
    assert verdicts("run")["jetson-orin"] == "no: cuda-python is not installed"
    machine("cuda", [a100])
    assert verdicts("run")["a100"] == "no: tensorrt or tensorrt-rtx is not installed"
    machine("cuda tensorrt_rtx", [a100])
    assert verdicts("run")["a100"] == "yes, by tensorrt-rtx"


def test_the_command_prints_a_table_and_ends_with_one_json_document(machine, capsys):
    machine("onnxruntime tensorrt polygraphy", [Gpu("Orin", "8.7", 32 << 30)])
    assert doctor.main(["--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == doctor.examine()
    assert "GPU: Orin (8.7)" in lines
    rows = {line.split()[0]: line for line in lines if line.split()}
    assert TARGETS.keys() <= rows.keys()
    assert "yes, by TensorRT on this GPU (liteframe compile)" in rows["jetson-orin"]


def test_without_a_gpu_the_command_says_why(machine, capsys):
    machine("onnxruntime")
    assert doctor.main([]) == 0
    assert "GPU: no NVIDIA driver" in capsys.readouterr().out.splitlines()
