"""The demo's training, all stages, on a teacher, a language model and videos as small as they can be."""

import json
import shutil

import pytest
import torch
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.build_engine import build
from train_demo import Stages


def test_what_is_trained_is_an_artifact_that_builds(trained, tmp_path):
    package = build(trained / "artifact", "cpu", tmp_path / "package", frames=8, questions=trained / "questions")
    assert package.manifest.accuracy.different == 0 and package.manifest.accuracy.questions > 3


def test_what_is_written_is_what_was_trained(trained, base):
    artifact, before = load_artifact(trained / "artifact"), load_artifact(base)
    checkpoint = torch.load(trained / "align" / "checkpoint.pt", weights_only=True)["parameters"]
    for name, parameter in artifact.encoder.named_parameters():
        torch.testing.assert_close(parameter, checkpoint[f"encoder.{name}"].half().float())
    layer = "model.layers.1.mlp.up_proj"
    a, b = (checkpoint[f"decoder.{layer}.lora_{half}.default.weight"].half().float() for half in "AB")
    merged = before.decoder.get_submodule(layer).weight + 2 * b @ a
    torch.testing.assert_close(artifact.decoder.get_submodule(layer).weight, merged)


def test_stages_that_were_interrupted_go_on_to_the_same(trained, base, plan, footage, tmp_path, monkeypatch):
    import train_demo

    monkeypatch.setattr(train_demo.Stages, "judge", lambda self, trained: True)
    for stage, runs in (("distil", 1), ("ground", 2), ("align", 3)):
        train = getattr(train_demo, stage)

        def interrupted(*arguments, train=train, **options):
            return train(*arguments, **(options | {"minutes": 0.0}))

        with monkeypatch.context() as patch:
            patch.setattr(train_demo, stage, interrupted)
            assert not Stages(base, tmp_path, plan, footage, minutes=10).run(), runs
    assert Stages(base, tmp_path, plan, footage, minutes=10).run()
    for stage in ("distil", "ground", "align"):
        assert (tmp_path / stage / "log.jsonl").read_text() == (trained / stage / "log.jsonl").read_text()


def test_time_that_is_over_stops_between_shards(base, plan, footage, tmp_path):
    assert not Stages(base, tmp_path, plan, footage, minutes=0).run()
    assert len(list((tmp_path / "clips" / "test").glob("*-targets.npy"))) == 1


def test_a_base_of_another_layout_is_refused(base, plan, footage, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "qwen2"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model_type 'qwen2' is not supported"):
        Stages(tmp_path / "base", tmp_path / "out", plan, footage, minutes=10)
