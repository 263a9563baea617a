"""Text in and out of token ids and embeddings: chat template, tokenizer, embedding table, sampling."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..engines.package import InputError, Package

_VIDEO = "\u2063liteframe-video\u2063"  # invisible separators: no question holds this by accident
_ANSWER = "\u2063liteframe-answer\u2063"


class _Generation(Extension):
    """`{% generation %}`, by which templates mark what a model is trained on, renders as what it holds."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # unlike jinja's, escapes nothing for HTML


def numbered(text: str, first: int, last: int) -> str:
    """A prefix of visual tokens with the numbers of their frames."""
    return text.replace("{first}", str(first)).replace("{last}", str(last))


def parse_template(template: str) -> jinja2.Template:
    """A chat template, as transformers renders them. Raises jinja2.TemplateError when it does not parse."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=lambda f: datetime.datetime.now().strftime(f))
    return environment.from_string(template)


class ChatText:
    """
    Args:
        template: Jinja.
        special_tokens: what the template may ask for by name.
        embeddings: (vocabulary, D).
        run_prefix: instead of `unit_prefix` in front of a run of merged frames; None where that has no other.

    Raises:
        jinja2.TemplateError: the template does not parse.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special_tokens: dict[str, str],
        unit_prefix: str,
        unit_suffix: str,
        end_of_turn: Iterable[int],
        embeddings: NDArray[Any],
        run_prefix: str | None = None,
    ):
        self._tokenizer, self._embeddings, self._special = tokenizer, embeddings, special_tokens
        self._control = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        self._unit_prefix, self._unit_suffix = unit_prefix, unit_suffix
        self._run_prefix = unit_prefix if run_prefix is None else run_prefix
        self.end_of_turn = frozenset(end_of_turn)
        self._template = parse_template(template)

    @classmethod
    def of(cls, package: Package) -> ChatText:
        """Raises InputError when the package's chat template does not parse."""
        text, path = package.manifest.text, package.path(package.manifest.text.chat_template)
        try:
            return cls(
                Tokenizer.from_file(str(package.path(text.tokenizer))),
                path.read_text(encoding="utf-8"),
                text.special_tokens,
                text.unit_prefix,
                text.unit_suffix,
                text.end_of_turn,
                np.load(package.path(text.embeddings), mmap_mode="r", allow_pickle=False),
                text.run_prefix,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"{path}: the chat template does not parse ({error})") from None

    def embed(self, ids: list[int]) -> NDArray[np.float32]:
        """Token ids -> float32 (len(ids), D)."""
        return np.asarray(self._embeddings[np.asarray(ids, np.int64)], np.float32)

    def embed_words(self, text: str) -> NDArray[np.float32]:
        """Text as it is, without a template -> float32 (tokens, D)."""
        return self.embed(self._encode(text))

    def turn(self, question: str, first: bool = True, with_video: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a user's turn with this question, before and after the place of the video, which stands at the turn's
        beginning; all are after it if there is no video.

        Args:
            first: the turn begins the conversation. Otherwise its ids begin where the answer before it ended.

        Raises:
            InputError: the question holds a control token or is not Unicode, or the template drops what it is given.
        """
        video = _VIDEO if with_video else ""
        content = video + self.checked(question)
        if first:
            rendered = self._render([("user", content)])
        else:
            rendered = self._render([("user", _VIDEO), ("assistant", _ANSWER), ("user", content)])
            rendered = self._behind(rendered, _ANSWER)
        if not with_video:
            return [], self._encode(rendered)
        before, found, after = rendered.partition(_VIDEO)
        if not found:
            raise InputError("the chat template drops the user's text; the artifact's template is not usable")
        return self._encode(before), self._encode(after)

    @staticmethod
    def _behind(rendered: str, mark: str) -> str:
        _, found, after = rendered.partition(mark)
        if not found:
            raise InputError(
                "the chat template drops earlier turns, so a question can't follow another; forget() the earlier ones"
            )
        return after

    def unit(self, first: int, last: int, merged: bool = False) -> tuple[list[int], list[int]]:
        """Ids before and after the visual tokens of one unit, or of a run of merged frames; these are numbered first to
        last from 1."""
        prefix = self._run_prefix if merged and first != last else self._unit_prefix
        return self._encode(numbered(prefix, first, last)), self._encode(self._unit_suffix)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Text as it becomes complete: a character of several tokens waits for the last of them, or for the end."""
        decoder = DecodeStream(skip_special_tokens=True)
        waiting = []
        for token in ids:
            waiting.append(token)
            if piece := decoder.step(self._tokenizer, token):
                waiting.clear()
                yield piece
        if rest := self._tokenizer.decode(waiting):
            yield rest

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def checked(self, question: str) -> str:
        """The same. Raises InputError when it holds a control token or is not Unicode."""
        try:
            question.encode()
        except UnicodeEncodeError:
            raise InputError(f"the question {question!a} is not valid Unicode; give it in UTF-8") from None
        for token in self._control:
            if token in question:
                raise InputError(
                    f"the question contains the control token {token}, which would end its turn; remove it"
                )
        return question

    def _render(self, turns: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except Exception as error:  # a template may raise anything
            raise InputError(f"the chat template failed: {error}") from None


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


class Sampler:
    """Greedy at temperature 0; otherwise temperature, then nucleus (top-p) sampling, seeded (Holtzman et al. 2020).

    Raises:
        InputError: temperature below 0 or infinite, top_p outside (0, 1], or seed below 0.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature is {temperature}, expected 0 (greedy) or a positive number")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}, expected more than 0 and at most 1")
        if seed < 0:
            raise InputError(f"seed is {seed}, expected 0 or more")
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """One token id from logits (vocabulary,). Raises InputError when they are not numbers."""
        if not np.isfinite(logits.max()):
            raise InputError("the decoder engine computed logits that are not numbers; build the package again")
        if self._temperature == 0:
            return int(logits.argmax())
        probabilities = np.exp((logits.astype(np.float64) - logits.max()) / self._temperature)
        probabilities /= probabilities.sum()
        if self._top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self._top_p]] = 0
            probabilities /= probabilities.sum()
        return int(self._random.choice(len(probabilities), p=probabilities))
