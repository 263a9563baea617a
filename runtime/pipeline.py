"""Stages that run at the same time, joined by bounded queues; what is put in comes out in order.

    clips ──▶ [queue] ──▶ encoder's thread ──▶ [queue] ──▶ language model's thread: prefill, decode
                          as many clips at once as wait

Requests (to answer, to forget, ...) travel the same way, so each finds what was put in before it and nothing else.
Nothing here depends on timing but how many clips the encoder is given at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from queue import SimpleQueue
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..engines.package import InputError
from .conversation import Conversation
from .cuda import DeviceFrames
from .engine import Encoder, EngineError
from .text import Sampler
from .trace import Trace

Backpressure = Literal["block", "drop-oldest", "latest-only"]
TOKENS_WAITING = 16  # clips between encoder and language model, which may be busy with an answer
MOST_LAG = 1  # entries of the second cache, beyond which it no longer waits for a pause,
CATCH_UP = 2  # but is given so many for each clip and request, unless someone waits
CLOSED = "the session is closed; open a new one"
GONE_ON = (
    "this answer ended when the session was given another video or question; read it to its end first, or ask again"
)

Encoded = tuple[NDArray[np.float32], NDArray[np.float32] | None]  # a clip's visual tokens, and features if wanted
Item = TypeVar("Item")


@dataclass(eq=False)
class Request:
    """Something to do on the language model's thread."""

    run: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


class Queue(Generic[Item]):
    """Bounded in what its items weigh together; requests always have room, and so has what is alone.

    Args:
        weigh: an item's weight; by default each weighs 1.
    """

    def __init__(self, size: int, weigh: Callable[[Item], int] = lambda _: 1):
        self._size, self._weigh = size, weigh
        self._waiting: deque[Item | Request] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Item | Request, when_full: Backpressure = "block") -> list[Item]:
        """Returns the items that were dropped to make room.

        Raises:
            InputError: the queue is closed, or closes while waiting.
        """
        dropped: list[Item] = []
        with self._changed:
            if not isinstance(item, Request):
                size = 1 if when_full == "latest-only" else self._size
                if when_full == "block":
                    self._changed.wait_for(lambda: self._closed or self._has_room(item, size))
                while not self._closed and not self._has_room(item, size):
                    dropped.append(self._drop_oldest())
            if self._closed:
                raise InputError(CLOSED)
            self._waiting.append(item)
            self._changed.notify_all()
        return dropped

    def take(self, most: int, wait: bool = True) -> list[Item] | Request | None:
        """Items that follow each other and weigh up to `most`, or a single one, or a request; None when closed, or when
        nothing waits."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed or not self._waiting:
                return None
            taken: list[Item] = []
            while self._waiting and not isinstance(item := self._waiting[0], Request):
                if taken and sum(map(self._weigh, taken)) + self._weigh(item) > most:
                    break
                taken.append(item)
                self._waiting.popleft()
            first = taken or self._waiting.popleft()
            self._changed.notify_all()
        return first  # type: ignore[return-value]

    def discard(self) -> None:
        """Takes out all items; requests stay."""
        with self._changed:
            self._waiting = deque(item for item in self._waiting if isinstance(item, Request))
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits is woken; what waits is dropped, and requests are refused."""
        with self._changed:
            self._closed = True
            for item in self._waiting:
                if isinstance(item, Request):
                    item.done.set_exception(InputError(CLOSED))
            self._waiting.clear()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def has_requests(self) -> bool:
        with self._changed:
            return any(isinstance(item, Request) for item in self._waiting)

    def _has_room(self, new: Item, size: int) -> bool:
        weights = [self._weigh(item) for item in self._waiting if not isinstance(item, Request)]
        return not weights or sum(weights) + self._weigh(new) <= size

    def _drop_oldest(self) -> Item:
        oldest = next(item for item in self._waiting if not isinstance(item, Request))
        self._waiting.remove(oldest)
        return oldest


class Turns:
    """A lock that goes to whoever has waited longest, so that neither of two busy threads is left out."""

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._state:
            if not self._taken:
                self._taken = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()

    def __exit__(self, *_: object) -> None:
        with self._state:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


