"""Scenes: what is asked follows from what is drawn, and what is drawn can be found in the pixels."""

import re
from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liteframe.engines.package import InputError
from liteframe.training import scenes
from liteframe.training.backgrounds import Backgrounds
from liteframe.training.scenes import COLOURS, SHAPES, SPLITS, TESTED, Scene, Thing, ask, describe, draw, pairs, render

GREY = np.full((8, 224, 224, 3), 110, np.uint8)
seeds = st.integers(0, 2**31)


def centre(frame, colour):
    """Of the pixels of just this colour, in sides of the frame; None where there are few."""
    found = np.argwhere((frame == COLOURS[colour]).all(-1))
    return None if len(found) < 60 else found.mean(0)[::-1] / len(frame)


def happens(spots):
    """What a thing does that is seen at these spots, None where it can't be seen."""
    seen = [spot is not None for spot in spots]
    if seen[0] != seen[-1]:
        return "appears" if seen[-1] else "disappears"
    dx, dy = spots[-1] - spots[0]
    if max(abs(dx), abs(dy)) < 0.05:
        return None
    return "moves " + (("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up"))


def test_splits_share_no_pair_and_have_all_colours_and_shapes():
    sets = {split: set(pairs(split)) for split in SPLITS}
    assert sum(map(len, sets.values())) == len(set.union(*sets.values())) == len(COLOURS) * len(SHAPES)
    for split, chosen in sets.items():
        assert {shape for _, shape in chosen} == set(SHAPES)
        assert {colour for colour, _ in chosen} == set(COLOURS if split == "train" else TESTED)


@given(seeds, st.sampled_from(SPLITS))
def test_answers_are_seen_in_the_pixels(seed, split):
    random = np.random.default_rng(seed)
    scene = draw(random, split)
    frames = render(scene, GREY)
    where = {thing.name: [centre(frame, thing.colour) for frame in frames] for thing in scene.things}
    seen = {name: [spot is not None for spot in spots] for name, spots in where.items()}
    for question in ask(scene, random, most=20):
        words, answer = question.text.rstrip("?").split(), question.answer
        named = [thing for thing in scene.things if thing.colour in words or thing.shape in words]
        match question.kind:
            case "colour":
                assert any(thing.colour == answer and thing.shape in words for thing in scene.things)
            case "shape":
                assert any(thing.shape == answer and thing.colour in words for thing in scene.things)
            case "count":
                assert sum(map(all, seen.values())) == len(seen) == scenes.NUMBERS.index(answer)
            case "direction":
                (thing,) = named
                assert happens(where[thing.name]) == f"moves {answer}"
            case "speed":
                faster, slower = sorted(named, key=lambda thing: thing.name != answer)
                ways = [np.abs(where[thing.name][-1] - where[thing.name][0]).max() for thing in (faster, slower)]
                assert faster.name == answer and ways[0] > 1.8 * ways[1] > 0
            case "order":
                first, second = sorted(named, key=lambda thing: thing.name != answer)
                assert first.name == answer and seen[first.name].index(True) < seen[second.name].index(True)
            case "change":
                (thing,) = named
                told = {"appears": (False, True), "disappears": (True, False), "stays": (True, True)}[answer]
                assert (seen[thing.name][0], seen[thing.name][-1]) == told
            case "event":
                told = re.findall(r"the (\w+ \w+)(?: (moves \w+|appears|disappears))?", answer.lower())
                assert all(not does or does == happens(where[name]) for name, does in told)
                untold = {name: spots for name, spots in where.items() if name not in dict(told)}
                assert all(happens(spots) is None for spots in untold.values())
                firsts = [seen[name].index(True) for name, _ in told]
                assert firsts == sorted(firsts)
            case kind:
                assert kind == "unknown" and answer == scenes.UNKNOWN
                assert not any(thing.colour in words and thing.shape in words for thing in scene.things)
                assert len(named) == 0 or "move" in words


@given(seeds)
def test_a_description_names_all_things_from_left_to_right(seed):
    scene = draw(np.random.default_rng(seed), "train")
    told = re.findall(r"a (\w+ \w+)", describe(scene).answer.lower())
    assert sorted(told) == sorted(thing.name for thing in scene.things)
    places = {thing.name: thing.at(0)[0] for thing in scene.things}
    assert [places[name] for name in told] == sorted(places.values())


def test_only_in_training_a_description_is_asked_for(sources):
    backgrounds = Backgrounds([sources / "photo.png"])
    for split in SPLITS:
        kinds = [question.kind for question in scenes.sample(3, split, backgrounds, size=32).questions]
        assert ("description" in kinds) == (split == "train") and 1 < len(kinds) <= 4


