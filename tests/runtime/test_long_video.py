"""Long videos in few positions: what is kept of a video's clips, and whole sessions with it."""

import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines.package import InputError, Model
from liteframe.engines.package import LongVideo as Settings
from liteframe.runtime.long_video import LongVideo, Query, check_long_frames, check_mode

WIDTH, TOKENS = 6, 4


def model(units=1, keyframes=2, similar=0.99, max_frames=4000):
    return Model(
        image_size=(8, 8),
        clip_length=4,
        units_per_clip=units,
        tokens_per_clip=TOKENS,
        hidden_size=WIDTH,
        vocabulary=1,
        layers=1,
        kv_heads=1,
        head_dim=1,
        max_frames=16,
        max_tiles=1,
        unit_text=16,
        capacity=64,
        max_clips=1,
        chunk=8,
        long_video=Settings(
            max_frames=max_frames, keyframes=keyframes, similar=similar, redundancy_weight=0.5, temperature=0.1
        ),
    )


class ByHand:
    """Differential feature merging, equations 5 to 10, token by token in double precision."""

    def merge(self, features, query, key_features, redundancy_weight, temperature):
        return np.array(
            [merged(clip, query, key_features, redundancy_weight, temperature) for clip in features], np.float32
        )


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 0.0 if norms == 0 else float(np.dot(a.astype(float), b) / norms)


def merged(clip, query, key, weight, temperature):
    scores = [
        (cosine(token, query) - (0 if key is None else weight * cosine(token, key[place]))) / temperature
        for place, token in enumerate(clip)
    ]
    weights = np.exp(np.array(scores) - max(scores))
    return (weights[:, None] * clip.astype(float)).sum(0) / weights.sum()


def random_clips(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, TOKENS, WIDTH)).astype(np.float32)


def spans_of(clips, mode="hybrid", features=None, query=None, trained=True, **options):
    query = Query.of(np.ones((1, WIDTH), np.float32)) if query is None else query
    video = LongVideo(mode, query, model(**options), ByHand(), trained)
    for number, clip in enumerate(clips):
        video.add(clip, None if features is None else features[number])
    return video.keyframes().tolist(), list(video.spans())


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_every_frame_is_told_of_once_and_in_order(count, keyframes, seed):
    keys, spans = spans_of(random_clips(count, seed), keyframes=keyframes)
    assert [span.first for span in spans] == [1, *(span.last + 1 for span in spans[:-1])]
    assert spans[-1].last == 4 * count
    assert sum(len(span.tokens) for span in spans) == TOKENS * len(keys) + count - len(keys)


def test_key_clips_keep_their_tokens_and_others_become_one_each_against_the_key_before():
    clips = random_clips(7)
    keys, spans = spans_of(clips)
    assert len(keys) == 2
    query, key, position = np.ones(WIDTH, np.float32), None, iter(spans)
    run: list = []
    for number, clip in enumerate(clips):
        if number in keys:
            if run:
                np.testing.assert_allclose(next(position).tokens, run, rtol=1e-5)
            span = next(position)
            np.testing.assert_array_equal(span.tokens, clip)
            assert (span.first, span.last) == (4 * number + 1, 4 * number + 4)
            key, run = clip, []
        else:
            run.append(merged(clip, query, key, 0.5, 0.1))
    if run:
        np.testing.assert_allclose(next(position).tokens, run, rtol=1e-5)
    assert next(position, None) is None


def test_the_most_relevant_clips_are_key_and_those_like_them_are_not():
    clips = random_clips(6)
    clips[4] = np.ones((TOKENS, WIDTH)) + np.random.default_rng(1).normal(size=(TOKENS, WIDTH)) / 4
    clips[1] = clips[4]
    keys, _ = spans_of(clips, keyframes=2)
    assert keys[0] == 1  # the earlier of two that are alike
    assert 4 not in keys


def test_visual_tokens_are_compared_without_what_all_of_them_share():
    clips = random_clips(6) + 100
    alike, _ = spans_of(clips, keyframes=4, similar=0.9)
    apart, _ = spans_of(clips, keyframes=4, similar=0.9, trained=False)
    assert len(alike) == 1
    means = clips.mean(1) - clips.mean((0, 1))
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert len(apart) > 1
    for number, key in enumerate(apart[1:], start=1):
        assert (unit[key] @ unit[apart[:number]].T).max() < 0.9


