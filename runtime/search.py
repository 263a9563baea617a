"""From a question or a picture to what a long video is searched for, by the engines that a package has for it.

question ─┬─▶ query encoder, where the package has one
          └─▶ the language model's own token embeddings, which visual tokens are compared with
picture ────▶ encoder: a clip that stands still
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..engines.package import InputError, Package
from .clips import resize
from .engine import Encoder, open_merger, open_query_encoder
from .long_video import Query
from .text import ChatText


def has_features(package: Package) -> bool:
    """Whether what is compared and merged is not the visual tokens, but an output of the encoder beside them."""
    return any(spec.name == "features" for spec in package.engine("encoder").outputs)


class Searcher:
    """
    Args:
        encoder: the package's, on which nothing else runs while `query` does.
        threads: CPU threads an engine; None leaves it to the executor.

    Attributes:
        trained: there is a query encoder, and features were trained to be compared with its vectors.

    Raises:
        InputError: see `open_engines`.
    """

    def __init__(self, package: Package, text: ChatText, encoder: Encoder, threads: int | None):
        self._package, self._text, self._encoder = package, text, encoder
        self.merger = open_merger(package, threads)
        self._query_encoder, self._tokenizer = None, None
        self.trained = package.manifest.text.query_tokenizer is not None
        if package.manifest.text.query_tokenizer is not None:
            self._query_encoder = open_query_encoder(package, threads)
            self._tokenizer = Tokenizer.from_file(str(package.path(package.manifest.text.query_tokenizer)))

    def query(self, searched: str | NDArray[np.uint8]) -> Query:
        """
        Args:
            searched: a question, or a picture uint8 (H, W, 3), RGB.

        Raises:
            InputError: a question that is empty, not Unicode, with a control token, or too long for the query encoder;
                a picture of another type or shape.
        """
        if isinstance(searched, str):
            return self._of_text(searched)
        if searched.dtype != np.uint8 or searched.ndim != 3 or searched.shape[2] != 3 or 0 in searched.shape:
            raise InputError(
                f"the picture to search for is {searched.dtype} {searched.shape}; uint8 (height, width, 3) in RGB was "
                "expected"
            )
        model = self._package.manifest.model
        picture = resize(searched, model.image_size)
        clip = np.broadcast_to(picture, (1, model.clip_length, *picture.shape))
        if has_features(self._package):
            _, features = self._encoder.encode_with_features(np.ascontiguousarray(clip))
        else:
            features = self._encoder.encode(np.ascontiguousarray(clip))
        return Query.of(features[0])

    def _of_text(self, question: str) -> Query:
        if not question.strip():
            raise InputError("the question that a long video is searched for is empty")
        question = self._text.checked(question)
        if self._query_encoder is not None and self._tokenizer is not None:
            return Query.of(self._query_encoder.encode(self._tokenizer.encode(question).ids)[None])
        return Query.of(self._text.embed_words(question))
