"""Who has the scheduler take a step, where several threads, or several replies of one thread, wait for text.

Whoever waits while nobody else computes does so for all that wait. An answer that nobody reads for a moment, or whose
reader has asked for another one in the meantime, may lose its place to one that is waited for, and goes on later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from grok_local.runtime.scheduling.generation import Generation
from grok_local.runtime.scheduling.scheduler import Scheduler

__all__ = ["Turns"]

_PATIENCE = 0.1  # seconds after which an answer is taken for one that nobody reads


@dataclass
class _Reader:
    """Who waits for an answer: how many threads now, and which one did last, until when. All do if it is eager."""

    is_eager: bool = False
    waiting: int = 0
    thread: int = 0
    rested: float = 0.0


class Turns:
    """Any thread may call any method."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._changed = threading.Condition()
        self._is_busy = False
        self._impatient = 0  # threads that want the engine for themselves
        self._readers: dict[Generation, _Reader] = {}

    def submit(self, generation: Generation, *, eager: bool = False) -> None:
        """Have it generated: when somebody waits for it, or if it is `eager`, whenever anything is computed."""
        with self._changed:
            self._readers[generation] = _Reader(is_eager=eager)
            self.scheduler.submit(generation)

    def until(self, is_ready: Callable[[], bool], *, reading: Sequence[Generation]) -> None:
        """Compute, or wait for others who do, until something is ready. The generations in `reading` are waited for."""
        readers = [self._readers[generation] for generation in reading if generation in self._readers]
        for reader in readers:
            reader.waiting += 1
        try:
            while not is_ready():
                with self._turn(patient=False) as mine:
                    worked = mine and self.scheduler.tick(wanted=self._is_wanted, may_yield=self._may_yield)
                    self._forget_ended()
                if mine and not worked:
                    with self._changed:
                        self._changed.wait(_PATIENCE / 10)
        finally:
            for reader in readers:
                reader.waiting -= 1
                reader.thread, reader.rested = threading.get_ident(), time.monotonic()

    def step(self) -> bool:
        """A step of those that are eager, for a thread that does nothing else. Says whether there was one.

        Whoever wants the engine alone goes first.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._impatient)
        with self._turn():
            worked = self.scheduler.tick(wanted=self._is_wanted, may_yield=self._may_yield)
            self._forget_ended()
        return worked

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the engine itself, its first sequence: nobody else does, and nobody's answer is there."""
        try:
            while True:
                with self._first(), self._turn():
                    if self.scheduler.vacate(may_yield=self._may_yield):
                        try:
                            yield
                        finally:
                            self.scheduler.look_again()
                        return
                self.until(iter((False, True)).__next__, reading=())  # a step, or a moment's rest
        except BaseException:  # Ctrl-C while it waits, too: the place that it waited for is anybody's again
            self.scheduler.stop_vacating()
            raise

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Nobody computes meanwhile."""
        with self._first(), self._turn():
            yield

    def go_on_with(self, scheduler: Scheduler) -> None:
        """From now on this one has places, also for those that were submitted to the one before and have not begun.

        For whoever has all `stopped`.
        """
        with self._changed:
            for generation in [known for known in self._readers if not known.has_ended]:
                scheduler.submit(generation)
            self.scheduler = scheduler

    def interrupt(self) -> None:
        """End all answers that have begun. From a signal handler, too: it waits for nothing."""
        self.scheduler.cancel_all()

    def _forget_ended(self) -> None:
        for generation in [known for known in list(self._readers) if known.has_ended]:
            self._readers.pop(generation, None)

    @contextmanager
    def _first(self) -> Iterator[None]:
        """No thread that only steps begins another one."""
        with self._changed:
            self._impatient += 1
        try:
            yield
        finally:
            with self._changed:
                self._impatient -= 1
                self._changed.notify_all()

    @contextmanager
    def _turn(self, *, patient: bool = True) -> Iterator[bool]:
        """Compute alone. Says whether it is one's turn: who is not `patient` waits no longer than for a step, which may
        have brought what was waited for.
        """
        mine = False
        try:
            with self._changed:
                waited = self._is_busy
                while self._is_busy:
                    self._changed.wait(_PATIENCE)
                    if not patient:
                        break
                if not self._is_busy and (patient or not waited):
                    mine = self._is_busy = True  # in this order: Ctrl-C may come between
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()

    def _is_wanted(self, generation: Generation) -> bool:
        reader = self._readers[generation]
        return (reader.is_eager or reader.waiting > 0) and not generation.is_held

    def _may_yield(self, generation: Generation) -> bool:
        reader = self._readers[generation]
        if self._is_wanted(generation):
            return False
        return reader.thread == threading.get_ident() or time.monotonic() > reader.rested + _PATIENCE
