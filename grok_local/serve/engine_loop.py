"""One thread that has the model compute, and the answers that wait for it in an event loop.

Whoever follows an answer sees its pieces from the first, however late they come; when nobody follows it any more it
ends with the step under way.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grok_local.errors import GrokLocalError, ModelError, RefusedError
from grok_local.runtime.scheduling.generation import Generation
from grok_local.runtime.text.batch import prompt_logprobs, result_of
from grok_local.runtime.text.reply import TokenLogprob
from grok_local.serve.figures import AnswerProgress, Figures

if TYPE_CHECKING:
    from grok_local.runtime.scheduling.generation import FinishReason, Stats
    from grok_local.runtime.text.batch import Prepared, Result
    from grok_local.runtime.text.model import Model

__all__ = ["BACKGROUND", "Answer", "EngineLoop", "Increment"]

INTERACTIVE, BACKGROUND = 0, 1  # ranks: who asks now goes before batches
_LINGER, _SHARE = 0.1, 0.05  # seconds, and of the last step: how long the next one waits for new questions at most
_LOOK_EVERY = 1.0  # seconds after which an idle engine is looked at


@dataclass(frozen=True)
class Increment:
    """What a step brought of an answer's generation number `index`; with the first comes the prompt's."""

    index: int
    text: str
    tokens: Sequence[TokenLogprob] | None
    is_first: bool
    prompt: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    is_last: bool = False


@dataclass(eq=False)
class Answer:
    """The generations of one request. `is_streamed`: its parts are wanted as they come.

    Belongs to an event loop; what the thread of the engine may call says so.
    """

    tasks: Sequence[Prepared]
    generations: Sequence[Generation]
    is_streamed: bool
    is_expired: bool = False
    parts: list[Increment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._open = len(self.generations)
        self._told = [0] * len(self.generations)  # tokens with log-probabilities
        self._seen = [False] * len(self.generations)
        self._numbers = {generation: index for index, generation in enumerate(self.generations)}

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return not self._open

    @property
    def stats(self) -> list[Stats]:
        """What each generation took so far."""
        return [generation.stats for generation in self.generations]

    def take(self, generation: Generation) -> bool:
        """Take in what a step brought. Says whether whoever waits is to know. For the engine's thread."""
        if generation.has_ended:
            if self.is_streamed:
                self.parts.append(self._part(generation))
            self._open -= 1
            return self.is_streamed or not self._open
        if not (self.is_streamed and generation.unread):
            return False
        if not generation.has_text and generation.request.likely is None:
            return False
        self.parts.append(self._part(generation))
        return True

    def close(self) -> None:
        """Nothing more will come, whatever is open. For the engine's thread."""
        self._open = 0

    def announce(self) -> None:
        """Wake up whoever waits."""
        before, self._changed = self._changed, asyncio.Event()
        before.set()

    async def change(self, seconds: float | None = None) -> bool:
        """Return when something has come, or after so many seconds. Says whether anything has."""
        try:
            return await asyncio.wait_for(self._changed.wait(), seconds)
        except asyncio.TimeoutError:
            return False

    async def increments(self, seconds: float) -> AsyncIterator[Increment | None]:
        """All of its parts as they come; None whenever none has come for so many seconds."""
        shown = 0
        while not (self.is_over and shown == len(self.parts)):
            if shown == len(self.parts) and not await self.change(seconds):
                yield None
            for part in self.parts[shown:]:
                yield part
                shown += 1

    async def ended(self) -> None:
        """Return when all have ended."""
        while not self.is_over:
            await self.change()

    async def results(self) -> list[Result]:
        """What became of each task, when all have ended. Raises what the model died of, and RefusedError."""
        await self.ended()
        self.check()
        return [result_of(task, done) for task, done in zip(self.tasks, self.generations, strict=True)]

    def check(self) -> None:
        """Raises the error that a generation ended with, and RefusedError for what nobody let end. Where the time was
        over all of it is told as far as it came, if there is anything.
        """
        for generation in self.generations:
            if generation.error:
                raise generation.error
        cut = [one for one in self.generations if one.finish_reason == "interrupted"]
        has_some = len(cut) < len(self.generations) or any(one.tokens for one in cut)
        if cut and not (self.is_expired and has_some):
            raise self._broken_off()

    def expire(self) -> None:
        """Its time is over: what there is of it is the answer."""
        self.is_expired = True
        self.cancel()

    def cancel(self) -> None:
        """Nobody wants the rest."""
        for generation in self.generations:
            generation.is_cancelled = True

    def hold(self, held: bool) -> None:
        """Have nobody compute it for the time being, or go on."""
        for generation in self.generations:
            generation.is_held = held

    def _broken_off(self) -> RefusedError:
        if self.is_expired:
            return RefusedError(408, "timeout: it was over before the first token came", code="timeout")
        return RefusedError(503, "the server is stopping", code="server_stopping")

    def _part(self, generation: Generation) -> Increment:
        index = self._numbers[generation]
        text = generation.take()
        first, self._seen[index] = not self._seen[index], True
        ended = generation.has_ended
        return Increment(
            index,
            text,
            self._fresh(generation, index),
            first,
            prompt_logprobs(self.tasks[index], generation) if first else None,
            generation.finish_reason,
            generation.stopped_by,
            ended,
        )

    def _fresh(self, generation: Generation, index: int) -> list[TokenLogprob] | None:
        if generation.request.likely is None:
            return None
        start, self._told[index] = self._told[index], len(generation.scored)
        return [TokenLogprob.of(token) for token in generation.scored[start : self._told[index]]]


