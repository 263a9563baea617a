"""An artifact's torch modules, asked as a package's engines are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..calib.accuracy import LONGEST
from ..engines.targets import TARGETS
from ..export.artifact import Artifact
from ..export.build_engine import describe_model
from ..export.models.attention import use_dialect
from ..runtime.conversation import Conversation
from ..runtime.engine import Decoder
from ..runtime.text import Sampler
from .align import chat_text


class Modules:
    """An artifact's torch modules in FP32, on the runtime's own way of laying out text."""

    def __init__(self, artifact: Artifact, frames: int):
        self._encoder, self._text = artifact.encoder, chat_text(artifact)
        model = describe_model(artifact, frames, TARGETS["cpu"])
        self._conversation = Conversation(_Cached(artifact, model.capacity), self._text, model)

    @torch.inference_mode()
    def answer(self, clips: NDArray[np.uint8] | None, questions: Sequence[str]) -> list[str]:
        self._conversation.refill([])
        for clip in [] if clips is None else clips:
            self._conversation.add(self._encoder(torch.from_numpy(clip[None]))[0].numpy())
        answers = []
        for question in questions:
            ids = self._conversation.ask(question, LONGEST, Sampler())
            answers.append("".join(self._text.stream(ids)))
            self._conversation.forget()
        return answers


class _Cached(Decoder):
    """A decoder's torch module with a KV cache that grows; see `runtime.engine.Decoder`."""

    def __init__(self, artifact: Artifact, capacity: int):
        self._decoder, self.capacity, self.position = artifact.decoder, capacity, 0
        self._caches = self._decoder.empty_caches(0)

    @torch.inference_mode()
    def forward(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        with use_dialect("plain"):
            logits, self._caches = self._decoder(
                torch.from_numpy(embeddings[None]), torch.tensor([self.position]), self._caches
            )
        self.position += len(embeddings)
        return logits[0].numpy()

    def rewind(self, position: int) -> None:
        self.position = position
        self._caches = [cache[:, :, :position] for cache in self._caches]

    def reserve(self, positions: int) -> None:
        """It grows by itself."""

    def twin(self) -> Decoder:
        raise NotImplementedError("no streams here")

    def node_times(self) -> list[tuple[str, float]]:
        raise NotImplementedError("no engine")
