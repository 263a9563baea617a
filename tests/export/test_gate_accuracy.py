"""The accuracy gate: builds that answer as well as torch pass and say so, others stop."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from liteframe.calib.accuracy import ask_all, read_videos
from liteframe.calib.questions import Question
from liteframe.engines import inspect_package
from liteframe.engines.package import GateError
from liteframe.export import build_engine
from liteframe.export.artifact import load_artifact
from liteframe.export.gate_accuracy import gate_accuracy
from liteframe.export.torch_engine import respondent
from liteframe.runtime.cli import guard
from liteframe.training.samples import Sample, write_samples


@pytest.fixture(scope="module")
def questions(tiny_artifact, tiny_package, tmp_path_factory):
    """Random videos; of every other question the answer that the tiny model gives is the right one."""
    folder = tmp_path_factory.mktemp("gate")
    samples = []
    for seed in range(4):
        frames = np.random.default_rng(seed).integers(0, 256, (8, 7, 7, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        samples.append(Sample(frames, 2.0, (Question("a", f"what is {seed}?", "?"), Question("b", "is it?", "?"))))
    write_samples(samples, folder / "asked")
    model = tiny_package.manifest.model
    videos = read_videos(folder / "asked", model.max_frames, model.clip_length, model.image_size)
    said = [one.answer for one in ask_all(respondent(load_artifact(tiny_artifact), model), videos)]
    for number, sample in enumerate(samples):
        a, b = sample.questions
        samples[number] = replace(sample, questions=(replace(a, answer=said[2 * number]), replace(b, answer="no")))
    write_samples(samples, folder / "set")
    return folder / "set"


def test_a_build_that_answers_alike_passes_and_says_so(questions, tiny_artifact, tmp_path, capsys):
    arguments = [str(tiny_artifact), "--target", "cpu", "--frames", "16", "--output", str(tmp_path / "out")]
    assert build_engine.main([*arguments, "--gate-accuracy", str(questions), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["manifest"]["accuracy"] == {
        "questions": 8,
        "modules": 50.0,
        "engines": 50.0,
        "different": 0,
    }
    assert "8 questions: 50.00 % right, the torch modules 50.00 %; 0 answers differ" in err
    inspect_package.main([str(tmp_path / "out")])
    assert "8 questions: 50.00 % right" in capsys.readouterr().out


def gated(questions, tiny_artifact, tiny_package, asked, noise):
    """The gate on the tiny package's engines, with noise on the embeddings that they are given."""
    artifact, package = load_artifact(tiny_artifact), tiny_package
    table = artifact.decoder.model.embed_tokens.weight.detach().numpy()
    table = table + noise * np.random.default_rng(0).standard_normal(table.shape).astype(np.float32)
    engines = {name: package.path(package.engine(name).files[0]) for name in ("encoder", "decoder")}
    told: list[tuple[int, int]] = []
    try:
        return gate_accuracy(
            questions, artifact, package.manifest.model, engines, table, asked, lambda *counts: told.append(counts)
        )
    finally:  # each video twice, once by the modules and once by the engines
        assert told == [(done, len(told)) for done in range(len(told))] and told


@pytest.mark.parametrize("asked", [["fp32"], ["fp16"], ["fp32", "int8"]])
def test_a_build_that_answers_worse_stops(questions, tiny_artifact, tiny_package, asked):
    with pytest.raises(GateError, match=r"of 8 answers are others .* % are right instead of 50\.00 %.*became"):
        gated(questions, tiny_artifact, tiny_package, asked, noise=3.0)


def test_in_fp32_an_answer_that_is_wrong_otherwise_stops_it_too(questions, tiny_artifact, tiny_package, tmp_path):
    """Wrong before and wrong now is as good, but not the same computation."""
    lines = [json.loads(line) | {"answer": "no"} for line in (questions / "questions.jsonl").open()]
    shutil.copytree(questions, tmp_path / "set")
    (tmp_path / "set" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = gated(tmp_path / "set", tiny_artifact, tiny_package, ["int8"], noise=3.0)
    assert told.modules == told.engines == 0.0 and told.different > 0
    with pytest.raises(GateError, match="all must be equal"):
        gated(tmp_path / "set", tiny_artifact, tiny_package, ["fp32"], noise=3.0)


def test_engines_for_another_machine_are_judged_by_their_graphs(questions, tiny_artifact, tmp_path):
    made = build_engine.build(tiny_artifact, "a100", tmp_path / "out", frames=16, questions=questions)
    assert made.manifest.accuracy.different == 0


def test_a_folder_without_questions_leaves_nothing_behind(tiny_artifact, tmp_path, capsys):
    arguments = [str(tiny_artifact), "--target", "cpu", "--frames", "16", "--output", str(tmp_path / "out")]
    assert guard(build_engine.main, [*arguments, "--gate-accuracy", str(tmp_path)]) == 2
    assert "questions.jsonl: can't be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
