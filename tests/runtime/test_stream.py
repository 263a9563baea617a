"""Streams: frames pushed while the session encodes, reads and answers, against the same work done in turn."""

import gc
import itertools
import random
import resource
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.engines.package import InputError, Package
from liteframe.runtime import EngineError, Trace, VideoSession
from liteframe.runtime import session as session_module
from liteframe.runtime.engine import open_engines
from liteframe.runtime.ort_engine import OrtDecoder
from liteframe.runtime.session import STALL
from liteframe.runtime.text import ChatText

QUESTION, OTHER = "what's in the video?", "the cat sat in 2024"
CLIP, SIZE, WINDOW = 4, 56, 4  # frames, pixels, clips


def edited(package, **model):
    """The package with other fields of its model; no answer ends by itself."""
    manifest = package.manifest
    return Package(
        package.folder,
        msgspec.structs.replace(
            manifest,
            model=msgspec.structs.replace(manifest.model, **model),
            text=msgspec.structs.replace(manifest.text, end_of_turn=[]),
        ),
    )


@pytest.fixture(scope="module")
def package(tiny_package):
    return edited(tiny_package)


def video(seed, frames):
    return np.random.default_rng(seed).integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8)


def push(session, frames, start=0.0, step=0.25):
    for number, frame in enumerate(frames):
        session.push(frame, start + number * step)


def answer(session, question=QUESTION, count=8):
    return "".join(session.ask(question, count))


class Slow:
    """An engine whose calls are given to `around`, a context manager, before and after; records what they return."""

    def __init__(self, engine, around, made=None):
        self._engine, self._around = engine, around
        self.made = [] if made is None else made

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def encode(self, frames):
        with self._around("encode"):
            return self._engine.encode(frames)

    def forward(self, embeddings):
        with self._around("forward"):
            logits = self._engine.forward(embeddings)
        self.made.append((len(embeddings), logits.copy()))
        return logits

    def twin(self):
        return Slow(self._engine.twin(), self._around, [])


@contextmanager
def at_once(what):
    yield


