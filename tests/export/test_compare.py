"""`liteframe compare`: who is in the table, what its figures mean, and what is refused."""

import importlib
import json
import re
import sys

import cv2
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines.package import InputError
from liteframe.export import compare, contenders, peers
from liteframe.export.artifact import load_artifact
from liteframe.export.compare import Row, cosines_to_wap, make_engines, most_frames, prefill_model, to_wap
from liteframe.export.compare_report import pareto
from liteframe.export.contenders import artifact_field, random_field
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.reducers import REDUCERS
from liteframe.export.models.variants import VARIANTS
from liteframe.export.models.vit import ViTConfig
from liteframe.export.ops import weighted_average_pool
from liteframe.export.verify import relative_difference, sample_clips
from liteframe.runtime import cli
from liteframe.runtime.ort_engine import OrtEncoder
from safetensors.torch import load_file, save_file

METHODS = [*REDUCERS]


@pytest.fixture(scope="module")
def framewise(tiny_artifact, tmp_path_factory):
    """The tiny artifact with a frame-wise tower of 16 x 16 patches, which every method reduces 16 times."""
    folder = tmp_path_factory.mktemp("compare") / "framewise"
    folder.mkdir()
    vit = ViTConfig(
        image_size=(112, 112),
        patch_size=7,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    config = EncoderConfig(backbone=vit, output_size=24)
    tensors = load_file(tiny_artifact / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    generator = torch.Generator().manual_seed(1)
    for name, parameter in VideoEncoder(config).named_parameters():
        tensors[f"encoder.{name}"] = torch.randn(parameter.shape, generator=generator) * 0.3
    save_file(tensors, folder / "model.safetensors")
    for path in tiny_artifact.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text())
    content["decoder"]["max_position_embeddings"] = 16384
    (folder / "config.json").write_text(json.dumps(content | {"encoder": msgspec.to_builtins(config)}))
    return folder


@pytest.fixture
def clock(monkeypatch):
    """No engines and no clock: a clip takes 10 ms and 1 ms more for each contender, prefill 1 ms a position."""

    def measure(field, engines, decoder, lengths, rounds):
        return {name: [10.0 + i] for i, name in enumerate(engines)}, {length: float(length) for length in lengths}

    def engines(field, folder):
        return {one.name: folder / one.name for one in field.contenders if one.make is not None}, folder / "decoder"

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "make_engines", engines)
    monkeypatch.setattr(contenders, "has_timm", lambda: False)  # timm is not there


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "questions"
    folder.mkdir()
    writer = cv2.VideoWriter(str(folder / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 4, (64, 64))
    for level in range(0, 240, 20):
        writer.write(np.full((64, 64, 3), level, np.uint8))
    writer.release()
    line = {"video": "a.mp4", "kind": "any", "question": "What is it?", "answer": "grey"}
    (folder / "questions.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def run(*arguments):
    return cli.guard(compare.main, [str(argument) for argument in arguments])


# who is compared


def test_every_reducer_and_every_encoder_of_the_paper_is_compared_with_random_weights(monkeypatch):
    monkeypatch.setattr(contenders, "has_timm", lambda: False)
    for size in ("small", "full"):
        field = random_field(size, 16)
        names = [one.name for one in field.contenders]
        assert names == [*METHODS, *(name for name in VARIANTS if name != "ViT-L-24L"), "FastVLM"]
        budget = {one.name: one.tokens_per_clip for one in field.contenders}
        full = {"small": 256, "full": 1024}[size]
        assert {budget[name] for name in METHODS if name != "none"} == {full // 16}
        assert budget["none"] == budget["ViT-B-12L"] == full
        assert budget["DWTempConv"] == budget["Spatial16x"] == full // 16
        assert {one.weights for one in field.contenders} == {"random"}
    by_name = {one.name: one for one in field.contenders}
    assert by_name["none"].paper == "1043.33 (256 frames, Table 2)"
    assert by_name["DWTempConv"].config.backbone == VARIANTS["DWTempConv"].backbone
    assert by_name["FastVLM"].make is None
    assert by_name["FastVLM"].note == "timm is not installed: pip install 'liteframe[bench]'"


def test_small_is_the_same_families_with_the_same_order_of_work():
    teacher, student = (
        next(one.config for one in random_field("small", 16).contenders if one.name == name).backbone
        for name in ("none", "DWTempConv")
    )
    assert teacher.hidden_size // teacher.num_attention_heads == student.vit.hidden_size // 3 == 32
    assert [d.after for d in student.downsampling] == [1, 2]
    assert student.grids()[-1] == (1, 8, 8)
    assert student.head_size == teacher.hidden_size


def test_an_artifacts_reducers_share_its_weights_and_the_tower_runs_as_it_does(framewise):
    artifact = load_artifact(framewise)
    field = artifact_field(artifact, None, 8)
    made = {one.name: one.make() for one in field.contenders if one.kind == "reducer"}
    frames = torch.from_numpy(sample_clips(artifact.encoder))
    with torch.no_grad():
        assert torch.equal(made["wap"](frames), artifact.encoder(frames))
    weight = artifact.encoder.projector.fc1.weight
    assert {module.projector.fc1.weight.data_ptr() for module in made.values()} == {weight.data_ptr()}


# what the figures mean


def test_the_table_of_an_artifact_is_consistent(framewise, clock, capsys):
    assert run(framewise, "--frames", 8, "--json") == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    rows = {row["name"]: row for row in document["rows"]}
    assert [*rows] == [*METHODS, "FastVLM"]
    for name in METHODS:
        row = rows[name]
        assert row["weights"] == "artifact"
        assert row["frames"] == 8
        assert row["tokens"] == 8 * row["tokens_per_frame"] == 8 * (64 if name == "none" else 4)
        assert row["positions"] == row["tokens"] + around(load_artifact(framewise, name), 8)
        assert row["vision_ms"] == 2 * row["clip_ms"]
        assert row["llm_ms"] == row["positions"]
        assert row["total_ms"] == row["vision_ms"] + row["llm_ms"]
        assert row["accuracy"] is None
    assert rows["wap"]["frames_at_equal_ms"] == 8
    assert {row["frames_at_equal_tokens"] for name, row in rows.items() if name in METHODS and name != "none"} == {8}
    assert rows["none"]["frames_at_equal_tokens"] == 0
    assert rows["none"]["frames_at_equal_ms"] == 0
    assert rows["wap"]["cosine"] == pytest.approx(1)
    assert [name for name, row in rows.items() if row["cosine"] is None] == ["FastVLM"]
    assert rows["FastVLM"]["total_ms"] is None
    assert document["reference"] == "wap"
    assert "reducers make 1 token of 16" in out
    assert "FastVLM: timm is not installed" in out
    assert "random weights" not in out


def around(artifact, frames):
    """Positions of the text around a video's tokens, as the runtime lays it out for a package of this artifact."""
    text, encoder = contenders.chat_text(artifact), artifact.encoder
    frames_a_unit = encoder.config.clip_length // encoder.units_per_clip
    units = [text.unit(frames - frames_a_unit + 1, frames)] * (frames // frames_a_unit)  # the last is the longest
    return sum(len(part) for parts in (*units, text.turn(contenders.QUESTION, with_video=True)) for part in parts)


def test_the_text_around_tokens_is_that_of_each_methods_own_package(framewise, tmp_path, clock):
    """An artifact without a prompt has InternVL's: frame by frame where frames stay apart, in ranges where not."""
    for path in framewise.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    del content["prompt"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    rows = {row.name: row for row in compare.compare(artifact_field(load_artifact(tmp_path), 16, 8), 8, 1)}
    packages = {name: load_artifact(tmp_path, name) for name in METHODS}
    assert packages["none"].prompt.unit_prefix != packages["wap"].prompt.unit_prefix
    for name, package in packages.items():
        assert rows[name].positions == rows[name].tokens + around(package, 8)


def test_papers_figures_are_labelled_as_the_papers_and_add_up(framewise, clock, capsys):
    assert run(framewise, "--frames", 8) == 0
    out = capsys.readouterr().out
    measured, _, printed = out.partition("\npaper, A100")
    for name in ("AutoGaze", "Video-Panda", "NVILA", "InternVL3-8B"):
        assert name in printed
        assert name not in measured
    for row in peers.PAPER:
        assert row.table in ("Table 3", "Table 4", "Figure 7")
        assert row.vision_ms + row.llm_ms == pytest.approx(row.total_ms, abs=2)


def test_a_prompt_longer_than_the_language_model_was_trained_for_has_no_total(framewise, clock):
    field = artifact_field(load_artifact(framewise), 16, 8)
    field.max_positions = 400
    rows = {row.name: row for row in compare.compare(field, 8, 1)}
    assert rows["none"].llm_ms is rows["none"].total_ms is None
    assert rows["none"].note.endswith("positions, the language model was trained for 400")
    assert rows["none"].vision_ms == 20
    assert rows["wap"].total_ms is not None
    field.max_positions = 40
    with pytest.raises(InputError, match=r"--frames 8: .* positions with wap, the language model was trained for 40"):
        compare.compare(field, 8, 1)


def test_a_method_that_cannot_be_asked_is_there_with_its_reason(framewise, questions, clock, monkeypatch):
    """8 frames are 512 tokens uncompressed, for which there are positions, but not beside a question."""
    artifact = load_artifact(framewise)
    monkeypatch.setattr(
        artifact.decoder, "config", msgspec.structs.replace(artifact.decoder.config, max_position_embeddings=1536)
    )
    field = artifact_field(artifact, 16, 8)
    monkeypatch.setattr(compare, "ask", lambda field, engines, decoder, models, videos: dict.fromkeys(models))
    rows = {row.name: row for row in compare.compare(field, 8, 1, questions)}
    assert rows["none"].total_ms is not None
    assert rows["none"].note.startswith("not asked: --frames 8 needs a KV cache of 1792 positions")
    assert rows["wap"].note == ""
    with pytest.raises(InputError, match="--frames 128 needs a KV cache of 2048 positions"):
        compare.compare(field, 128, 1, questions)


def test_a_method_that_does_not_admit_the_ratio_is_there_with_its_reason(framewise, clock):
    field = artifact_field(load_artifact(framewise), 64, 8)
    rows = {row.name: row for row in compare.compare(field, 8, 1)}
    assert rows["prumerge"].total_ms is None
    assert "ratio 64" in rows["prumerge"].note
    assert rows["wap"].tokens == 8


@given(
    clip_ms=st.floats(1, 50),
    a_position=st.floats(0.001, 2),
    budget=st.floats(1, 500),
    tokens=st.integers(1, 64),
)
def test_frames_at_equal_latency_fit_and_a_clip_more_does_not(clip_ms, a_position, budget, tokens):
    field = contenders.Field(
        "", [], "", (8, 8), 4, 16, lambda: None, 8, 10**9, lambda _: contenders.Prompt(8, 40), None, None
    )
    one = contenders.Contender("x", "reducer", None, None, tokens, 1, "random")
    llm = prefill_model({100: 100 * a_position, 200: 200 * a_position})
    frames = most_frames(field, one, clip_ms, llm, budget)

    def total(clips):
        return clips * clip_ms + a_position * (clips * (tokens + 8) + 40)

    assert frames % 4 == 0
    assert frames == 0 or total(frames // 4) <= budget * (1.02 + 1e-6)
    assert total(frames // 4 + 1) > budget * (1.02 - 1e-6)


def test_encoders_that_are_not_in_the_papers_order_are_named():
    """Table 2: 1043.33, 348.29, 338.01, 204.35, 202.08, 174.84 ms."""
    names = ["none", "TempAttn", "ViT-B-12L", "SpatioTempAttn", "TempConv", "DWTempConv"]
    here = dict(zip(names, (60.0, 50.0, 40.0, 30.0, 20.0, 10.0), strict=True))
    ordered, paper = compare.order(here)
    assert ordered == [*paper] == names
    assert paper["TempAttn"] == 348.29
    assert compare.out_of_order(here) == []
    turned = here | {"TempConv": 35.0}
    assert compare.order(turned)[0] == ["none", "TempAttn", "ViT-B-12L", "TempConv", "SpatioTempAttn", "DWTempConv"]
    assert compare.out_of_order(turned) == ["SpatioTempAttn", "TempConv"]
    assert compare.out_of_order({"wap": 1.0}) == []


def test_prefill_goes_through_what_was_measured_and_on():
    llm = prefill_model({1000: 100.0, 500: 40.0})
    assert [llm(n) for n in (0, 250, 500, 750, 1000, 1500)] == pytest.approx([0, 20, 40, 70, 100, 160])
    assert prefill_model({500: 40.0})(1000) == pytest.approx(80)


def test_cosines_are_those_of_numpy_in_double_precision(framewise):
    field = artifact_field(load_artifact(framewise), 16, 8)
    found = cosines_to_wap(field)
    tower = field.teacher()
    with torch.no_grad():
        features = tower.dense(torch.from_numpy(sample_clips(tower))).double().numpy()
    blocks = 1, 4, 8, 2, 8, 2

    def shuffled(x):
        x = x.reshape(2, 4, 2, 4, 2, 16).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(2, 16, 64)

    wap = shuffled(weighted_average_pool.numpy_reference(features, blocks))
    average = shuffled(features[:, :, 1:].reshape(2, *blocks, 16).mean((2, 4, 6)))
    patches = features[:, :, 1:].reshape(2 * 4, 8, 2, 8, 2, 16).transpose(0, 1, 3, 2, 4, 5).reshape(2, 256, 64)

    def nearest(tokens):
        return np.mean(
            [
                max(float(w @ t / np.linalg.norm(w) / np.linalg.norm(t)) for t in clip)
                for of_wap, clip in zip(wap, tokens, strict=True)
                for w in of_wap
            ]
        )

    assert found["wap"] == pytest.approx(1)
    assert found["average"] == pytest.approx(nearest(average), abs=1e-5)
    assert found["none"] == pytest.approx(nearest(patches), abs=1e-5)


def test_the_nearest_token_counts():
    wap = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    found = torch.tensor([[[0.0, 5.0], [3.0, 0.0], [1.0, 1.0]]])
    assert to_wap(found, wap) == pytest.approx(1)
    assert to_wap(found[:, 2:], wap) == pytest.approx(0.5**0.5)


def test_engines_compute_what_the_modules_do_and_share_their_weights(framewise, tmp_path):
    field = artifact_field(load_artifact(framewise), 16, 8)
    field.contenders = [one for one in field.contenders if one.name in ("none", "prumerge")]
    engines, decoder = make_engines(field, tmp_path)
    clip = sample_clips(field.teacher())[1:]
    for one in field.contenders:
        with torch.no_grad():
            expected = one.make()(torch.from_numpy(clip)).numpy()
        assert relative_difference(OrtEncoder(engines[one.name]).encode(clip), expected) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "decoder.onnx",
        "encoder-0.onnx",
        "encoder-1.onnx",
        "engines.data",
    ]
    held = sum(tensor.numel() * 4 for tensor in load_file(framewise / "model.safetensors").values())
    assert (tmp_path / "engines.data").stat().st_size < held + 40 * 4096  # the tower once
    clip_ms, prefill_ms = compare.measure(field, engines, decoder, [20, 600], 2)
    assert {name: len(times) for name, times in clip_ms.items()} == {"none": 2, "prumerge": 2}
    assert [*prefill_ms] == [20, 600]
    assert min(*clip_ms["none"], *clip_ms["prumerge"], *prefill_ms.values()) > 0
    kinds = compare.profile(field, engines["prumerge"], tmp_path)
    assert {"attention", "MLP", "projector", "patch embedding"} <= {*kinds}
    assert all(milliseconds >= 0 for milliseconds in kinds.values())


# the command


def test_a_students_artifact_is_measured_and_asked(tiny_artifact, questions, tmp_path, capsys, monkeypatch):
    """Without a stand-in for anything but timm."""
    monkeypatch.setattr(contenders, "has_timm", lambda: False)
    monkeypatch.setattr(compare, "SPELL", 1e-9)  # one run each
    output = tmp_path / "out"
    command = tiny_artifact, "--frames", 8, "--rounds", 1, "--questions", questions, "--output", output, "--json"
    assert run(*command) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    student, fastvlm = document["rows"]
    assert (student["name"], student["weights"], student["cosine"]) == ("LiteFrame", "artifact", None)
    assert student["accuracy"]["questions"] == 1
    assert student["llm_ms"] > 0 and student["vision_ms"] == 2 * student["clip_ms"] > 0
    assert student["frames_at_equal_ms"] >= 8
    assert document["ratio"] is None
    assert fastvlm["name"] == "FastVLM"
    assert {path.name for path in output.iterdir()} == {"compare.md", "compare.json", "pareto.png"}
    assert json.loads((output / "compare.json").read_text()) == document
    page = (output / "compare.md").read_text()
    assert "| LiteFrame |" in page
    assert "| paper, A100 | in |" in page
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")


def row(name, total, cosine):
    return msgspec.to_builtins(
        Row(name, "encoder", "random", 8, 8, 1.0, 9, 1.0, [1.0], 2.0, 3.0, total, 8, 8, cosine, None, "", None, "")
    )


def test_a_picture_needs_a_quality():
    assert pareto({"rows": [row("a", 5.0, None)]}) is None
    assert pareto({"rows": [row("a", 5.0, 0.9)]}).png().startswith(b"\x89PNG")


def test_the_line_joins_those_that_none_beats_in_both():
    points = {
        "fast": (100.0, 0.5),
        "worse": (400.0, 0.4),
        "middle": (300.0, 0.7),
        "slow": (900.0, 0.7),
        "best": (990.0, 1.0),
    }
    svg = pareto({"rows": [row(name, *point) for name, point in points.items()]}).svg()
    lines = re.findall(r'points="([^"]+)"', svg)
    (joined,) = [line for line in lines if len(line.split()) == 3]
    width, height = 720 - 50 - 120, 400 - 30 - 45
    wanted = [
        (50 + ms / (990 * 1.1) * width, 30 + (1 - cosine) * height)
        for ms, cosine in (points[n] for n in ("fast", "middle", "best"))
    ]
    found = [tuple(map(float, point.split(","))) for point in joined.split()]
    np.testing.assert_allclose(found, wanted, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "6"], "--frames 6: expected a multiple of 4, the frames of a clip"),
        (["--frames", "0"], "--frames 0: expected a multiple of 4"),
        (["--ratio", "48"], "--ratio 48: ratio 48 does not divide the clip's grid .* expected one of 1, 2, 4"),
        (["--frames", "8000"], "--frames 8000: their prompt takes .* DWTempConv, .* trained for 32768"),
        (["--ratio", "0"], "--ratio 0: expected 1 or more"),
        (["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["--questions", "."], "--questions are answered by an artifact"),
        (["nowhere"], "nowhere: no such folder"),
        (["nowhere", "--size", "full"], "--size full is for random weights"),
        (["--output", "."], "already exists"),
        (["{tiny}", "--ratio", "8"], "--ratio 8 is for frame-wise towers; artifact compresses inside, leave it out"),
        (["{tiny}", "--questions", "nowhere"], "nowhere/questions.jsonl: can't be read"),
        (["{tiny}", "--frames", "6"], "--frames 6: expected a multiple of 4"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message, tiny_artifact, clock, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*(argument.format(tiny=tiny_artifact) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


# timm


def test_empty_modules_stand_only_while_they_are_needed(tmp_path, monkeypatch):
    (tmp_path / "takes_parts.py").write_text(
        "from absent.parts import Thing\nimport absent.more as m\n\n"
        "class Own(Thing): pass\n\nNAMES = {m.A.X: 1, m.A.Y: 2}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with peers._stood_for("absent"):
        module = importlib.import_module("takes_parts")
    assert len(module.NAMES) == 2
    assert not any(name.partition(".")[0] == "absent" for name in sys.modules)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absent")


def test_fastvlms_encoder_gives_a_token_for_every_64_x_64_pixels():
    encoder = peers.FastVLMEncoder("fastvit_mci3", (128, 64), 4, 24)
    assert encoder.tokens_per_clip == 4 * 2
    assert sum(parameter.numel() for parameter in encoder.backbone.parameters()) == pytest.approx(125e6, rel=0.02)
