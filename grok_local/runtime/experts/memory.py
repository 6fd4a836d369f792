"""Memory for tensors, reserved whole and filled in pieces: a page costs nothing before it is written to.

A tensor's address is congruent to its place in the file, so that blocks of the file can be read in place.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from functools import cache

from grok_local.files import BLOCK

__all__ = ["HUGE", "Region", "can_reserve"]

HUGE = 2 << 20
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has it from 3.11 on
_MAY_MOVE, _FIXED, _DONT_UNMAP = 1, 2, 4  # MREMAP_ of linux/mman.h
_ADVICE_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


def can_reserve() -> bool:
    """Whether this system hands out memory in this way, and takes pieces of it back."""
    return sys.platform == "linux"


class Region:
    """Room for the bytes `offset` to `offset + nbytes` of a file. Raises OSError."""

    def __init__(self, offset: int, nbytes: int, *, huge: bool = False) -> None:
        self.nbytes = nbytes
        slack = offset % BLOCK
        whole = -(-(slack + nbytes) // BLOCK) * BLOCK
        self._map = mmap.mmap(-1, whole + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._start = -self._base % HUGE + slack  # of the tensor in the map
        self.address = self._base + self._start
        self._view = memoryview(self._map)
        if huge and _ADVICE_HUGE is not None:
            with suppress(OSError):  # a kernel without them
                self._map.madvise(_ADVICE_HUGE)

    def view(self, start: int, end: int) -> memoryview:
        """The bytes `start` to `end` of the tensor; up to a block more on either side is there."""
        return self._view[self._start + start : self._start + end]

    def release(self, start: int, end: int) -> None:
        """Give back the pages that lie wholly between."""
        first, last = self._pages(start, end)
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def take_pages(self, start: int, end: int, *, source: Region, source_start: int) -> None:
        """Have, between `start` and `end`, the pages that `source` has from `source_start` on, which gives them up.

        New pages would be filled with zeros first, only to be overwritten.
        """
        first, last = self._pages(start, end)
        other, _ = source._pages(source_start, source_start)
        length = min(last - first, source._pages(source_start, source_start + end - start)[1] - other)
        moved = length > 0 and _move_pages(source._base + other, self._base + first, length)
        source.release(source_start + (length if moved else 0), source_start + end - start)

    def close(self) -> None:
        """Give everything back; nobody may use it any more."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._view.release()
        with suppress(BufferError):  # someone still holds a view
            self._map.close()

    def _pages(self, start: int, end: int) -> tuple[int, int]:
        """First and last of the whole pages, as positions in the map."""
        return -(-(self._start + start) // BLOCK) * BLOCK, (self._start + end) // BLOCK * BLOCK


def _move_pages(source: int, target: int, nbytes: int) -> bool:
    flags = _MAY_MOVE | _FIXED | _DONT_UNMAP
    found = _libc().mremap(source, ctypes.c_size_t(nbytes), ctypes.c_size_t(nbytes), flags, ctypes.c_void_p(target))
    return bool(found == target)


@cache
def _libc() -> ctypes.CDLL:
    lib = ctypes.CDLL(None, use_errno=True)
    lib.mremap.restype = ctypes.c_void_p
    lib.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    return lib
