"""A file being packed, written past the page cache where the system allows it.

180 GB of output would push everything else out of memory, and on two cores the copies and their write-back took a
third of the time of packing to q4_0.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grok_local.files import BLOCK, DirectFile

__all__ = ["PartFile", "aligned_empty", "allow_open_files"]

_PER_PART = 2  # descriptors: through the page cache, and past it
_OTHER_FILES = 256


def aligned_empty(size: int) -> npt.NDArray[np.uint8]:
    """`size` uninitialised bytes whose address suits direct I/O."""
    memory = np.empty(size + BLOCK, np.uint8)
    start = -memory.ctypes.data % BLOCK
    return memory[start : start + size]


def allow_open_files(parts: int) -> None:
    """Have the system allow as many open files as the parts take, up to what it lets this process ask for."""
    wanted = _PER_PART * parts + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(OSError, ValueError):  # what it does not grant is said when it is missing
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class PartFile:
    """A file of `size` bytes, written at any offset by any thread. A context manager. Raises OSError."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = DirectFile(path, flags=os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        os.ftruncate(self._file.fileno(), size)

    def write(self, data: npt.NDArray[np.uint8], offset: int) -> None:
        """Write all of `data` at `offset`."""
        self._file.write(memoryview(data), offset, aligned=data.ctypes.data % BLOCK == 0)

    def read(self, memory: npt.NDArray[np.uint8], offset: int) -> None:
        """Fill `memory` from `offset`; what was never written is zero."""
        os.preadv(self._file.fileno(), [memory], offset)

    def sync(self) -> None:
        """Wait until all that is written is on the disk."""
        os.fsync(self._file.fileno())

    def write_header(self, header: bytes) -> None:
        """Write what makes the file a GGUF, after everything else is on the disk; then wait until it is, too."""
        self.sync()
        self._file.write(memoryview(header), 0, aligned=False)
        self.sync()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
