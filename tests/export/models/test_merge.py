"""Feature merging against reference arrays and against the published equations in NumPy, in double precision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from liteframe.export.models.encoder import EncoderConfig, EncoderWithFeatures, VideoEncoder
from liteframe.export.models.liteframe import Downsampling, LiteFrameConfig
from liteframe.export.models.merge import FeatureMerger, MergerConfig
from liteframe.export.models.projector import Projector
from liteframe.export.models.vit import ViTConfig

REFERENCES = np.load(Path(__file__).parents[2] / "references" / "feature_merging.npz")
VIT = ViTConfig(image_size=(56, 56), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
BACKBONES = {
    "student": LiteFrameConfig(vit=VIT, downsampling=(Downsampling(1, (2, 2, 2)),), head_size=12),
    "tower": VIT,
}


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms else 0.0


def merged(features, query, key, redundancy_weight, temperature):
    """Equations 5-10 for one clip (P, C), patch by patch, in double precision: weights, token."""
    features, query, key = (np.asarray(x, np.float64) for x in (features, query, key))
    saliency = [cosine(p, query) - redundancy_weight * cosine(p, q) for p, q in zip(features, key, strict=True)]
    weights = np.exp((np.array(saliency) - max(saliency)) / temperature)
    weights /= weights.sum()
    return weights, weights @ features


def call(method, features, query, key, redundancy_weight, temperature, dtype=np.float32):
    """A merger's `weights` or itself, for clips (clips, P, C)."""
    arrays = features, query[None], key[None], [redundancy_weight], [temperature]
    with torch.no_grad():
        return method(*(torch.from_numpy(np.asarray(array, dtype)) for array in arrays)).numpy()


@pytest.fixture
def merger():
    return lambda features: FeatureMerger(MergerConfig(*features.shape[1:]))


@st.composite
def cases(draw):
    """Clips, query and keyframe with zero vectors among them, redundancy weight, temperature."""
    clips, patches, width = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    features, key = rng.standard_normal((clips, patches, width)), rng.standard_normal((patches, width))
    features[rng.random((clips, patches)) < 0.2] = 0
    key[rng.random(patches) < 0.2] = 0
    scale = 10.0 ** draw(st.integers(-3, 3))
    redundancy_weight, temperature = draw(st.floats(0, 2)), draw(st.sampled_from([0.01, 0.1, 1.0]))
    arrays = (x.astype(np.float32) for x in (features * scale, rng.standard_normal(width), key))
    return *arrays, redundancy_weight, temperature


# references


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("video", ["a", "b"])
def test_tokens_and_weights_are_the_references(merger, video, dtype, tolerance):
    features, query, key_of, redundancy_weight, temperature, tokens, weights = (
        REFERENCES[f"{video}_{name}"]
        for name in ("features", "query", "key_of", "redundancy_weight", "temperature", "tokens", "weights")
    )
    module = merger(features)
    for frame, key in zip(range(len(features)), key_of, strict=True):
        key_features = features[key] if key >= 0 else np.zeros_like(features[0])
        given_ = features[frame : frame + 1], query, key_features, redundancy_weight, temperature
        np.testing.assert_allclose(call(module, *given_, dtype)[0], tokens[frame], rtol=0, atol=tolerance)
        np.testing.assert_allclose(call(module.weights, *given_, dtype)[0], weights[frame], rtol=0, atol=tolerance)


def test_without_a_norm_the_connector_is_the_references():
    """Equation 11 names no LayerNorm; with that left out the rest is the reference's."""
    tokens, connected = REFERENCES["connector_tokens"], REFERENCES["connector_connected"]
    others = REFERENCES["connector_is_key"] == 0
    connector = FeatureMerger(MergerConfig(49, 10, 12)).connector.double()
    names = "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"
    state = {name: torch.from_numpy(REFERENCES[f"connector_{name.replace('.', '_')}"]).double() for name in names}
    connector.load_state_dict(state, strict=False)
    connector.norm = torch.nn.Identity()
    with torch.no_grad():
        got = connector(torch.from_numpy(tokens[others])).numpy()
    np.testing.assert_allclose(got, connected, rtol=0, atol=1e-12)


# properties


