"""A file of which parts can be had, opened: what is read of it is asked for then, and nothing else."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import BinaryIO, cast

__all__ = ["open_ranges"]

_BLOCK = 1 << 14  # bytes asked for at least


def open_ranges(part: Callable[[range], bytes], size: int) -> BinaryIO:
    """A file of `size` bytes, whose methods raise what `part` raises."""
    return cast("BinaryIO", io.BufferedReader(_Ranges(part, size), _BLOCK))


class _Ranges(io.RawIOBase):
    """Each read asks for a part."""

    def __init__(self, part: Callable[[range], bytes], size: int) -> None:
        super().__init__()
        self._part, self._size, self._at = part, size, 0

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
        data = self._part(span) if span else b""
        memory[: len(data)] = data
        self._at += len(data)
        return len(data)