def test_vilamp_chooses_frames_of_an_encoder_that_keeps_them_apart():
    clips = random_clips(3)
    keys, spans = spans_of(clips, "vilamp", units=4, keyframes=2)
    frames = clips.reshape(12, 1, WIDTH)
    assert max(keys) > 2
    for span in spans:
        if span.first - 1 in keys:
            np.testing.assert_array_equal(span.tokens, frames[span.first - 1])
            assert span.first == span.last
    assert sum(len(span.tokens) for span in spans) == 12


def test_hybrid_tells_the_time_steps_of_a_key_clip_apart():
    keys, spans = spans_of(random_clips(3), "hybrid", units=2, keyframes=1)
    own = [span for span in spans if 4 * keys[0] < span.last <= 4 * keys[0] + 4]
    assert [(span.last - span.first + 1, len(span.tokens)) for span in own] == [(2, 2), (2, 2)]


def test_features_are_compared_and_merged_where_they_are_not_the_tokens():
    clips, features = random_clips(4), np.random.default_rng(5).normal(size=(4, TOKENS, 3)).astype(np.float32)
    query = Query.of(np.ones((1, 3), np.float32))
    keys, spans = spans_of(clips, features=features, query=query, keyframes=1)
    relevance = [query.relevance(clip) for clip in features]
    assert keys == [int(np.argmax(relevance))]
    shown = next(span for span in spans if span.first == 4 * keys[0] + 1)
    np.testing.assert_array_equal(shown.tokens, clips[keys[0]])
    assert {span.tokens.shape[1] for span in spans if span is not shown} == {3}


def test_each_part_of_a_query_looks_for_the_token_most_like_it():
    parts = random_clips(1)[0]
    tokens = random_clips(1, seed=3)[0]
    expected = np.mean([max(cosine(part, token) for token in tokens) for part in parts])
    assert Query.of(parts).relevance(tokens) == pytest.approx(expected, abs=1e-6)


def test_a_query_of_another_width_is_refused_with_both():
    with pytest.raises(InputError, match=r"5 wide.* 6"):
        spans_of(random_clips(2), query=Query.of(np.ones((1, 5), np.float32)))


LIMITED = """
import resource, tempfile
import numpy as np
from liteframe.engines.package import InputError
from liteframe.runtime.long_video import Spool

array = np.arange(24, dtype=np.float32)  # 96 bytes
tempfile.gettempdir()  # tries it out by writing
for limit in range(0, 4 * array.nbytes, 40):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    spool, kept = Spool(), 0
    try:
        while True:
            spool.append(array)
            kept += 1
    except InputError as error:
        assert "File too large" in str(error) and "TMPDIR" in str(error), error
    assert kept == limit // array.nbytes, (limit, kept)
    for number in range(kept):
        np.testing.assert_array_equal(spool.read(number), array)
    spool.close()
print("done")
"""


def test_a_full_disk_is_named_wherever_it_ends_and_what_was_kept_can_be_read_and_closed():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


def test_no_room_for_a_temporary_file_is_named(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(InputError, match=r"^/proc: .*TMPDIR"):
        spans_of(random_clips(1))


def test_a_package_that_was_not_built_for_it_is_refused():
    plain = Model(**{name: getattr(model(), name) for name in Model.__struct_fields__} | {"long_video": None})
    with pytest.raises(InputError, match="build with --long-video"):
        check_mode("hybrid", plain)
    check_mode("uniform", plain)
    with pytest.raises(InputError, match="1 time steps of the 4 frames"):
        check_mode("vilamp", model())
    with pytest.raises(InputError, match="expected one of uniform, vilamp, hybrid"):
        check_mode("dense", model())


@pytest.mark.parametrize(
    ("mode", "frames", "there", "message"),
    [
        ("hybrid", 10, 10, "multiple of 4"),
        ("hybrid", 4004, 4004, "at most 4000"),
        ("hybrid", 128, 128, "33 keyframes of 32 clips"),
        ("hybrid", 400, 20, "33 keyframes of 5 clips"),
        ("vilamp", 32, 32, "33 keyframes of 32 frames"),
    ],
)
def test_frames_that_do_not_fit_are_refused_with_the_numbers(mode, frames, there, message):
    with pytest.raises(InputError, match=message):
        check_long_frames(mode, frames, there, model(units=4, keyframes=33))