def opened(package, around=at_once, **options):
    """A session on engines wrapped in `Slow`, with one thread each."""
    encoder, decoder = (Slow(engine, around) for engine in open_engines(package, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "open_engines", lambda *_: (encoder, decoder))
        return VideoSession(package, **options)


def serially(package, clips, question):
    """The logits behind a question about clips, in a stream: every engine's call after the other, in this thread."""
    encoder, decoder = open_engines(package, 1)
    text, model = ChatText.of(package), package.manifest.model
    before, after = text.turn(question, with_video=True)
    frames = model.clip_length // model.units_per_clip
    number = 0
    for clip in clips:
        parts = [text.embed(before)] if number == 0 else []
        for unit in np.split(encoder.encode(clip[None])[0], model.units_per_clip):
            prefix, suffix = text.unit(number * frames + 1, (number + 1) * frames)
            parts += [text.embed(prefix), unit, text.embed(suffix)]
            number += 1
        decoder.forward(np.concatenate(parts))
    return decoder.forward(text.embed(after))


def window_of(frames):
    """The frames that are in the window when all have been pushed: with the fourth clip it is full, and the older half
    leaves when the next comes."""
    clips = len(frames) // CLIP
    kept = clips if clips <= WINDOW else WINDOW // 2 + 1 + (clips - WINDOW - 1) % (WINDOW // 2)
    return frames[(clips - kept) * CLIP : clips * CLIP]


# -- what is pushed is what is seen ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clips", [1, 2, 4])
def test_frames_pushed_are_answered_about_as_a_video_watched(package, clips):
    frames = video(1, clips * CLIP)
    pushed, watched = VideoSession(package, threads=1), VideoSession(package, threads=1)
    push(pushed, frames)
    watched.watch(frames, len(frames))
    assert answer(pushed) == answer(watched)
    assert [getattr(pushed.stats(), f) for f in ("clips", "frames", "visual_tokens", "pushed", "waiting")] == [
        clips,
        len(frames),
        clips * 2,
        len(frames),
        0,
    ]


@settings(max_examples=25)
@given(st.integers(1, 14), st.integers(0, 2**32), st.sampled_from(["calm", "slow encoder", "slow decoder", "bursts"]))
def test_logits_are_those_of_serial_work_bit_for_bit_however_stages_are_timed(package, clips, seed, timing):
    frames = video(2, clips * CLIP)
    chance = random.Random(seed)
    slow = {"slow encoder": "encode", "slow decoder": "forward"}.get(timing)

    @contextmanager
    def around(what):
        time.sleep(0.004 * chance.random() * (what == slow))
        yield
        time.sleep(0.002 * chance.random() * (timing != "calm"))

    session = opened(package, around)
    with session:
        for number, frame in enumerate(frames):
            if timing == "bursts" and number % 7 == 0:
                time.sleep(0.005 * chance.random())
            session.push(frame, number / 4)
        next(session.ask(QUESTION, 1))
        made = (session._pipeline.conversation._cache._decoder).made[-1][1]
    expected = serially(package, window_of(frames).reshape(-1, CLIP, SIZE, SIZE, 3), QUESTION)
    np.testing.assert_array_equal(made, expected)
    assert session.stats().clips == len(window_of(frames)) // CLIP


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(0, 3))
def test_an_endless_stream_is_answered_as_by_a_fresh_session_over_its_window(package, clips, rest):
    frames = video(3, clips * CLIP + rest)
    session, fresh = VideoSession(package, threads=1), VideoSession(package, threads=1)
    push(session, frames)
    push(fresh, window_of(frames))
    assert answer(session) == answer(fresh)
    assert session.stats().moves == max(0, (clips - WINDOW + 1) // 2)
    assert session.stats().waiting == rest
    assert session.stats().prompt_tokens == fresh.stats().prompt_tokens


def test_a_question_finds_the_clips_before_it_and_not_those_behind(package):
    """The encoder is held up until the question has been put and more frames behind it."""
    frames, go_on = video(4, 16), threading.Event()

    @contextmanager
    def around(what):
        if what == "encode":
            assert go_on.wait(10)
        yield

    session = opened(package, around)
    with session:
        push(session, frames[:8])
        first = session.ask(QUESTION, 8)
        pushing = threading.Thread(target=push, args=(session, frames[8:], 10.0))
        pushing.start()
        go_on.set()
        said = "".join(first)
        pushing.join()
        later = answer(session, OTHER)
    expected = VideoSession(package, threads=1)
    push(expected, frames[:8])
    assert said == answer(expected)
    push(expected, frames[8:], 10.0)
    assert later == answer(expected, OTHER)


def test_a_chat_goes_on_over_a_stream_and_earlier_turns_are_kept(package):
    session = VideoSession(package, threads=1)
    seen = [answer(session, "see")]
    for number in range(6):
        push(session, video(number, 8), number * 10.0)
        seen.append(answer(session, QUESTION))
    turns = [entry for entry in session._pipeline.conversation.entries if not isinstance(entry, np.ndarray)]
    assert [turn.question for turn in turns] == ["see"] + 6 * [QUESTION]
    assert [session._text._tokenizer.decode(list(turn.answer)) for turn in turns] == seen
    assert session.stats().moves == 4
    session.forget()
    fresh = VideoSession(package, threads=1)
    push(fresh, window_of(np.concatenate([video(number, 8) for number in range(6)])))
    assert answer(session) == answer(fresh)


def test_turns_leave_when_they_take_too_much_of_the_cache(tiny_package):
    session = VideoSession(edited(tiny_package, capacity=400), threads=1)
    for number in range(40):
        push(session, video(number, CLIP), number * 10.0)
        assert len(answer(session, f"{number} {QUESTION}", 30)) > 0
    entries = session._pipeline.conversation.entries
    turns = [entry for entry in entries if not isinstance(entry, np.ndarray)]
    assert turns[-1].question.startswith("39") and 1 <= len(turns) < 10
    assert 1 <= session.stats().clips <= WINDOW


def test_more_questions_than_fit_the_cache_while_the_camera_stands_still(tiny_package):
    """Old turns leave; the clips stay."""
    session = VideoSession(edited(tiny_package, capacity=400), threads=1)
    push(session, video(1, 8))
    for number in range(30):
        assert len(answer(session, f"{number} {QUESTION}", 30)) > 0
        assert session.stats().clips == 2


@pytest.mark.parametrize("taken", [0, 3])
def test_of_an_answer_given_up_over_a_stream_what_was_read_stays(package, taken):
    """Also in the second cache, which takes over in between."""
    session, fresh = VideoSession(package, threads=1), VideoSession(package, threads=1)
    frames = video(1, 24)
    push(session, frames[:12])
    given_up = session.ask(OTHER, 200)
    for _ in range(taken):
        next(given_up)
    ids = given_up._answer.read
    until(lambda: session._pipeline.conversation.lag == 0)
    given_up.close()
    push(session, frames[12:], 3.0)
    push(fresh, frames[:12])
    if taken:
        "".join(fresh.ask(OTHER, ids))
    push(fresh, frames[12:], 3.0)
    assert answer(session) == answer(fresh)
    assert session.stats().moves == fresh.stats().moves == 1
    assert session.stats().prompt_tokens == fresh.stats().prompt_tokens


# -- the window --------------------------------------------------------------------------------------------------------


def test_each_clip_is_prefilled_about_twice(package):
    session = opened(package)
    with session:
        push(session, video(5, 400))
        answer(session)
        caches = [session._pipeline.conversation._cache, session._pipeline.conversation._other]
        positions = sum(size for cache in caches for size, _ in cache._decoder.made)
        clip = session._pipeline.conversation._cache.lengths()[1]
        assert 1.6 < positions / (100 * clip) < 2.4
        assert session.stats().clips_seen == 100
        assert session.stats().again_ms > 0


def test_a_window_of_one_clip_is_the_last_clip(tiny_package):
    package = edited(tiny_package, max_frames=CLIP)
    session, fresh = VideoSession(package, threads=1), VideoSession(package, threads=1)
    frames = video(6, 5 * CLIP)
    push(session, frames)
    push(fresh, frames[-CLIP:])
    assert answer(session) == answer(fresh)
    assert session.stats().clips == 1


def test_a_video_watched_goes_on_as_a_stream(package):
    frames = video(7, 24)
    session, fresh = VideoSession(package, threads=1), VideoSession(package, threads=1)
    session.watch(frames[:16])
    push(session, frames[16:])
    push(fresh, window_of(frames))
    assert answer(session) == answer(fresh)
    session.watch(frames[:16])
    watched = VideoSession(package, threads=1)
    watched.watch(frames[:16])
    assert answer(session) == answer(watched)
    assert (session.stats().pushed, session.stats().clips_seen) == (0, 4)


@pytest.fixture
def growths(monkeypatch):
    """Told, for each time that a cache grows, whether its decoder was being asked for something."""
    reserve, forward, told, busy = OrtDecoder.reserve, OrtDecoder.forward, [], threading.local()

    def counted(self, positions):
        before = self._buffers
        reserve(self, positions)
        if before is not self._buffers:
            told.append(getattr(busy, "now", False))

    def watched(self, embeddings):
        busy.now = True
        try:
            return forward(self, embeddings)
        finally:
            busy.now = False

    monkeypatch.setattr(OrtDecoder, "reserve", counted)
    monkeypatch.setattr(OrtDecoder, "forward", watched)
    return told


def test_a_stream_takes_the_memory_of_both_caches_when_it_begins_and_no_more(package, growths):
    session = VideoSession(package, threads=1)
    for number, frame in enumerate(video(5, 64)):
        session.push(frame, number / 4)
        session.drain()
        assert growths == [False, False]
    answer(session, count=100)
    assert growths == [False, False] and session.stats().moves


def test_a_video_that_is_watched_finds_room_made_for_it(package, growths):
    session = VideoSession(package, threads=1)
    session.watch(video(5, 16))
    answer(session)
    assert growths == [False]


def test_a_stream_without_memory_for_whole_caches_says_so_and_grows_them_when_it_must(package, monkeypatch):
    session, fresh = VideoSession(package, threads=1), VideoSession(package, threads=1)

    def refused(self, positions):
        if positions == self.capacity:
            raise MemoryError("no room")
        reserve(self, positions)

    frames, reserve = video(6, 16), OrtDecoder.reserve
    monkeypatch.setattr(OrtDecoder, "reserve", refused)
    session.push(frames[0], 0.0)
    with pytest.raises(EngineError, match="the decoder failed on room for a stream: no room"):
        session.drain()
    push(session, frames[1:], 0.25)
    said = answer(session)
    monkeypatch.undo()
    push(fresh, frames)
    assert said == answer(fresh)


# -- backpressure ------------------------------------------------------------------------------------------------------


def held_up(package, when_full):
    """A session whose encoder waits for `go_on`, and the number of its calls."""
    go_on, calls = threading.Event(), []

    @contextmanager
    def around(what):
        if what == "encode":
            calls.append(what)
            assert go_on.wait(10)
        yield

    session = opened(package, around, when_full=when_full)
    return session, go_on, calls


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(("when_full", "kept"), [("drop-oldest", [0, 4, 5]), ("latest-only", [0, 5])])
def test_clips_are_dropped_as_the_caller_chose_and_each_frame_is_counted(package, when_full, kept):
    frames = video(8, 6 * CLIP)
    session, go_on, calls = held_up(package, when_full)
    with session:
        push(session, frames[:CLIP])
        until(lambda: calls)  # the first is being encoded, two more may wait
        push(session, frames[CLIP:], 1.0)
        stats = session.stats()
        assert stats.dropped == (6 - len(kept)) * CLIP
        assert (stats.pushed, stats.waiting) == (24, len(kept) * CLIP)
        go_on.set()
        said = answer(session)
        assert session.stats().waiting == 0
    fresh = VideoSession(package, threads=1)
    push(fresh, frames.reshape(-1, CLIP, SIZE, SIZE, 3)[kept].reshape(-1, SIZE, SIZE, 3))
    assert said == answer(fresh)


def test_blocking_waits_for_room_and_drops_nothing(package):
    frames = video(9, 6 * CLIP)
    session, go_on, calls = held_up(package, "block")
    with session:
        pushing = threading.Thread(target=push, args=(session, frames))
        pushing.start()
        until(lambda: calls)
        pushing.join(0.2)
        assert pushing.is_alive() and session.stats().pushed == 4 * CLIP
        go_on.set()
        pushing.join(10)
        answer(session)
        stats = session.stats()
        assert (stats.pushed, stats.dropped, stats.clips_seen) == (24, 0, 6)


def test_a_push_that_waits_ends_when_the_session_closes(package):
    session, go_on, calls = held_up(package, "block")
    ended = []

    def pushing():
        with pytest.raises(InputError, match="the session is closed"):
            push(session, video(9, 40))
        ended.append(True)

    thread = threading.Thread(target=pushing)
    thread.start()
    until(lambda: calls and session.stats().pushed == 4 * CLIP)
    closing = threading.Thread(target=session.close)
    closing.start()
    thread.join(10)
    go_on.set()
    closing.join(10)
    assert ended and not thread.is_alive() and not closing.is_alive()


def test_what_is_no_way_to_deal_with_backpressure_is_refused(package):
    with pytest.raises(InputError, match="when_full is 'drop', expected \"block\""):
        VideoSession(package, when_full="drop")


# -- frames that are not as they should be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((SIZE, SIZE), np.uint8), r"a frame is uint8 \(56, 56\)"),
        (np.zeros((SIZE, SIZE, 4), np.uint8), r"a frame is uint8 \(56, 56, 4\)"),
        (np.zeros((SIZE, SIZE, 3), np.float32), r"a frame is float32 \(56, 56, 3\)"),
        (np.zeros((0, SIZE, 3), np.uint8), r"a frame is uint8 \(0, 56, 3\)"),
        (None, "a NoneType is not a frame"),
        (b"jpeg", "a bytes is not a frame"),
    ],
)
def test_a_frame_that_is_none_is_not_taken_and_the_session_goes_on(package, frame, message):
    session, clean = VideoSession(package, threads=1), VideoSession(package, threads=1)
    frames = video(10, 8)
    push(session, frames[:2])
    with pytest.raises(InputError, match=message):
        session.push(frame, 0.4)
    push(session, frames[2:], 0.5)
    push(clean, frames)
    assert answer(session) == answer(clean)
    assert session.stats().pushed == 8


