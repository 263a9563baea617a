"""The build as its user runs it: packages for every target, arguments that can't be meant, gates, and what is left."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from liteframe.engines.device import Gpu
from liteframe.engines.package import QUESTION_POSITIONS, GateError, InputError, Operators, open_package
from liteframe.engines.targets import PLAIN_TYPES, TARGETS
from liteframe.export import build_engine, verify
from liteframe.export.artifact import LiteFrameFolder, load_artifact
from liteframe.export.build_engine import build
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.reducers import TOKEN_REDUCERS
from liteframe.export.models.vit import ViTConfig
from liteframe.runtime import VideoSession, cli
from safetensors.torch import load_file, save_file

SCRIPT = Path(build_engine.__file__)
TENSORRT = [name for name, target in TARGETS.items() if target.compiler != "onnxruntime"]


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tiny_artifact, tiny_package, tmp_path_factory):
    """Packages by target, each built once."""
    made = {"cpu": tiny_package}

    def get(target):
        if target not in made:
            made[target] = build(tiny_artifact, target, tmp_path_factory.mktemp("built") / target, frames=16)
        return made[target]

    return get


@pytest.fixture
def framewise_artifact(tiny_artifact, tmp_path):
    """The tiny artifact with a frame-wise tower behind which WAP reduces, as with InternVL's."""
    folder = tmp_path / "framewise"
    folder.mkdir()
    vit = ViTConfig(
        image_size=(112, 112), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    config = EncoderConfig(backbone=vit, output_size=24, reducer="wap", shuffle=1)
    encoder = VideoEncoder(config)
    tensors = load_file(tiny_artifact / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    for name, parameter in encoder.named_parameters():
        tensors[f"encoder.{name}"] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    save_file(tensors, folder / "model.safetensors")
    for path in tiny_artifact.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"encoder": msgspec.to_builtins(config)}))
    msgspec.json.decode((folder / "config.json").read_bytes(), type=LiteFrameFolder)
    return folder


# what comes out


def test_a_cpu_package_holds_two_engines_and_what_text_needs(built):
    made = built("cpu")
    assert files(made.folder) == {
        "manifest.json",
        "encoder.onnx",
        "encoder.data",
        "decoder.onnx",
        "decoder.data",
        "embeddings.npy",
        "tokenizer.json",
        "chat_template.jinja",
        *(f"polygraphy/{name}" for name in ("commands.txt", "helpers.py", "frames.npy", "inputs_embeds.npy")),
    }
    for engine in made.manifest.engines:
        assert engine.compiler == "onnxruntime"
        assert engine.parity["cosine"] >= 0.99999
        assert set(engine.precision.found) == {"fp32"}
        onnx.checker.check_model(made.folder / engine.files[0].path)
    table = np.load(made.folder / "embeddings.npy")
    assert (table.shape, table.dtype) == ((340, 24), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("target", TENSORRT)
def test_every_tensorrt_target_gets_what_the_table_says(built, target):
    made, row = built(target), TARGETS[target]
    graphs = {(graph.name, graph.dialect) for graph in made.manifest.graphs}
    assert graphs == {(name, dialect) for name in ("encoder", "decoder") for dialect in row.dialects}
    ahead = row.compiler == "tensorrt-rtx" or row.ahead_of_time == "tensorrt-rtx"
    assert [engine.name for engine in made.manifest.engines] == (["encoder", "decoder"] if ahead else [])
    for engine in made.manifest.engines:
        assert engine.compiler == "tensorrt-rtx"
        assert engine.capabilities == list(row.capabilities)
        assert engine.parity is None
        assert all(spec.profile or all(isinstance(n, int) for n in spec.shape) for spec in engine.inputs)
    for graph in made.manifest.graphs:
        assert graph.parity["cosine"] >= 0.99999
    assert open_package(made.folder).manifest == made.manifest
    with pytest.raises(InputError, match=f"TensorRT engines for {target}" if ahead else "liteframe compile"):
        VideoSession(made)


def test_the_cuda_package_is_for_its_provider_and_was_not_run(built):
    made = built("cuda")
    assert {engine.compiler for engine in made.manifest.engines} == {"onnxruntime"}
    assert all(engine.parity is None for engine in made.manifest.engines)


@pytest.mark.parametrize("target", ["cpu", "a100"])
def test_ahead_of_time_operators_are_function_bodies(built, target):
    encoder, decoder = built(target).manifest.engines
    assert encoder.operators == Operators(way="bodies", milliseconds={}, library=None)
    assert decoder.operators is None


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_that_are_required_where_the_device_is_not_are_refused_at_once(tiny_artifact, tmp_path, target):
    with pytest.raises(InputError, match=r"--plugins require: .* liteframe compile BUNDLE --plugins require"):
        build(tiny_artifact, target, tmp_path / "out", frames=16, plugins="require")
    assert list(tmp_path.iterdir()) == []


def test_on_its_device_a_bundle_is_finished_at_once_by_another_process(tiny_artifact, tmp_path, monkeypatch, capfd):
    """Here, with no GPU, that process says so: the bundle stays."""
    monkeypatch.setattr(build_engine, "find_gpus", lambda: ([Gpu("Orin", "8.7", 1)], ""))
    monkeypatch.setattr(build_engine.compile_tensorrt, "available", lambda flavour: True)
    with pytest.raises(InputError, match=r"the bundle is written, and was not finished.* liteframe compile .*orin"):
        build(tiny_artifact, "jetson-orin", tmp_path / "orin", frames=16, plugins="require", max_workspace=64 << 20)
    assert "tensorrt is not installed here" in capfd.readouterr().err
    assert not open_package(tmp_path / "orin").manifest.engines

    commands = []

    def run(command, **options):
        commands.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build_engine.subprocess, "run", run)
    arguments = {"plugins": "never", "plugin_library": Path("some.so")}
    build(tiny_artifact, "jetson-orin", tmp_path / "again", frames=16, **arguments)
    expected = ["compile", str(tmp_path / "again"), "--plugins", "never", "--plugin-library", "some.so"]
    assert commands == [expected]

    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(build_engine.subprocess, "run", lambda command, **options: failed)
    with pytest.raises(GateError, match="was not finished"):
        build(tiny_artifact, "jetson-orin", tmp_path / "failed", frames=16)


