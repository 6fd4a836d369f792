"""Who uses the engine now, where several threads, or several replies of one thread, want it.

There is one KV cache. Whoever has begun keeps it from step to step; somebody else gets it when the holder has ended,
has not come back for a moment, or is of the same thread, which cannot be reading both. A reply that was set aside goes
on later: it has its prompt and its tokens evaluated again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns"]

_PATIENCE = 0.1  # seconds between two steps, after which a reply is taken for one that nobody reads


class Turns:
    """Any thread may call any method. An owner is any object."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._owner: object = None  # who took the last step ...
        self._thread = 0  # ... where ...
        self._rested = 0.0  # ... when it ended ...
        self._keeps = False  # ... and whether it takes more

    @contextmanager
    def step(self, owner: object, *, keep: bool = True) -> Iterator[bool]:
        """Use the engine alone. Yields whether nobody else did since the owner's last step; `keep` if more follow."""
        with self._changed:
            while self._has_to_wait(owner):
                self._changed.wait(_PATIENCE)
            undisturbed = self._owner is owner
            self._busy, self._owner, self._thread = True, owner, threading.get_ident()
        try:
            yield undisturbed
        finally:
            with self._changed:
                self._busy, self._keeps, self._rested = False, keep, time.monotonic()
                if not keep:
                    self._changed.notify_all()

    def done(self, owner: object) -> None:
        """The owner takes no more steps."""
        with self._changed:
            if self._owner is owner and self._keeps:
                self._keeps = False
                self._changed.notify_all()

    def _has_to_wait(self, owner: object) -> bool:
        if self._busy:
            return True
        reads = self._keeps and self._owner is not owner and self._thread != threading.get_ident()
        return reads and time.monotonic() < self._rested + _PATIENCE
