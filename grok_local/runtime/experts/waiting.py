"""Experts that are being read, and the time llama.cpp waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from grok_local.runtime.experts.reader import Reader, Ticket
from grok_local.runtime.experts.weights import StreamedTensor
from grok_local.runtime.graph.tap import Interrupted

__all__ = ["ExpertStats", "Fetches", "Waiting"]

_LOOK = 0.05  # seconds after which a waiting thread looks whether it is interrupted


@dataclass
class ExpertStats:
    """Counted since loading. A hit is an expert, chosen in a layer for one or more tokens, that was in memory."""

    bytes_read: int = 0
    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0  # in which nothing was computed, because an expert was being read
    seconds: float = 0.0  # evaluating, waiting included

    @property
    def hit_rate(self) -> float:
        """Of the experts chosen, those that were in memory."""
        chosen = self.hits + self.misses
        return self.hits / chosen if chosen else 0.0

    @property
    def compute_seconds(self) -> float:
        """What was not waiting."""
        return self.seconds - self.wait_seconds

    def since(self, before: ExpertStats) -> ExpertStats:
        """What came after `before` was counted."""
        return ExpertStats(**{name: value - getattr(before, name) for name, value in vars(self).items()})

    def described(self, tokens: int) -> dict[str, float]:
        """For people and programs: of so many tokens."""
        return {
            "bytes_read": self.bytes_read,
            "bytes_read_per_token": round(self.bytes_read / max(tokens, 1)),
            "hit_rate": round(self.hit_rate, 4),
            "wait_seconds": round(self.wait_seconds, 6),
            "compute_seconds": round(self.compute_seconds, 6),
        }

    def __add__(self, other: ExpertStats) -> ExpertStats:
        return ExpertStats(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def copy(self) -> ExpertStats:
        """As it is now."""
        return replace(self)


class Waiting:
    """Waits for tickets, and counts how long; `interrupted` is asked meanwhile."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self.stats = ExpertStats()
        self._interrupted = interrupted
        self._started = 0.0

    def begin(self) -> None:
        """An evaluation starts."""
        self._started = time.monotonic()

    def finish(self) -> None:
        """It is over."""
        self.stats.seconds += time.monotonic() - self._started

    def wait_for(self, ticket: Ticket) -> None:
        """Until it is done; the time counts as waiting. Raises what went wrong, and Interrupted."""
        if not ticket.done:
            started = time.monotonic()
            while not (ticket.wait(_LOOK) or self._interrupted()):
                pass
            self.stats.wait_seconds += time.monotonic() - started
        if ticket.error is not None:
            raise ticket.error
        if not ticket.done:
            raise Interrupted("interrupted")


class Fetches:
    """The slices of experts that are under way from the disk to memory."""

    def __init__(self, reader: Reader, waiting: Waiting) -> None:
        self._reader, self._waiting = reader, waiting
        self._tickets: dict[tuple[str, int], Ticket] = {}

    def __bool__(self) -> bool:
        return bool(self._tickets)

    def start(self, weight: StreamedTensor, expert: int) -> None:
        """Have an expert's slice read."""
        self._tickets[weight.name, expert] = weight.read(self._reader, expert)
        self._waiting.stats.bytes_read += weight.stride

    def is_awaited(self, weight: StreamedTensor, experts: Iterable[int]) -> bool:
        """Whether one of these experts' slices is not there yet."""
        tickets = (self._tickets.get((weight.name, expert)) for expert in experts)
        return any(ticket is not None and not ticket.done for ticket in tickets)

    def wait_for(self, weight: StreamedTensor, experts: Iterable[int]) -> None:
        """Until these experts' slices are there. Raises what went wrong, and Interrupted."""
        for expert in experts:
            ticket = self._tickets.get((weight.name, expert))
            if ticket is not None:
                self._waiting.wait_for(ticket)
                del self._tickets[weight.name, expert]

    def wait_for_all(self) -> None:
        """Until nothing is under way."""
        for ticket in self._tickets.values():
            self._waiting.wait_for(ticket)
        self._tickets.clear()

    def settle(self, weight: StreamedTensor, expert: int) -> None:
        """Whatever happens, memory into which a read is under way stays where it is until that is done."""
        _settle(self._tickets.pop((weight.name, expert), None))

    def settle_all(self) -> None:
        """The same for everything that is under way."""
        for ticket in self._tickets.values():
            _settle(ticket)
        self._tickets.clear()


def _settle(ticket: Ticket | None) -> None:
    while ticket is not None and not ticket.wait(1):
        pass
