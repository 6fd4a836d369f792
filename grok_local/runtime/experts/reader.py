"""Reads pieces of files into memory, several at once and past the page cache, and notices when a file changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from grok_local.errors import ModelError
from grok_local.files import BLOCK, DirectFile
from grok_local.pages import Region

__all__ = ["Reader", "Ticket"]

_CHUNK = 4 << 20  # bytes of one read
_THREADS = 4  # enough for one NVMe disk


class Ticket:
    """A read under way. `error` is set before it is done."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._left = 0
        self._lock = threading.Lock()
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether it is done, at the latest after `seconds`."""
        return self._done.wait(seconds)

    def expect(self, pieces: int) -> None:
        """So many calls of `finish` are to come."""
        self._left = pieces

    def finish(self, error: BaseException | None) -> None:
        """One piece is there, or is not going to be."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if self._left == 0:
                self._done.set()


class _Piece(NamedTuple):
    file: int
    offset: int
    target: memoryview | None  # none: only into the page cache
    nbytes: int
    ticket: Ticket
    in_place: bool = True  # whole blocks, to where blocks are in memory


class Reader:
    """Open `paths`; the files are addressed by their number in it. Raises ModelError."""

    def __init__(self, paths: Sequence[Path], *, threads: int = _THREADS) -> None:
        self.paths = list(paths)
        self._closing = False
        self._files = [_File(path) for path in paths]
        self._queue: SimpleQueue[_Piece | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def read(self, file: int, start: int, nbytes: int, *, region: Region, at: int) -> Ticket:
        """Have so many bytes from `start` on read to `at` in the region.

        Whole blocks are read in place, where both begin in theirs alike; else by way of other memory.
        """
        ticket, end = Ticket(), start + nbytes
        alike = (start - region.address - at) % BLOCK == 0
        spans = _chunks(start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK) if alike else _chunks(start, end)
        pieces = [
            _Piece(
                file, first, region.view(first - start + at, last - start + at), min(last, end) - first, ticket, alike
            )
            for first, last in spans
        ]
        return self._put(ticket, pieces)

    def read_ahead(self, file: int, start: int, end: int) -> Ticket:
        """Bytes `start` to `end` of the file, into the page cache."""
        ticket = Ticket()
        pieces = [_Piece(file, offset, None, stop - offset, ticket) for offset, stop in _chunks(start, end)]
        return self._put(ticket, pieces)

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return all(file.is_direct for file in self._files)

    def check(self) -> None:
        """Raises ModelError if a file is no longer what it was when it was opened."""
        for file in self._files:
            file.check()

    def drop_cache(self) -> None:
        """What the page cache has of the files is not needed."""
        for file in self._files:
            file.drop_cache()

    def close(self) -> None:
        """Wait for what is being read, drop the rest, and close the files."""
        self._closing = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():  # one of them may have found that nobody has the model
                thread.join()
        for file in self._files:
            file.close()

    def _put(self, ticket: Ticket, pieces: Sequence[_Piece]) -> Ticket:
        ticket.expect(len(pieces))
        for piece in pieces:
            self._queue.put(piece)
        return ticket

    def _work(self) -> None:
        detour: Region | None = None
        while (piece := self._queue.get()) is not None:
            error: BaseException | None = None
            try:
                if self._closing:
                    raise ModelError("the model is closed")
                if not piece.in_place and detour is None:
                    detour = Region(0, _CHUNK + 2 * BLOCK, huge=True)
                self._files[piece.file].read(piece, detour)
            except OSError as caught:
                error = self._files[piece.file].failed(caught)
            except BaseException as caught:
                error = caught
            piece.ticket.finish(error)
            del piece  # its view of memory


class _File:
    """An open file, and what it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = DirectFile(path)
        except OSError as error:
            raise self.failed(error) from None
        self._known = _identity(self._file.status())

    @property
    def is_direct(self) -> bool:
        return self._file.is_direct

    def read(self, piece: _Piece, detour: Region | None) -> None:
        """A piece whose blocks lie otherwise in memory than in the file goes by way of `detour`."""
        if piece.target is None:
            self._file.read_ahead(piece.offset, piece.nbytes)
        elif piece.in_place or detour is None:
            self._fill(piece.target, piece.offset, piece.nbytes)
        else:
            first, end = piece.offset // BLOCK * BLOCK, piece.offset + piece.nbytes
            with detour.view(0, -(-end // BLOCK) * BLOCK - first) as blocks:
                self._fill(blocks, first, end - first)
                source = np.frombuffer(blocks, np.uint8)[piece.offset - first : end - first]
                np.frombuffer(piece.target, np.uint8)[:] = source  # others may run meanwhile
                del source

    def _fill(self, target: memoryview, offset: int, nbytes: int) -> None:
        """Read at least so many bytes, and as many more as the target holds, if the file has them."""
        done = 0
        while done < nbytes:
            count = self._file.read(target[done:], offset + done)
            if not count:
                raise ModelError(f"{self._path}: has become shorter while it was in use: {_ADVICE}")
            done += count

    def drop_cache(self) -> None:
        self._file.drop_cache()

    def check(self) -> None:
        try:
            now = self._file.status()
        except OSError as error:
            raise self.failed(error) from None
        if not now.st_nlink:
            raise ModelError(f"{self._path}: was deleted while it was in use: put it back and load the model again")
        if _identity(now) != self._known:
            raise ModelError(f"{self._path}: has changed while it was in use: {_ADVICE}")

    def failed(self, error: OSError) -> ModelError:
        return ModelError(
            f"{self._path}: cannot be read ({error.strerror or error}): check the disk, then load the model again"
        )

    def close(self) -> None:
        self._file.close()


_ADVICE = "grok-local verify tells whether it is whole; then load the model again"


def _identity(status: os.stat_result) -> tuple[int, ...]:
    # The time of the last change to anything too: some programs put that of the data back.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _chunks(start: int, end: int) -> list[tuple[int, int]]:
    return [(offset, min(offset + _CHUNK, end)) for offset in range(start, end, _CHUNK)]
