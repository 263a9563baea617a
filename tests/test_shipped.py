"""The model that ships looks at its videos and through time: the first of its test set (docs/accuracy.md has all)."""

import pytest
from footage import backgrounds
from liteframe.calib.accuracy import Respondent, ask_all, percent_right, read_videos
from liteframe.export.build_engine import build
from liteframe.runtime import VideoSession
from liteframe.training import scenes
from liteframe.training.samples import write_samples
from liteframe_smollm2 import TRAINED, assemble
from train_demo import FPS, FRAMES

VIDEOS = 12


@pytest.mark.slow
def test_it_answers_as_torch_does_and_looks_and_sees_the_order_of_frames(tmp_path):
    """One test, for two workers would each build and ask."""
    questions = tmp_path / "questions"
    assemble(tmp_path / "artifact")
    scenery = backgrounds("test")
    write_samples((scenes.sample(seed, "test", scenery, FRAMES, FPS) for seed in range(VIDEOS)), questions)
    package = build(tmp_path / "artifact", "cpu", tmp_path / "cpu", FRAMES, questions=questions)
    accuracy, model = package.manifest.accuracy, package.manifest.model
    assert accuracy.different == 0 and accuracy.questions > 2 * VIDEOS

    videos = read_videos(questions, FRAMES, model.clip_length, model.image_size)
    asked = {shown: ask_all(Respondent.of(package), videos, shown) for shown in ("video", "shuffled", "nothing")}
    assert percent_right(asked["video"]) >= percent_right(asked["nothing"]) + 30
    seen, shuffled = (
        percent_right([one for one in asked[shown] if one.question.kind in ("direction", "order")])
        for shown in ("video", "shuffled")
    )
    assert seen >= shuffled + 25

    with VideoSession(package) as session:
        session.watch(questions / "00000.mp4", frames=FRAMES)
        assert "".join(session.ask("What color is the house?")) == scenes.UNKNOWN


def test_it_is_small():
    assert sum(path.stat().st_size for path in TRAINED.rglob("*")) < 40e6
