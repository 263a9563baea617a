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

pytestmark = pytest.mark.slow
VIDEOS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped")
    assemble(folder / "artifact")
    scenery = backgrounds("test")
    write_samples((scenes.sample(seed, "test", scenery, FRAMES, FPS) for seed in range(VIDEOS)), folder / "questions")
    return folder


@pytest.fixture(scope="module")
def package(folder):
    """Its engines answer as torch does, or it would not be built."""
    return build(folder / "artifact", "cpu", folder / "cpu", FRAMES, questions=folder / "questions")


@pytest.fixture(scope="module")
def asked(package, folder):
    """Answers to all questions, by what was shown."""
    model = package.manifest.model
    videos = read_videos(folder / "questions", FRAMES, model.clip_length, model.image_size)
    return {shown: ask_all(Respondent.of(package), videos, shown) for shown in ("video", "shuffled", "nothing")}


def test_every_answer_of_the_engines_is_torchs(package):
    accuracy = package.manifest.accuracy
    assert accuracy.different == 0 and accuracy.questions > 2 * VIDEOS


def test_it_looks(asked):
    assert percent_right(asked["video"]) >= percent_right(asked["nothing"]) + 30


def test_it_sees_what_only_the_order_of_frames_tells(asked):
    seen, shuffled = (
        percent_right([one for one in asked[shown] if one.question.kind in ("direction", "order")])
        for shown in ("video", "shuffled")
    )
    assert seen >= shuffled + 25


def test_about_what_is_not_there_it_can_not_tell(package, folder):
    session = VideoSession(package)
    session.watch(folder / "questions" / "00000.mp4", frames=FRAMES)
    assert "".join(session.ask("What color is the house?")) == scenes.UNKNOWN


def test_it_is_small():
    assert sum(path.stat().st_size for path in TRAINED.rglob("*")) < 40e6