def test_the_profiles_cover_the_manifests_numbers(built):
    manifest = built("a100").manifest
    model = manifest.model
    assert (model.max_frames, model.clip_length, model.tokens_per_clip, model.units_per_clip) == (16, 4, 2, 2)
    encoder, decoder = (engine.inputs for engine in manifest.engines)
    assert encoder[0].profile.max == [4, 4, 56, 56, 3]
    assert decoder[0].profile.max == [1, model.chunk, 24]
    assert all(spec.shape == [1, 2, model.capacity, 6] for spec in decoder[2:])
    assert model.capacity % 256 == 0 and model.capacity >= 4 * 2 + QUESTION_POSITIONS


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "jetson-orin"])
def test_the_same_artifact_gives_the_same_bytes(built, tiny_artifact, exported_anew, tmp_path, target):
    again = build(tiny_artifact, target, tmp_path / "again", frames=16)
    for name in files(built(target).folder):
        assert (again.folder / name).read_bytes() == (built(target).folder / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reducer", "ratio", "units"),
    [("wap", 4, 4), ("average", 8, 2), ("wap", 16, 1), ("prumerge", 8, 4)],
)
def test_the_ratio_sets_the_tokens_of_a_clip(framewise_artifact, tmp_path, reducer, ratio, units):
    made = build(framewise_artifact, "cpu", tmp_path / "out", frames=8, reducer=reducer, ratio=ratio)
    assert made.manifest.model.tokens_per_clip * ratio == 4 * 8 * 8
    assert made.manifest.model.units_per_clip == units


# what is refused


@pytest.mark.parametrize("frames", [0, -4, 3, 18])
def test_frames_in_no_whole_clips_are_refused(tiny_artifact, tmp_path, frames):
    with pytest.raises(InputError, match=rf"--frames {frames}: expected a multiple of 4"):
        build(tiny_artifact, "cpu", tmp_path / "out", frames=frames)
    assert not list(tmp_path.iterdir())


def test_more_frames_than_the_language_model_has_positions_for_are_refused(tiny_artifact, tmp_path):
    with pytest.raises(InputError, match=r"--frames 400 needs a KV cache of \d+ positions, .* trained for 2048"):
        build(tiny_artifact, "cpu", tmp_path / "out", frames=400)
    assert not list(tmp_path.iterdir())


def test_a_reducer_in_front_of_a_student_is_refused(tiny_artifact, tmp_path):
    with pytest.raises(InputError, match="a LiteFrame student compresses inside"):
        build(tiny_artifact, "cpu", tmp_path / "out", reducer="wap")


