"""A file that is still on the hub, opened: what is read of it is fetched then, and nothing else."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import BinaryIO, cast

from grok_local.hub.download import read_span

__all__ = ["open_remote"]

_BLOCK = 1 << 14  # bytes asked for at least

Seen = Callable[[int, bytes], None]


def open_remote(url: str, size: int, *, headers: dict[str, str], seen: Seen, stopped: threading.Event) -> BinaryIO:
    """A file of `size` bytes at `url`; `seen` gets what is fetched, with its offset.

    Its methods raise FetchError, StopError, and what the server answers.
    """
    return cast("BinaryIO", io.BufferedReader(_Ranges(url, size, headers, seen, stopped), _BLOCK))


class _Ranges(io.RawIOBase):
    """Each read is a request."""

    def __init__(self, url: str, size: int, headers: dict[str, str], seen: Seen, stopped: threading.Event) -> None:
        super().__init__()
        self._url, self._size, self._headers, self._seen, self._stopped = url, size, headers, seen, stopped
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, memory: bytearray) -> int:  # type: ignore[override]  # any buffer, in truth
        span = range(self._at, min(self._at + len(memory), self._size))
        if not span:
            return 0
        data = read_span(self._url, span, headers=self._headers, stopped=self._stopped)
        self._seen(span.start, data)
        memory[: len(data)] = data
        self._at += len(data)
        return len(data)
