"""A file being packed, written past the page cache where the system allows it.

180 GB of output would push everything else out of memory, and on two cores the copies and their write-back took a
third of the time of packing to q4_0.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["DIRECT_ALIGNMENT", "PartFile", "aligned_empty"]

DIRECT_ALIGNMENT = 4096  # bytes; of address, offset and size


def aligned_empty(size: int) -> npt.NDArray[np.uint8]:
    """`size` uninitialised bytes whose address suits direct I/O."""
    memory = np.empty(size + DIRECT_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % DIRECT_ALIGNMENT
    return memory[start : start + size]


class PartFile:
    """A file of `size` bytes, written at any offset by any thread. A context manager. Raises OSError."""

    def __init__(self, path: Path, size: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        os.ftruncate(self._fd, size)
        self._direct = _open_direct(path)

    def write(self, data: npt.NDArray[np.uint8], offset: int) -> None:
        """Write all of `data` at `offset`."""
        fits = not (offset | data.nbytes | data.ctypes.data) % DIRECT_ALIGNMENT
        if self._direct is not None and fits:
            try:
                _write_all(self._direct, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return
        _write_all(self._fd, data, offset)

    def read(self, memory: npt.NDArray[np.uint8], offset: int) -> None:
        """Fill `memory` from `offset`; what was never written is zero."""
        os.preadv(self._fd, [memory], offset)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:  # a file system in memory, for one
        return None


def _write_all(fd: int, data: npt.NDArray[np.uint8], offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
