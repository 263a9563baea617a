"""The latency protocol of the paper: batch 1, the median of 100 runs after 40, vision and language model apart."""

import itertools
import json
import re
import statistics
import time

import cv2
import numpy as np
import pytest
from liteframe.engines.package import InputError
from liteframe.runtime import VideoSession, profile
from liteframe.runtime import session as session_module
from liteframe.runtime.layer_times import by_kind, by_module


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

    def reserve(self, positions):
        pass

    def twin(self):
        """What runs the protocol; the session's own decoder is for streams, which are left out here."""
        return self


@pytest.fixture
def timed(tiny_package, monkeypatch):
    """A session whose engines take given times: one call of the encoder a clip, two of the decoder a question."""

    def make(vision, language):
        clock = Clock()
        monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
        engines = FakeEncoder(clock, vision), FakeDecoder(clock, language)
        monkeypatch.setattr(session_module, "open_engines", lambda *_: engines)
        monkeypatch.setattr(profile, "_stream", lambda session, clips: float(len(clips)))
        return VideoSession(tiny_package)

    return make


def test_the_protocol_is_100_runs_after_40_unless_told_otherwise(tiny_package, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(profile, "measure", lambda session, *protocol: asked.append(protocol) or [])
    monkeypatch.setattr(profile, "layer_times", lambda package: {})
    assert profile.main([str(tiny_package.folder)]) == 0
    assert profile.main([str(tiny_package.folder), "--frames", "16,4", "--iterations", "3", "--warmup", "0"]) == 0
    assert asked == [([8, 16], 100, 40), ([16, 4], 3, 0)]
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
    clips, calls = (engine.given for engine in session.engines)
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


def test_tokens_are_those_of_the_prompt_on_the_real_engines(tiny_package):
    session = VideoSession(tiny_package)
    rows = profile.measure(session, [4, 8], iterations=1, warmup=0)
    for row in rows:
        session.watch(np.zeros((row["frames"], 56, 56, 3), np.uint8), row["frames"])
        next(session.ask(profile.QUESTION, 1), "")
        assert row["tokens"] == session.stats().prompt_tokens
        assert row["first_token_streamed_ms"] > 0 and row["first_token_serial_ms"] > 0 and row["peak_memory_mb"] > 50
    assert rows[0].keys() == profile.COLUMNS.keys()


def test_frames_the_package_can_not_take_are_refused_before_anything_is_measured(timed):
    session = timed(iter([]), iter([]))
    for frames in ([4, 64], [4, 6]):
        with pytest.raises(InputError, match=f"{frames[1]} frames"):
            profile.measure(session, frames, iterations=1, warmup=0)
    assert session.engines[0].given == []


def test_streamed_only_the_last_clip_and_the_question_are_left_to_wait_for(tiny_package):
    """Counted, not timed: of the engines' calls between the last frame and the first token."""
    session = VideoSession(tiny_package, threads=1)
    encoder, decoder = session.engines
    encode, forward, calls = encoder.encode, decoder.forward, []
    encoder.encode = lambda frames: calls.append("clip") or encode(frames)
    decoder.forward = lambda embeddings: calls.append("prefill") or forward(embeddings)
    push, before = session.push, []
    session.push = lambda frame, timestamp: before.append(list(calls)) or push(frame, timestamp)
    clips = np.zeros((2, 4, 56, 56, 3), np.uint8)
    assert profile._stream(session, clips) > 0
    assert before[-1] == ["clip", "prefill"]
    assert calls[2:] == ["clip", "prefill", "prefill"]


# -- modules -----------------------------------------------------------------------------------------------------------


def test_every_node_of_the_engines_counts_as_a_part_of_the_model(tiny_package):
    layers = profile.layer_times(tiny_package, threads=1)
    parts = [f"block {i} {part}" for i in range(2) for part in ("attention", "temporal", "MLP")]
    assert [*layers["encoder"]] == [
        "input", "patch embedding", *parts[:3], "down-sampling 1", *parts[3:], "head", "projector"
    ]  # fmt: skip
    of_layers = [f"layer {i} {part}" for i in range(2) for part in ("attention", "MLP")]
    for name in ("decoder", "decode"):
        assert [module for module in layers[name] if module != "input"] == [*of_layers, "head"]
    assert all(time > 0 for modules in layers.values() for time in modules.values())
    assert by_kind(layers["encoder"]).keys() == {
        "input", "patch embedding", "attention", "temporal", "MLP", "down-sampling", "head", "projector"
    }  # fmt: skip


def test_times_of_nodes_add_up_by_module_and_unnamed_ones_count_with_the_node_before():
    runs = [
        ("graph/Cast", 1.0),
        ("backbone.patch_embedding/MatMul", 2.0),
        ("backbone/Concat", 3.0),
        ("backbone.blocks.11.norm1/LayerNormalization", 4.0),
        ("node_Add_8", 5.0),
        ("", 6.0),
        ("backbone.blocks.11/Add", 7.0),
        ("backbone.blocks.11.mlp.fc1/MatMul", 8.0),
        ("_inlfunc_WeightedAveragePool_cls", 9.0),
        ("projector.fc1/MatMul", 10.0),
        ("graph/Reshape", 11.0),
    ]
    assert by_module(runs) == {
        "input": 1.0,
        "patch embedding": 5.0,
        "block 11 attention": 22.0,
        "block 11 MLP": 8.0,
        "reducer": 9.0,
        "projector": 21.0,
    }


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_report_is_a_page_on_its_own_with_pictures_beside_it(tiny_package, tmp_path, capsys):
    options = ["--frames", "4,16", "--iterations", "2", "--warmup", "0"]
    outputs = ["--report", str(tmp_path / "report"), "--trace", str(tmp_path / "trace.json"), "--json"]
    assert profile.main([str(tiny_package.folder), *options, *outputs]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["frames"] for row in document["rows"]] == [4, 16] and document[
        "layers"
    ].keys() == profile.LAYER_TITLES.keys()
    names = ["profile-latency.png", *(f"profile-layers-{number}.png" for number in (1, 2, 3)), "profile.html"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == names
    for name in names[:-1]:
        image = cv2.imread(str(tmp_path / "report" / name))
        assert image.std() > 5
    page = (tmp_path / "report" / "profile.html").read_text()
    assert page.count("<svg") == 4 and "block 1 temporal" in page and "polygraphy run" in page
    assert not re.search(r"(?:src|href)=|https?://|@import", page)
    spans = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert {span["name"] for span in spans} >= {"read", "vision", "llm", "decode"}
