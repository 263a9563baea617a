"""Keyframe selection against reference arrays and against Algorithm 1 in double precision; the stream against both."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines.package import InputError
from liteframe.runtime import keyframes
from liteframe.runtime.keyframes import KeyframeStream, cosines, select

REFERENCES = np.load(Path(__file__).parents[1] / "references" / "keyframes.npz")


def double_cosines(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return np.divide(a @ b.T, norms, out=np.zeros_like(norms), where=norms > 0)


def algorithm_1(embeddings, relevance, count, similar):
    """As printed; the first frame is kept whatever it is, and its own cosine keeps it from being added again.

    Cosines are rounded to float32, or those of equal vectors would be 1 or a little less."""
    cosine = double_cosines(embeddings, embeddings).astype(np.float32)
    order = sorted(range(len(embeddings)), key=lambda n: (-relevance[n], n))
    kept = order[:1]
    for n in order[1:]:
        if len(kept) < count and max(cosine[n, k] for k in kept) < np.float32(similar):
            kept.append(n)
    return kept


@st.composite
def videos(draw):
    """Of integers, so that frames are equal, parallel, opposite, orthogonal or zero often; relevance has ties too."""
    frames, width = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    embeddings = np.array(draw(st.lists(row, min_size=frames, max_size=frames)), np.float32)
    relevance = draw(st.lists(st.sampled_from([-0.5, 0.0, -0.0, 0.25, 1.0]), min_size=frames, max_size=frames))
    return embeddings, np.array(relevance, np.float32)


similars = st.sampled_from([-1.0, 0.0, 0.5, 0.6, 0.85, 1.0, 1.5])


# select


@pytest.mark.parametrize("video", ["a", "b", "c"])
def test_keyframes_are_the_references(video):
    embeddings, query, relevance, order, similar, count = (
        REFERENCES[f"{video}_{name}"] for name in ("embeddings", "query", "relevance", "order", "similar", "count")
    )
    np.testing.assert_allclose(cosines(embeddings, query[None])[:, 0], relevance, rtol=0, atol=1e-6)
    assert select(embeddings, relevance, int(count), float(similar)).tolist() == order.tolist()


@given(videos(), similars, st.integers(1, 24))
def test_keyframes_are_algorithm_1s(video, similar, count):
    embeddings, relevance = video
    count = min(count, len(embeddings))
    kept = select(embeddings, relevance, count, similar)
    assert kept.dtype == np.int64
    assert kept.tolist() == algorithm_1(embeddings, relevance, count, similar)


@pytest.mark.parametrize("similar", [0.3, 0.85, 1.0])
def test_rankings_of_several_blocks_are_algorithm_1s(similar, monkeypatch):
    monkeypatch.setattr(keyframes, "BLOCK", 16)
    rng = np.random.default_rng(0)
    scenes = rng.standard_normal((12, 20))
    embeddings = (scenes[rng.integers(0, 12, 300)] + rng.standard_normal((300, 20)) / 4).astype(np.float32)
    relevance = rng.standard_normal(300).astype(np.float32)
    for count in (1, 9, 40, 300):
        assert select(embeddings, relevance, count, similar).tolist() == algorithm_1(
            embeddings, relevance, count, similar
        )


@given(videos(), similars, st.floats(-30, 30))
def test_the_scale_of_embeddings_does_not_matter(video, similar, exponent):
    embeddings, relevance = video
    scaled = embeddings * np.float32(2.0) ** round(exponent * 4)  # to where squares leave float32
    count = len(embeddings)
    assert select(scaled, relevance, count, similar).tolist() == select(embeddings, relevance, count, similar).tolist()


@given(videos(), st.floats(-0.9, 0.99))
def test_those_kept_are_ranked_distinct_and_as_many_as_can_be(video, similar):
    embeddings, relevance = video
    kept = select(embeddings, relevance, len(embeddings), similar)
    assert kept[0] == relevance.argmax()
    assert (np.diff(relevance[kept]) <= 0).all()
    among = cosines(embeddings[kept], embeddings[kept])
    assert (among[~np.eye(len(kept), dtype=bool)] < similar + 1e-6).all()
    left = np.setdiff1d(np.arange(len(embeddings)), kept)
    if len(left):
        assert (cosines(embeddings[left], embeddings[kept]).max(axis=1) >= similar - 1e-6).all()


@given(videos())
def test_cosines_are_those_in_double_precision(video):
    embeddings, _ = video
    found = cosines(embeddings, embeddings[::-1])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, double_cosines(embeddings, embeddings[::-1]), rtol=0, atol=1e-6)


def test_zero_vectors_have_cosine_0():
    embeddings = np.array([[0, 0], [3, 4]], np.float32)
    assert cosines(embeddings, embeddings).tolist() == [[0, 0], [0, 1]]


# the stream


@given(videos(), similars, st.integers(1, 6))
def test_after_every_frame_the_stream_has_what_select_gives(video, similar, count):
    embeddings, relevance = video
    stream = KeyframeStream(count, similar)
    assert stream.selected.tolist() == []
    for number in range(1, len(embeddings) + 1):
        stream.add(embeddings[number - 1], float(relevance[number - 1]))
        expected = select(embeddings[:number], relevance[:number], min(count, number), similar)
        assert stream.selected.dtype == np.int64
        assert stream.selected.tolist() == expected.tolist()


def test_a_long_stream_has_what_select_gives():
    rng = np.random.default_rng(1)
    embeddings = np.cumsum(rng.standard_normal((1000, 16)), axis=0).astype(np.float32)  # neighbours are alike
    relevance = cosines(embeddings, rng.standard_normal((1, 16)))[:, 0]
    stream = KeyframeStream(12, 0.8)
    for number, (embedding, value) in enumerate(zip(embeddings, relevance, strict=True), 1):
        stream.add(embedding, float(value))
        if number in (12, 300, 1000):
            assert stream.selected.tolist() == select(embeddings[:number], relevance[:number], 12, 0.8).tolist()


def test_only_a_frame_that_is_kept_has_the_ranking_walked(monkeypatch):
    walks = []
    walk = keyframes._walk
    monkeypatch.setattr(keyframes, "_walk", lambda *args: (walks.append(args[2].tolist()), walk(*args)))
    stream = KeyframeStream(2, 0.9)
    for embedding, relevance in [((1, 0), 0.5), ((0, 1), 0.4), ((1, 0.1), 0.3), ((1, 0.1), 0.45), ((1, 1), 0.1)]:
        stream.add(np.array(embedding, np.float32), relevance)
    assert walks == [[0], [1]]
    stream.add(np.array([-1, 0], np.float32), 0.45)  # behind frame 3, its equal in relevance
    assert walks[2:] == [[5, 1, 2, 4]]
    assert stream.selected.tolist() == [0, 5]


# faults


@pytest.mark.parametrize(
    ("embeddings", "relevance", "count", "message"),
    [
        (np.ones((3, 2)), np.ones(3), 0, "0 keyframes of 3 frames"),
        (np.ones((3, 2)), np.ones(3), 4, "4 keyframes of 3 frames; ask for 1 to 3"),
        (np.ones((0, 2)), np.ones(0), 1, "1 keyframes of 0 frames"),
        (np.ones((3, 2)), np.ones(4), 1, r"3 embeddings and a relevance of shape \(4,\)"),
        (np.ones((3, 2)), np.ones((3, 1)), 1, r"relevance of shape \(3, 1\)"),
        (np.ones(3), np.ones(3), 1, r"embeddings of shape \(3,\)"),
        (np.ones((3, 0)), np.ones(3), 1, r"embeddings of shape \(3, 0\)"),
        (np.array([[1, 2], [np.nan, 0]]), np.ones(2), 1, "vector 1 holds NaN"),
        (np.array([[np.inf, 2], [3, 0]]), np.ones(2), 1, "vector 0 holds NaN or infinity"),
        (np.ones((2, 2)), np.array([0, np.nan]), 1, "relevance of frame 1 is not a number"),
    ],
)
def test_what_does_not_fit_is_refused(embeddings, relevance, count, message):
    with pytest.raises(InputError, match=message):
        select(embeddings.astype(np.float32), relevance.astype(np.float32), count, 0.8)


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="not a number"):
        select(np.ones((2, 2), np.float32), np.ones(2, np.float32), 1, float("nan"))


def test_cosines_of_two_widths_are_refused():
    with pytest.raises(InputError, match="3 and 4 wide"):
        cosines(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32))


def test_a_stream_refuses_what_does_not_fit_and_goes_on():
    with pytest.raises(InputError, match="0 keyframes"):
        KeyframeStream(0, 0.8)
    with pytest.raises(InputError, match="not a number"):
        KeyframeStream(1, float("nan"))
    stream = KeyframeStream(2, 0.8)
    with pytest.raises(InputError, match=r"frame 0 has an embedding of shape \(\), expected \(width,\)"):
        stream.add(np.float32(3), 0.5)
    stream.add(np.ones(3, np.float32), 0.5)
    with pytest.raises(InputError, match=r"frame 1 has an embedding of shape \(4,\), expected \(3,\)"):
        stream.add(np.ones(4, np.float32), 0.5)
    with pytest.raises(InputError, match="frame 1: vector 0 holds NaN"):
        stream.add(np.array([1, np.nan, 0], np.float32), 0.5)
    with pytest.raises(InputError, match="relevance of frame 1 is not a number"):
        stream.add(np.ones(3, np.float32), float("nan"))
    stream.add(np.array([1, -1, 0], np.float32), 0.9)
    assert stream.selected.tolist() == [1, 0]
