"""`liteframe doctor`: what this machine has, and for each target what can be compiled and run here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from .device import find_gpus
from .targets import TARGETS, TENSORRT_MODULES, Target

LIBRARIES = (
    "liteframe",
    "numpy",
    "opencv-python-headless",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "torch",
    "polygraphy",
    "tensorrt-rtx",
    "tensorrt",
    "cuda-bindings",
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="liteframe doctor", description="What can be compiled and run here.")
    parser.add_argument("--self-test", action="store_true", help="run small engines on every executor that is here")
    parser.add_argument("--json", action="store_true", help="make the last line of the output one JSON document")
    options = parser.parse_args(arguments)
    report = examine()
    print(f"Python {report['python']} on {report['machine']}")
    print(", ".join(f"{name} {found}" for name, found in report["libraries"].items()))
    print("GPU: " + ("; ".join(f"{g['name']} ({g['capability']})" for g in report["gpus"]) or report["no_gpu"]))
    table = Table("target", "compile here", "run here", box=None, pad_edge=False)
    for name, verdict in report["targets"].items():
        table.add_row(name, verdict["compile"], verdict["run"])
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    failed = options.self_test and _self_test(report)
    if options.json:
        print(json.dumps(report))
    return 1 if failed else 0


def _self_test(report: dict[str, Any]) -> bool:
    """Prints the results and puts them into the report; whether one failed."""
    from .self_test import self_test

    print("\nself-test: small engines against what ONNX Runtime makes of them on a CPU")
    results = self_test()
    for result in results:
        verdict = {None: "not tried", True: "ok", False: "FAILED"}[result.passed]
        print(f"{verdict:10}{result.executor}{', ' if result.what else ''}{result.what}: {result.detail}")
    tried = [result for result in results if result.passed is not None]
    failed = [result for result in tried if not result.passed]
    print(f"verdict: {len(tried) - len(failed)} of {len(tried)} passed")
    report["self_test"] = [asdict(result) for result in results]
    return bool(failed)


def examine() -> dict[str, Any]:
    """What the command prints, as one document."""
    gpus, why = find_gpus()
    capabilities = {gpu.capability for gpu in gpus}
    return {
        "python": platform.python_version(),
        "machine": f"{sys.platform} {platform.machine()}",
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "gpus": [{"name": g.name, "capability": g.capability, "memory": g.memory} for g in gpus],
        "no_gpu": why,
        "targets": {
            target.name: {
                "compile": _can_compile(target, capabilities),
                "run": _can_run(target, capabilities),
            }
            for target in TARGETS.values()
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _can_compile(target: Target, capabilities: set[str]) -> str:
    exporting = "" if importlib.util.find_spec("torch") else "no: torch is not installed, to export"
    if target.compiler == "onnxruntime":
        return exporting or ("yes" if importlib.util.find_spec("onnxruntime") else "no: onnxruntime is not installed")
    if (
        target.compiler == "tensorrt"
        and importlib.util.find_spec("tensorrt")
        and capabilities & set(target.capabilities)
    ):
        drives = importlib.util.find_spec("polygraphy")
        return "yes, by TensorRT on this GPU (liteframe compile)" if drives else "no: polygraphy is not installed"
    ahead = importlib.util.find_spec("tensorrt_rtx") is not None
    if "tensorrt-rtx" in (target.compiler, target.ahead_of_time):
        return exporting or ("ahead of time, by TensorRT-RTX" if ahead else "no: tensorrt-rtx is not installed")
    return exporting or ("a bundle, finished on the device" if ahead else "no: tensorrt-rtx is not installed")


def _can_run(target: Target, capabilities: set[str]) -> str:
    if target.provider is None:
        if not capabilities & set(target.capabilities):
            return f"no: no GPU of compute capability {' or '.join(target.capabilities)}"
        compilers = [name for name in (target.compiler, target.ahead_of_time) if name is not None]
        installed = [name for name in compilers if importlib.util.find_spec(TENSORRT_MODULES[name])]
        if not installed:
            return f"no: {' or '.join(compilers)} is not installed"
        return (
            f"yes, by {' or '.join(installed)}"
            if importlib.util.find_spec("cuda")
            else "no: cuda-python is not installed"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        return "no: onnxruntime is not installed"
    import onnxruntime

    return "yes" if target.provider in onnxruntime.get_available_providers() else f"no: {target.provider} is not there"
