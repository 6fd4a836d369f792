"""Brings lots in their order, as many at a time as the room allows, and lets them go when they are packed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from grok_local.arrival.lots import Gate, Lot
from grok_local.arrival.room import Room
from grok_local.arrival.skeleton import Skeleton
from grok_local.errors import FetchError
from grok_local.hub.fetcher import CONNECTIONS, Fetcher
from grok_local.hub.repositories import RemoteFile
from grok_local.quantize.layout.pieces import Piece
from grok_local.quantize.sources.checkpoint import Checkpoint, check_scales, looked_at

__all__ = ["Landing", "Ordered"]


@dataclass(frozen=True)
class Ordered:
    """What is to come: the checkpoint where it will be, its files by path, and its lots in their order.

    `fetcher` makes what brings the files, given those that are done with.
    """

    checkpoint: Checkpoint
    files: Mapping[Path, RemoteFile]
    lots: Sequence[Lot]
    room: Room
    fetcher: Callable[[Collection[RemoteFile]], Fetcher]


class Landing:
    """One run. A context manager, whose end stops all that is still coming."""

    def __init__(self, ordered: Ordered, skeleton: Skeleton) -> None:
        self._ordered, self._skeleton = ordered, skeleton
        self._gate = Gate(ordered.room.together)
        self._arrived: queue.SimpleQueue[Lot | BaseException] = queue.SimpleQueue()
        self._left: dict[Lot, int] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1 + CONNECTIONS)
        self._fetcher: Fetcher | None = None

    def ready(self, pending: Sequence[Piece], sync: Callable[[], None]) -> Iterator[Sequence[Piece]]:
        """The pieces of each lot that is there: a `Supply`. Raises FetchError, CheckpointError."""
        wanted = {piece.index for piece in pending}
        due = [lot for lot in self._ordered.lots if not self._is_done(lot, wanted)]
        self._ordered.room.check()
        self._begin(due)
        for _ in due:
            lot = self._next()
            self._check(lot)
            yield [piece for piece in lot.pieces if piece.index in wanted]
            sync()
            self._keep(lot)
            self._let_go(lot)

    def _is_done(self, lot: Lot, wanted: Collection[int]) -> bool:
        return all(map(self._skeleton.has_kept, lot.files)) and not any(p.index in wanted for p in lot.pieces)

    def _begin(self, due: Sequence[Lot]) -> None:
        waiting = set(due)
        done = [lot for lot in self._ordered.lots if lot not in waiting]
        for lot in done:
            self._gate.count(lot)
            self._discard(lot)  # killed before that
        self._fetcher = self._ordered.fetcher({self._ordered.files[path] for lot in done for path in lot.files})
        self._pool.submit(self._feed, self._fetcher, due)

    def _feed(self, fetcher: Fetcher, due: Sequence[Lot]) -> None:
        for lot in due:
            if not self._gate.enter(lot):
                return
            self._left[lot] = len(lot.files)
            for path in lot.files:
                self._pool.submit(self._bring, fetcher, lot, self._ordered.files[path])

    def _bring(self, fetcher: Fetcher, lot: Lot, file: RemoteFile) -> None:
        problem = fetcher.bring(file)
        if fetcher.raised:
            self._arrived.put(fetcher.raised)
        elif problem:
            rest = "what is packed so far is kept: the same command goes on from here"
            self._arrived.put(FetchError([problem, rest]))
        elif not fetcher.stopped.is_set():
            with self._lock:
                self._left[lot] -= 1
                complete = not self._left[lot]
            if complete:
                self._arrived.put(lot)

    def _next(self) -> Lot:
        arrived = self._arrived.get()
        if isinstance(arrived, Lot):
            return arrived
        raise arrived

    def _check(self, lot: Lot) -> None:
        """What could not be looked at before the files were there."""
        for path in lot.files:
            self._skeleton.check(path)
        check_scales(self._part(lot))

    def _part(self, lot: Lot) -> Checkpoint:
        """The tensors that the lot has something of."""
        checkpoint, files = self._ordered.checkpoint, set(lot.files)
        return replace(checkpoint, tensors=tuple(t for t in checkpoint.tensors if not files.isdisjoint(t.paths)))

    def _keep(self, lot: Lot) -> None:
        self._skeleton.keep(span for span in looked_at(self._part(lot)) if span.path in lot.files)
        self._skeleton.mark(lot.files)

    def _let_go(self, lot: Lot) -> None:
        if self._ordered.room.discard:
            self._discard(lot)
            self._gate.leave(lot)

    def _discard(self, lot: Lot) -> None:
        if self._ordered.room.discard:
            for path in lot.files:
                path.unlink(missing_ok=True)

    def __enter__(self) -> Landing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fetcher:
            self._fetcher.stopped.set()
        self._gate.close()
        self._pool.shutdown(cancel_futures=True)
