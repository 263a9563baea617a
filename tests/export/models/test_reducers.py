"""Token reducers against the paper's equations in NumPy."""

import math

import numpy as np
import pytest
import torch
from liteframe.export.models.reducers import REDUCERS, WINDOWS, AveragePooling, NoReduction, WeightedAveragePooling

CLIPS, T, H, W, C = 2, 4, 4, 6, 5
PAPER = {4: (1, 2, 2), 8: (2, 2, 2), 16: (4, 2, 2)}


def random_features():
    return np.random.default_rng(0).normal(size=(CLIPS, T, 1 + H * W, C))


def blocks_of(clip, window):
    """The blocks of one clip (T, 1 + H*W, C) in time, row, column order: lists of (frame's CLS, token)."""
    t, h, w = window
    for time in range(0, T, t):
        for row in range(0, H, h):
            for column in range(0, W, w):
                yield [
                    (clip[tau, 0], clip[tau, 1 + i * W + j])
                    for tau in range(time, time + t)
                    for i in range(row, row + h)
                    for j in range(column, column + w)
                ]


def weighted_average(block):
    scores = [float(cls @ token) / math.sqrt(C) for cls, token in block]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(weight * token for weight, (_, token) in zip(weights, block, strict=True)) / sum(weights)


def reduce(reducer, features):
    """Flattens time steps and positions: (clips, blocks, C)."""
    return reducer(torch.from_numpy(features)).flatten(1, 2).numpy()


@pytest.mark.parametrize("ratio", PAPER)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_wap_is_equation_1_at_the_papers_ratios(ratio, dtype, tolerance):
    features = random_features()
    expected = [[weighted_average(block) for block in blocks_of(clip, PAPER[ratio])] for clip in features]
    got = reduce(WeightedAveragePooling((T, H, W), PAPER[ratio]), features.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [*PAPER.values(), (2, 1, 3)])
def test_average_pooling_is_the_mean_of_each_block(window):
    features = random_features()
    expected = [
        [np.mean([token for _, token in block], axis=0) for block in blocks_of(clip, window)] for clip in features
    ]
    np.testing.assert_allclose(reduce(AveragePooling((T, H, W), window), features), expected, rtol=1e-12, atol=1e-12)


def test_no_reduction_only_drops_cls():
    features = random_features()
    np.testing.assert_array_equal(
        reduce(NoReduction((T, H, W), (1, 1, 1)), features), features[:, :, 1:].reshape(2, -1, C)
    )


@pytest.mark.parametrize("name", ["wap", "average"])
@pytest.mark.parametrize(("ratio", "grid"), [(4, (4, 2, 3)), (8, (2, 2, 3)), (16, (1, 2, 3))])
def test_the_paper_window_of_each_ratio_leaves_one_token_in_ratio(name, ratio, grid):
    assert WINDOWS[ratio] == PAPER[ratio]
    reducer = REDUCERS[name]((T, H, W), WINDOWS[ratio])
    assert reducer.grid == grid
    out = reducer(torch.zeros(CLIPS, T, 1 + H * W, C))
    assert out.shape == (CLIPS, grid[0], grid[1] * grid[2], C)
    assert math.prod(out.shape[1:3]) * ratio == T * H * W


@pytest.mark.parametrize("window", [(3, 2, 2), (4, 3, 2), (4, 2, 4)])
@pytest.mark.parametrize("name", ["wap", "average"])
def test_a_window_that_does_not_divide_the_grid_is_refused(name, window):
    with pytest.raises(ValueError, match="does not divide"):
        REDUCERS[name]((T, H, W), window)


def test_extreme_scores_still_give_a_weighted_mean_of_each_block():
    features = (random_features() * 1e3).astype(np.float32)
    got = reduce(WeightedAveragePooling((T, H, W), (4, 2, 2)), features)
    tokens = np.array([[[token for _, token in block] for block in blocks_of(clip, (4, 2, 2))] for clip in features])
    slack = 1e-5 * np.abs(tokens).max()
    assert np.all(got >= tokens.min(axis=2) - slack)
    assert np.all(got <= tokens.max(axis=2) + slack)
