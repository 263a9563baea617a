"""The encoders of the paper's Tables 2 and 7 at full size, each a configuration of the code here, beside its figures.

    VARIANTS["TempAttn"].encoder(output_size=896)   ->  EncoderConfig
    VARIANTS["TempAttn"].paper                      ->  what the paper measured

docs/variants.md has our counts beside the paper's, and what was assumed where the paper's text leaves a form open.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from .encoder import EncoderConfig
from .liteframe import Downsampling, LiteFrameConfig
from .vit import ViTConfig

FRAMES = 256  # of the paper's latency and compute
STUDENT = LiteFrameConfig()


@dataclass(frozen=True)
class PaperFigures:
    """Of one encoder and FRAMES frames, as printed.

    Attributes:
        table: where.
        a100_ms: median latency on one A100-80GB, 100 runs after 40.
        tflop: compute, without attention's products.
        parameters_m: millions of parameters.
    """

    table: str
    a100_ms: float
    tflop: float | None
    parameters_m: float


@dataclass(frozen=True)
class Variant:
    """
    Attributes:
        backbone: its configuration.
        paper: None where the paper has no such row.
        assumed: what the paper leaves open and how our figures differ from its own, in a sentence or two.
    """

    backbone: LiteFrameConfig | ViTConfig
    paper: PaperFigures | None
    assumed: str

    def encoder(self, output_size: int) -> EncoderConfig:
        """With the projector for a language model so wide, and without a reducer behind a ViT."""
        if isinstance(self.backbone, ViTConfig):
            return EncoderConfig(backbone=self.backbone, output_size=output_size, reducer="none", window=(1, 1, 1))
        return EncoderConfig(backbone=self.backbone, output_size=output_size)


def _student(mixer: str, downsampling: tuple[Downsampling, ...] = STUDENT.downsampling) -> LiteFrameConfig:
    return msgspec.structs.replace(STUDENT, mixer=mixer, downsampling=downsampling)


VARIANTS: dict[str, Variant] = {
    "ViT-L-24L": Variant(
        ViTConfig(),
        PaperFigures("Table 2", 1043.33, 158.80, 304.01),
        "Nothing: the teacher, 256 tokens a frame.",
    ),
    "ViT-B-12L": Variant(
        _student("none", ()),
        PaperFigures("Table 2", 338.01, 44.81, 86.31),
        "The table counts no head. Ours has the student's, 768 to 1024 on each patch, so that the teacher's projector "
        "fits behind it; without it our figures are 86.31 M and 44.81 TFLOP.",
    ),
    "TempAttn": Variant(
        _student("temp_attn"),
        PaperFigures("Table 2", 348.29, 32.77, 143.83),
        "A whole block (attention, MLP, two norms, no layer scale) over time after the spatial attention of each of "
        "blocks 1-8 gives the table's parameters. Its compute is that of four of the eight, those of blocks 1-4 at "
        "four time steps: without the other four ours is 32.77 TFLOP too. Here all eight run.",
    ),
    "SpatioTempAttn": Variant(
        _student("spatio_temp_attn"),
        PaperFigures("Table 2", 204.35, 17.92, 87.15),
        "In blocks 1-8 the block's own attention runs over all tokens of all time steps, with no parameters of its "
        "own. The table's 87.15 M comes out with LiteFrame's eight depth-wise convolutions counted too, 0.02 M; Table "
        "5 marks this row as without them, so ours has none.",
    ),
    "TempConv": Variant(
        _student("temp_conv"),
        PaperFigures("Table 2", 202.08, 22.44, 109.54),
        "Convolutions from all channels to all, both for mixing (3 taps, norm before, in blocks 1-8) and for "
        "down-sampling (kernels as large as the strides; CLS has one of its own over time): parameters and compute "
        "are the table's at once.",
    ),
    "DWTempConv": Variant(
        STUDENT,
        PaperFigures("Table 2", 174.84, 17.92, 87.15),
        "Nothing: LiteFrame itself. Kernel sizes are derived from the parameters.",
    ),
    "NoMixing": Variant(
        _student("none"),
        None,
        "Not in the paper: LiteFrame without its temporal convolutions. Frames meet in the strided ones only.",
    ),
    "Spatial16x": Variant(
        _student("none", (Downsampling(4, (1, 2, 2)), Downsampling(8, (1, 2, 2)))),
        PaperFigures("Table 7", 185.2, None, 86),
        "The paper says spatial pooling inside, and a 4 x 4 grid left of a frame; here LiteFrame's strided "
        "convolutions without their time stride, after the same blocks. Its table counts no head (86 M), and no TFLOP; "
        "its latency is from another run than Table 2's, in which LiteFrame takes 204.0 ms.",
    ),
}
