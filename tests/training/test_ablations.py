"""The ablations, all of them, of a model as small as it can be."""

import json
import shutil

import ablations
import pytest
from ablations import Ablations, main
from liteframe.export.artifact import load_artifact
from liteframe.runtime.cli import guard


@pytest.mark.slow
def test_every_ablation_is_trained_and_judged(trained, base, plan, footage, tmp_path, monkeypatch):
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    monkeypatch.setattr(ablations, "SPACE_SIZE", 64)
    monkeypatch.setattr(ablations, "PRECISIONS", ("fp32",))  # so small a model is too rough for the others' gates
    assert not Ablations(base, folder, plan, footage, minutes=0).run()
    assert Ablations(base, folder, plan, footage, minutes=10).run()
    rows = json.loads((folder / "ablations" / "page" / "accuracy.json").read_text())
    without = ["demo, frames shuffled", "demo, one frame", "demo, no video"]
    others = ["CTD", "RTD", "in space only", "WAP", "average", "CTD without LMA"]
    assert [row["name"] for row in rows] == ["demo, fp32", *without, *others]
    encoders = {n: load_artifact(folder / "ablations" / n.replace(" ", "-") / "artifact").encoder for n in others}
    assert [encoders[name].config.reducer for name in ("WAP", "average")] == ["wap", "average"]
    assert encoders["in space only"].backbone.config.grids() == [(4, 8, 8), *[(4, 4, 4)] * 2, *[(4, 2, 2)] * 6]


def test_without_a_trained_model_there_is_nothing_to_compare_with(tmp_path, capsys):
    assert guard(main, [str(tmp_path)]) == 2
    assert "run examples/train_demo.py on it first" in capsys.readouterr().err
