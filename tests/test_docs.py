"""What the documents say is what the code does: fields, commands, the Python in the README."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import msgspec
import pytest
from liteframe.engines import package
from liteframe.engines.targets import TARGETS
from liteframe.export import precision, verify
from liteframe.export.artifact import LiteFrameFolder
from liteframe.export.models.encoder import EncoderConfig
from liteframe.export.models.liteframe import LiteFrameConfig
from liteframe.export.models.vit import ACTIVATIONS, ViTConfig

ROOT = Path(__file__).parents[1]
README, PACKAGE, ARTIFACT = ((ROOT / path).read_text() for path in ("README.md", "docs/package.md", "docs/artifact.md"))


def section(text, title):
    return re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def table_fields(text):
    """Names in backticks in the first column of a section's table."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


@pytest.mark.parametrize(
    "kind",
    [
        package.Manifest,
        package.Origin,
        package.Accuracy,
        package.Model,
        package.LongVideo,
        package.Text,
        package.Graph,
        package.Engine,
        package.TensorSpec,
        package.Profile,
        package.Precision,
        package.File,
    ],
)
def test_every_field_of_the_manifest_is_specified_in_order(kind):
    documented = table_fields(section(PACKAGE, kind.__name__))
    assert documented == list(kind.__struct_fields__)


@pytest.mark.parametrize("kind", [EncoderConfig, LiteFrameConfig, ViTConfig])
def test_every_field_of_an_artifacts_config_is_specified(kind):
    assert sorted(table_fields(section(ARTIFACT, kind.__name__))) == sorted(kind.__struct_fields__)


def test_the_example_config_is_one_and_shows_the_defaults():
    (example,) = re.findall(r"```json\n(.*?)```", ARTIFACT, re.S)
    config = msgspec.json.decode(example, type=LiteFrameFolder)
    assert config.encoder.backbone == LiteFrameConfig()
    assert config.__struct_fields__ == tuple(table_fields(section(ARTIFACT, "LiteFrame folders")))[1:]


def test_figures_and_gates_are_the_codes(tiny_package):
    text = section(PACKAGE, "Figures in `parity`")
    lowered = {"mean_cosine", "worst_cosine", "perplexity", "perplexity_increase", "perplexity_increase_95"}
    assert set(table_fields(text)) == {*tiny_package.manifest.engines[1].parity, *lowered}
    for gates in (precision.MEAN_COSINE, precision.WORST_COSINE):
        assert f"FP16 >= {gates['fp16']}, INT8 >= {gates['int8']}" in text
    limits = [f"{precision.PERPLEXITY[asked] * 100:g} %" for asked in ("fp16", "int8", "int4-weights")]
    assert "FP16 <= {}, INT8 <= {}, INT4 weights <= {}".format(*limits) in text
    assert f">= {verify.COSINE}" in text and f"<= {verify.CHUNKED_DIFFERENCE:.0e}".replace("-0", "-") in text
    assert f"a prompt of {verify.PROMPT}" in text
    assert "chunks of {}, {} and {}".format(*verify.CHUNKS) in text
    assert all(f"`{name}`" in ARTIFACT for name in ACTIVATIONS)


def test_targets_are_the_tables():
    listed = re.findall(
        r"`([\w-]+)`", "".join(re.findall(r"^\| (`.*?) \|", section(README, "From your checkpoint to a device"), re.M))
    )
    assert listed == list(TARGETS)
    assert set(
        re.findall(r"`([\w-]+)`", next(row for row in PACKAGE.splitlines() if row.startswith("| `target`")))
    ) == {
        "target",
        *TARGETS,
    }


def test_make_targets_that_are_named_exist():
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([\w-]+)", README))
    assert {"demo", "test"} <= named <= rules


def test_ci_calls_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "    make test" in README


def test_commands_that_are_named_exist():
    named = set(re.findall(r"liteframe (\w+) [A-Z-]", README)) | set(re.findall(r"`liteframe (\w+)", README))
    known = {entry.name for entry in entry_points(group="liteframe.commands")}
    assert named and named <= known


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"


def test_folders_on_the_map_exist():
    found = re.findall(r"(\w+)/ ", section(README, "Folders"))
    assert {"export", "engines", "runtime", "calib", "tests"} <= set(found)
    assert all((ROOT / name).is_dir() for name in found)


@pytest.fixture
def video(tmp_path):
    import cv2
    import numpy as np

    writer = cv2.VideoWriter(str(tmp_path / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 30, (64, 48))
    for i in range(30):
        writer.write(np.full((48, 64, 3), 8 * i, np.uint8))
    writer.release()
    return tmp_path / "video.mp4"


@pytest.mark.parametrize("document", ["README.md", "docs/runtime.md"])
def test_the_python_of_the_documents_runs(tiny_package, video, document):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)
    code = code.replace("build/demo/liteframe-smollm2-cpu", str(tiny_package.folder)).replace("frames=64", "frames=16")
    done = subprocess.run([sys.executable, "-c", code], cwd=video.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Stats\(frames=[1-9]", done.stdout)


def test_the_profile_command_of_the_documents_runs(tiny_package, tmp_path, monkeypatch):
    (command,) = re.findall(r"^    (liteframe profile .*)$", (ROOT / "docs/runtime.md").read_text(), re.M)
    command = command.replace("PACKAGE", str(tiny_package.folder)).replace(
        "64,128,256", "8,16 --iterations 2 --warmup 1"
    )
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {path.name for path in tmp_path.iterdir()} == {"report", "trace.json"}


def test_the_commands_of_the_readme_run(tiny_artifact, video, monkeypatch):
    """From a checkpoint to an answer, line by line; the tiny artifact takes the place of the checkpoint."""
    commands = re.findall(
        r"^    (python export/.*|liteframe .*)$", section(README, "From your checkpoint to a device"), re.M
    )
    assert [command.split()[1] for command in commands] == ["export/build_engine.py", "run"]
    shutil.copytree(tiny_artifact, video.parent / "InternVL3-1B")
    (video.parent / "export").symlink_to(ROOT / "export")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=video.parent, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    manifest = json.loads((video.parent / "InternVL3-1B-cpu/manifest.json").read_text())
    assert manifest["model"]["max_frames"] == 64
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_way_to_a_jetson_runs_up_to_the_jetson(tiny_artifact, tmp_path, monkeypatch):
    commands = re.findall(r"^    (python export/.*|.venv/bin/liteframe .*)$", section(README, "To a Jetson"), re.M)
    assert len(commands) == 4
    shutil.copytree(tiny_artifact, tmp_path / "InternVL3-1B")
    (tmp_path / "export").symlink_to(ROOT / "export")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    results = [
        subprocess.run(
            command.replace(".venv/bin/liteframe", "liteframe"),
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        for command in commands
    ]
    assert [done.returncode for done in results] == [0, 2, 0, 0], results
    assert "tensorrt is not installed here; on a Jetson it comes with JetPack" in results[1].stderr
    assert "bundle without engines" in results[2].stdout
    assert re.search(r"verdict: (\d+) of \1 passed", results[3].stdout)
