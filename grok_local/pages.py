"""Memory for tensors, reserved whole and filled in pieces: a page costs nothing before it is written to.

Its address is congruent to a place in a file, so that blocks of the file can be read in place.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from grok_local.files import BLOCK

__all__ = ["HUGE", "Region", "can_reserve", "has_huge_pages", "release_pages"]

HUGE = 2 << 20
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has it from 3.11 on
_ADVICE_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
_ADVICE_SMALL = getattr(mmap, "MADV_NOHUGEPAGE", None)
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def can_reserve() -> bool:
    """Whether this system hands out memory in this way, and takes pieces of it back."""
    return sys.platform == "linux"


def has_huge_pages(setting: Path = _SETTING) -> bool:
    """Whether the system gives huge pages to those who ask; True where it does not say."""
    try:
        return "[never]" not in setting.read_text()
    except OSError:
        return True


class Region:
    """Room for the bytes `offset` to `offset + nbytes` of a file. Raises OSError.

    With `huge`, the whole of it is in huge pages, where there are any, and may take one more; else in small ones. A
    direct read into scattered small pages is split into many.
    """

    def __init__(self, offset: int, nbytes: int, *, huge: bool = False) -> None:
        self.nbytes = nbytes
        slack = offset % BLOCK
        self._map = _reserved(-(-(slack + nbytes) // BLOCK) * BLOCK + HUGE, huge=huge)
        self._base = _address(self._map)
        self._start = -self._base % HUGE + slack  # of the tensor in the map
        self.address = self._base + self._start
        self._view = memoryview(self._map)

    def view(self, start: int, end: int) -> memoryview:
        """The bytes `start` to `end` of the tensor; up to a block more on either side is there."""
        return self._view[self._start + start : self._start + end]

    def release(self, start: int, end: int) -> None:
        """Give back the pages that lie wholly between; who looks there afterwards finds zeros."""
        release_pages(self.address + start, self.address + end)

    def close(self) -> None:
        """Give everything back; nobody may use it any more."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._view.release()
        with suppress(BufferError):  # someone still holds a view
            self._map.close()


def release_pages(start: int, end: int) -> None:
    """Give back the pages that lie wholly between two addresses."""
    first, last = -(-start // BLOCK) * BLOCK, end // BLOCK * BLOCK
    if first < last:
        _libc().madvise(first, last - first, mmap.MADV_DONTNEED)


def _reserved(nbytes: int, *, huge: bool) -> mmap.mmap:
    found = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    advice = _ADVICE_HUGE if huge else _ADVICE_SMALL
    if advice is not None:
        with suppress(OSError):  # a kernel without huge pages
            found.madvise(advice)
    return found


def _address(area: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


@cache
def _libc() -> ctypes.PyDLL:
    lib = ctypes.PyDLL(None)  # others that wait for the interpreter would get it for each of these short calls
    lib.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lib
