"""Questions about videos: a folder of them, what is shown, who answers, and how many answers are right."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.calib.accuracy import LONGEST, Asked, Respondent, accuracies, ask_all, main, read_videos, show
from liteframe.calib.questions import Question, read_questions
from liteframe.engines.package import InputError
from liteframe.export.artifact import load_artifact
from liteframe.export.torch_engine import respondent
from liteframe.runtime.session import VideoSession
from liteframe.training.samples import Sample, write_samples


def sample(seed, frames=8):
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (frames, 7, 7, 3), np.uint8)
    asked = (Question("colour", "what is red?", "the cat"), Question("count", f"how many in {seed}?", "two"))
    return Sample(small.repeat(8, 1).repeat(8, 2), 2.0, asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions") / "set"
    write_samples([sample(seed) for seed in range(3)], folder)
    return folder


def test_a_folder_is_read_as_it_was_written(folder):
    videos = read_videos(folder, 16, 4, (56, 56))
    assert [asked for _, asked in videos] == [sample(seed).questions for seed in range(3)]
    for seed, (clips, _) in enumerate(videos):
        assert clips.shape == (2, 4, 56, 56, 3)
        assert np.abs(clips.reshape(8, 56, 56, 3).astype(int) - sample(seed).frames).mean() < 25  # MPEG-4


def test_a_long_video_is_sampled(tmp_path):
    write_samples([sample(0, frames=30)], tmp_path / "set")
    ((clips, _),) = read_videos(tmp_path / "set", 16, 4, (56, 56))
    assert clips.shape == (4, 4, 56, 56, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"questions\.jsonl: can't be read"),
        ("", "holds no questions"),
        ('{"video": "a.mp4"}', "line 1: Object missing required field `kind`"),
        ('{"video": "00000.mp4", "kind": "k", "question": "q", "answer": "a", "x": 1}', "line 1: .*unknown field `x`"),
        ("{", "line 1: "),
        ('{"video": "a.mp4", "kind": "k", "question": "q", "answer": "a"}', r"line 1: no video .*a\.mp4"),
        ('{"video": "../a.mp4", "kind": "k", "question": "q", "answer": "a"}', r"\.\./a\.mp4"),
    ],
)
def test_a_folder_that_is_none_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path)


def test_a_folder_that_is_there_is_not_overwritten(folder):
    with pytest.raises(InputError, match="already exists"):
        write_samples([], folder)


CLIPS = np.arange(8, dtype=np.uint8).reshape(2, 4, 1, 1, 1).repeat(3, 4)


@given(st.integers(0, 2**31))
def test_shuffled_frames_are_the_same_in_another_order(seed):
    shuffled = show(CLIPS, "shuffled", np.random.default_rng(seed))
    assert shuffled.shape == CLIPS.shape and (shuffled != CLIPS).any()
    assert sorted(shuffled[..., 0].ravel()) == list(range(8))


def test_what_else_is_shown():
    random = np.random.default_rng(0)
    assert show(CLIPS, "nothing", random) is None and show(CLIPS, "video", random) is CLIPS
    assert show(CLIPS, "frame", random)[..., 0].ravel().tolist() == [4, 4, 4, 4]
    assert show(CLIPS[:1, :1], "shuffled", random).shape == (1, 1, 1, 1, 3)  # there is no other order


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Red.", True), (" red", True), ("the red", True), ("reddish", False), ("", False), ("red circle", False)],
)
def test_answers_are_compared_without_case_article_and_full_stop(answer, right):
    assert Asked(0, Question("colour", "?", "red"), answer).right is right


def test_intervals_are_those_of_the_binomial_where_videos_have_one_question_each():
    asked = [Asked(i, Question("k", "?", "yes"), "yes" if i % 4 else "no") for i in range(400)]
    found = accuracies(asked)
    assert found.keys() == {"all", "k"} and found["all"] == found["k"]
    half = 196 * np.sqrt(0.75 * 0.25 / 400)  # the normal approximation
    assert (found["k"].percent, found["k"].questions) == (75.0, 400)
    assert found["k"].low == pytest.approx(75 - half, abs=0.6) and found["k"].high == pytest.approx(75 + half, abs=0.6)


def test_questions_about_one_video_do_not_count_as_independent():
    once = [Asked(i, Question("k", "?", "yes"), "yes" if i % 2 else "no") for i in range(50)]
    one, four = accuracies(once)["all"], accuracies(once * 4)["all"]
    assert (four.low, four.high) == (one.low, one.high) and four.questions == 200


def test_engines_and_modules_answer_alike(folder, tiny_artifact, tiny_package):
    videos = read_videos(folder, 16, 4, (56, 56))
    modules = respondent(load_artifact(tiny_artifact), tiny_package.manifest.model)
    for shown in ("video", "shuffled", "frame", "nothing"):
        by_engines, by_modules = (ask_all(who, videos, shown) for who in (Respondent.of(tiny_package), modules))
        assert by_engines == by_modules and len(by_engines) == 6


def test_answers_are_those_of_a_session(folder, tiny_package):
    videos = read_videos(folder, 16, 4, (56, 56))
    asked = ask_all(Respondent.of(tiny_package), videos)
    with VideoSession(tiny_package) as session:
        for number, (clips, questions) in enumerate(videos):
            session.watch(clips.reshape(-1, 56, 56, 3), clips.shape[0] * 4)
            for question in questions:
                answer = "".join(session.ask(question.text, LONGEST))
                session.forget()
                assert Asked(number, question, answer) in asked


def test_questions_do_not_hear_of_each_other(folder, tiny_package):
    videos = read_videos(folder, 16, 4, (56, 56))
    together = [one.answer for one in ask_all(Respondent.of(tiny_package), videos)]
    alone = [
        one.answer
        for clips, questions in videos
        for question in questions
        for one in ask_all(Respondent.of(tiny_package), [(clips, [question])])
    ]
    assert together == alone


def test_the_command_prints_a_table_and_json(folder, tiny_package, capsys):
    assert main([str(tiny_package.folder), str(folder), "--shown", "video", "nothing", "--json"]) == 0
    out = capsys.readouterr().out
    assert "colour" in out and "count" in out
    told = json.loads(out.splitlines()[-1])
    assert told["video"]["all"]["questions"] == told["nothing"]["all"]["questions"] == 6
