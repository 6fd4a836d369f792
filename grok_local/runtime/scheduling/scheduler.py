"""Decides which sequences go on: continuous batching.

A step evaluates a token of each answer and as much of prompts as fits beside them. A place that an answer leaves is
taken at once; a beginning that several prompts share is evaluated once.
"""

from __future__ import annotations

import itertools
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grok_local.errors import ContextError, GrokLocalError, NoRoomError
from grok_local.runtime.engine.interrupts import ctrl_c_later
from grok_local.runtime.engine.sampling import PENALTY_WINDOW
from grok_local.runtime.graph.rows import Draw, Row
from grok_local.runtime.scheduling.composing import Chunk, Composer, Running, Together
from grok_local.runtime.scheduling.generation import Generation
from grok_local.runtime.scheduling.sequences import Sequences, common_length

if TYPE_CHECKING:
    from grok_local.runtime.engine.protocol import Decoder
    from grok_local.runtime.experts.waiting import ExpertStats
    from grok_local.runtime.graph.rows import Drawn

__all__ = ["Scheduler"]

_WORTH_WAITING = 16  # tokens that a prompt beside evaluates anyway, for which a prompt waits with its own
_WORTH_COPYING = 16  # tokens, where llama.cpp copies all that a place has room for
_LEAD = 16  # tokens that an answer may be ahead of its reader

Wanted = Callable[[Generation], bool]


@dataclass
class _Step:
    """What is evaluated together and what is chosen after it; `experts` are the streamed ones' figures before."""

    chunks: list[Chunk]
    rows: list[Row]
    draws: list[Draw]
    began: float
    experts: ExpertStats | None
    drawn: list[Drawn] | None = None