@pytest.mark.parametrize("late", [0.25, 0.0, -1.0, float("nan"), float("inf")])
def test_a_frame_out_of_order_is_not_taken(package, late):
    session = VideoSession(package, threads=1)
    push(session, video(10, 2))
    with pytest.raises(InputError, match="push them in their order"):
        session.push(video(10, 1)[0], late)
    assert session.stats().pushed == 2


def test_a_camera_that_changes_its_size_goes_on(package):
    frames = video(11, 8)
    large = [cv2.resize(frame, (100, 80)) for frame in frames[4:]]
    session, expected = VideoSession(package, threads=1), VideoSession(package, threads=1)
    push(session, frames[:4])
    push(session, large, 1.0)
    push(expected, frames[:4])
    push(expected, [cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for image in large], 1.0)
    assert answer(session) == answer(expected)


def test_after_a_stall_the_clip_in_the_middle_is_filled_with_its_last_frame(package):
    frames = video(12, 6)
    session, expected = VideoSession(package, threads=1), VideoSession(package, threads=1)
    push(session, frames[:2])
    push(session, frames[2:], 0.25 + STALL + 0.01)
    push(expected, frames[[0, 1, 1, 1, 2, 3, 4, 5]])
    assert answer(session) == answer(expected)
    assert session.stats().pushed == 6