@dataclass(eq=False)
class Clip:
    """Frames uint8 (T, H, W, 3), RGB, on the host or a GPU; `given` of them were pushed, the rest repeat the last. Or,
    on the host, frames in several views (views, T, H, W, 3); see tiles.py. `features`: the encoder's second output is
    wanted, too, of frames on the host in one view."""

    frames: NDArray[np.uint8] | DeviceFrames
    given: int
    features: bool = False

    @property
    def views(self) -> list[NDArray[np.uint8] | DeviceFrames]:
        """Each is a clip to the encoder."""
        if isinstance(self.frames, np.ndarray) and self.frames.ndim == 5:
            return list(self.frames)
        return [self.frames]


class Answer:
    """Ids of an answer, as they come. Generating goes on whether they are read or not, until it is given up.

    Attributes:
        read: how many ids have been taken.
        given_up: nobody wants the rest.
        over: the session has gone on, and nothing more can be read.
    """

    def __init__(self) -> None:
        self._arrived: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.read = 0
        self.given_up = threading.Event()
        self.over = False

    def put(self, item: int | BaseException | None) -> None:
        """An id, or what ended the answer early, or None at its end."""
        self._arrived.put(item)

    def __iter__(self) -> Iterator[int]:
        """Raises what ended the answer early."""
        while not self.over and (item := self._arrived.get()) is not None and not self.over:
            if isinstance(item, BaseException):
                raise item
            self.read += 1
            yield item
        if self.over:
            raise InputError(GONE_ON)


@dataclass
class Stats:
    """What a session has done. Times in milliseconds.

    Attributes:
        frames, clips, visual_tokens: in the window, which is the whole video where one is watched. A frame counts once,
            in however many tiles the encoder is given it.
        clips_seen: encoded since the video, or the stream, began.
        pushed, dropped, failed, waiting: frames that were pushed; of these, dropped for want of room, lost to an error,
            and not encoded yet.
        moves: how often the older half of the window has left.
        prompt_tokens: positions before the last answer, visual tokens included.
        new_tokens: of the last answer.
        vision_ms, llm_ms: what encoding and prefilling took since the video, or the stream, began.
        again_ms: what prefilling for the second cache took; see conversation.py.
        first_token_ms: from the last `ask` to its answer's first token.
        decode_ms: the answer's tokens after the first.
        finished: why the answer ended: "end", "length" (max_new_tokens), "cache" (the cache is full), "" if it has not.
    """

    frames: int = 0
    clips: int = 0
    visual_tokens: int = 0
    clips_seen: int = 0
    pushed: int = 0
    dropped: int = 0
    failed: int = 0
    waiting: int = 0
    moves: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    vision_ms: float = 0.0
    llm_ms: float = 0.0
    again_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    finished: str = ""


