"""Ways of mixing a clip's frames, against NumPy in double precision: one token, one time step, one clip at a time."""

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liteframe.export.models.liteframe import MIXERS, Downsampling, LiteFrame, LiteFrameConfig
from liteframe.export.models.mixers import DenseStridedConv, DenseTemporalConv, TemporalAttention
from liteframe.export.models.vit import Attention, ViTConfig

SIZE, HEADS, EPS = 8, 2, 1e-6
VIT = ViTConfig(
    image_size=(56, 56),
    hidden_size=SIZE,
    num_hidden_layers=3,
    num_attention_heads=HEADS,
    intermediate_size=20,
    norm_eps=EPS,
)
STUDENT = LiteFrameConfig(
    vit=VIT, downsampling=(Downsampling(1, (2, 2, 2)), Downsampling(2, (2, 1, 1))), head_size=SIZE
)
clip_sizes = settings(max_examples=20, deadline=None)
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def random_module(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def ours(module, x):
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()


def weights(module):
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(x, w, prefix):
    """x (N, C): one sequence."""
    q, k, v = np.split(linear(x, w, f"{prefix}qkv"), 3, axis=-1)
    out, width = np.empty_like(q), SIZE // HEADS
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(width))
        out[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
    return linear(out, w, f"{prefix}proj")


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@clip_sizes
@given(clips=st.integers(1, 3), time=st.integers(2, 5), tokens=st.integers(1, 4), seed=st.integers(0, 99))
def test_temporal_attention_is_a_block_over_the_steps_of_each_token(clips, time, tokens, seed):
    module = random_module(TemporalAttention(VIT, time), seed)
    x, w = tokens_of(clips, time, tokens, SIZE, seed=seed), weights(module)
    expected = x.copy()
    for clip in range(clips):
        for token in range(tokens):
            steps = x[clip, :, token]
            steps = steps + attention(norm(steps, w, "block.norm1"), w, "block.attn.")
            hidden = gelu(linear(norm(steps, w, "block.norm2"), w, "block.mlp.fc1"))
            expected[clip, :, token] = steps + linear(hidden, w, "block.mlp.fc2")
    found = ours(module, x.reshape(-1, tokens, SIZE))
    np.testing.assert_allclose(found.reshape(x.shape), expected, rtol=1e-9, atol=1e-9)


@clip_sizes
@given(
    clips=st.integers(1, 3),
    time=st.integers(2, 5),
    tokens=st.integers(1, 4),
    kernel=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)
def test_a_dense_temporal_convolution_is_a_sum_over_taps(clips, time, tokens, kernel, seed):
    module = random_module(DenseTemporalConv(VIT, kernel, time), seed)
    x, w = tokens_of(clips, time, tokens, SIZE, seed=seed), weights(module)
    normed, taps = norm(x, w, "norm"), w["conv.weight"].reshape(SIZE, kernel, SIZE)
    expected = x + w["conv.bias"]
    for step in range(time):
        for tap in range(kernel):
            source = step + tap - kernel // 2
            if 0 <= source < time:
                expected[:, step] += normed[:, source] @ taps[:, tap].T
    found = ours(module, x.reshape(-1, tokens, SIZE))
    np.testing.assert_allclose(found.reshape(x.shape), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 1, 1), (1, 2, 2), (4, 1, 3)])
def test_a_dense_strided_convolution_is_torchs_own(stride):
    grid, clips = (4, 4, 6), 2
    module = random_module(DenseStridedConv(SIZE, grid, stride))
    x, w = tokens_of(clips, 4, 1 + 24, SIZE), weights(module)
    kernel = torch.from_numpy(w["conv.weight"].reshape(SIZE, *stride, SIZE)).permute(0, 4, 1, 2, 3)
    patches = torch.from_numpy(x[:, :, 1:]).reshape(clips, *grid, SIZE).permute(0, 4, 1, 2, 3)
    out = torch.nn.functional.conv3d(patches, kernel, torch.from_numpy(w["conv.bias"]), stride).permute(0, 2, 3, 4, 1)
    steps = grid[0] // stride[0]
    cls = linear(x[:, :, 0].reshape(clips, steps, -1), w, "cls")
    expected = np.concatenate([cls[:, :, None], out.reshape(clips, steps, -1, SIZE).numpy()], axis=2)
    found = ours(module, x.reshape(-1, 25, SIZE))
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)