def test_a_stream_may_end_within_a_clip(package):
    frames = video(13, 6)
    session, expected = VideoSession(package, threads=1), VideoSession(package, threads=1)
    push(session, frames)
    session.flush()
    session.flush()
    push(expected, frames[[0, 1, 2, 3, 4, 5, 5, 5]])
    assert answer(session) == answer(expected)


def test_a_question_before_the_first_clip_is_whole_says_so(package):
    session = VideoSession(package, threads=1)
    push(session, video(13, 3))
    with pytest.raises(InputError, match=r"only 3 of the 4 frames of a clip were pushed; .* flush\(\)"):
        session.ask(QUESTION)
    session.flush()
    assert answer(session)


def test_frames_may_be_pushed_from_what_speaks_dlpack(package):
    torch = pytest.importorskip("torch")
    frames = video(14, 4)
    session, expected = VideoSession(package, threads=1), VideoSession(package, threads=1)
    push(session, torch.from_numpy(frames))
    push(expected, frames)
    assert answer(session) == answer(expected)


def test_a_frame_is_copied_when_it_is_pushed(package):
    frames = video(15, 8)
    session, expected = VideoSession(package, threads=1), VideoSession(package, threads=1)
    buffer = np.empty_like(frames[0])
    for number, frame in enumerate(frames):
        buffer[:] = frame
        session.push(buffer, number / 4)
    push(expected, frames)
    assert answer(session) == answer(expected)