@given(seeds)
def test_things_stay_within_the_frame_and_apart(seed):
    scene = draw(np.random.default_rng(seed), "train")
    for time in (0.0, 0.5, 1.0):
        for thing in scene.things:
            assert all(thing.radius - 1e-9 <= place <= 1 - thing.radius + 1e-9 for place in thing.at(time))
        for i, one in enumerate(scene.things):
            for other in scene.things[:i]:
                assert np.hypot(*np.subtract(one.at(time), other.at(time))) > one.radius + other.radius


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_as_large_as_they_say_and_differ(shape):
    def mask(shape):
        (frame,) = render(Scene("stand", (Thing("red", shape, radius=0.3),)), GREY[:1])
        return (frame != GREY[0]).any(-1)

    rows = np.flatnonzero(mask(shape).any(1))
    assert 224 * 0.3 * 1.3 < rows[-1] - rows[0] < 224 * 0.3 * 2.1
    for other in set(SHAPES) - {shape}:
        assert (mask(shape) != mask(other)).mean() > 0.02


def test_no_answer_is_the_usual_one():
    """Or one could be right without looking."""
    random, answers = np.random.default_rng(0), defaultdict(Counter)
    for _ in range(2000):
        for question in ask(draw(random, "test"), random, most=4):
            answers[question.kind][question.answer] += 1
    most = {kind: max(found.values()) / found.total() for kind, found in answers.items() if kind != "unknown"}
    assert most["colour"] < 0.25 and most["shape"] < 0.35 and most["direction"] < 0.3
    assert most["count"] < 0.35 and most["change"] < 0.45 and most["order"] < 0.3 and most["speed"] < 0.3
    assert most["event"] < 0.3
    assert answers["unknown"].total() / sum(found.total() for found in answers.values()) < 0.1


@pytest.fixture
def sources(tmp_path):
    """A photo that is dark on the left and light on the right, and a video that grows lighter."""
    photo = np.repeat(np.linspace(0, 255, 400)[None, :, None], 300, 0).repeat(3, 2).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), photo)
    writer = cv2.VideoWriter(str(tmp_path / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (160, 120))
    for light in range(0, 240, 6):
        writer.write(np.full((120, 160, 3), light, np.uint8))
    writer.release()
    return tmp_path


def test_a_seed_is_always_the_same_sample_and_another_another(sources):
    backgrounds = Backgrounds([sources / "photo.png"], [sources / "video.mp4"])
    one, again, other = (scenes.sample(seed, "train", backgrounds) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.frames, again.frames)
    assert one.questions == again.questions and one.frames.shape == (8, 224, 224, 3)
    assert one.frames.shape == other.frames.shape and (one.frames != other.frames).any()


@pytest.mark.parametrize("fps", [1, 2, 4])
def test_frames_of_a_video_lie_as_far_apart_as_asked(sources, fps):
    backgrounds = Backgrounds([], [sources / "video.mp4"])
    frames = backgrounds.sample(np.random.default_rng(0), 4, fps, 64, video_share=1.0)
    steps = np.diff(frames.mean((1, 2, 3)))
    np.testing.assert_allclose(steps, 6 * 8 / fps, atol=2.5)


def test_a_collage_is_of_several_stretches(sources):
    cv2.imwrite(str(sources / "red.png"), np.full((60, 60, 3), (0, 0, 200), np.uint8))
    cv2.imwrite(str(sources / "blue.png"), np.full((60, 60, 3), (200, 0, 0), np.uint8))
    backgrounds = Backgrounds([sources / "red.png", sources / "blue.png"])
    for varied, most in ((False, 1), (True, 2)):
        found = [backgrounds.sample(np.random.default_rng(i), 2, 2.0, 32, 0.0, varied) for i in range(20)]
        assert max(len(np.unique(frames.reshape(-1, 3).argmax(-1))) for frames in found) == most


def test_colours_are_changed_alike_in_all_frames(sources, monkeypatch):
    monkeypatch.setattr("liteframe.training.backgrounds.OTHERS", (0,))
    backgrounds = Backgrounds([sources / "photo.png"])
    changed = backgrounds.sample(np.random.default_rng(1), 4, 2.0, 64, 0.0, varied=True)
    plain = backgrounds.sample(np.random.default_rng(1), 4, 2.0, 64, 0.0)
    pairs = {(*a, *b) for a, b in zip(plain.reshape(-1, 3), changed.reshape(-1, 3), strict=True)}
    assert len(pairs) == len({pair[:3] for pair in pairs}) > 50 and (changed != plain).any()


def test_small_and_large_squares_are_cut(sources):
    """Of a picture whose red rises to the right, by how much a cut's does tells its width."""
    ramp = np.zeros((512, 512, 3), np.uint8)
    ramp[..., 2] = np.arange(512) // 2
    cv2.imwrite(str(sources / "ramp.png"), ramp)
    backgrounds = Backgrounds([sources / "ramp.png"])
    cuts = [backgrounds.sample(np.random.default_rng(i), 1, 2.0, 64, 0.0)[0, 0, :, 0].astype(int) for i in range(200)]
    widths = np.array([np.ptp(red) for red in cuts]) * 2
    assert widths.min() < 170 and widths.max() > 450
    assert np.median(widths) == pytest.approx(np.sqrt(0.3 * 512 * 512), rel=0.15)


def test_backgrounds_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one photo or video"):
        Backgrounds([])
    (tmp_path / "photo.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"photo\.jpg: can't be read as a picture"):
        Backgrounds([tmp_path / "photo.jpg"])
