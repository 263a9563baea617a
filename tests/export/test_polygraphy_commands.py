"""The commands as their user runs them: in the package's folder, with the installed polygraphy."""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines.package import (
    File,
    Graph,
    InputError,
    Precision,
    Profile,
    TensorSpec,
    describe_file,
    open_package,
)
from liteframe.engines.targets import TARGETS
from liteframe.export.build_engine import build
from liteframe.export.polygraphy_commands import write_commands

FRAMES = np.random.default_rng(0).integers(0, 256, (1, 4, 56, 56, 3), dtype=np.uint8)
PROMPT = np.random.default_rng(1).standard_normal((1, 9, 24)).astype(np.float32)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "POLYGRAPHY_USE_TENSORRT_RTX"}
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
GPU_TARGETS = ["a100", pytest.param("jetson-orin", marks=pytest.mark.slow)]
ALL_TARGETS = [
    "cpu",
    *GPU_TARGETS,
    pytest.param("a100 int8", marks=pytest.mark.slow),
    pytest.param("cpu int8", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder_of(tiny_artifact, tiny_package, tmp_path_factory):
    """By target and precision, built once: a package's folder with its commands, and its manifest."""
    made = {}

    def write(name):
        target, _, precision = name.partition(" ")
        folder = tmp_path_factory.mktemp("commands") / "package"
        if name == "cpu":
            shutil.copytree(tiny_package.folder, folder)
            package = open_package(folder)
        elif precision:
            clips = folder.with_name("clips.npy")
            np.save(clips, np.random.default_rng(2).integers(0, 256, (8, 4, 56, 56, 3), dtype=np.uint8))
            package = build(
                tiny_artifact, target, folder, frames=16, precision=precision, calib=[clips], allow_drift=True
            )
        else:
            package = build(tiny_artifact, target, folder, frames=16)
        manifest = package.manifest
        write_commands(folder, TARGETS[target], [*manifest.graphs, *manifest.engines], FRAMES, PROMPT)
        return folder, manifest

    def get(name):
        if name not in made:
            made[name] = write(name)
        return made[name]

    return get


def lines(folder, having):
    text = (folder / "polygraphy/commands.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#") and having in line]


def shell(line, folder):
    return subprocess.run(line, shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def saved_outputs(path):
    """What polygraphy saved of its one runner's one iteration."""
    from polygraphy.json import from_json

    ((_, iterations),) = from_json(path.read_text()).lst
    (iteration,) = iterations
    return dict(iteration.items())


def feed(session):
    """The inputs that the commands promise, from the graph's own types and shapes."""
    sizes = {"sequence": 9, "capacity": 9, "past": 0}
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    values = {"frames": FRAMES, "inputs_embeds": PROMPT}
    for value in session.get_inputs():
        if value.name not in ("frames", "inputs_embeds"):
            shape = [sizes.get(size, size) for size in value.shape]
            values[value.name] = np.zeros(shape, types[value.type])
    return {value.name: values[value.name] for value in session.get_inputs()}


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_without_a_gpu_every_graph_runs_and_gives_what_onnxruntime_gives(folder_of, name):
    folder, manifest = folder_of(name)
    graphs = [
        file for part in manifest.graphs or manifest.engines for file in part.files if file.path.endswith(".onnx")
    ]
    commands = lines(folder, "--save-outputs")
    assert len(commands) == len(graphs) == (4 if name == "jetson-orin" else 2)
    for line, graph in zip(commands, graphs, strict=True):
        done = shell(line, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        session = ort.InferenceSession(folder / graph.path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        expected = dict(zip(names, session.run(names, feed(session)), strict=True))
        found = saved_outputs(folder / "polygraphy" / f"{Path(graph.path).stem}.outputs.json")
        assert found.keys() == expected.keys()
        for output, value in expected.items():
            assert found[output].dtype == value.dtype and np.any(value)
            np.testing.assert_allclose(found[output], value, rtol=1e-5, atol=1e-5, err_msg=output)


def test_the_line_fails_when_the_graph_gives_no_numbers(folder_of):
    folder, _ = folder_of("cpu")
    prompt = folder / "polygraphy/inputs_embeds.npy"
    good = prompt.read_bytes()
    try:
        np.save(prompt, np.full_like(PROMPT, np.nan))
        assert shell(lines(folder, "decoder.onnx --onnxrt")[0], folder).returncode != 0
    finally:
        prompt.write_bytes(good)


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_polygraphy_takes_the_lines_for_a_gpu_as_they_are_meant(folder_of, name, tmp_path):
    """It writes, instead of running, the program that it would run."""
    folder, manifest = folder_of(name)
    commands = lines(folder, "--trt ")
    assert len(commands) == {"a100": 2 * 2 + 2, "jetson-orin": 4}[name]
    parts = {part.files[0].path: part for part in [*manifest.graphs, *manifest.engines]}
    for line in commands:
        script = tmp_path / "script.py"
        done = shell(f"{line} --gen-script {script}", folder)
        assert done.returncode == 0, done.stdout + done.stderr
        text = script.read_text()
        script.unlink()
        part = parts[next(word for word in shlex.split(line) if word.endswith((".onnx", ".engine")))]
        assert "threshold={'': 0.99999}" in text
        if part in manifest.engines:
            assert "RTX=1" in line and part.compiler == "tensorrt-rtx"
            assert f"BytesFromPath('{folder / part.files[0].path}')" in text
            continue
        assert f"'{'tensorrt_rtx' if 'RTX=1' in line else 'tensorrt'}>=" in text
        assert "strongly_typed=True" in text and text.index("TrtRunner(") < text.index("OnnxrtRunner(")
        for spec in part.inputs:
            ranged = spec.profile and f".add('{spec.name}', min={spec.profile.min}, opt={spec.profile.opt}, max="
            assert ranged is None or f"{ranged}{spec.profile.max})" in text


def test_what_the_lines_for_tensorrt_rtx_build_compiles(folder_of, tmp_path):
    folder, _ = folder_of("a100")
    commands = lines(folder, "--trt-config-postprocess-script")
    assert len(commands) == 2
    for line in commands:
        words = shlex.split(line)
        built_with = words[words.index("--trt") + 1 : words.index("--onnxrt")]
        engine = tmp_path / "made.engine"
        convert = ["polygraphy", "convert", words[3], "--output", str(engine), *built_with]
        done = shell(f"{words[0]} {shlex.join(convert)} --compute-capabilities 8.0", folder)
        assert done.returncode == 0, done.stdout + done.stderr
        flags = next(row for row in done.stdout.splitlines() if row.strip().startswith("Flags "))
        assert "STRONGLY_TYPED" in flags and "TF32" not in flags
        assert engine.stat().st_size > 10_000
        engine.unlink()


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_trtexec_is_given_every_graph_and_engine_with_the_profiles_shapes(folder_of, name):
    folder, manifest = folder_of(name)
    commands = [shlex.split(line) for line in (*lines(folder, "trtexec --"), *lines(folder, "tensorrt_rtx --"))]
    assert len(commands) == {"a100": 2 * 2 + 2, "jetson-orin": 4}[name]
    parts = {part.files[0].path: part for part in [*manifest.graphs, *manifest.engines]}
    for program, path, *options in commands:
        part = parts[path.partition("=")[2]]
        given = dict(option.removeprefix("--").split("=") for option in options if "=" in option)
        ranged = [spec for spec in part.inputs if spec.profile is not None]
        if path.startswith("--loadEngine"):
            assert program == "tensorrt_rtx"
            wanted = {"shapes": "opt"}
        else:
            assert ("--stronglyTyped" in options) == (program == "trtexec")
            wanted = {"minShapes": "min", "optShapes": "opt", "maxShapes": "max"}
        assert given == {
            option: ",".join(f"{spec.name}:{'x'.join(map(str, getattr(spec.profile, which)))}" for spec in ranged)
            for option, which in wanted.items()
        }


def test_the_same_bytes_wherever_and_however_the_inputs_lie(folder_of, tmp_path):
    _, manifest = folder_of("a100")
    written = []
    for name, frames in (("one", FRAMES), ("another", np.asfortranarray(FRAMES))):
        (tmp_path / name).mkdir()
        parts = [*manifest.graphs, *manifest.engines]
        written.append(write_commands(tmp_path / name, TARGETS["a100"], parts, frames, PROMPT))
    assert written[0] == written[1]
    there = {path for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert there == {tmp_path / "one" / file.path for file in written[0]}
    assert written[0] == [describe_file(tmp_path / "one", tmp_path / "one" / file.path) for file in written[0]]


def test_a_package_stays_whole_when_its_own_commands_have_run(tiny_package, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(tiny_package.folder, folder)
    assert shell(lines(folder, "encoder.onnx --onnxrt")[0], folder).returncode == 0
    open_package(folder)


@given(
    positions=st.integers(1, 8),
    dtype=st.sampled_from(["float16", "float32"]),
    length=st.sampled_from(["capacity", "past", 64]),
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    width=st.integers(1, 8),
)
def test_feeds_have_the_types_and_shapes_of_the_graph(positions, dtype, length, layers, heads, width):
    caches = [f"{kind}_cache_{layer}" for layer in range(layers) for kind in "kv"]
    graph = described(
        TensorSpec(name="inputs_embeds", dtype="float32", shape=[1, "sequence", width], profile=None),
        TensorSpec(name="write_index", dtype="int64", shape=[1], profile=None),
        *(TensorSpec(name=name, dtype=dtype, shape=[1, heads, length, width], profile=None) for name in caches),
    )
    prompt = np.random.default_rng(0).standard_normal((1, positions, width)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_commands(Path(folder), TARGETS["cpu"], [graph], FRAMES, prompt)
        (values,) = runpy.run_path(f"{folder}/polygraphy/helpers.py")["decoder_fused"]()
    np.testing.assert_array_equal(values["inputs_embeds"], prompt)
    assert list(values) == ["inputs_embeds", "write_index", *caches]
    assert values["write_index"].dtype == np.int64 and values["write_index"].tolist() == [0]
    expected = {"capacity": positions, "past": 0, 64: 64}[length]
    for name in caches:
        assert values[name].shape == (1, heads, expected, width)
        assert values[name].dtype == dtype and not values[name].any()


def described(*inputs):
    """A decoder graph's description, whose files nobody reads."""
    return Graph(
        name="decoder",
        dialect="fused",
        opset=24,
        files=[File(path="graphs/decoder.fused.onnx", bytes=1, sha256="")],
        inputs=list(inputs),
        outputs=[],
        precision=Precision(asked="fp32", found={}, kept=[]),
        parity={},
    )


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT.astype(np.float64),
        PROMPT[0],
        PROMPT[..., :23],
        np.zeros((1, 513, 24), np.float32),
        np.zeros((1, 0, 24), np.float32),
    ],
    ids=["type", "rank", "width", "too long", "empty"],
)
def test_a_prompt_that_the_graph_cannot_take_is_refused(prompt, tmp_path):
    profile = Profile(min=[1, 1, 24], opt=[1, 64, 24], max=[1, 512, 24])
    graph = described(
        TensorSpec(name="inputs_embeds", dtype="float32", shape=[1, "sequence", 24], profile=profile),
    )
    with pytest.raises(
        InputError, match=r"decoder\.fused\.onnx: .*inputs_embeds.* expected float32 \[1, 'sequence', 24\]"
    ):
        write_commands(tmp_path, TARGETS["a100"], [graph], FRAMES, prompt)
    assert not [*tmp_path.iterdir()]