@given(cases())
def test_tokens_are_the_equations(case):
    features, query, key, redundancy_weight, temperature = case
    module = FeatureMerger(MergerConfig(*features.shape[1:]))
    tokens, weights = call(module, *case), call(module.weights, *case)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-5)
    for clip, token, weight in zip(features, tokens, weights, strict=True):
        expected_weight, expected = merged(clip, query, key, redundancy_weight, temperature)
        np.testing.assert_allclose(weight, expected_weight, rtol=0, atol=1e-4)  # at 0.01 a hundredfold rounding
        np.testing.assert_allclose(token, expected, rtol=0, atol=1e-4 * max(1e-6, np.abs(clip).max()))


@given(cases())
def test_a_keyframe_of_zeros_is_no_redundancy(case):
    features, query, key, _, temperature = case
    module = FeatureMerger(MergerConfig(*features.shape[1:]))
    none = call(module, features, query, np.zeros_like(key), 1.7, temperature)
    np.testing.assert_array_equal(none, call(module, features, query, key, 0.0, temperature))


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_patches_does_not_matter(case, random):
    features, query, key, redundancy_weight, temperature = case
    order = [*range(len(key))]
    random.shuffle(order)
    module = FeatureMerger(MergerConfig(*features.shape[1:]))
    got = call(module, features[:, order], query, key[order], redundancy_weight, temperature)
    expected = call(module, features, query, key, redundancy_weight, temperature)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * max(1e-6, np.abs(features).max()))


def test_extremes_do_not_overflow(merger):
    features = np.array([[[1, 0], [-1, 0], [0, 0]]], np.float32)
    token = call(merger(features), features, features[0, 0], -features[0], 1.0, 0.01)  # saliencies 2, 0, 0
    np.testing.assert_allclose(token, [[1, 0]])
    token = call(merger(features), features, np.zeros(2, np.float32), np.zeros_like(features[0]), 1.0, 0.01)
    np.testing.assert_allclose(token, [[0, 0]], atol=1e-7)  # nothing to go by: the mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_merged_in_single(dtype):
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(2, 5, 300, generator=generator) * 100).to(dtype)  # squares leave FP16
    query, key = torch.randn(1, 300, generator=generator), torch.randn(1, 5, 300, generator=generator)
    module, numbers = FeatureMerger(MergerConfig(5, 300)), (torch.tensor([1.0]), torch.tensor([0.01]))
    got = module(features, query.to(dtype), key.to(dtype), *numbers)
    assert got.dtype == dtype
    assert torch.equal(
        got, module(features.float(), query.to(dtype).float(), key.to(dtype).float(), *numbers).to(dtype)
    )


# with the encoder


def encoder_of(backbone, merge_connector):
    torch.manual_seed(0)
    encoder = VideoEncoder(
        EncoderConfig(backbone=BACKBONES[backbone], output_size=20, merge_connector=merge_connector)
    ).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_are_what_the_projectors_mlp_takes(backbone):
    encoder = encoder_of(backbone, merge_connector=True)
    frames = torch.randint(0, 256, (3, 4, 56, 56, 3), dtype=torch.uint8)
    size = {"student": 12, "tower": 16}[backbone]
    with torch.no_grad():
        tokens, features = encoder.with_features(frames)
        assert torch.equal(encoder(frames), tokens)
        assert features.shape == (3, encoder.tokens_per_clip, 4 * size)
        torch.testing.assert_close(encoder.projector(features), tokens)
        assert all(map(torch.equal, EncoderWithFeatures(encoder)(frames), (tokens, features)))
    assert encoder.merger.config == MergerConfig(encoder.tokens_per_clip, 4 * size, 20)
    assert isinstance(encoder.merger.connector, Projector)
    shapes = [
        {name: p.shape for name, p in m.named_parameters()} for m in (encoder.projector, encoder.merger.connector)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_a_second_connector_visual_tokens_are_merged(backbone):
    encoder = encoder_of(backbone, merge_connector=False)
    tokens, features = encoder.with_features(torch.zeros(1, 4, 56, 56, 3, dtype=torch.uint8))
    assert features is tokens
    assert encoder.merger.config == MergerConfig(encoder.tokens_per_clip, 20)
    assert not [*encoder.merger.parameters()]
