"""How far fetching and packing are together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from grok_local.hub.fetcher import FetchProgress
from grok_local.quantize.packing.pool import Progress

__all__ = ["Passage", "Shown"]


@dataclass(frozen=True)
class ArrivalProgress:
    """`phase` is "headers", whose counts are files, or "arrive": there each byte of the release counts twice, when it
    has come and when it is packed. `bytes_read` are those that came in this run.
    """

    phase: str
    done: int
    total: int
    file: str
    bytes_read: int

    @property
    def label(self) -> str:
        return self.file


Shown: TypeAlias = Callable[[ArrivalProgress], None]


class Passage:
    """Adds up what both report. Any thread may use it."""

    def __init__(self, nbytes: int, progress: Shown | None) -> None:
        self.received = 0
        self._nbytes, self._progress = nbytes, progress
        self._come = self._packed = 0
        self._lock = threading.Lock()

    def header(self, number: int, total: int, name: str) -> None:
        """So many headers are read."""
        if self._progress:
            self._progress(ArrivalProgress("headers", number, total, name, 0))

    def fetched(self, event: FetchProgress) -> None:
        """A file grows."""
        with self._lock:
            self._come, self.received = event.done, event.bytes_read
            self._show(event.file)

    def packed(self, event: Progress) -> None:
        """A piece is packed, or found to be."""
        with self._lock:
            self._packed = self._nbytes * event.done // event.total
            self._show(event.tensor)

    def _show(self, label: str) -> None:
        if self._progress:
            done = self._come + self._packed
            self._progress(ArrivalProgress("arrive", done, 2 * self._nbytes, label, self.received))
