"""Experts that are being read, and the time llama.cpp waits for them."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from grok_local.runtime.experts.reader import Ticket
from grok_local.runtime.experts.weights import ExpertTensor
from grok_local.runtime.graph.tap import Interrupted

__all__ = ["ExpertStats", "Fetches", "Waiting"]

_LOOK = 0.05  # seconds after which a waiting thread looks whether it is interrupted


@dataclass
class ExpertStats:
    """Counted since loading. A hit is an expert, chosen in a layer for one or more tokens, that was in memory."""

    bytes_read: int = 0
    bytes_reread: int = 0  # of them, what had been read before, and had to go
    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0  # in which nothing was computed, because an expert was being read
    seconds: float = 0.0  # evaluating, waiting included
    major_faults: int = 0  # pages that the system had to fetch from a disk meanwhile: it has too little memory

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
            "bytes_reread": self.bytes_reread,
            "bytes_read_per_token": round(self.bytes_read / max(tokens, 1)),
            "hit_rate": round(self.hit_rate, 4),
            "wait_seconds": round(self.wait_seconds, 6),
            "compute_seconds": round(self.compute_seconds, 6),
            "major_faults": self.major_faults,
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
        self._started, self._faults = 0.0, 0

    def begin(self) -> None:
        """An evaluation starts."""
        self._started, self._faults = time.monotonic(), _major_faults()

    def finish(self) -> None:
        """It is over."""
        self.stats.seconds += time.monotonic() - self._started
        self.stats.major_faults += _major_faults() - self._faults

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

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._tickets: dict[tuple[str, int], Ticket] = {}
        self._known: set[tuple[str, int]] = set()  # slices that were read before

    def add(self, weight: ExpertTensor, expert: int, ticket: Ticket) -> None:
        """An expert's slice is being read."""
        key, stats = (weight.name, expert), self._waiting.stats
        self._tickets[key] = ticket
        stats.bytes_read += weight.stride
        stats.bytes_reread += weight.stride if key in self._known else 0
        self._known.add(key)

    def is_awaited(self, weight: ExpertTensor, experts: Iterable[int]) -> bool:
        """Whether one of these experts' slices is not there yet."""
        tickets = (self._tickets.get((weight.name, expert)) for expert in experts)
        return any(ticket is not None and not ticket.done for ticket in tickets)

    def wait_for(self, weight: ExpertTensor, experts: Iterable[int]) -> None:
        """Until these experts' slices are there. Raises what went wrong, and Interrupted."""
        for expert in experts:
            ticket = self._tickets.get((weight.name, expert))
            if ticket is not None:
                self._waiting.wait_for(ticket)
                del self._tickets[weight.name, expert]

    def settle(self, weight: ExpertTensor, expert: int) -> None:
        """Whatever happens, memory into which a read is under way stays where it is until that is done."""
        _settle(self._tickets.pop((weight.name, expert), None))

    def settle_all(self) -> None:
        """The same for everything that is under way."""
        for ticket in self._tickets.values():
            _settle(ticket)
        self._tickets.clear()


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _settle(ticket: Ticket | None) -> None:
    while ticket is not None and not ticket.wait(1):
        pass