# -- engines that fail -------------------------------------------------------------------------------------------------


def failing(engine, at):
    """A context manager for `opened` that fails at the given calls of an engine."""
    calls = []

    @contextmanager
    def around(what):
        if what == engine:
            calls.append(what)
            if len(calls) in at:
                raise RuntimeError("the device is lost")
        yield

    return around


def test_an_encoder_that_fails_loses_a_clip_tells_once_and_goes_on(package):
    frames = video(16, 12)
    session = opened(package, failing("encode", {2}))
    with session:
        push(session, frames[:8])
        until(lambda: session.stats().failed == 4)
        with pytest.raises(EngineError, match="the encoder failed on 1 clips, which are left out: the device is lost"):
            session.push(frames[8], 2.0)
        push(session, frames[8:], 2.0)
        said = answer(session)
        assert (session.stats().pushed, session.stats().failed, session.stats().clips) == (12, 4, 2)
    expected = VideoSession(package, threads=1)
    push(expected, np.concatenate([frames[:4], frames[8:]]))
    assert said == answer(expected)


@pytest.mark.parametrize("at", range(1, 8))
def test_a_decoder_that_fails_tells_and_loses_nothing(package, at):
    """Of prefilling; calls come in another order where the second cache has caught up in between."""
    frames = video(17, 24)
    session = opened(package, failing("forward", {at}))
    with session:
        for number, frame in enumerate(frames):
            try:
                session.push(frame, number / 4)
            except EngineError as error:
                assert "the device is lost" in str(error)
                session.push(frame, number / 4)
            until(lambda: session.stats().waiting < CLIP and not session._pipeline.conversation.lag)
        try:
            said = answer(session)
        except EngineError as error:
            assert "the device is lost" in str(error)
            said = answer(session)
    expected = VideoSession(package, threads=1)
    push(expected, frames)
    assert said == answer(expected)


