"""`liteframe doctor --self-test` where there is no GPU, and its verdicts on executors that are not right."""

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from liteframe.engines import doctor, self_test
from liteframe.engines.device import find_gpus
from liteframe.engines.package import open_package
from liteframe.engines.self_test import Result, compare
from liteframe.export import self_test_bundles
from liteframe.runtime.ort_engine import OrtDecoder, OrtEncoder

without_gpu = pytest.mark.skipif(bool(find_gpus()[0]), reason="there is a GPU")


@without_gpu
def test_the_command_tries_what_is_here_and_says_why_not_the_rest(capsys):
    assert doctor.main(["--self-test", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)["self_test"]
    tried = [(result["executor"], result["what"]) for result in results if result["passed"]]
    assert tried == [
        ("ONNX Runtime, CPU", f"{precision}, {dialect}")
        for precision in ("fp32", "fp16")
        for dialect in ("fused", "plain")
    ]
    assert {result["executor"]: result["detail"] for result in results if result["passed"] is None}.keys() == {
        "ONNX Runtime, CUDA",
        "TensorRT",
        "TensorRT-RTX",
    }
    assert "verdict: 4 of 4 passed" in lines
    assert any(line.startswith("not tried TensorRT: ") for line in lines)


def test_an_executor_that_is_wrong_fails_and_so_does_the_command(monkeypatch, capsys):
    """Wrong is: a cache that forgets what is behind a position it goes back to."""
    rewind = OrtDecoder.rewind
    monkeypatch.setattr(OrtDecoder, "rewind", lambda self, position: rewind(self, position and position - 1))
    results = self_test.try_executor("ONNX Runtime, CPU")
    assert [result.passed for result in results] == [False] * 4
    assert all("least cosine" in result.detail for result in results)
    monkeypatch.setattr(self_test, "self_test", lambda: results)
    assert doctor.main(["--self-test"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED    ONNX Runtime, CPU, fp32, fused: least cosine" in printed
    assert "verdict: 0 of 4 passed" in printed


def test_an_executor_that_raises_or_crashes_fails(monkeypatch):
    def refuse(*_):
        raise MemoryError("the device is full")

    monkeypatch.setattr(OrtEncoder, "encode", refuse)
    assert {result.detail for result in self_test.try_executor("ONNX Runtime, CPU")} == {
        "MemoryError: the device is full"
    }

    class Crashing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(self_test, "ProcessPoolExecutor", Crashing)
    monkeypatch.setattr(self_test, "missing", lambda executor: None if executor == "TensorRT" else "not here")
    results = self_test.self_test()
    assert [result for result in results if result.passed is not None] == [
        Result("TensorRT", "", False, "the process crashed; see its messages above")
    ]


def test_the_least_cosine_decides_and_nan_is_the_least():
    expected = {"a": np.array([1.0, 2.0]), "b": np.array([3.0, 1.0])}
    same = compare("x", "y", expected, expected, 0.99)
    assert same.passed and "1.0000000" in same.detail
    off = compare("x", "y", expected | {"b": np.array([3.0, 1.5])}, expected, 0.99)
    assert not off.passed and "(b)" in off.detail
    broken = compare("x", "y", expected | {"a": np.array([np.nan, 2.0])}, expected, 0.0)
    assert not broken.passed and "(a)" in broken.detail


@pytest.mark.slow
def test_the_bundles_are_what_makes_them_makes(tmp_path):
    self_test_bundles.make(tmp_path / "made")
    for precision in self_test.PRECISIONS:
        made, kept = (open_package(folder / precision) for folder in (tmp_path / "made", self_test.FOLDER))
        for graph in kept.manifest.graphs:
            (other,) = (g for g in made.manifest.graphs if (g.name, g.dialect) == (graph.name, graph.dialect))
            assert [file.sha256 for file in other.files] == [file.sha256 for file in graph.files]
        results = [np.load(folder / f"{precision}.npz") for folder in (tmp_path / "made", self_test.FOLDER)]
        assert results[0].files == results[1].files
        for name in results[0].files:
            np.testing.assert_allclose(results[0][name], results[1][name], rtol=0, atol=2e-3)