class EngineLoop:
    """Has a model compute whatever was submitted. A context manager.

    `places` are the sequences that go together, and `most_waiting` are as many interactive ones as may wait for one.
    `failure` is why nothing is answered any more though nobody has stopped it.
    """

    failure: GrokLocalError | None = None

    def __init__(self, model: Model, *, places: int, most_waiting: int, figures: Figures) -> None:
        self.figures, self.places = figures, places
        self._model, self._most_waiting = model, most_waiting
        self._live: dict[Generation, Answer] = {}
        self._news = threading.Event()
        self._submitting = threading.Lock()  # so that nobody waits for what comes after the end
        self._is_closing = self._is_over = False
        self._thread = threading.Thread(target=self._work, name="grok-local-engine", daemon=True)

    def __enter__(self) -> EngineLoop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """End all answers with the step under way. Safe to call from a signal handler."""
        self._is_closing = True
        self._model.interrupt()
        self._news.set()

    @property
    def is_alive(self) -> bool:
        """Whether anything is answered."""
        return self._thread.is_alive() and not self._is_closing and self.failure is None

    def wake(self) -> None:
        """Something is to be looked at, if only a cancelled answer."""
        self._news.set()

    @property
    def running(self) -> int:
        """How many sequences are computed."""
        return sum(one.has_begun and not one.is_held for one in list(self._live))

    @property
    def waiting(self) -> list[Generation]:
        """What has not begun, in the order in which it will."""
        some = [one for one in list(self._live) if not one.has_begun]
        return sorted(some, key=lambda one: one.rank)  # which keeps the order of those of one rank

    def submit(self, tasks: Sequence[Prepared], *, rank: int = INTERACTIVE, is_streamed: bool = False) -> Answer:
        """Have tasks answered. Raises RefusedError where too many wait already, and while the server stops."""
        some = [Generation(task.request, self._model.context_size, rank) for task in tasks]
        answer = Answer(tasks, some, is_streamed)
        with self._submitting:
            if not self.is_alive or self._is_over:
                raise RefusedError(503, "the server is stopping", code="server_stopping")
            if rank == INTERACTIVE:
                self._check_queue()
            for one in some:
                self._live[one] = answer
                self._model.turns.submit(one, eager=True)
        self._news.set()
        return answer

    @asynccontextmanager
    async def following(self, answer: Answer) -> AsyncIterator[Answer]:
        """While an answer is followed by one alone: it ends with them."""
        try:
            yield answer
        finally:
            self.cancel(answer)

    def cancel(self, answer: Answer) -> None:
        """End it with the step under way."""
        answer.cancel()
        self._news.set()

    def hold(self, answer: Answer, held: bool) -> None:
        """Stop computing it for the time being, or go on."""
        answer.hold(held)
        self._news.set()

    def progress(self, answer: Answer) -> AnswerProgress:
        """How far an answer is."""
        waiting = self.waiting
        places = [place for place, one in enumerate(waiting, 1) if self._live.get(one) is answer]
        ahead = waiting[: places[0] - 1] if places else []
        left = [self.figures.seconds_left(one, ahead=ahead, places=self.places) for one in answer.generations]
        return AnswerProgress.of(answer.generations, place=places[0] if places else None, seconds_left=max(left))

    def _check_queue(self) -> None:
        ours = [one for one in list(self._live) if one.rank == INTERACTIVE and not one.is_held]
        waiting = len(ours) - self.places
        if waiting >= self._most_waiting:
            seconds = self.figures.queue_seconds(ours, places=self.places)
            raise RefusedError(
                429,
                f"{waiting} answers are waiting already, which takes {seconds:.0f} s at most",
                code="queue_full",
                retry_after=max(1, round(seconds)),
            )

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._has_ended():
                self._news.clear()
                began = time.monotonic()
                worked = self._stepped()
                self._linger(began, answered=self._tell())
                self.failure = self._model.engine.failure
                if not (worked or self._is_closing or self.failure):
                    self._news.wait(_LOOK_EVERY)
        except BaseException:
            self.failure = ModelError("the engine failed in a way that nobody knows: the log has more")
            raise
        finally:
            self._end()

    def _linger(self, began: float, *, answered: int) -> None:
        """Wait a moment for what those who were answered ask next: a step without it would cost them more."""
        until = time.monotonic() + min(_LINGER, _SHARE * (time.monotonic() - began))
        expected = len(self._live) + answered * (not self.waiting)
        while len(self._live) < expected and not self._is_closing:
            if not self._news.wait(max(0.0, until - time.monotonic())):
                break
            self._news.clear()

    def _has_ended(self) -> bool:
        return self.failure is not None or (self._is_closing and not self._live)

    def _stepped(self) -> bool:
        try:
            return self._model.turns.step()
        except GrokLocalError as error:
            self._fail(error)
            return False

    def _end(self) -> None:
        """Whoever still waits is told."""
        with self._submitting:
            self._is_over = True
        self._fail(self.failure or RefusedError(503, "the server is stopping", code="server_stopping"))
        for one, answer in list(self._live.items()):
            with suppress(Exception):  # which may be what ended it
                answer.take(one)
            answer.close()
        self._announce(dict.fromkeys(self._live.values()))

    def _fail(self, error: GrokLocalError) -> None:
        for one in list(self._live):
            one.fail(error)
            one.is_cancelled = True  # which has the scheduler forget it

    def _tell(self) -> int:
        """How many interactive ones have ended."""
        news: dict[Answer, None] = {}
        answered = 0
        for generation, answer in list(self._live.items()):
            ended = generation.has_ended
            if answer.take(generation):
                news[answer] = None
            if ended:
                self._live.pop(generation, None)
                self.figures.count(generation)
                answered += generation.rank == INTERACTIVE
        self.figures.look(list(self._live))
        self._announce(news)
        return answered

    def _announce(self, news: Iterable[Answer]) -> None:
        for loop, answers in itertools.groupby(news, key=lambda answer: answer._loop):
            with suppress(RuntimeError):  # it is closed: nobody waits any more
                loop.call_soon_threadsafe(_announce, list(answers))


def _announce(answers: Iterable[Answer]) -> None:
    for answer in answers:
        answer.announce()
