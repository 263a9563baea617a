"""What LiteFrame is compared with and is not made of modules of ours: FastVLM's encoder, and the figures that the paper
prints."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

PAPERS = "paper, A100"
NO_TIMM = "timm is not installed: pip install 'liteframe[bench]'"


@dataclass(frozen=True)
class PaperFigures:
    """A row of the LiteFrame paper, measured there on one A100-80GB with an LLM of 7 to 8 billion parameters.

    Attributes:
        tokens_per_frame: visual ones; None where the paper does not say.
        vision_ms, llm_ms, total_ms: None where the paper does not say.
        accuracy: percent, the mean of the paper's video benchmarks.
        note: what the milliseconds hold beside the vision encoder and the LLM.
    """

    name: str
    table: str
    frames: int
    tokens_per_frame: int | None
    vision_ms: float | None
    llm_ms: float | None
    total_ms: float | None
    accuracy: float | None
    note: str = ""


PAPER = (
    PaperFigures("InternVL3-8B", "Table 3", 8, 256, 40.0, 167.3, 208.4, 59.0),
    PaperFigures("InternVL3-8B + FastVID", "Table 3", 32, 16, 161.7, 63.0, 224.8, 59.5),
    PaperFigures("InternVL3-8B + LiteFrame", "Table 3", 64, 16, 54.8, 94.9, 150.1, 61.1),
    PaperFigures("InternVL3-8B", "Table 3", 32, 256, 144.5, 669.8, 814.5, 65.3),
    PaperFigures("InternVL3-8B + FastVID", "Table 3", 128, 16, 625.8, 168.9, 794.9, 62.9),
    PaperFigures("InternVL3-8B + LiteFrame", "Table 3", 256, 16, 204.0, 327.4, 532.3, 65.7),
    PaperFigures("FastVLM", "Table 4", 32, 49, 98.3, 132.9, 231.5, 47.6),
    PaperFigures("Video-Panda", "Table 4", 32, 272, 36.5, 345.7, 382.4, 49.2),
    PaperFigures("LiteFrame", "Table 4", 32, 16, 30.1, 61.5, 91.9, 58.0),
    PaperFigures("NVILA-8B-Video", "Figure 7", 32, None, 451.0, 329.9, 780.8, 63.1),
    PaperFigures(
        "NVILA-8B-Video + AutoGaze",
        "Figure 7",
        256,
        None,
        5567.0,
        539.5,
        6106.5,
        63.1,
        "vision: AutoGaze 2961.4, ViT 2605.6",
    ),
)


class FastVLMEncoder(nn.Module):
    """FastVLM's encoder, frame by frame, with random weights: a FastViT of timm's and the two-layer MLP behind it.

    timm's `fastvit_mci3` has the layers of FastViTHD, 125 M parameters; every 64 x 64 pixels become a token. Its
    branches are merged, as for inference.

    Raises:
        ImportError: timm is not installed.
    """

    def __init__(self, name: str, image_size: tuple[int, int], clip_length: int, output_size: int):
        super().__init__()
        self.backbone = import_timm().create_model(name, num_classes=0, inference_mode=True)
        self.stride = self.backbone.feature_info[-1]["reduction"]
        rows, columns = (-(-side // self.stride) for side in image_size)
        self.units_per_clip = clip_length
        self.tokens_per_clip = clip_length * rows * columns
        size = self.backbone.num_features
        self.fc1 = nn.Linear(size, output_size)
        self.fc2 = nn.Linear(output_size, output_size)

    def forward(self, frames: Tensor) -> Tensor:
        """frames uint8 (clips, T, H, W, 3), RGB -> visual tokens (clips, tokens_per_clip, D_llm)"""
        height, width = frames.shape[2:4]
        images = frames.reshape(-1, height, width, 3).permute(0, 3, 1, 2).to(self.fc1.weight.dtype) / 255
        features = self.backbone.forward_features(images).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(self.fc1(features))).reshape(-1, self.tokens_per_clip, self.fc2.out_features)


def has_timm() -> bool:
    """Whether timm is installed; a folder of its name that happens to lie on the path is not it."""
    spec = importlib.util.find_spec("timm")
    return spec is not None and spec.origin is not None


def import_timm() -> Any:
    """timm. Its data pipeline, which is imported along, wants torchvision, whose wheels do not go with every build of
    torch, and Pillow; no model that is made here uses either, so that empty modules stand for them meanwhile.

    Raises:
        ImportError: timm is not installed.
    """
    if not has_timm():
        raise ImportError(NO_TIMM, name="timm")
    with _stood_for("torchvision", *(name for name in ("PIL",) if importlib.util.find_spec(name) is None)):
        return importlib.import_module("timm")


class _Anything(type):
    """Of classes with every attribute: each a class like it, its own."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)
        setattr(cls, name, _Anything(name, (), {}))
        return vars(cls)[name]


class _EmptyModule(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - so that it is a package

    def __getattr__(self, name: str) -> type:
        if name.startswith("_"):
            raise AttributeError(name)
        setattr(self, name, _Anything(name, (), {}))
        return vars(self)[name]


class _EmptyModules(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0.0"  # type: ignore[attr-defined] # which timm takes apart


@contextmanager
def _stood_for(*names: str) -> Iterator[None]:
    """Packages of these names are empty, installed or not; those imported before stay what they are."""
    finder = _EmptyModules(tuple(name for name in names if name not in sys.modules))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _EmptyModule)]:
            del sys.modules[name]
