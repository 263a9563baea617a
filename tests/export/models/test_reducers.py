"""Token reducers against the paper's equations and the originals' own results; ratios that are admitted and refused."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.reducers import (
    GRID_REDUCERS,
    REDUCERS,
    TOKEN_REDUCERS,
    fastvid,
    fastvid_videos,
    prumerge,
    tome,
    window_of,
)
from liteframe.export.models.vit import ViTConfig

CLIPS, T, H, W, C = 2, 4, 4, 6, 5
PAPER = {4: (1, 2, 2), 8: (2, 2, 2), 16: (4, 2, 2)}
REFERENCES = Path(__file__).parents[2] / "references"
NAMES = {"average": "avg", "max": "max", "subsample": "sub_first", "wap": "wap"}
every_token_reducer = pytest.mark.parametrize("name", TOKEN_REDUCERS)


class References:
    """What an original got, and from what: arrays as tensors, by the name of the case."""

    def __init__(self, file, case):
        with np.load(REFERENCES / f"{file}.npz") as arrays:
            names = [name for name in arrays.files if name.startswith(f"{case}_")]
            self.arrays = {name.removeprefix(f"{case}_"): torch.from_numpy(np.array(arrays[name])) for name in names}

    def __getattr__(self, name):
        return self.arrays[name]

    def get(self, *names):
        return tuple(self.arrays[name] for name in names)


def assert_close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def random_features(seed=0):
    return np.random.default_rng(seed).normal(size=(CLIPS, T, 1 + H * W, C))


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


REDUCED = {
    "wap": weighted_average,
    "average": lambda block: np.mean([token for _, token in block], axis=0),
    "max": lambda block: np.max([token for _, token in block], axis=0),
    "subsample": lambda block: block[0][1],
}
every_window_method = pytest.mark.parametrize("name", REDUCED)


def reduce(name, window, features):
    """Flattens time steps and positions: (clips, blocks, C)."""
    return GRID_REDUCERS[name]((T, H, W), window)(torch.from_numpy(features)).flatten(1, 2).numpy()


# blocks of a grid


@every_window_method
@pytest.mark.parametrize("window", [*PAPER.values(), (2, 1, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_each_block_becomes_what_its_method_says(name, window, dtype, tolerance):
    features = random_features()
    expected = [[REDUCED[name](block) for block in blocks_of(clip, window)] for clip in features]
    got = reduce(name, window, features.astype(dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@every_window_method
@pytest.mark.parametrize("case", ["paper", "other"])
def test_pooling_equals_the_reference(name, case):
    reference = References("pooling", case)
    x, cls, window, expected = reference.get("x", "cls", "block_thw", f"out_{NAMES[name]}")
    features = torch.cat([cls[:, None], x.flatten(1, 2)], 1)[None].float()
    out = GRID_REDUCERS[name](tuple(x.shape[:3]), tuple(window.tolist()))(features)
    assert_close(out.double(), expected.flatten(1, 2)[None])


def test_no_reduction_only_drops_cls():
    features = random_features()
    np.testing.assert_array_equal(reduce("none", (1, 1, 1), features), features[:, :, 1:].reshape(2, -1, C))


def test_extreme_scores_still_give_a_weighted_mean_of_each_block():
    features = (random_features() * 1e3).astype(np.float32)
    got = reduce("wap", (4, 2, 2), features)
    tokens = np.array([[[token for _, token in block] for block in blocks_of(clip, (4, 2, 2))] for clip in features])
    slack = 1e-5 * np.abs(tokens).max()
    assert np.all(got >= tokens.min(axis=2) - slack)
    assert np.all(got <= tokens.max(axis=2) + slack)


# ToMe


def expected_merge(x, size, unmerged, source, target):
    """One step in NumPy, pair by pair: mean by size."""
    x, size = x.double().numpy(), size.double().numpy()
    out = []
    for b in range(len(x)):
        total, count = (x[b] * size[b])[1::2].copy(), size[b][1::2].copy()
        for s, t in zip(source[b].tolist(), target[b].tolist(), strict=True):
            total[t] += x[b][2 * s] * size[b][2 * s]
            count[t] += size[b][2 * s]
        out.append(np.concatenate([x[b][::2][unmerged[b].numpy()], total / count]))
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("case", ["plain", "class"])
def test_tome_merges_as_the_original(case):
    reference = References("tome", case)
    x, metric = reference.get("x", "metric")
    size = reference.arrays.get("size", torch.ones_like(x[:, :, :1]))
    matched = tome.match(metric, int(reference.r), class_token=case == "class")
    for got, name in zip(matched, ("unm", "src", "dst"), strict=True):
        assert torch.equal(got, reference.arrays[f"out_{name}_idx"])
    got, sizes = tome.merge(x, size, matched)
    assert_close(got, reference.out_x)
    assert_close(sizes, reference.out_size)
    assert_close(got.double(), expected_merge(x, size, *matched))


def test_tome_halves_a_clip_as_often_as_it_takes():
    reference = References("tome", "repeated")
    x = reference.x
    size = torch.ones_like(x[:, :, :1])
    for step in range(1, 5):
        matched = tome.match(x, x.shape[1] // 2)
        assert torch.equal(matched[1], reference.arrays[f"out_src_idx_step{step}"])
        assert torch.equal(matched[2], reference.arrays[f"out_dst_idx_step{step}"])
        x, size = tome.merge(x, size, matched)
    assert_close(x, reference.out_x)
    assert torch.equal(size, reference.out_size)
    reducer = tome.ToMe(frames=4, grid=(8, 8), shuffle=1, ratio=16)
    assert_close(reducer(reference.x.reshape(1, 4, 64, 32), None, None), reference.out_x)
    members = torch.nn.functional.one_hot(reference.out_owner, 16).double().transpose(1, 2)
    assert_close(x.double(), members @ reference.x.double() / members.sum(2, keepdim=True))


@given(frames=st.integers(1, 4), rows=st.integers(1, 5), columns=st.integers(1, 5), data=st.data())
def test_tome_keeps_the_mean_of_all_tokens(frames, rows, columns, data):
    count = frames * rows * columns
    ratio = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    reducer = tome.ToMe(frames, (rows, columns), 1, ratio)
    x = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    assert reducer(x.reshape(2, frames, -1, 3), None, None).shape == (2, reducer.tokens, 3)
    merged, size = x, torch.ones_like(x[:, :, :1])
    while merged.shape[1] > reducer.tokens:
        pairs = min(merged.shape[1] - reducer.tokens, merged.shape[1] // 2)
        merged, size = tome.merge(merged, size, tome.match(merged, pairs))
    torch.testing.assert_close((merged * size).sum(1), x.sum(1))
    assert torch.equal(merged, reducer(x.reshape(2, frames, -1, 3), None, None))


# PruMerge


@pytest.mark.parametrize("case", ["adaptive", "fixed", "plus"])
def test_prumerge_keeps_and_merges_as_the_original(case):
    reference = References("prumerge", case)
    feat, k, q = reference.get("feat", "k", "q_cls")
    side = math.isqrt(feat.shape[1] - 1)
    attention, keys = prumerge.PruMerge(1, (side, side), 1, 2).attend(q, k)
    assert_close(attention, reference.out_cls_attn)
    assert torch.equal(keys, k[:, 1:])
    assert prumerge.outlier_ratio(attention) == float(reference.out_outlier_ratio)
    kept = {
        "adaptive": prumerge.adaptive,
        "fixed": lambda attention: prumerge.most_attended(attention, 16),
        "plus": prumerge.adaptive_plus,
    }[case](attention)
    assert torch.equal(kept, reference.out_selected_idx)
    assert torch.equal(prumerge.nearest(keys, kept).sort()[0], reference.out_neighbours_sorted)
    assert_close(prumerge.merge(feat[:, 1:], attention, keys, kept), reference.out)


def test_prumerge_in_an_encoder_has_a_fixed_number_of_tokens_a_frame():
    reference = References("prumerge", "fixed")
    feat, k, q = reference.get("feat", "k", "q_cls")
    reducer = prumerge.PruMerge(frames=2, grid=(16, 16), shuffle=1, ratio=32)
    assert (reducer.units, reducer.tokens) == (2, 16)
    kept = reference.out_selected_idx[:, :7]
    expected = prumerge.merge(feat[:, 1:], reference.out_cls_attn, k[:, 1:], kept)
    assert_close(reducer(feat[None, :, 1:], q, k), expected.reshape(1, 16, -1))


@pytest.mark.parametrize("choose", [prumerge.adaptive, prumerge.adaptive_plus])
def test_attention_without_outliers_is_refused(choose):
    with pytest.raises(ValueError, match="outlier"):
        choose(torch.full((1, 64), 1 / 64))


# FastVID


VARIANTS = {
    "onevision": fastvid_videos.onevision,
    "sparse": fastvid_videos.onevision,
    "llava": fastvid_videos.llava_video,
    "qwen": fastvid_videos.qwen,
}


def lengths(parts: list[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


def test_anchors_that_frames_cannot_share_evenly_are_left_out():
    """As the original divides: 5 frames of 3 salient tokens; of 5 anchors frames 0 and 4 get 2 each."""
    reducer = TOKEN_REDUCERS["fastvid"](5, (8, 8), 1, 16)
    assert reducer.tokens == 5 * 3 + 2 * 2
    x, q, k = torch.randn(2, 5, 64, 6), torch.randn(10, 6), torch.randn(10, 65, 6)
    assert reducer(x, q, k).shape == (2, 19, 6)


@pytest.mark.parametrize("reduce", [fastvid_videos.onevision, fastvid_videos.llava_video, fastvid_videos.qwen])
def test_a_retention_that_keeps_nothing_is_refused(reduce):
    tokens = torch.randn(2, 4, 5, 6) if reduce is fastvid_videos.llava_video else torch.randn(2, 16, 6)
    with pytest.raises(ValueError, match=r"retention 0\.05 keeps none of the 16 tokens .* 0\.0625 or more"):
        reduce(tokens, torch.rand(2, 16), torch.randn(2, 6), retention=0.05)


def test_a_frame_without_anchors_keeps_what_is_salient():
    """One frame a segment, of whose two tokens none is for an anchor."""
    tokens, attention = torch.randn(2, 4, 5, 6), torch.rand(2, 16)
    kept, place, anchor = fastvid_videos.llava_video(tokens, attention, torch.eye(6)[:2], retention=0.125)
    assert not anchor.any()
    grid = torch.arange(2 * 4 * 5).reshape(2, 4, 5)
    wanted = {int(grid[:, :, :4].flatten(1)[frame, n]) for frame in (0, 1) for n in attention[frame].topk(2)[1]}
    newlines = {number // 5 * 5 + 4 for number in wanted}
    assert set(place.tolist()) == wanted | newlines
    assert torch.equal(kept, tokens.reshape(-1, 6)[place])


@pytest.mark.parametrize("case", VARIANTS)
def test_fastvid_reduces_a_video_as_the_original(case):
    reference = References("fastvid", case)
    options = {
        "fewest": int(reference.DySeg_c),
        "threshold": float(reference.DySeg_tau),
    }
    frames = reference.arrays["global"]
    assert lengths(fastvid_videos.segments(frames, **options)) == reference.out_segment_sizes.tolist()
    assert_close(fastvid_videos.similarities(frames), reference.out_adjacent_sim)
    if case == "qwen":
        options["same"] = float(reference.DySeg_ignore)
    options |= {"retention": float(reference.retention_ratio), "share": float(reference.STPrune_d)}
    tokens, place, anchor = VARIANTS[case](reference.hidden, reference.attn, frames, **options)
    assert torch.equal(place, reference.out_keep_index)
    assert torch.equal(anchor, reference.out_is_anchor)
    assert_close(tokens, reference.out_tokens)
    merged = tokens - reference.hidden.reshape(-1, tokens.shape[1])[place]
    assert (merged[anchor].abs().amax(1) > 0).any() and not merged[~anchor].any()


@pytest.mark.parametrize("case", ["onevision", "sparse"])
def test_fastvid_scores_tokens_as_the_original(case):
    reference = References("fastvid", case)
    salient = fastvid.mark(reference.out_salient_idx_sorted, reference.hidden.shape[1])
    density, score = fastvid.density_and_score(reference.hidden, salient)
    for got, expected in ((density, reference.out_density), (score, reference.out_score)):
        # whose densities have noise of up to 1e-6
        assert (got[~salient].reshape(expected.shape) - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert torch.equal(score[salient], -torch.ones(int(salient.sum())))


def test_fastvid_in_an_encoder_takes_a_clip_as_one_segment():
    reference = References("fastvid", "onevision")
    frames = slice(12, 16)  # the last segment
    tokens, attention = reference.hidden[None, frames], reference.attn[frames]
    reducer = fastvid.FastVID(frames=4, grid=(8, 8), shuffle=1, ratio=4)
    assert (reducer.units, reducer.tokens) == (1, 64)
    kept = reference.out_keep_index >= 12 * 64
    scores = torch.cat([torch.zeros(4, 1), attention.log()], 1)[:, :, None]  # of which the softmax is the attention
    assert_close(reducer(tokens, torch.ones(4, 1), scores), reference.out_tokens[kept][None])


# what a reducer sees


def test_tokens_behind_a_shuffle_have_their_squares_attention_and_mean_key():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, generator=generator), torch.randn(2, 1 + 24, 6, generator=generator)
    attention, keys = prumerge.PruMerge(2, (2, 3), 2, 3).attend(q, k)
    weights = np.exp(np.einsum("fc,fnc->fn", q.double(), k.double()) / math.sqrt(6))
    weights = (weights / weights.sum(1, keepdims=True))[:, 1:].reshape(2, 4, 6)
    patches = k[:, 1:].numpy().reshape(2, 4, 6, 6)
    for f, i, j in np.ndindex(2, 2, 3):
        square = np.s_[f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(attention[f, 3 * i + j], weights[square].sum(), rtol=1e-5)
        np.testing.assert_allclose(keys[f, 3 * i + j], patches[square].mean((0, 1)), atol=1e-6)


def encoder_with(name, ratio=None, **options):
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=(112, 112), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    encoder = VideoEncoder(EncoderConfig(backbone=vit, output_size=24, reducer=name, ratio=ratio, **options)).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@every_token_reducer
@pytest.mark.parametrize(("shuffle", "ratio"), [(1, 16), (2, 4)])
def test_an_encoder_reduces_between_shuffle_and_mlp(name, shuffle, ratio):
    encoder = encoder_with(name, ratio, shuffle=shuffle)
    frames = torch.randint(256, (2, 4, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen = {}
    for module in ("reducer", "projector.norm", "backbone.blocks.1.attn.qkv"):
        encoder.get_submodule(module).register_forward_hook(
            lambda _, inputs, out, module=module: seen.update({module: (inputs, out)})
        )
    with torch.no_grad():
        out = encoder(frames)
    (tokens, q, k), reduced = seen["reducer"]
    assert out.shape == (2, encoder.tokens_per_clip, 24)
    assert encoder.tokens_per_clip * ratio * shuffle**2 == 4 * 64
    assert encoder.units_per_clip == (4 if name == "prumerge" else 1)
    assert tokens.shape == (2, 4, 64 // shuffle**2, 16 * shuffle**2)
    qkv = seen["backbone.blocks.1.attn.qkv"][1]
    assert torch.equal(q, qkv[:, 0, :16]) and torch.equal(k, qkv[:, :, 16:32])
    assert reduced.shape[1] == encoder.tokens_per_clip
    assert torch.equal(seen["projector.norm"][0][0], reduced)


@every_token_reducer
def test_clips_do_not_meet(name):
    encoder = encoder_with(name, 4, shuffle=1)
    frames = torch.randint(256, (3, 4, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(encoder(frames)[1:2], encoder(frames[1:2]))


def test_without_a_ratio_a_token_method_takes_the_windows():
    assert encoder_with("tome", shuffle=1).tokens_per_clip == 4 * 64 // 16
    assert encoder_with("tome", shuffle=1, window=(1, 2, 2)).tokens_per_clip == 4 * 64 // 4


# ratios


@pytest.mark.parametrize(
    ("ratio", "window"),
    [
        *PAPER.items(),
        (1, (1, 1, 1)),
        (2, (2, 1, 1)),
        (9, (1, 3, 3)),
        (32, (2, 4, 4)),
        (64, (4, 4, 4)),
        (144, (4, 6, 6)),
    ],
)
def test_one_rule_gives_the_window_of_a_ratio(ratio, window):
    assert window_of(ratio, (4, 48, 48)) == window
    assert math.prod(window) == ratio


def test_a_square_that_does_not_divide_the_grid_is_passed_over():
    """7 x 7 patches, as of ViT-B/32 at 224 pixels; and 14 x 14, where the shuffle needs even sides."""
    assert [window_of(ratio, (4, 7, 7)) for ratio in (4, 49, 196)] == [(4, 1, 1), (1, 7, 7), (4, 7, 7)]
    assert window_of(4, (4, 14, 14), shuffle=2) == (4, 1, 1)


def test_a_long_clips_windows_grow_in_time_first():
    assert [window_of(ratio, (8, 16, 16)) for ratio in (16, 32, 64)] == [(4, 2, 2), (8, 2, 2), (4, 4, 4)]


@pytest.mark.parametrize("ratio", [-4, 0, 3, 5, 9, 16 * 25, 10**9])
def test_a_ratio_without_a_window_is_refused_with_those_that_have_one(ratio):
    with pytest.raises(ValueError) as caught:
        window_of(ratio, (4, 4, 8))
    for part in (f"ratio {ratio} ", "[4, 4, 8]", "expected one of 1, 2, 4, 8, 16, 32, 64"):
        assert part in str(caught.value)


@given(frames=st.integers(1, 8), rows=st.integers(1, 8), columns=st.integers(1, 8), shuffle=st.integers(1, 3))
def test_every_ratio_that_is_offered_is_admitted(frames, rows, columns, shuffle):
    rows, columns = rows * shuffle, columns * shuffle
    with pytest.raises(ValueError) as caught:
        window_of(0, (frames, rows, columns), shuffle)
    offered = [int(n) for n in str(caught.value).rpartition("one of ")[2].split(", ")]
    assert offered[0] == 1 and all(a < b for a, b in pairwise(offered))
    for ratio in range(1, frames * rows * columns + 1):
        if ratio in offered:
            t, h, w = window_of(ratio, (frames, rows, columns), shuffle)
            assert t * h * w == ratio and frames % t == rows % h == columns % w == 0
            assert rows // h % shuffle == columns // w % shuffle == 0
        else:
            with pytest.raises(ValueError, match="does not divide"):
                window_of(ratio, (frames, rows, columns), shuffle)


def test_a_grid_that_the_shuffle_does_not_divide_has_no_window():
    with pytest.raises(ValueError, match=re.escape("pixel shuffle 2 does not divide the grid [4, 5]")):
        window_of(4, (4, 4, 5), 2)


def test_a_video_shorter_than_its_fewest_segments_is_cut_everywhere():
    frames = torch.eye(8)[:4]
    assert lengths(fastvid_videos.segments(frames, fewest=8, threshold=-1.0)) == [1, 1, 1, 1]
    assert lengths(fastvid_videos.segments(frames[:1], fewest=8, threshold=-1.0)) == [1]


@pytest.mark.parametrize("window", [(3, 2, 2), (4, 3, 2), (4, 2, 4)])
@pytest.mark.parametrize("name", ["wap", "average", "max", "subsample"])
def test_a_window_that_does_not_divide_the_grid_is_refused(name, window):
    with pytest.raises(ValueError, match="does not divide"):
        REDUCERS[name]((T, H, W), window)


@pytest.mark.parametrize(
    ("name", "frames", "ratio", "parts"),
    [
        ("tome", 4, 3, ["ratio 3 ", "256 tokens of a clip"]),
        ("tome", 4, 0, ["ratio 0 "]),
        ("prumerge", 4, 5, ["ratio 5 ", "64 tokens of a frame"]),
        ("prumerge", 4, 64, ["ratio 64 ", "64 tokens", "needs two"]),
        ("fastvid", 4, 7, ["ratio 7 ", "64 tokens of a frame"]),
        ("fastvid", 4, 2, ["ratio 2 ", "48 anchors", "64 tokens", "44"]),
        ("tome", 128, 2, ["4096", "3840"]),
    ],
)
def test_a_ratio_that_a_token_method_does_not_admit_is_refused_with_its_numbers(name, frames, ratio, parts):
    with pytest.raises(ValueError) as caught:
        TOKEN_REDUCERS[name](frames, (8, 8), 1, ratio)
    for part in parts:
        assert part in str(caught.value)


def test_a_ratio_for_a_grid_method_is_refused_in_a_config():
    with pytest.raises(ValueError, match="ratio is 16, which is for tome, prumerge, fastvid; wap has a window"):
        encoder_with("wap", 16)
