"""The encoder graph: clips of frames in, visual tokens of the language model's width out.

    uint8 (clips, T, H, W, 3) -> normalise -> backbone -> reduce -> pixel shuffle -> MLP -> (clips, tokens, D_llm)

With a second connector for merged tokens (`merge_connector`) the features before the projector's MLP come out as well:

    pixel shuffle -> (clips, tokens, s*s*C)

The backbone is the LiteFrame student, which compresses on its way, or a frame-wise ViT with a reducer behind it.
A clip leaves as `units` in time order: one for each time step that is left after compression.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from .liteframe import LiteFrame, LiteFrameConfig
from .merge import FeatureMerger, MergerConfig
from .projector import Projector
from .reducers import REDUCERS
from .vit import VisionTransformer, ViTConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`reducer` and `window` apply to a ViT backbone only; the student has its compression inside. `merge_connector`:
    merged tokens (ViLaMP) have an MLP of their own, from the features before the projector's."""

    backbone: ViTConfig | LiteFrameConfig
    output_size: int
    clip_length: int = 4
    reducer: str = "wap"
    window: tuple[int, int, int] = (4, 2, 2)
    shuffle: int = 2
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    merge_connector: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.backbone, LiteFrameConfig) and self.clip_length != self.backbone.clip_length:
            raise ValueError(f"clip_length is {self.clip_length}, the backbone's is {self.backbone.clip_length}")
        if self.reducer not in REDUCERS:
            raise ValueError(f"reducer is {self.reducer!r}, expected one of {', '.join(REDUCERS)}")

    @property
    def vit(self) -> ViTConfig:
        return self.backbone.vit if isinstance(self.backbone, LiteFrameConfig) else self.backbone


class VideoEncoder(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(config.mean) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std) * 255, persistent=False)
        self.backbone: nn.Module
        if isinstance(config.backbone, LiteFrameConfig):
            self.backbone, self.reducer = LiteFrame(config.backbone), None
            units, h, w = config.backbone.grids()[-1]
            size = config.backbone.head_size
        else:
            self.backbone = VisionTransformer(config.backbone)
            grid = (config.clip_length, *config.backbone.grid)
            self.reducer = REDUCERS[config.reducer](grid, config.window if config.reducer != "none" else (1, 1, 1))
            units, h, w = self.reducer.grid
            size = config.backbone.hidden_size
        self.units_per_clip = units
        self.projector = Projector(size, config.output_size, (h, w), config.shuffle)
        self.tokens_per_clip = units * self.projector.tokens
        if config.merge_connector:
            merged = MergerConfig(self.tokens_per_clip, size * config.shuffle**2, config.output_size)
        else:
            merged = MergerConfig(self.tokens_per_clip, config.output_size)
        self.merger = FeatureMerger(merged)

    def dense(self, frames: Tensor) -> Tensor:
        """frames uint8 (clips, T, H, W, 3), RGB -> what the backbone says: of a ViT (clips, T, 1 + H'*W', C), of the
        student (clips, T', H'*W', C)"""
        clip_length, height, width = frames.shape[1:4]
        images = frames.to(self.mean.dtype).reshape(-1, height, width, 3)  # TensorRT wants the Cast right at the input
        images = (images - self.mean) / self.std
        features = self.backbone(images)
        return features if self.reducer is None else features.reshape(-1, clip_length, *features.shape[1:])

    def with_features(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What a FeatureMerger takes beside the visual tokens.

        frames uint8 (clips, T, H, W, 3), RGB -> visual tokens (clips, tokens_per_clip, D_llm), and with a
        `merge_connector` features (clips, tokens_per_clip, s*s*C), else the visual tokens again
        """
        features = self.dense(frames)
        if self.reducer is not None:
            features = self.reducer(features)
        features = self.projector.gather(features.reshape(-1, *features.shape[2:]))
        tokens = self.projector.project(features).reshape(-1, self.tokens_per_clip, self.config.output_size)
        if not self.config.merge_connector:
            return tokens, tokens
        return tokens, features.reshape(-1, self.tokens_per_clip, features.shape[-1])

    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 (clips, T, H, W, 3), RGB -> visual tokens (clips, tokens_per_clip, D_llm)"""
        return self.with_features(frames)[0]


class EncoderWithFeatures(VideoEncoder):
    """Another's modules under their own names; gives what `with_features` gives."""

    def __init__(self, encoder: VideoEncoder):
        nn.Module.__init__(self)
        vars(self).update(vars(encoder))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.with_features(frames)
