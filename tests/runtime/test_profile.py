"""The latency protocol of the paper: batch 1, the median of 100 runs after 40, vision and language model apart."""

import itertools
import statistics
import time

import numpy as np
import pytest
from liteframe.engines.package import InputError
from liteframe.runtime import VideoSession, profile


class Clock:
    """Stands still, but for what the engines say they take."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Engine:
    """An engine that takes a given time, in ms, at each of its calls, and counts its runs."""

    def __init__(self, clock, durations):
        self.clock, self.durations, self.given = clock, durations, []

    def spend(self, given):
        self.given.append(given)
        self.clock.now += next(self.durations) / 1e3


class FakeEncoder(Engine):
    def encode(self, frames):
        self.spend(frames)
        return np.zeros((len(frames), 2, 24), np.float32)


class FakeDecoder(Engine):
    position, capacity = 0, 1280

    def forward(self, embeddings):
        self.spend(embeddings)
        self.position += len(embeddings)
        return np.eye(340, dtype=np.float32)[65]  # a token that is no end of turn

    def rewind(self, position):
        self.position = position


@pytest.fixture
def timed(tiny_package, monkeypatch):
    """A session whose engines take given times: one call of the encoder a clip, two of the decoder a question."""

    def make(vision, language):
        clock = Clock()
        monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
        session = VideoSession(tiny_package)
        session._encoder, session._decoder = FakeEncoder(clock, vision), FakeDecoder(clock, language)
        return session

    return make


def test_the_protocol_is_100_runs_after_40_unless_told_otherwise(tiny_package, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(profile, "measure", lambda session, *protocol: asked.append(protocol) or [])
    assert profile.main([str(tiny_package.folder)]) == 0
    assert profile.main([str(tiny_package.folder), "--frames", "16,4", "--iterations", "3", "--warmup", "0"]) == 0
    assert asked == [([4, 8, 16], 100, 40), ([16, 4], 3, 0)]
    assert "medians of 100 after 40, batch 1" in capsys.readouterr().out


def test_medians_are_of_the_runs_after_the_warm_up_and_of_each_part_alone(timed):
    random = np.random.default_rng(0)
    vision, language = random.uniform(1, 100, (2, 140))
    # a clip at each call of the encoder; video prefix and question are one call of the decoder each
    session = timed(iter(vision), iter(np.repeat(language / 2, 2)))
    (row,) = profile.measure(session, [4], iterations=100, warmup=40)
    assert row["vision_ms"] == pytest.approx(statistics.median(vision[40:]), abs=0.051)
    assert row["llm_ms"] == pytest.approx(statistics.median(language[40:]), abs=0.051)
    assert row["total_ms"] == pytest.approx(
        statistics.median(vision[40:]) + statistics.median(language[40:]), abs=0.051
    )


def test_slow_runs_to_warm_up_and_a_few_outliers_do_not_show(timed):
    vision = [5000.0] * 40 + [3.0] * 51 + [900.0] * 49
    language = [5000.0] * 80 + [2.0, 5.0] * 51 + [900.0, 900.0] * 49
    (row,) = profile.measure(timed(iter(vision), iter(language)), [4], iterations=100, warmup=40)
    assert (row["vision_ms"], row["llm_ms"], row["total_ms"]) == (3.0, 7.0, 10.0)


def test_every_run_encodes_every_clip_and_prefills_the_whole_prompt(timed):
    session = timed(itertools.repeat(1.0), itertools.repeat(10.0))
    rows = profile.measure(session, [4, 16], iterations=5, warmup=2)
    clips, calls = session._encoder.given, session._decoder.given
    assert [len(given) for given in clips] == [1] * 7 * (1 + 4)
    assert all(given.shape == (1, 4, 56, 56, 3) and given.dtype == np.uint8 for given in clips)
    assert np.ptp(clips[0]) == 255
    assert len(calls) == 2 * 7 * 2  # nothing is decoded, nothing is kept from the run before
    tokens = [sum(len(given) for given in calls[start : start + 2]) for start in range(0, len(calls), 2)]
    assert tokens == [rows[0]["tokens"]] * 7 + [rows[1]["tokens"]] * 7
    assert [(row["frames"], row["vision_ms"], row["llm_ms"], row["total_ms"]) for row in rows] == [
        (4, 1.0, 20.0, 21.0),
        (16, 4.0, 20.0, 24.0),
    ]


def test_reading_the_video_is_not_in_the_figures(timed, monkeypatch):
    from liteframe.runtime import session as module

    session, read = timed(itertools.repeat(1.0), itertools.repeat(1.0)), module.read_clips

    def slowly(*arguments):
        for clip in read(*arguments):
            session._encoder.clock.now += 1000
            yield clip

    monkeypatch.setattr(module, "read_clips", slowly)
    (row,) = profile.measure(session, [8], iterations=3, warmup=1)
    assert (row["vision_ms"], row["llm_ms"]) == (2.0, 2.0)


def test_tokens_are_those_of_the_prompt_on_the_real_engines(tiny_package):
    session = VideoSession(tiny_package)
    rows = profile.measure(session, [4, 8], iterations=1, warmup=0)
    for row in rows:
        session.watch(np.zeros((row["frames"], 56, 56, 3), np.uint8), row["frames"])
        next(session.ask(profile.QUESTION, 1), "")
        assert row["tokens"] == session.stats.prompt_tokens
    assert rows[0].keys() == {"frames", "tokens", "vision_ms", "llm_ms", "total_ms"}


def test_frames_the_package_can_not_take_are_refused_before_anything_is_measured(timed):
    session = timed(iter([]), iter([]))
    for frames in ([4, 64], [4, 6]):
        with pytest.raises(InputError, match=f"{frames[1]} frames"):
            profile.measure(session, frames, iterations=1, warmup=0)
    assert session._encoder.given == []
