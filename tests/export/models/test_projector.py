"""The projector against InternVL's in transformers."""

import pytest
import torch
from liteframe.export.models.projector import Projector, pixel_shuffle
from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, Qwen2Config
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

NAMES = {"norm": "layer_norm", "fc1": "linear_1", "fc2": "linear_2"}


def random_tokens(rows, columns, channels):
    return torch.randn(3, rows * columns, channels, generator=torch.Generator().manual_seed(0))


def internvl_shuffle(tokens, rows, columns):
    """As InternVLModel.get_image_features does it; the method needs nothing of its model."""
    squares = InternVLModel.pixel_shuffle(None, tokens.unflatten(1, (rows, columns)), scale_factor=0.5)
    return squares.flatten(1, 2)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 6), (2, 8)])
def test_pixel_shuffle_is_internvls(rows, columns):
    tokens = random_tokens(rows, columns, 5 * 4)
    expected = internvl_shuffle(tokens, rows, columns)
    assert torch.equal(pixel_shuffle(tokens, (rows, columns), 2), expected)


def test_projector_is_internvls():
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(hidden_size=12, num_attention_heads=2),
        text_config=Qwen2Config(hidden_size=20, num_attention_heads=2, num_key_value_heads=2),
    )
    theirs, ours = InternVLMultiModalProjector(config), Projector(12, 20, (4, 6), 2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    weights = theirs.state_dict()
    ours.load_state_dict({f"{o}.{p}": weights[f"{t}.{p}"] for o, t in NAMES.items() for p in ("weight", "bias")})
    tokens = random_tokens(4, 6, 12) / 100  # so small that the LayerNorm's epsilon shows
    with torch.no_grad():
        got, expected = ours(ours.gather(tokens)), theirs(internvl_shuffle(tokens, 4, 6))
    assert got.shape == (3, ours.tokens, 20)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("grid", [(3, 4), (4, 3)])
def test_a_shuffle_that_does_not_divide_the_grid_is_refused(grid):
    with pytest.raises(ValueError, match="does not divide"):
        Projector(12, 20, grid, 2)
