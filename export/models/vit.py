"""Vision transformers: InternViT-300M, CLIP's and DINOv2's towers, which see one frame at a time.

    frames (F, H, W, 3) --PatchEmbedding--> (F, N, C) --+ CLS, + position--> (F, 1+N, C) --blocks--> (F, 1+N, C)

Block:  x + ls1 * attention(norm1(x));  x + temporal_conv(x), where there is one;  x + ls2 * mlp(norm2(x))
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import scaled_dot_product_attention

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
NORMS = ("layer_norm", "rms_norm")


def refuse_below_one(**sizes: int | None) -> None:
    """Raises ValueError with the name and value of a size that is below 1; None is not given."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}, expected 1 or more")


class ViTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="vit"):
    """Shape of a vision transformer; the defaults are InternViT-300M-448px (the paper's teacher)."""

    image_size: tuple[int, int] = (448, 448)
    patch_size: int = 14
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    activation: str = "gelu"
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    patch_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = True
    pre_norm: bool = False
    final_norm: bool = False
    pretrained_image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for value, allowed, field in (
            (self.activation, ACTIVATIONS, "activation"),
            (self.norm, NORMS, "norm"),
        ):
            if value not in allowed:
                raise ValueError(f"{field} is {value!r}, expected one of {', '.join(allowed)}")
        refuse_below_one(
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        for size in (self.image_size, self.pretrained_image_size or self.image_size):
            if any(side <= 0 or side % self.patch_size for side in size):
                raise ValueError(f"image size {size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


class PatchEmbedding(nn.Module):
    """Cuts frames into patches and projects each: a convolution whose stride is its kernel, done as one matrix product.

    The product keeps the channels-last layout that frames arrive in, so no transpose of the whole image is needed.
    """

    def __init__(self, patch_size: int, hidden_size: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (F, H, W, 3) -> (F, H/p * W/p, C)"""
        height, width = frames.shape[1:3]
        p = self.weight.shape[-1]
        patches = frames.reshape(-1, height // p, p, width // p, p, 3).permute(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(-1, (height // p) * (width // p), p * p * 3)
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).reshape(self.weight.shape[0], -1), self.bias)


def build_norm(kind: str, size: int, eps: float) -> nn.Module:
    return nn.LayerNorm(size, eps=eps) if kind == "layer_norm" else nn.RMSNorm(size, eps=eps)


class Attention(nn.Module):
    """`time_steps` frames of a clip see each other, each token all tokens of all of them; 1: a frame sees itself."""

    def __init__(self, config: ViTConfig, time_steps: int = 1):
        super().__init__()
        size = config.hidden_size
        self.time_steps = time_steps
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """x (F, N, C) -> (F, N, C); the frames of a clip are consecutive in F. `seen` takes q and k, all heads as one
        (F, N, C)."""
        tokens, size = x.shape[1:]
        together = self.time_steps * tokens
        if together > tokens:
            x = x.reshape(-1, together, size)
        q, k, v = self.qkv(x).split(size, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        if seen is not None:
            seen += [q, k]
        q, k, v = (t.reshape(-1, together, self.num_heads, size // self.num_heads).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v)
        out = self.proj(out.transpose(1, 2).reshape(-1, together, size))
        return out.reshape(-1, tokens, size) if together > tokens else out


class MLP(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.fc2(x)


class LayerScale(nn.Module):
    def __init__(self, size: int, initial: float = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """A pre-norm block. `temporal` mixes the frames of a clip, token by token, after the spatial attention; what it
    returns has its residual connection inside. `time_steps` is the attention's."""

    def __init__(self, config: ViTConfig, temporal: nn.Module | None = None, time_steps: int = 1):
        super().__init__()
        size = config.hidden_size
        self.norm1 = build_norm(config.norm, size, config.norm_eps)
        self.attn = Attention(config, time_steps)
        self.ls1 = LayerScale(size) if config.layer_scale else nn.Identity()
        self.temporal = temporal
        self.norm2 = build_norm(config.norm, size, config.norm_eps)
        self.mlp = MLP(config)
        self.ls2 = LayerScale(size) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """x (F, N, C) -> (F, N, C); the frames of a clip are consecutive in F. `seen` takes the attention's q and k."""
        x = x + self.ls1(self.attn(self.norm1(x), seen))
        if self.temporal is not None:
            x = self.temporal(x)
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Of blocks, by their index: `temporal` names those that get a temporal mixer, `time_steps` those whose attention
    sees several frames at once, and how many."""

    def __init__(
        self,
        config: ViTConfig,
        temporal: dict[int, nn.Module] | None = None,
        time_steps: dict[int, int] | None = None,
    ):
        super().__init__()
        self.config = config
        size, (rows, columns) = config.hidden_size, config.grid
        self.patch_embedding = PatchEmbedding(config.patch_size, size, config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(size))
        self.position_embedding = nn.Parameter(torch.empty(1 + rows * columns, size))
        nn.init.normal_(self.position_embedding, std=0.02)
        self.pre_norm = build_norm(config.norm, size, config.norm_eps) if config.pre_norm else nn.Identity()
        temporal, time_steps = temporal or {}, time_steps or {}
        self.blocks = nn.ModuleList(
            Block(config, temporal.get(i), time_steps.get(i, 1)) for i in range(config.num_hidden_layers)
        )
        self.final_norm = build_norm(config.norm, size, config.norm_eps) if config.final_norm else nn.Identity()

    def embed(self, frames: Tensor) -> Tensor:
        """frames (F, H, W, 3), normalised -> tokens (F, 1+N, C)"""
        patches = self.patch_embedding(frames)
        cls = self.class_token.expand(patches.shape[0], 1, -1)
        return self.pre_norm(torch.cat([cls, patches], dim=1) + self.position_embedding)

    def forward(self, frames: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        """frames (F, H, W, 3), normalised -> tokens (F, 1+N, C), CLS first; `seen` takes q and k (F, 1+N, C) of the
        last block's attention."""
        x = self.embed(frames)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x = block(x, seen if number == last else None)
        return self.final_norm(x)


def interpolate_position_embedding(embedding: Tensor, old_grid: Sequence[int], new_grid: Sequence[int]) -> Tensor:
    """Resamples a learned position embedding (1+N, C) bicubically from one patch grid to another; CLS stays.

    As in DINO and InternVL: `align_corners=False`, no antialiasing.
    """
    rows, columns = old_grid
    patches = embedding[1:].T.reshape(1, -1, rows, columns)
    patches = F.interpolate(patches, size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:1], patches.flatten(2)[0].T])