def test_a_dense_strided_convolution_begins_as_the_mean():
    module = DenseStridedConv(SIZE, (4, 4, 4), (2, 2, 2)).double()
    x = tokens_of(1, 4, 17, SIZE)
    found = ours(module, x[0]).reshape(2, 5, SIZE)
    np.testing.assert_allclose(found[:, 0], x[0, :, 0].reshape(2, 2, SIZE).mean(1))
    blocks = x[0, :, 1:].reshape(2, 2, 2, 2, 2, 2, SIZE)
    np.testing.assert_allclose(found[:, 1:], blocks.mean((1, 3, 5)).reshape(2, 4, SIZE))


@clip_sizes
@given(clips=st.integers(1, 3), time=st.integers(1, 4), tokens=st.integers(1, 5), seed=st.integers(0, 99))
def test_spatio_temporal_attention_sees_all_tokens_of_a_clip(clips, time, tokens, seed):
    module = random_module(Attention(VIT, time), seed)
    x, w = tokens_of(clips, time, tokens, SIZE, seed=seed), weights(module)
    expected = np.stack([attention(clip.reshape(-1, SIZE), w, "").reshape(clip.shape) for clip in x])
    found = ours(module, x.reshape(-1, tokens, SIZE))
    np.testing.assert_allclose(found.reshape(x.shape), expected, rtol=1e-9, atol=1e-9)


@every_mixer
def test_clips_never_meet_and_frames_of_one_do(mixer):
    student = random_module(LiteFrame(msgspec.structs.replace(STUDENT, mixer=mixer))).eval()
    frames = tokens_of(8, 56, 56, 3)
    both = ours(student, frames)
    for clip in range(2):
        np.testing.assert_allclose(ours(student, frames[4 * clip : 4 * clip + 4])[0], both[clip], rtol=1e-9)
    changed = frames.copy()
    changed[3] += 1
    after = ours(student, changed)
    assert np.abs(after[0] - both[0]).max() > 1e-4
    np.testing.assert_allclose(after[1], both[1], rtol=1e-9)


@every_mixer
def test_only_without_a_mixer_frames_stay_alone_until_they_are_merged(mixer):
    student = random_module(LiteFrame(msgspec.structs.replace(STUDENT, mixer=mixer, downsampling=()))).eval()
    frames = tokens_of(4, 56, 56, 3)
    changed = frames.copy()
    changed[3] += 1
    moved = np.abs(ours(student, changed)[0] - ours(student, frames)[0]).max((1, 2)) > 1e-6
    assert moved.tolist() == [mixer != "none"] * 3 + [True]


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "spatio_temp_attn"])
def test_a_fresh_mixer_is_the_identity(mixer):
    torch.manual_seed(0)
    config = msgspec.structs.replace(STUDENT, mixer=mixer, downsampling=())
    student = LiteFrame(config).double()
    framewise = LiteFrame(msgspec.structs.replace(config, mixer="none")).double()
    found, missing = student.state_dict(), framewise.state_dict()
    framewise.load_state_dict({name: found[name] for name in missing})
    frames = tokens_of(4, 56, 56, 3)
    np.testing.assert_allclose(ours(student, frames), ours(framewise, frames), rtol=1e-12)


def test_mixers_stand_where_a_clip_has_more_than_one_time_step():
    for mixer in ("dw_temp_conv", "temp_conv", "temp_attn"):
        blocks = LiteFrame(msgspec.structs.replace(STUDENT, mixer=mixer)).vit.blocks
        assert [block.temporal.time_steps if block.temporal else 1 for block in blocks] == [4, 2, 1]
    blocks = LiteFrame(msgspec.structs.replace(STUDENT, mixer="spatio_temp_attn")).vit.blocks
    assert [block.attn.time_steps for block in blocks] == [4, 2, 1]
    assert all(block.temporal is None for block in blocks)


def test_an_unknown_mixer_is_refused():
    with pytest.raises(ValueError, match="mixer is 'lstm', expected one of dw_temp_conv, temp_conv, temp_attn"):
        LiteFrameConfig(mixer="lstm")


def test_a_config_written_before_there_were_mixers_is_liteframes():
    config = msgspec.json.decode(b'{"type": "liteframe", "temporal_kernel": 3}', type=LiteFrameConfig)
    assert config == LiteFrameConfig(mixer="dw_temp_conv")
