"""What a device needs: the runtime starts and answers without anything that only exporting takes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from liteframe.runtime import VideoSession

QUESTION = "what's in the video?"
EXPORTING = ("torch", "onnx", "onnxscript", "onnx_ir", "transformers", "safetensors", "peft", "gguf", "polygraphy")
COMPILERS = ("tensorrt", "tensorrt_rtx", "cuda")
WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
MAIN = "from liteframe.runtime.cli import main; raise SystemExit(main())"


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def loaded_by(statement):
    code, out, err = python(f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert (code, err) == (0, "")
    return {name.partition(".")[0] for name in json.loads(out)}


@pytest.mark.parametrize("module", ["liteframe.runtime", "liteframe.runtime.cli"])
def test_importing_the_runtime_brings_in_nothing_heavy(module):
    loaded = loaded_by(f"import {module}")
    assert {"numpy", "cv2", "liteframe"} <= loaded
    assert not loaded & {*EXPORTING, *COMPILERS, "onnxruntime", "matplotlib", "pandas", "scipy", "sympy"}


@pytest.mark.parametrize("module", ["profile", "ort_engine"])
def test_measuring_and_running_bring_in_onnx_runtime_at_most(module):
    assert not loaded_by(f"import liteframe.runtime.{module}") & {*EXPORTING, *COMPILERS}


@pytest.mark.parametrize("module", ["compile_bundle", "doctor", "inspect_package", "package"])
def test_the_engines_side_needs_nothing_of_exporting(module):
    assert not loaded_by(f"import liteframe.engines.{module}") & {*EXPORTING, *COMPILERS}


def test_a_question_is_answered_without_anything_of_exporting(tiny_package, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (16, 56, 56, 3), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", frames)
    session = VideoSession(tiny_package)
    session.watch(frames)
    expected = "".join(session.ask(QUESTION, 16))
    code = f"""{WITHOUT.format(names={*EXPORTING, *COMPILERS})}
import numpy as np
from liteframe.runtime import VideoSession
session = VideoSession(sys.argv[1])
session.watch(np.load(sys.argv[2]))
sys.stdout.buffer.write("".join(session.ask(sys.argv[3], 16)).encode())
assert "onnxruntime" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_package.folder, tmp_path / "frames.npy", QUESTION], capture_output=True
    )
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected, b"")


@pytest.mark.parametrize("command", ["run", "inspect", "doctor", "profile"])
def test_the_commands_of_a_device_work_without_anything_of_exporting(tiny_package, command):
    arguments = {
        "run": [tiny_package.folder, "", QUESTION, "--max-new-tokens", "4", "--json"],
        "inspect": [tiny_package.folder, "--json"],
        "doctor": ["--json"],
        "profile": [tiny_package.folder, "--frames", "4", "--iterations", "1", "--warmup", "0", "--json"],
    }[command]
    code, out, err = python(WITHOUT.format(names={*EXPORTING, *COMPILERS}) + MAIN, command, *arguments)
    assert (code, err) == (0, "")
    document = json.loads(out.splitlines()[-1])
    if command == "doctor":
        assert document["targets"]["cpu"] == {"compile": "no: torch is not installed, to export", "run": "yes"}


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("torch", ["build", "artifact", "--target", "cpu"], "build needs the module torch; run: pip install"),
        ("onnx_ir", ["build", "artifact", "--target", "cpu"], "build needs the module onnx_ir; run: pip install"),
        ("onnxruntime", ["run", "PACKAGE", "", QUESTION], "which needs the module onnxruntime; run: pip install"),
        ("onnxruntime", ["profile", "PACKAGE"], "which needs the module onnxruntime; run: pip install"),
    ],
)
def test_what_is_missing_is_named_with_what_installs_it(tiny_package, missing, arguments, message):
    arguments = [tiny_package.folder if argument == "PACKAGE" else argument for argument in arguments]
    code, out, err = python(WITHOUT.format(names={missing}) + MAIN, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line
    assert line.endswith("'liteframe[export]'" if arguments[0] == "build" else "'liteframe[cpu]'")
