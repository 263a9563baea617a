"""The encoder graph: clips of frames in, visual tokens of the language model's width out.

    uint8 (clips, T, H, W, 3) -> normalise -> backbone -> reduce -> pixel shuffle -> MLP -> (clips, tokens, D_llm)

With a second connector for merged tokens (`merge_connector`) the features before the projector's MLP come out as well.

The backbone is the LiteFrame student, which compresses on its way, or a frame-wise ViT with a reducer behind it. Some
reducers leave no grid to shuffle: they come between pixel shuffle and MLP.
A clip leaves as `units` in time order: one for each time step that is left after compression.
"""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor, nn

from .liteframe import LiteFrame, LiteFrameConfig
from .merge import FeatureMerger, MergerConfig
from .projector import Projector
from .reducers import GRID_REDUCERS, REDUCERS, TOKEN_REDUCERS, GridReducer, TokenReducer
from .vit import VisionTransformer, ViTConfig, refuse_below_one

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EncoderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`reducer` applies to a ViT backbone only; the student has its compression inside. A grid method reduces
    `window`s, a token method by `ratio`, or if that is None by as much as `window` holds. `merge_connector`: merged
    tokens (ViLaMP) have an MLP of their own, from the features before the projector's."""

    backbone: ViTConfig | LiteFrameConfig
    output_size: int
    clip_length: int = 4
    reducer: str = "wap"
    window: tuple[int, int, int] = (4, 2, 2)
    ratio: int | None = None
    shuffle: int = 2
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    merge_connector: bool = False

    def __post_init__(self) -> None:
        refuse_below_one(
            output_size=self.output_size,
            clip_length=self.clip_length,
            window=min(self.window),
            ratio=self.ratio,
            shuffle=self.shuffle,
        )
        if isinstance(self.backbone, LiteFrameConfig) and self.clip_length != self.backbone.clip_length:
            raise ValueError(f"clip_length is {self.clip_length}, the backbone's is {self.backbone.clip_length}")
        if self.reducer not in REDUCERS:
            raise ValueError(f"reducer is {self.reducer!r}, expected one of {', '.join(REDUCERS)}")
        if self.ratio is not None and self.reducer not in TOKEN_REDUCERS:
            raise ValueError(
                f"ratio is {self.ratio}, which is for {', '.join(TOKEN_REDUCERS)}; {self.reducer} has a window"
            )

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
        self.reducer: GridReducer | TokenReducer | None = None
        if isinstance(config.backbone, LiteFrameConfig):
            self.backbone = LiteFrame(config.backbone)
            units, h, w = config.backbone.grids()[-1]
            size = config.backbone.head_size
        else:
            self.backbone = VisionTransformer(config.backbone)
            units, h, w = (config.clip_length, *config.backbone.grid)
            if config.reducer in GRID_REDUCERS:
                window = config.window if config.reducer != "none" else (1, 1, 1)
                self.reducer = GRID_REDUCERS[config.reducer]((units, h, w), window)
                units, h, w = self.reducer.grid
            size = config.backbone.hidden_size
        self.projector = Projector(size, config.output_size, (h, w), config.shuffle)
        self.tokens_per_clip = units * self.projector.tokens
        if config.reducer in TOKEN_REDUCERS and isinstance(config.backbone, ViTConfig):
            grid = h // config.shuffle, w // config.shuffle
            ratio = config.ratio if config.ratio is not None else math.prod(config.window)
            self.reducer = TOKEN_REDUCERS[config.reducer](config.clip_length, grid, config.shuffle, ratio)
            units, self.tokens_per_clip = self.reducer.units, self.reducer.tokens
        self.units_per_clip = units
        if config.merge_connector:
            merged = MergerConfig(self.tokens_per_clip, size * config.shuffle**2, config.output_size)
        else:
            merged = MergerConfig(self.tokens_per_clip, config.output_size)
        self.merger = FeatureMerger(merged)

    def dense(self, frames: Tensor) -> Tensor:
        """frames uint8 (clips, T, H, W, 3), RGB -> what the backbone says: of a ViT (clips, T, 1 + H'*W', C), of the
        student (clips, T', H'*W', C)"""
        features = self.backbone(self.images(frames))
        return features if self.reducer is None else features.reshape(-1, frames.shape[1], *features.shape[1:])

    def with_features(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What a FeatureMerger takes beside the visual tokens.

        frames uint8 (clips, T, H, W, 3), RGB -> visual tokens (clips, tokens_per_clip, D_llm), and with a
        `merge_connector` features (clips, tokens_per_clip, s*s*C), else the visual tokens again
        """
        features = self.compressed(frames)
        tokens = self.projector(features).reshape(-1, self.tokens_per_clip, self.config.output_size)
        if not self.config.merge_connector:
            return tokens, tokens
        return tokens, features.reshape(-1, self.tokens_per_clip, features.shape[-1])

    def compressed(self, frames: Tensor) -> Tensor:
        """frames uint8 (clips, T, H, W, 3), RGB -> what the projector's MLP takes, (units, tokens, s*s*C) or (clips,
        tokens, s*s*C)"""
        if isinstance(self.reducer, TokenReducer):
            return self._reduced(frames, self.reducer)
        features = self.dense(frames)
        if self.reducer is not None:
            features = self.reducer(features)
        return self.projector.gather(features.reshape(-1, *features.shape[2:]))

    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 (clips, T, H, W, 3), RGB -> visual tokens (clips, tokens_per_clip, D_llm)"""
        return self.with_features(frames)[0]

    def _reduced(self, frames: Tensor, reducer: TokenReducer) -> Tensor:
        """frames uint8 (clips, T, H, W, 3) -> tokens (clips, tokens_per_clip, s*s*C)"""
        seen: list[Tensor] = []
        features = self.backbone(self.images(frames), seen)
        q, k = seen
        tokens = self.projector.gather(features[:, 1:])
        return reducer(tokens.reshape(-1, frames.shape[1], *tokens.shape[1:]), q[:, 0], k)

    def images(self, frames: Tensor) -> Tensor:
        """frames uint8 (clips, T, H, W, 3) -> (clips * T, H, W, 3), normalised"""
        height, width = frames.shape[2:4]
        images = frames.to(self.mean.dtype).reshape(-1, height, width, 3)  # TensorRT wants the Cast right at the input
        return (images - self.mean) / self.std


class EncoderWithFeatures(VideoEncoder):
    """Another's modules under their own names; gives what `with_features` gives."""

    def __init__(self, encoder: VideoEncoder):
        nn.Module.__init__(self)
        vars(self).update(vars(encoder))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.with_features(frames)
