"""The encoder that benchmarks at full size share."""

from __future__ import annotations

import torch
from liteframe.export.models.encoder import EncoderConfig, VideoEncoder
from liteframe.export.models.liteframe import LiteFrameConfig


def random_encoder(output_size: int = 896) -> VideoEncoder:
    """LiteFrame-B for 4 x 448 x 448 and a language model `output_size` wide; the same random weights each time, none
    zero."""
    torch.manual_seed(0)
    encoder = VideoEncoder(EncoderConfig(backbone=LiteFrameConfig(), output_size=output_size)).eval()
    for parameter in encoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return encoder
