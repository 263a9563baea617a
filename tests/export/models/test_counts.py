"""Parameters and compute of the paper's encoders (Table 2), counted by torch and not by hand."""

import pytest
import torch
from liteframe.export.models.liteframe import LiteFrame, LiteFrameConfig
from liteframe.export.models.vit import VisionTransformer, ViTConfig
from torch.utils.flop_counter import FlopCounterMode

VIT_B = ViTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
ENCODERS = {
    "student": lambda: LiteFrame(LiteFrameConfig()),
    "teacher": lambda: VisionTransformer(ViTConfig()),
    "vit_b": lambda: VisionTransformer(VIT_B),
}
LAYERS = ("mm", "addmm", "convolution")
ATTENTION_PRODUCTS = ("bmm", "baddbmm", "attention")


def flops_by_operator(encoder, frames):
    """Floating-point operations of one pass, by the name of the aten operator."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(frames)
    return {
        str(operator).removeprefix("aten."): flops for operator, flops in counter.get_flop_counts()["Global"].items()
    }


@pytest.mark.parametrize(
    ("name", "parameters"), [("student", 87_149_824), ("teacher", 304_012_288), ("vit_b", 86_313_216)]
)
def test_parameters_are_those_of_the_paper(name, parameters):
    with torch.device("meta"):
        encoder = ENCODERS[name]()
    assert sum(p.numel() for p in encoder.parameters()) == parameters


@pytest.mark.parametrize(("name", "tera"), [("student", "17.92"), ("teacher", "158.80"), ("vit_b", "44.81")])
def test_compute_of_256_frames_is_that_of_the_paper(name, tera):
    with torch.device("meta"):
        flops = flops_by_operator(ENCODERS[name](), torch.empty(4, 448, 448, 3))
    layers = {operator: n for operator, n in flops.items() if operator in LAYERS}
    assert all(any(word in operator for word in ATTENTION_PRODUCTS) for operator in flops.keys() - layers.keys())
    assert f"{sum(layers.values()) * 64 / 1e12:.2f}" == tera


def test_the_flop_counter_sees_a_depthwise_convolution_as_one_channel_wide():
    channels, steps, taps = 8, 5, 3
    conv = torch.nn.Conv1d(channels, channels, taps, padding=1, groups=channels, device="meta")
    flops = flops_by_operator(conv, torch.empty(2, channels, steps, device="meta"))
    assert flops == {"convolution": 2 * 2 * channels * steps * taps}