class Scheduler:
    """Generations on the places of an engine. Any thread may submit or cancel; all else is for one at a time.

    `composer` says what goes into a step; `strict` is as in `Sequences`. In
    `tick`, `wanted` of a generation is whether somebody waits for it now, and `may_yield` whether it may lose its place
    to one that is wanted.
    """

    def __init__(
        self,
        engine: Decoder,
        *,
        places: int,
        composer: Composer | None = None,
        strict: bool = False,
    ) -> None:
        self._engine = engine
        self._streams = engine.expert_stats() is not None
        self._composer = composer or Together()
        worth = _WORTH_COPYING if self._composer.in_a_row else 1
        self._sequences = Sequences(engine, places, strict=strict, worth_copying=worth)
        self._arrived: deque[Running] = deque()
        self._queue: list[Running] = []  # those without a place
        self._running: list[Running] = []
        self._numbers = itertools.count(1)
        self._is_full = False  # the KV cache was too small for those that run: nobody is admitted before one ends
        self._is_doubtful = False  # something broke into a step: what the places hold is not known

    @property
    def is_idle(self) -> bool:
        """Whether there is no generation that has not ended."""
        return not (self._arrived or self._queue or self._running)

    def submit(self, generation: Generation) -> None:
        """It goes on when there is a place and somebody wants it."""
        self._arrived.append(Running(generation, next(self._numbers)))

    def tick(self, *, wanted: Wanted, may_yield: Wanted) -> bool:
        """A step of those that are wanted, and of those beside them that are not far ahead of their readers.

        Says whether there was anything to do. An error of the engine ends all generations that were in the step.
        Ctrl-C interrupts the engine, and is raised when everything is where it belongs.
        """
        with ctrl_c_later(self._engine), self._doubted():
            self._begin(wanted, may_yield)
            active = [one for one in self._running if wanted(one.generation) or _may_go_along(one.generation)]
            if not any(wanted(one.generation) for one in active):
                return False
            step = self._composed(active)
            with self._watched(active):
                step.drawn = self._engine.step(step.rows, step.draws)
            if step.drawn is None:  # interrupted: those that are cancelled end with the next tick
                self._is_doubtful = True  # some models cannot forget a part, and have forgotten all
            else:
                self._finish(step, step.drawn)
            return True

    def _begin(self, wanted: Wanted, may_yield: Wanted) -> None:
        self._engine.interrupted = False
        self.end_cancelled()
        self._look_again()
        self._admit(wanted, may_yield)
        if self._composer.in_a_row:
            self._close_gaps()

    @contextmanager
    def _watched(self, active: Sequence[Running]) -> Iterator[None]:
        """What goes wrong in a step ends the generations in it, unless it is only room that is wanting."""
        try:
            yield
        except NoRoomError:
            self._make_room()
        except GrokLocalError as error:
            self._is_doubtful = True
            self._fail(active, error)

    @contextmanager
    def _doubted(self) -> Iterator[None]:
        """After what breaks into a step nobody knows what the places hold."""
        try:
            yield
        except BaseException:
            self._is_doubtful = True
            raise

    def cancel_all(self) -> None:
        """Nobody wants any of them. Safe to call from any thread and from a signal handler."""
        for one in (*self._running, *self._queue, *self._arrived):
            one.generation.is_cancelled = True

    def end_cancelled(self) -> None:
        """Those that nobody wants have ended, and are not waited for."""
        while self._arrived:
            self._wait(self._arrived.popleft())
        for one in (*self._running, *self._queue):
            if one.generation.is_cancelled:
                one.generation.end("interrupted")
                self._end(one)

    def vacate(self, *, may_yield: Wanted) -> bool:
        """Have place 0 free, for what is done with the engine itself. Says whether it is."""
        with ctrl_c_later(self._engine), self._doubted():
            self.end_cancelled()
            for one in list(self._running):
                if one.place == 0 and may_yield(one.generation):
                    self._set_aside(one)
            return self._sequences.reserve(0)

    def stop_vacating(self) -> None:
        """Whoever waited for place 0 has given up. From any thread: others who wait for it ask for it again."""
        self._sequences.end_reserving()

    def look_again(self) -> None:
        """Somebody has used the engine itself, and is done with it."""
        self.stop_vacating()
        self._is_doubtful = True

    # -- places --------------------------------------------------------------------------------------------------------

    def _admit(self, wanted: Wanted, may_yield: Wanted) -> None:
        """Give places to those that are wanted, in the order of their turns."""
        for one in list(self._queue):
            if self._is_full and self._running:
                return
            others = [] if self._sequences.has_free else self._displaceable(one, wanted, may_yield)
            if not (self._sequences.has_free or others):
                return
            if wanted(one.generation) and not self._comes_soon(one, wanted) and self._has_chain(one):
                if others:
                    self._set_aside(others[0])
                self._place(one)

    def _has_chain(self, one: Running) -> bool:
        """Whether it has a sampler chain, or can be given one: its grammar may be of no use."""
        request = one.generation.request
        try:
            if one.chain is None:
                recent = request.prompt[-PENALTY_WINDOW:]
                one.chain = self._engine.begin_sampling(request.sampling, recent, request.grammar)
        except GrokLocalError as error:
            self._fail([one], error)
        return one.chain is not None

    def _place(self, one: Running) -> None:
        ids = one.generation.ids
        one.place, cached = self._sequences.take(ids[: one.generation.settled])
        self._queue.remove(one)
        one.pending = ids[cached:]
        if one.in_prompt:
            one.generation.stats.cached_tokens = cached
        self._running.append(one)

    def _close_gaps(self) -> None:
        """Move those into gaps that lie outside of the row in which most of them are."""
        taken, count = {one.place for one in self._running}, len(self._running)
        last = max(taken, default=0)
        row = max((range(a, a + count) for a in range(last + 1)), key=lambda row: len(taken.intersection(row)))
        gaps = [place for place in row if self._sequences.may_take(place)]
        for gap, one in zip(gaps, [one for one in self._running if one.place not in row], strict=False):
            self._sequences.move(one.place, gap)
            one.place = gap

    def _comes_soon(self, one: Running, wanted: Wanted) -> bool:
        """Whether much of its beginning is being evaluated for another one just now."""
        ids = one.generation.ids[: one.generation.settled]
        others = [other for other in self._running if other.in_prompt and other.pending and wanted(other.generation)]
        coming = max((common_length(ids[:-1], other.generation.ids) for other in others), default=0)
        return coming >= _WORTH_WAITING and coming - self._sequences.found(ids).length >= _WORTH_WAITING

    def _displaceable(self, one: Running, wanted: Wanted, may_yield: Wanted) -> list[Running]:
        """Those whose place may be taken for one: nobody waits for them, or they are of a higher rank; these last come
        first.
        """
        others = (other for other in self._running if not self._sequences.is_reserved(other.place))
        idle, lower = list[Running](), list[Running]()
        for other in others:
            if not wanted(other.generation) and may_yield(other.generation):
                idle.append(other)
            elif other.generation.rank > one.generation.rank:
                lower.append(other)
        return [*idle, *sorted(lower, key=lambda other: other.turn, reverse=True)]

    def _set_aside(self, one: Running) -> None:
        """It goes on later from what its place still holds by then."""
        self._running.remove(one)
        self._sequences.release(one.place)
        one.place = -1
        self._wait(one)

    def _wait(self, one: Running) -> None:
        insort(self._queue, one, key=lambda waiting: waiting.turn)

    def _make_room(self) -> None:
        """The KV cache is full. What nobody uses goes first, and then the youngest, to begin again later."""
        if self._sequences.clear_free():
            return
        youngest = max(self._running, key=lambda one: one.turn)
        if len(self._running) == 1:
            self._fail([youngest], ContextError("the KV cache has no room for this prompt: take a larger context"))
            return
        self._set_aside(youngest)
        self._sequences.clear_free()
        self._is_full = True

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _composed(self, active: Sequence[Running]) -> _Step:
        chunks = self._composer.compose(active, room=self._engine.batch_size)
        rows = [row for chunk in chunks for row in self._rows(chunk)]
        if self._composer.padded:  # llama.cpp evaluates together what comes in the order of the places
            rows += [Row(0, len(self._sequences.ids(place)), place, True) for place in self._composer.padded]
            rows.sort(key=lambda row: row.sequence)
        draws = [_draw(chunk) for chunk in chunks if _is_drawn(chunk)]
        return _Step(chunks, rows, draws, time.monotonic(), self._engine.expert_stats() if self._streams else None)

    def _finish(self, step: _Step, drawn: Sequence[Drawn]) -> None:
        self._count(step)
        for chunk in step.chunks:
            one = chunk.running
            self._sequences.grow(one.place, chunk.ids, kept=chunk.is_last and one.in_prompt)
            del one.pending[: len(chunk.ids)]
        self._forget_padding()
        for chunk, came in zip(filter(_is_drawn, step.chunks), drawn, strict=True):
            one = chunk.running
            if came.known:
                evaluated = len(self._sequences.ids(one.place)) - len(chunk.ids)
                one.generation.follow(came.known, start=evaluated + 1)
            if came.error:
                self._fail([one], came.error)
            elif chunk.is_last:
                self._take(one, came)

    def _forget_padding(self) -> None:
        for place in self._composer.padded:
            length = len(self._sequences.ids(place))
            self._sequences.grow(place, [0])
            if self._sequences.shorten(place, length) < length:
                self._is_doubtful = True  # some models can only forget all, an answer that rests there too

    def _rows(self, chunk: Chunk) -> list[Row]:
        one, end = chunk.running, len(chunk.ids) - 1
        start = len(self._sequences.ids(one.place))
        wanted = [one.is_scored or (chunk.is_last and i == end) for i in range(len(chunk.ids))]
        return [Row(token, start + i, one.place, wanted[i]) for i, token in enumerate(chunk.ids)]

    def _count(self, step: _Step) -> None:
        seconds, now = time.monotonic() - step.began, self._engine.expert_stats() if step.experts else None
        experts = now.since(step.experts) if now and step.experts else None
        for chunk in step.chunks:
            rows = len(chunk.ids) if chunk.running.in_prompt else 0
            chunk.running.generation.stats.count(prompt_rows=rows, seconds=seconds, experts=experts)

    def _take(self, one: Running, drawn: Drawn) -> None:
        generation = one.generation
        known = len(generation.tokens)
        generation.add(drawn)
        one.pending = generation.tokens[known:]
        if generation.has_ended:
            self._end(one)

    def _end(self, one: Running) -> None:
        if one.chain is not None:
            self._engine.end_sampling(one.chain)
        if one in self._queue:
            self._queue.remove(one)
            return
        self._running.remove(one)
        self._sequences.release(one.place)
        self._is_full = False

    def _fail(self, some: Iterable[Running], error: GrokLocalError) -> None:
        for one in list(some):
            one.generation.fail(error)
            self._end(one)

    def _look_again(self) -> None:
        """Go on from what the places really hold."""
        if not self._is_doubtful:
            return
        self._sequences.read_again()
        for one in self._running:
            ids = one.generation.ids
            same = common_length(list(self._sequences.ids(one.place)), ids)
            settled = min(same, len(ids) - 1, one.generation.settled)
            one.pending = ids[self._sequences.shorten(one.place, settled) :]
        self._is_doubtful = False


def _may_go_along(generation: Generation) -> bool:
    """Whether it may go on beside others though nobody waits for it: its reader will be back."""
    return generation.unread < _LEAD and not generation.is_held


def _is_drawn(chunk: Chunk) -> bool:
    return chunk.is_last or chunk.running.is_scored


def _draw(chunk: Chunk) -> Draw:
    one, request = chunk.running, chunk.running.generation.request
    chain = one.chain if chunk.is_last else None
    draw = Draw(one.place, chain, keep=one.in_prompt and chunk.is_last, likely=request.likely)
    if not one.is_scored or request.prompt_likely is None:
        return draw
    done = len(request.prompt) - len(one.pending)
    known = request.prompt[done + 1 : done + len(chunk.ids) + 1]
    return draw._replace(known=known, known_likely=request.prompt_likely)
