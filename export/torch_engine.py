"""An artifact's torch modules in FP32, where the runtime expects engines; what engines are compared with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..calib.accuracy import Respondent
from ..engines.package import Model
from ..runtime.cuda import DeviceFrames
from ..runtime.engine import Decoder, Encoder
from ..runtime.text import ChatText
from .artifact import Artifact
from .models.attention import use_dialect


class TorchEncoder(Encoder):
    """See `runtime.engine.Encoder`."""

    def __init__(self, artifact: Artifact):
        self._encoder = artifact.encoder

    @torch.inference_mode()
    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._encoder(torch.from_numpy(frames)).numpy()

    @torch.inference_mode()
    def encode_with_features(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        tokens, features = self._encoder.with_features(torch.from_numpy(frames))
        return tokens.numpy(), features.numpy()

    def device_frames(self) -> None:
        """Frames come from the host."""

    def encode_on_device(self, clips: list[DeviceFrames]) -> NDArray[np.float32]:
        raise NotImplementedError("frames come from the host")

    def node_times(self) -> list[tuple[str, float]]:
        raise NotImplementedError("no engine")


class TorchDecoder(Decoder):
    """See `runtime.engine.Decoder`; the cache grows by itself."""

    def __init__(self, artifact: Artifact, capacity: int):
        self._artifact, self.capacity, self.position = artifact, capacity, 0
        self._caches = artifact.decoder.empty_caches(0)

    @torch.inference_mode()
    def forward(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        x, index = torch.from_numpy(embeddings[None]), torch.tensor([self.position])
        with use_dialect("plain"):
            logits, self._caches = self._artifact.decoder(x, index, self._caches)
        self.position += len(embeddings)
        return logits[0].numpy()

    def rewind(self, position: int) -> None:
        self.position = position
        self._caches = [cache[:, :, :position] for cache in self._caches]

    def reserve(self, positions: int) -> None:
        """It grows by itself."""

    def twin(self) -> TorchDecoder:
        return TorchDecoder(self._artifact, self.capacity)

    def node_times(self) -> list[tuple[str, float]]:
        raise NotImplementedError("no engine")


def chat_text(artifact: Artifact, table: NDArray | None = None) -> ChatText:
    """The artifact's text as the runtime lays it out, by default with the artifact's own embeddings."""
    if table is None:
        table = artifact.decoder.model.embed_tokens.weight.detach().cpu().numpy()
    text, prompt = artifact.text, artifact.prompt
    return ChatText(
        text.tokenizer,
        text.chat_template,
        text.special_tokens,
        prompt.unit_prefix,
        prompt.unit_suffix,
        text.end_of_turn,
        table,
        prompt.run_prefix,
    )


def respondent(artifact: Artifact, model: Model) -> Respondent:
    """Answers by the artifact's modules as a package made of it does by its engines."""
    return Respondent(TorchEncoder(artifact), TorchDecoder(artifact, model.capacity), chat_text(artifact), model)
