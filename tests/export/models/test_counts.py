"""Parameters and compute of the paper's encoders (Table 2), counted by torch and not by hand."""

import re
from pathlib import Path

import msgspec
import pytest
import torch
from liteframe.export.models.encoder import VideoEncoder
from liteframe.export.models.liteframe import MIXERS, LiteFrameConfig
from liteframe.export.models.variants import FRAMES, VARIANTS
from liteframe.export.models.vit import VisionTransformer, ViTConfig
from torch.utils.flop_counter import FlopCounterMode

LAYERS = ("mm", "addmm", "convolution")
ATTENTION_PRODUCTS = ("bmm", "baddbmm", "attention")
PAGE = (Path(__file__).parents[3] / "docs/variants.md").read_text()


def flops_by_operator(encoder, frames):
    """Floating-point operations of one pass, by the name of the aten operator."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(frames)
    return {
        str(operator).removeprefix("aten."): flops for operator, flops in counter.get_flop_counts()["Global"].items()
    }


def tera_flops(module, frames):
    """Of FRAMES frames, without attention's products."""
    flops = flops_by_operator(module, frames)
    layers = {operator: n for operator, n in flops.items() if operator in LAYERS}
    assert all(any(word in operator for word in ATTENTION_PRODUCTS) for operator in flops.keys() - layers.keys())
    return sum(layers.values()) * FRAMES / 4 / 1e12


def backbone_of(name):
    with torch.device("meta"):
        return VideoEncoder(VARIANTS[name].encoder(896)).backbone


@pytest.fixture(scope="module")
def counted():
    """Variant -> parameters, TFLOP."""
    made = {}
    for name in VARIANTS:
        backbone = backbone_of(name)
        parameters = sum(p.numel() for p in backbone.parameters())
        made[name] = parameters, tera_flops(backbone, torch.empty(4, 448, 448, 3, device="meta"))
    return made


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("DWTempConv", 87_149_824), ("ViT-L-24L", 304_012_288), ("TempAttn", 143_828_224), ("TempConv", 109_535_488)],
)
def test_parameters_are_those_of_the_paper(counted, name, parameters):
    assert counted[name][0] == parameters
    assert f"{parameters / 1e6:.2f}" == f"{VARIANTS[name].paper.parameters_m:.2f}"


@pytest.mark.parametrize("name", ["DWTempConv", "ViT-L-24L", "TempConv", "SpatioTempAttn"])
def test_compute_of_256_frames_is_that_of_the_paper(counted, name):
    assert f"{counted[name][1]:.2f}" == f"{VARIANTS[name].paper.tflop:.2f}"


def test_temporal_attention_has_the_papers_compute_without_the_blocks_at_two_time_steps(counted):
    blocks = backbone_of("TempAttn").vit.blocks
    assert [block.temporal.time_steps if block.temporal else 1 for block in blocks] == [4] * 4 + [2] * 4 + [1] * 4
    frames = torch.empty(2, 1 + 16 * 16, 768, device="meta")
    left_out = sum(tera_flops(block.temporal, frames) for block in blocks[4:8])
    assert f"{counted['TempAttn'][1] - left_out:.2f}" == f"{VARIANTS['TempAttn'].paper.tflop:.2f}"


def test_vit_b_has_the_papers_figures_without_the_head(counted):
    head, paper = backbone_of("ViT-B-12L").head, VARIANTS["ViT-B-12L"].paper
    parameters, tera = counted["ViT-B-12L"]
    parameters -= sum(p.numel() for p in head.parameters())
    tera -= tera_flops(head, torch.empty(4, 1024, 768, device="meta"))
    assert parameters == 86_313_216 and (f"{parameters / 1e6:.2f}", f"{tera:.2f}") == ("86.31", "44.81")
    assert (paper.parameters_m, paper.tflop) == (86.31, 44.81)
    with torch.device("meta"):
        vit = VisionTransformer(LiteFrameConfig().vit)
    assert sum(p.numel() for p in vit.parameters()) == parameters


def test_joint_attention_lacks_eight_depthwise_convolutions_of_the_papers_parameters(counted):
    paper = VARIANTS["SpatioTempAttn"].paper.parameters_m
    assert f"{(counted['SpatioTempAttn'][0] + 8 * 768 * (3 + 1)) / 1e6:.2f}" == f"{paper:.2f}"


def test_spatial_compression_leaves_sixteen_tokens_a_frame():
    with torch.device("meta"):
        encoder = VideoEncoder(VARIANTS["Spatial16x"].encoder(896))
    assert encoder.units_per_clip == 4 and encoder.tokens_per_clip == 4 * 16


def test_the_page_has_what_is_counted_beside_the_papers_figures(counted):
    def shown(number, digits):
        return "" if number is None else f"{number:.{digits}f}" if digits else f"{number:g}"

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows if row[0] in VARIANTS}
    assert list(table) == list(VARIANTS)
    for name, (config, parameters, papers_m, tera, papers_tera, papers_ms) in table.items():
        variant = VARIANTS[name]
        assert (parameters, tera) == (f"{counted[name][0] / 1e6:.2f}", f"{counted[name][1]:.2f}"), name
        digits = 2 if variant.paper is not None and variant.paper.table == "Table 2" else 0
        paper = variant.paper and (variant.paper.parameters_m, variant.paper.tflop, variant.paper.a100_ms)
        assert [papers_m, papers_tera, papers_ms] == [shown(x, digits) for x in paper or [None] * 3], name
        if isinstance(variant.backbone, ViTConfig):
            assert config == "`ViTConfig()`"
        else:
            strides = [f"{d.after}: {list(d.stride)}" for d in variant.backbone.downsampling]
            assert config == f"`{variant.backbone.mixer}`; {', '.join(strides) or 'none'}"


def test_the_page_says_what_each_variant_assumes():
    text = " ".join(PAGE.split())
    for name, variant in VARIANTS.items():
        assert f"- **{name}**: {variant.assumed}" in text


def test_variants_survive_being_written_down():
    for variant in VARIANTS.values():
        config = variant.encoder(896)
        assert msgspec.json.decode(msgspec.json.encode(config), type=type(config)) == config


def test_the_page_names_every_mixer():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.split("## What the mixers do")[1], re.M)[1:]
    assert rows == list(MIXERS)


def test_the_flop_counter_sees_a_depthwise_convolution_as_one_channel_wide():
    channels, steps, taps = 8, 5, 3
    conv = torch.nn.Conv1d(channels, channels, taps, padding=1, groups=channels, device="meta")
    flops = flops_by_operator(conv, torch.empty(2, channels, steps, device="meta"))
    assert flops == {"convolution": 2 * 2 * channels * steps * taps}