def test_an_engine_that_fails_on_a_video_leaves_what_was_seen(package):
    for engine in ("encode", "forward"):
        session = opened(package, failing(engine, {6}))
        with session:
            push(session, video(18, 8))
            until(lambda session=session: session.stats().clips == 2)
            with pytest.raises(EngineError, match="the device is lost"):
                session.watch(np.concatenate([video(19, 16)] * 3), 16 if engine == "encode" else None)
                raise EngineError("the device is lost")  # the decoder takes the whole video in one call
            push(session, video(20, 4), 10.0)
            said = answer(session)
        expected = VideoSession(package, threads=1)
        push(expected, video(18, 8))
        push(expected, video(20, 4), 10.0)
        if engine == "encode":
            assert said == answer(expected)


# -- closing -----------------------------------------------------------------------------------------------------------


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("liteframe")]


def test_closing_joins_the_threads_in_whatever_it_is_doing(package):
    for moment in ("fresh", "mid-clip", "encoding", "answering"):
        session = VideoSession(package, threads=1)
        assert len(ours()) == 2
        reading = None
        if moment != "fresh":
            push(session, video(21, {"mid-clip": 6, "encoding": 40, "answering": 8}[moment]))
        if moment == "answering":
            reading = session.ask(QUESTION, 1000)
            next(reading)
        session.close()
        session.close()
        assert ours() == []
        for call in (
            lambda s=session: push(s, video(21, 4), 100.0),
            lambda s=session: s.ask(QUESTION),
            lambda s=session: s.watch(video(21, 4), 4),
            session.forget,
        ):
            with pytest.raises(InputError, match="the session is closed"):
                call()
        if reading is not None:
            with pytest.raises(InputError, match="the session is closed"):
                for _ in reading:
                    pass


def test_a_session_that_is_dropped_ends_its_threads(package):
    session = VideoSession(package, threads=1)
    push(session, video(22, 30))
    answer(session)
    session.watch(video(22, 16))
    del session
    gc.collect()
    until(lambda: ours() == [])


def test_an_answer_holds_its_session_open(package):
    reading = VideoSession(package, threads=1).ask(QUESTION, 8)
    gc.collect()
    assert len("".join(reading)) > 0
    del reading
    gc.collect()
    until(lambda: ours() == [])


# -- tracing -----------------------------------------------------------------------------------------------------------


def test_a_trace_shows_stages_that_take_turns_on_a_cpu(package, tmp_path):
    trace = Trace()
    with VideoSession(package, threads=1, trace=trace) as session:
        push(session, video(23, 40))
        answer(session)
    spans = sorted((start, end) for _, _, start, end, _ in trace.spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    trace.write(tmp_path / "trace.json")
    events = msgspec.json.decode((tmp_path / "trace.json").read_bytes())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"encoder", "language model"}
    named = [event["name"] for event in events if event["ph"] == "X"]
    assert named.count("vision") == 10 and named.count("decode") == 8 and {"llm", "again"} <= set(named)
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")


# -- for long ----------------------------------------------------------------------------------------------------------


def resident():
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def open_handles():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_ten_thousand_frames_leave_nothing_behind(package):
    with VideoSession(package, threads=1) as session:  # whatever libraries open once
        answer(session)
    frames, handles = video(24, 100), open_handles()
    with VideoSession(package, threads=1) as session:
        for number in range(10_000):
            session.push(frames[number % 100], number / 4)
            if number % 500 == 499:
                answer(session)
            if number == 999:
                session.drain()
                before = resident()
        session.drain()
        assert resident() - before < 50e6
        stats = session.stats()
        assert (stats.pushed, stats.clips_seen, stats.dropped, stats.waiting) == (10_000, 2_500, 0, 0)
        assert stats.clips <= WINDOW
    assert ours() == []
    assert open_handles() <= handles