@pytest.mark.parametrize(
    ("reducer", "ratio", "message"),
    [
        ("max", "3", "ratio 3 does not divide the clip's grid [4, 8, 8]"),
        ("none", "4", "ratio 4: reducer none keeps every token"),
        ("tome", "3", "ratio 3 does not divide the 256 tokens of a clip"),
        ("prumerge", "5", "ratio 5 does not divide the 64 tokens of a frame"),
        ("fastvid", "2", "ratio 2 leaves 44 of the 64 tokens of a frame"),
    ],
)
def test_a_ratio_that_does_not_fit_is_refused_with_its_numbers(
    framewise_artifact, tmp_path, capsys, reducer, ratio, message
):
    options = ["--target", "cpu", "--reducer", reducer, "--ratio", ratio, "--output", str(tmp_path / "out")]
    assert cli.guard(build_engine.main, [str(framewise_artifact), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_no_reducer_may_replace_one_with_a_ratio(framewise_artifact):
    config = json.loads((framewise_artifact / "config.json").read_text())
    config["encoder"] |= {"reducer": "tome", "ratio": 16}
    (framewise_artifact / "config.json").write_text(json.dumps(config))
    assert load_artifact(framewise_artifact).encoder.tokens_per_clip == 16
    assert load_artifact(framewise_artifact, "average").encoder.config.window == (4, 2, 2)
    assert load_artifact(framewise_artifact, "none").encoder.config.reducer == "none"


@pytest.mark.parametrize("reducer", TOKEN_REDUCERS)
def test_long_videos_need_tokens_that_have_places(framewise_artifact, tmp_path, capsys, reducer):
    options = ["--target", "cpu", "--reducer", reducer, "--ratio", "4", "--long-video", "160"]
    assert cli.guard(build_engine.main, [str(framewise_artifact), *options, "--output", str(tmp_path / "out")]) == 2
    message = f"{reducer} leaves none at a place of its own; expected --reducer none, average, max, subsample, wap"
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_video_beyond_reason_is_refused_before_text_is_laid_out_around_its_frames(tiny_artifact, monkeypatch):
    monkeypatch.setattr(build_engine, "_unit_text_positions", None)
    artifact = load_artifact(tiny_artifact)
    with pytest.raises(InputError, match=r"--long-video 4000000000 .* needs a KV cache of 1000\d+ positions"):
        build_engine.describe_model(artifact, 16, 1, TARGETS["cpu"], 4 * 10**9)


def test_an_output_that_exists_is_left_alone(tiny_artifact, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InputError, match="already exists; remove it or choose another --output"):
        build(tiny_artifact, "cpu", tmp_path)
    assert files(tmp_path) == {"precious"}


# gates


def test_a_gate_that_fails_leaves_nothing_behind(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "COSINE", 1.1)
    with pytest.raises(GateError, match=r"encoder\.fused\.onnx: cosine 1\S* to the torch module, the gate is 1\.1"):
        build(tiny_artifact, "cpu", tmp_path / "out", frames=16)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_changes_the_precision_fails_the_build(tiny_artifact, tmp_path, monkeypatch):
    proven = build_engine.proof.Proof(found={"fp16": 3, "fp32": 9}, integer_products=0, wrong=[])
    compiled = build_engine.compile_tensorrt.Compiled(engine=b"engine", proof=proven, version="1.7.1")
    monkeypatch.setattr(build_engine.compile_tensorrt, "compile_graph", lambda *_: compiled)
    with pytest.raises(GateError, match=r"asked for fp32, the compiled network computes tensors of .*fp16"):
        build(tiny_artifact, "a100", tmp_path / "out", frames=16)
    assert not list(tmp_path.iterdir())


def test_an_operator_beyond_the_plain_floor_fails_the_build(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.delitem(PLAIN_TYPES, "Softmax")
    with pytest.raises(GateError, match=r"encoder\.plain\.onnx: opset 20 with Softmax, which TensorRT 10\.3 may not"):
        build(tiny_artifact, "jetson-orin", tmp_path / "out", frames=16)


# the command


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def test_the_script_and_the_command_build_the_same(tiny_artifact, tiny_package, tmp_path, monkeypatch):
    arguments = [tiny_artifact, "--target", "cpu", "--frames", "16", "--json"]
    script = run(SCRIPT, *arguments, cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    report = json.loads(script.stdout.splitlines()[-1])
    assert report["package"] == "artifact-cpu"
    manifest = (tmp_path / "artifact-cpu/manifest.json").read_bytes()
    assert manifest == (tiny_package.folder / "manifest.json").read_bytes()
    assert report["manifest"] == json.loads(manifest)
    assert "cosine 1.0" in script.stderr
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command sets it
    command = ["liteframe", "build", *map(str, arguments), "--output", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main() == 0
    assert (tmp_path / "again/manifest.json").read_bytes() == manifest


def test_bad_input_is_one_message_and_exit_code_2(tmp_path):
    done = run(SCRIPT, tmp_path / "nowhere", "--target", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"liteframe: {tmp_path / 'nowhere'}: no such folder")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_is_wrong_use(tiny_artifact):
    done = run(SCRIPT, tiny_artifact, "--target", "h100")
    assert done.returncode == 2
    assert "invalid choice: 'h100'" in done.stderr
