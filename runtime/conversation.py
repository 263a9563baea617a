"""What the language model has seen: a chat's prefix, then clips and turns in the order they came, in KV caches.

    clips, turns ──┬─▶ cache ────────▶ answers
                   └─▶ second cache    from the middle of the window on; takes over when the window is full

A cache's clips belong to the user's turn that is open: what comes before the question is prefilled before the question
is known. A window that is full loses its older half. By then the second cache holds the newer one, prefilled behind a
prefix of its own and numbered from 1, so its keys and values have never seen what has left, and positions stay small.
Each clip is prefilled about twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError, Model
from .engine import Decoder
from .long_video import LongVideo, Span
from .text import ChatText, Sampler

# of the cache's positions: what turns may bring along when the clips they were about leave the window, and what is left
# free of clips, for the question and its answer (of the latter RESERVE at most)
OLD_TURNS, FREE, RESERVE = 1 / 4, 1 / 4, 512
UNIT_TEXT, TURN = 8, 512  # positions of prompt text around one unit, and of a question with its answer, more or less


@dataclass(frozen=True)
class Turn:
    """A question and the ids of its answer, as far as it was generated."""

    question: str
    answer: tuple[int, ...]


Clip = NDArray[np.float32]  # its visual tokens (tokens_per_clip, D); in several views (views, tokens_per_clip, D)
Entry = Clip | Span | Turn
Finished = Literal["", "end", "length", "cache"]


@dataclass(frozen=True)
class _Place:
    """How far a cache's contents are laid out.

    Attributes:
        entries, position: how many of the entries, in how many positions.
        clips, turns: of the entries.
        lead: ids before the clips of the user's turn that is open; None if none is.
        pending: ids at the end of the last answer, which the decoder has not been given.
    """

    entries: int = 0
    position: int = 0
    clips: int = 0
    turns: int = 0
    lead: tuple[int, ...] | None = None
    pending: tuple[int, ...] = ()


class Cache:
    """One KV cache, and the entries that it holds or is to hold.

    Which positions the decoder is given in one call depends on the entries alone, so that the same entries make the
    same bits, whenever they came.

    Args:
        decoder: whose cache this is; what it holds is forgotten.
    """

    def __init__(self, decoder: Decoder, text: ChatText, model: Model, entries: list[Entry]):
        self._decoder, self._text, self._model = decoder, text, model
        self.refill(entries)

    def refill(self, entries: list[Entry]) -> None:
        """Begins anew with other entries."""
        self._decoder.rewind(0)
        self.entries = list(entries)
        self._places = [_Place()]  # before the first entry, and behind each that is laid out
        self._lead: list[int] | None = None  # where it is not what is usual
        self._laid: list[NDArray[np.float32]] = []  # what is laid out and not in the cache yet
        self.finished: Finished = ""
        self.prompt = 0  # positions before the last answer

    @property
    def _place(self) -> _Place:
        return self._places[-1]

    @property
    def position(self) -> int:
        """Behind what is laid out."""
        return self._place.position

    @property
    def capacity(self) -> int:
        return self._decoder.capacity

    @property
    def clips(self) -> int:
        """Of the entries, those it does not hold yet among them."""
        return sum(not isinstance(entry, Turn) for entry in self.entries)

    @property
    def visual_tokens(self) -> int:
        """Of the clips."""
        shown = [
            entry.tokens if isinstance(entry, Span) else entry for entry in self.entries if not isinstance(entry, Turn)
        ]
        return sum(tokens.size // tokens.shape[-1] for tokens in shown)

    @property
    def waiting(self) -> int:
        """How many entries are not in the cache yet, or not wholly."""
        return len(self.entries) - self._place.entries + bool(self._laid)

    def lengths(self) -> list[int]:
        """Positions of each entry that is laid out."""
        return [after.position - before.position for before, after in pairwise(self._places)]

    def length(self, clip: Clip) -> int:
        """Positions that a clip takes behind what is laid out."""
        return sum(map(len, self._lay(clip, self._place)[0]))

    def reserve(self, positions: int | None = None) -> None:
        """Makes room behind what is laid out, by default for all that the cache may ever hold."""
        self._decoder.reserve(self.capacity if positions is None else self.position + positions)

    def step(self) -> None:
        """Prefills the next entry on its own."""
        if not self._laid:
            self._lay_next()
        self._prefill_laid(1)

    def fill(self, at_least: int = 1, go_on: Callable[[], object] = lambda: None) -> None:
        """Prefills everything that waits, in whole chunks; and the rest, if it has `at_least` so many positions.
        `go_on` is called before each chunk, and ends this by raising."""
        while self._place.entries < len(self.entries):
            self._lay_next()
            self._prefill_laid(self._model.chunk, go_on)  # or a long video would be laid out in memory as a whole
        self._prefill_laid(at_least, go_on)

    def _lay_next(self) -> None:
        parts, place = self._lay(self.entries[self._place.entries], self._place)
        self._laid += parts
        self._places.append(place)

    def _lay(self, entry: Entry, place: _Place) -> tuple[list[NDArray[np.float32]], _Place]:
        """An entry's embeddings behind `place`, and the place behind them."""
        first, with_video = place.turns == 0, place.lead is not None
        if isinstance(entry, Turn):
            _, question = self._text.turn(entry.question, first, with_video)
            parts = [self._text.embed([*place.pending, *question, *entry.answer[:-1]])]
            after = replace(place, turns=place.turns + 1, lead=None, pending=entry.answer[-1:])
        else:
            parts, after = [], replace(place, clips=place.clips + 1, pending=())
            if not with_video:
                lead = self._lead or self._text.turn("", first, with_video=True)[0]
                parts.append(self._text.embed([*place.pending, *lead]))
                after = replace(after, lead=tuple(lead))
            if isinstance(entry, Span):
                parts += self._unit(entry.tokens, entry.first, entry.last, entry.merged)
                after = replace(after, clips=entry.last // self._model.clip_length)
            else:
                parts += self._units(entry, place.clips)
        position = place.position + sum(map(len, parts))
        return parts, replace(after, entries=place.entries + 1, position=position)

    def _units(self, clip: Clip, clips_before: int) -> Iterator[NDArray[np.float32]]:
        """A clip's units, each between its own text; in a unit the tokens of one view follow those of the other."""
        units = self._model.units_per_clip
        frames = self._model.clip_length // units
        for number, unit in enumerate(np.split(clip, units, axis=-2), start=clips_before * units):
            tokens = unit.reshape(-1, unit.shape[-1])
            yield from self._unit(tokens, number * frames + 1, (number + 1) * frames)

    def _unit(
        self, tokens: NDArray[np.float32], first: int, last: int, merged: bool = False
    ) -> Iterator[NDArray[np.float32]]:
        prefix, suffix = self._text.unit(first, last, merged)
        yield from (self._text.embed(prefix), tokens, self._text.embed(suffix))

    def _prefill_laid(self, at_least: int, go_on: Callable[[], object] = lambda: None) -> None:
        chunk = self._model.chunk
        while (size := sum(map(len, self._laid))) >= chunk or size >= at_least:
            go_on()
            together = np.concatenate(self._laid)
            self._decoder.forward(together[:chunk])
            self._laid = [together[chunk:]] if size > chunk else []

    def _forward(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits behind these ids; if it fails, none of them is in the cache."""
        before, embeddings = self._decoder.position, self._text.embed(ids)
        try:
            for start in range(0, len(embeddings), self._model.chunk):
                logits = self._decoder.forward(embeddings[start : start + self._model.chunk])
        except BaseException:
            self._decoder.rewind(before)
            raise
        return logits

    def check(self, question: str) -> tuple[list[int], list[int]]:
        """Ids of the question's turn, before its clips and behind them.

        Raises:
            InputError: the question with a token of an answer does not fit behind what the cache holds.
        """
        lead, after = self._text.turn(question, self._place.turns == 0, self._place.lead is not None)
        needed = self.position + len(self._place.pending) + len(after) + 1
        if self._place.lead is not None:
            needed += len(lead) - len(self._place.lead)
        if needed > self.capacity:
            more = "use fewer frames or tiles, a shorter question, or build with more --frames"
            if any(isinstance(entry, Span) for entry in self.entries):
                more = "ask a shorter question, or build with a larger --long-video for as many --keyframes"
            raise InputError(
                f"video, earlier turns and question take {needed} positions, the KV cache holds {self.capacity}; "
                f"forget() the earlier turns, {more}"
            )
        return lead, after

    def ask(self, question: str, max_new_tokens: int, sampler: Sampler) -> Generator[int]:
        """The answer's ids as they are generated; then, or when given up, the turn is one of the entries.

        Raises:
            InputError: see `check`.
        """
        self.fill()
        lead, after = self.check(question)
        if self._place.lead is not None and self._place.lead != tuple(lead):  # a template that tells the time
            self._begin_turn_with(lead)
        place = self._place
        logits = self._forward([*place.pending, *after])
        self.prompt = self._decoder.position
        answer: list[int] = []
        pending: list[int] = []
        self.finished = ""
        try:
            while not self.finished:
                token = sampler.pick(logits)
                if token in self._text.end_of_turn:
                    self.finished = "end"
                    break
                answer.append(token)
                pending = [token]
                yield token
                if len(answer) == max_new_tokens:
                    self.finished = "length"
                elif self._decoder.position == self.capacity:
                    self.finished = "cache"
                else:
                    logits, pending = self._forward([token]), []
        finally:
            if answer or self.finished:
                self.entries.append(Turn(question, tuple(answer)))
                self._places.append(self._behind_turn(self._decoder.position, tuple(pending)))
            else:
                self._decoder.rewind(place.position)

    def _behind_turn(self, position: int, pending: tuple[int, ...]) -> _Place:
        before = self._place
        return _Place(before.entries + 1, position, before.clips, before.turns + 1, None, pending)

    def cut_answer(self, length: int) -> None:
        """Shortens the answer with which the entries end to its first ids; without any its question leaves, too."""
        turn = self.entries.pop()
        assert isinstance(turn, Turn)
        self._places.pop()
        if length:
            self.entries.append(replace(turn, answer=turn.answer[:length]))
            self._places.append(self._behind_turn(self.prompt + length - 1, turn.answer[length - 1 : length]))
        self._decoder.rewind(self.position)

    def drop_last(self) -> None:
        """Forgets the last entry, which is not half prefilled."""
        if not self.waiting:
            self._places.pop()
            self._decoder.rewind(self.position)
        self.entries.pop()

    def _begin_turn_with(self, lead: list[int]) -> None:
        """Prefills the turn that is open once more, behind another lead."""
        while self._place.lead is not None:
            self._places.pop()
        self._decoder.rewind(self.position)
        self._lead = lead
        self.fill()
        self._lead = None


class Conversation:
    """
    Args:
        decoder: its own cache is the first; the second is made when a stream begins.

    Attributes:
        live: what is watched is a stream without an end, whose window moves.
        long: takes the clips of the video that is being watched, where it is a long one.
        moves: how often the window's older half has left.
    """

    def __init__(self, decoder: Decoder, text: ChatText, model: Model):
        self._decoder, self._text, self._model = decoder, text, model
        self._cache = Cache(decoder, text, model, [])
        self._other: Cache | None = None
        self._has_second = False  # the other cache is the second one, not a spare
        self._arrived: list[Clip] = []  # of a stream, and not among the entries yet
        self._window = model.max_frames // model.clip_length
        self._room = self._cache.capacity - min(RESERVE, int(self._cache.capacity * FREE))
        self.live = False
        self.long: LongVideo | None = None
        self.moves = 0

    @property
    def entries(self) -> list[Entry]:
        return list(self._cache.entries)

    @property
    def clips(self) -> int:
        """In the window."""
        return self.frames // self._model.clip_length

    @property
    def frames(self) -> int:
        """In the window."""
        length = self._model.clip_length
        shown = [entry for entry in self._cache.entries if not isinstance(entry, Turn)]
        return sum(entry.last - entry.first + 1 if isinstance(entry, Span) else length for entry in shown)

    @property
    def visual_tokens(self) -> int:
        """In the window."""
        return self._cache.visual_tokens

    @property
    def prompt(self) -> int:
        """Positions before the last answer."""
        return self._cache.prompt

    @property
    def finished(self) -> Finished:
        """Why the last answer ended."""
        return self._cache.finished

    @property
    def lag(self) -> int:
        """How many entries the second cache has to catch up with."""
        return self._second.waiting if self.live and self._second is not None else 0

    @property
    def _second(self) -> Cache | None:
        return self._other if self._has_second else None

    def add(self, clip: Clip, features: NDArray[np.float32] | None = None) -> None:
        """Appends a clip to what was seen. Of a stream it is prefilled, of a video that is watched whole chunks are; a
        long one waits for its end. `features`: what is merged, where that is not the visual tokens."""
        if self.long is not None:
            self.long.add(clip, features)
        elif self.live:
            self._arrived = [*self._arrived, clip][-self._window :]
            self.settle()
        else:
            self._cache.entries.append(clip)
            self._cache.fill(at_least=self._model.chunk)

    def settle(self) -> None:
        """Prefills everything that waits for the first cache: each entry of a stream on its own, for it came so."""
        while self.live and self._cache.waiting:
            self._cache.step()
        while self._arrived:
            self._make_room(self._arrived[0])
            clip = self._arrived.pop(0)
            self._cache.entries.append(clip)
            if self._second is not None:
                self._second.entries.append(clip)
            self._cache.step()
        self._cache.fill()

    def end_long(self) -> None:
        """A long video has been read to its end; what is left of it is prefilled.

        Raises:
            InputError: `stop_long` was called meanwhile.
        """
        assert self.long is not None
        spans = list(self.long.spans())
        self._cache.reserve(sum(len(span.tokens) + UNIT_TEXT for span in spans) + TURN)
        self._cache.entries += spans
        self._cache.fill(go_on=self.long.go_on)
        self.give_up_long()

    def stop_long(self) -> None:
        """The long video that is being watched, if one is, is read no further; from any thread."""
        long = self.long
        if long is not None:
            long.stop()

    def give_up_long(self) -> None:
        """Forgets the long video that is being watched, if one is."""
        long, self.long = self.long, None
        if long is not None:
            long.close()

    def expect(self, clips: int, views: int) -> None:
        """Makes room for so many clips in so many views, of a video that is about to be watched."""
        clip = views * self._model.tokens_per_clip + self._model.units_per_clip * UNIT_TEXT
        self._cache.reserve(clips * clip + TURN)

    def begin_stream(self) -> None:
        """What is added from here on is a stream's. Both caches take all their memory now: growing takes time, and what
        a stream needs should be known when it begins. If there is not enough, they grow when they must.

        A long video leaves: its spans are no clips of a window, and depend on each other. Turns about it stay."""
        entries = self._cache.entries
        if any(isinstance(entry, Span) for entry in entries):
            self.refill([entry for entry in entries if not isinstance(entry, Span)])
        self.live = True
        self._cache.reserve()
        self._spare().reserve()

    def catch_up(self) -> None:
        """Prefills what the second cache has waited for longest."""
        assert self._second is not None
        self._second.step()

    def give_up_second(self) -> None:
        """The second cache is made anew when the window moves."""
        self._has_second = False

    def check(self, question: str) -> None:
        """Raises InputError when a question can't be asked, or can't fit. In a stream room can be made."""
        if self.live:
            self._text.turn(question)
        else:
            self._cache.check(question)

    def ask(self, question: str, max_new_tokens: int, sampler: Sampler) -> Generator[int]:
        """The answer's ids as they are generated. See `Cache.ask`."""
        self.settle()
        for _ in range(2 if self.live else 0):
            try:
                self._cache.check(question)
            except InputError:
                self._move_window()
        before = len(self._cache.entries)
        try:
            yield from self._cache.ask(question, max_new_tokens, sampler)
        finally:
            if self._second is not None:
                self._second.entries += self._cache.entries[before:]

    def cut_answer(self, length: int) -> None:
        """Shortens the last answer to its first ids if nothing has come since; see `Cache.cut_answer`."""
        last = self._cache.entries[-1] if self._cache.entries else None
        asked_here = self._cache.prompt > 0  # not before a stream that began anew
        if isinstance(last, Turn) and len(last.answer) > length and asked_here:
            self._cache.cut_answer(length)
            if self._second is not None and self._second.entries and self._second.entries[-1] is last:
                self._second.drop_last()
                self._second.entries += self._cache.entries[-1:] if length else []

    def refill(self, entries: list[Entry]) -> None:
        """Begins anew with other entries, which are prefilled when something is added or asked."""
        self._cache.refill(entries)
        self._arrived = []
        self._has_second = False

    def forget(self) -> None:
        """Forgets the turns; the clips stay."""
        self.refill([entry for entry in self._cache.entries if not isinstance(entry, Turn)])

    def _make_room(self, clip: Clip) -> None:
        for _ in range(2):
            if self._cache.clips < self._window and self._cache.position + self._cache.length(clip) <= self._room:
                break
            self._move_window()
        if not self._has_second and self._cache.clips >= self._window - self._window // 2:
            self._begin_second(clips=0)

    def _move_window(self) -> None:
        """The older half leaves. Where turns take much of the cache, they leave rather than clips."""
        sizes = [size for entry, size in self._sized() if not isinstance(entry, Turn)]
        keep = 0
        while keep < min(self._window // 2, len(sizes)) and sum(sizes[-keep - 1 :]) <= self._cache.capacity // 2:
            keep += 1
        if self._second is None or self._second.clips != keep:
            self._begin_second(keep)
        assert self._second is not None
        while self._second.waiting:
            self._second.step()
        self._cache, self._other, self._has_second = self._second, self._cache, False
        self.moves += 1

    def _begin_second(self, clips: int) -> None:
        """With the newest clips, and the newest turns as far as they take OLD_TURNS."""
        room = int(self._cache.capacity * OLD_TURNS)
        kept: list[Entry] = []
        for entry, size in reversed(self._sized()):
            if isinstance(entry, Turn):
                room -= size
                if room >= 0:
                    kept.append(entry)
            elif clips:
                clips -= 1
                kept.append(entry)
        kept.reverse()
        self._spare().refill(kept)
        self._has_second = True

    def _spare(self) -> Cache:
        """The other cache."""
        if self._other is None:
            self._other = Cache(self._decoder.twin(), self._text, self._model, [])
        return self._other

    def _sized(self) -> list[tuple[Entry, int]]:
        return list(zip(self._cache.entries, self._cache.lengths(), strict=True))