class Pipeline:
    """
    Args:
        max_clips: the most that the encoder takes at once; where frames have several views, of these.
        turns: whether encoder and language model take turns instead of running at the same time.
        trace: told what each stage does, and when.

    Attributes:
        stats: of its own work; see `Stats`.
    """

    def __init__(
        self, encoder: Encoder, conversation: Conversation, max_clips: int, turns: bool, trace: Trace | None = None
    ):
        self.conversation = conversation
        self.stats = Stats()
        self._encoder, self._max_clips = encoder, max_clips
        self._turns: AbstractContextManager[Any] = Turns() if turns else nullcontext()
        self._trace = trace
        self._clips: Queue[Clip] = Queue(2 * max_clips, weigh=lambda clip: len(clip.views))
        self._tokens: Queue[Encoded] = Queue(TOKENS_WAITING)
        self._errors: deque[Exception] = deque()
        self._threads = [
            threading.Thread(target=_repeat, args=(step,), name=f"liteframe {name}", daemon=True)
            for name, step in (("encoder", self._encode), ("language model", self._converse))
        ]
        for thread in self._threads:
            thread.start()

    # -- called by the session ----------------------------------------------------------------------------------------

    def put(self, clip: Clip, when_full: Backpressure = "block") -> None:
        """Raises InputError when the session is closed, also while waiting for room."""
        for dropped in self._clips.put(clip, when_full):
            self.stats.dropped += dropped.given
            self.stats.waiting -= dropped.given

    def submit(self, run: Callable[[], Any]) -> Future[Any]:
        """Runs it on the language model's thread, behind everything that was put in before."""
        request = Request(run)
        self._clips.put(request)
        return request.done

    def settle(self) -> Future[Any]:
        """What was put in before is read to its end; see `Conversation.settle` and `Conversation.end_long`."""

        def run() -> None:
            with self._span("language model", "llm_ms"):
                if self.conversation.long is None:
                    self.conversation.settle()
                else:
                    self.conversation.end_long()

        return self.submit(run)

    def begin_stream(self) -> None:
        """What is put in from here on is a stream's; see `Conversation.begin_stream`."""
        self.submit(self._begin_stream)

    def discard(self) -> None:
        """Drops the clips that wait."""
        self._clips.discard()
        self._tokens.discard()

    def answer(self, question: str, max_new_tokens: int, sampler: Sampler) -> Answer:
        """Begins to answer; see `Conversation.ask`."""
        answer, asked = Answer(), time.perf_counter()

        def generate() -> None:
            try:
                self._generate(answer, asked, self.conversation.ask(question, max_new_tokens, sampler))
            except InputError:
                raise
            except Exception as error:
                raise EngineError(f"the decoder failed while answering: {error}") from error

        self.submit(generate).add_done_callback(lambda done: answer.put(done.exception()))
        return answer

    def end(self, answer: Answer) -> None:
        """Nothing more of it can be read. What was read stays in the chat; if nothing was, the question leaves, too."""
        answer.over = True
        answer.given_up.set()
        self.submit(lambda: self.conversation.cut_answer(answer.read))

    def raise_error(self) -> None:
        """Raises the first error that no call has raised yet; InputError when the session is closed."""
        if self._clips.closed:
            raise InputError(CLOSED)
        if self._errors:
            raise self._errors.popleft()

    def forget_errors(self) -> None:
        """Of what was given up nobody wants to know."""
        self._errors.clear()

    def read(self, items: Iterator[Item], in_turn: bool) -> Iterator[Item]:
        """The same items; the trace is told how long each took to come.

        Args:
            in_turn: reading is work, not waiting, and takes turns with the engines where they do.
        """
        turn: AbstractContextManager[Any] = self._turns if in_turn else nullcontext()
        while True:
            with turn:
                start = time.perf_counter()
                item = next(items, None)
                end = time.perf_counter()
            if item is None:
                return
            if self._trace is not None:
                self._trace.add("video", "read", start, end)
            yield item

    def close(self) -> None:
        """Ends what is being done, and joins the threads. What waits is dropped."""
        self._clips.close()
        self._tokens.close()
        self.conversation.stop_long()
        for thread in self._threads:
            if thread is not threading.current_thread():  # where the garbage collector happens to run
                thread.join()
        self.conversation.give_up_long()

    # -- the threads --------------------------------------------------------------------------------------------------

    @contextmanager
    def _span(self, stage: str, figure: str, **details: object) -> Iterator[None]:
        with self._turns:
            start = time.perf_counter()
            try:
                yield
            finally:
                end = time.perf_counter()
                setattr(self.stats, figure, getattr(self.stats, figure) + (end - start) * 1e3)
                if self._trace is not None:
                    self._trace.add(stage, figure.removesuffix("_ms"), start, end, **details)

    def _encode(self) -> bool:
        """The encoder's next call. False when there is none, for the pipeline is closed."""
        taken = self._clips.take(self._max_clips)
        try:
            if isinstance(taken, Request):
                self._tokens.put(taken)
            elif taken is not None:
                for tokens in self._encoded(taken):
                    self._tokens.put(tokens)
        except InputError as closed:
            if isinstance(taken, Request):
                taken.done.set_exception(closed)
        return taken is not None

    def _encoded(self, clips: list[Clip]) -> Iterable[Encoded]:
        views = [view for clip in clips for view in clip.views]
        encoded: list[NDArray[np.float32]] = []
        features: list[NDArray[np.float32]] = []
        try:
            for start in range(0, len(views), self._max_clips):
                batch = views[start : start + self._max_clips]
                with self._span("encoder", "vision_ms", clips=len(batch)):
                    if clips[0].features:
                        frames = np.stack([view for view in batch if isinstance(view, np.ndarray)])
                        tokens, more = self._encoder.encode_with_features(frames)
                        features.extend(more)
                    else:
                        tokens = self._encode_clips(batch)
                    encoded.extend(tokens)
        except Exception as error:
            self._lose(clips)
            self._report("the encoder", f"{len(clips)} clips, which are left out", error)
            return []
        self.stats.clips_seen += len(clips)
        self.stats.waiting -= sum(clip.given for clip in clips)
        rest = iter(encoded)
        return zip_longest((_stacked([*islice(rest, len(clip.views))]) for clip in clips), features)

    def _encode_clips(self, clips: list[NDArray[np.uint8] | DeviceFrames]) -> NDArray[np.float32]:
        on_host = [clip for clip in clips if isinstance(clip, np.ndarray)]
        on_device = [clip for clip in clips if not isinstance(clip, np.ndarray)]
        if not on_device:
            return self._encoder.encode(np.stack(on_host))
        if not on_host:
            return self._encoder.encode_on_device(on_device)
        return np.concatenate([self._encode_clips([clip]) for clip in clips])

    def _converse(self) -> bool:
        """What the language model has to do next. False when the pipeline is closed."""
        taken = self._tokens.take(1, wait=not self.conversation.lag)
        if isinstance(taken, Request):
            try:
                taken.done.set_result(taken.run())
            except BaseException as error:
                taken.done.set_exception(error)
        elif taken is not None:
            ((tokens, features),) = taken
            try:
                with self._span("language model", "llm_ms"):
                    self.conversation.add(tokens, features)
            except Exception as error:
                self._report("the decoder", "a clip", error)
        elif not self._tokens.closed:
            self._catch_up()
        if taken is not None:
            for _ in range(CATCH_UP):
                if self.conversation.lag > MOST_LAG and not self._tokens.has_requests:
                    self._catch_up()
        return not self._tokens.closed

    def _catch_up(self) -> None:
        try:
            with self._span("language model", "again_ms"):
                self.conversation.catch_up()
        except Exception as error:
            self.conversation.give_up_second()
            self._report("the decoder", "the second cache", error)

    def _begin_stream(self) -> None:
        try:
            self.conversation.begin_stream()
        except Exception as error:
            self._report("the decoder", "room for a stream", error)

    def _lose(self, clips: list[Clip]) -> None:
        given = sum(clip.given for clip in clips)
        self.stats.failed += given
        self.stats.waiting -= given

    def _report(self, engine: str, what: str, error: Exception) -> None:
        known = isinstance(error, InputError)
        self._errors.append(error if known else EngineError(f"{engine} failed on {what}: {error}"))

    def _generate(self, answer: Answer, asked: float, ids: Generator[int]) -> None:
        stats = self.stats
        stats.prompt_tokens, stats.new_tokens, stats.decode_ms, stats.finished = 0, 0, 0.0, ""
        with closing(ids):
            figure = "llm_ms"
            while not answer.given_up.is_set() and not self._tokens.closed:
                with self._span("language model", figure):
                    token = next(ids, None)
                if figure == "llm_ms":
                    stats.first_token_ms = (time.perf_counter() - asked) * 1e3
                    stats.prompt_tokens, figure = self.conversation.prompt, "decode_ms"
                if token is None:
                    stats.finished = self.conversation.finished
                    return
                stats.new_tokens += 1
                answer.put(token)
        if self._tokens.closed:
            raise InputError(CLOSED)


def _stacked(views: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return views[0] if len(views) == 1 else np.stack(views)


def _repeat(step: Callable[[], bool]) -> None:
    """Each step lets go of what it worked on before the next begins to wait."""
    while step():
        pass
