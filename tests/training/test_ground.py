"""Grounding: what a token should name stands where it looks, and naming is learned."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from liteframe.export.artifact import load_artifact
from liteframe.training import scenes
from liteframe.training.ground import NOTHING, Sight, embeddings, ground, grounding_loss, named_right
from liteframe.training.loop import Recipe

WORDS = (("red", "blue"), ("left", "stays", "up"))


@pytest.fixture
def artifact(base):
    return load_artifact(base)


class Grey:
    def sample(self, random, frames, fps, size, video_share, varied=False):
        return np.full((frames, size, size, 3), 110, np.uint8)


def centres(clip, colour):
    """Of the pixels of just this colour, in each frame: (T, 2), rows and columns in sides of the frame."""
    found = [np.argwhere((frame == scenes.COLOURS[colour]).all(-1)) for frame in clip]
    return np.array([spots.mean(0) / clip.shape[1] if len(spots) > 60 else (np.nan, np.nan) for spots in found])


@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.sampled_from([(1, 7, 7), (4, 4, 4)]))
def test_tokens_say_what_pixels_show(seed, frames, grid):
    sight = scenes.sight(seed, "test", Grey(), grid, frames, 2.0, 224)
    assert sight.clips.shape == (2 * frames // 4, 4, 224, 224, 3)
    for clip, words in zip(sight.clips, sight.words.reshape(-1, *grid, 3), strict=True):
        for number, colour in enumerate(scenes.COLOURS):
            spots, named = centres(clip, colour), np.argwhere(words[..., 0] == number)
            assert np.isnan(spots).all() == (len(named) == 0)
            for time, row, column in named:
                cell = (np.array([row, column]) + 0.5) / grid[1:]
                at_time = spots[time * 4 // grid[0] : (time + 1) * 4 // grid[0]]
                assert np.nanmin(np.abs(at_time - cell).max(1)) < 0.5 / grid[1] + 0.02
                down, right = spots[-1] - spots[0]
                way = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
                said = scenes.WORDS[2][words[time, row, column, 2]]
                assert said == (way if max(abs(right), abs(down)) > 0.03 else "stays")


def test_backwards_is_the_same_video_and_other_words():
    sight = scenes.sight(3, "train", Grey(), (4, 4, 4), 8, 2.0, 64)
    there, back = np.split(sight.clips, 2)
    np.testing.assert_array_equal(there, back[:, ::-1])
    forwards, backwards = np.split(sight.words.reshape(4, 4, 16, 3), 2)
    np.testing.assert_array_equal(forwards[..., :2], backwards[:, ::-1, :, :2])
    assert (forwards[..., 2] != backwards[:, ::-1, :, 2]).any()


def test_embeddings_are_the_language_models_own_less_their_mean(artifact):
    groups = embeddings(artifact, WORDS)
    table = artifact.decoder.model.embed_tokens.weight.detach().numpy().astype(np.float64)
    plain = [
        [table[artifact.text.tokenizer.encode(f" {word}", add_special_tokens=False).ids].mean(0) for word in group]
        for group in WORDS
    ]
    mean = np.mean([vector for group in plain for vector in group], 0)
    for ours, theirs in zip(groups, plain, strict=True):
        np.testing.assert_allclose(ours, theirs - mean, atol=1e-6)


def test_the_loss_is_that_of_plain_arithmetic():
    random = np.random.default_rng(0)
    tokens, groups = random.standard_normal((2, 5, 8)), [random.standard_normal((n, 8)) for n in (2, 3)]
    words = np.full((2, 5, 2), NOTHING)
    words[0, 1], words[1, 4] = (1, 2), (0, 0)
    said, quiet = [], []
    for token, right in zip(tokens.reshape(10, 8), words.reshape(10, 2), strict=True):
        for group, n in zip(groups, right, strict=True):
            logits = group @ token
            if n == NOTHING:
                quiet += list(logits**2)
            else:
                said.append(np.log(np.exp(logits).sum()) - logits[n])
    expected = 0.1 * (tokens**2).mean() + 0.05 * np.mean(quiet) + sum(said) / 2
    loss = grounding_loss(*(torch.from_numpy(tokens), [torch.from_numpy(g) for g in groups], torch.from_numpy(words)))
    assert loss.item() == pytest.approx(expected)


def test_where_nothing_is_nothing_has_to_be_named():
    tokens = torch.zeros(1, 4, 8, requires_grad=True)
    loss = grounding_loss(tokens, [torch.ones(2, 8)], torch.full((1, 4, 1), NOTHING))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_naming_is_learned_by_what_is_not_frozen(artifact, tmp_path, frozen):
    """The left half of a clip is light or dark: which one, its tokens are to say."""
    encoder = artifact.encoder

    def sight(number):
        clips = np.full((1, 4, 32, 32, 3), 128, np.uint8)
        clips[..., :16, :] = (0, 255)[number % 2]
        words = np.full((1, 2, 2, 2), NOTHING)
        words[:, :, 0] = (number % 2, 2 * (number % 2))
        return Sight(clips, words.reshape(1, 4, 2))

    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    stays = (lambda name: name.startswith("backbone.")) if frozen else (lambda name: False)
    recipe = Recipe(steps=60, batch=4, peak_lr=3e-3, warmup=5)
    assert ground(artifact, WORDS, sight, tmp_path / "run", recipe, stays)
    assert named_right(artifact, WORDS, [sight(0), sight(1)]) == [1.0, 1.0]
    changed = {name.split(".")[0] for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert changed == ({"projector"} if frozen else {"projector", "backbone"})
