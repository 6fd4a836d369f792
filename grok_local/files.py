"""What several rooms need of files: direct I/O and what to do without it, JSON lines whose last one may be torn, locks,
and the names of parts and of what is not finished.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

__all__ = [
    "BLOCK",
    "PULL",
    "DirectFile",
    "JsonLines",
    "NoLocks",
    "first_part",
    "gone_mark",
    "is_part",
    "journal_of",
    "linked_part",
    "lock",
    "locked",
    "named_once",
    "part_name",
    "part_names",
    "partial_of",
    "sync_folder",
    "whole_lines",
    "write_whole",
    "written_whole",
]

BLOCK = 4096  # bytes: what O_DIRECT asks of addresses, offsets and lengths, on every disk of today

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NO_DIRECT = (errno.EINVAL, errno.ENOTSUP)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of folders, in shared ones of virtual machines and networks
_ENOTSUPP = 524  # of the Linux kernel, which has it beside ENOTSUP; NFS returns it
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, _ENOTSUPP)


# -- direct I/O --------------------------------------------------------------------------------------------------------


class DirectFile:
    """A file read and written past the page cache where the system can do that, and through it where it cannot.

    What has an offset, a length and an address that are multiples of BLOCK goes past the cache; what else is read is
    dropped from it afterwards. `is_direct` says which it is. Any thread may use any method. The constructor and all
    methods raise OSError.
    """

    def __init__(self, path: Path, *, flags: int = os.O_RDONLY) -> None:
        self.path = path
        self._cached = os.open(path, flags | os.O_CLOEXEC, 0o666)
        self._direct = _open_direct(path, flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR))
        self.is_direct = self._direct >= 0
        if self.is_direct and flags == os.O_RDONLY:
            self._compare_direct()

    def fileno(self) -> int:
        """The descriptor that goes through the page cache."""
        return self._cached

    def status(self) -> os.stat_result:
        """What fstat says of it now."""
        return os.fstat(self._cached)

    def read(self, memory: memoryview, offset: int) -> int:
        """Fill as much of `memory` from `offset` on as one call gives, which is nothing at the end of the file.

        Where `offset` is a multiple of BLOCK, the memory's address must be one too.
        """
        if self._may_be_direct(offset, len(memory)):
            try:
                return os.preadv(self._direct, [memory], offset)
            except OSError as error:
                self._give_up_direct(error)
        count = os.preadv(self._cached, [memory], offset)
        self.drop_cache(offset, count)
        return count

    def write(self, memory: memoryview, offset: int, *, aligned: bool) -> None:
        """Write all of `memory` at `offset`; `aligned` says whether its address is a multiple of BLOCK."""
        if aligned and self._may_be_direct(offset, len(memory)):
            try:
                _write_all(self._direct, memory, offset)
            except OSError as error:
                self._give_up_direct(error)
            else:
                return
        _write_all(self._cached, memory, offset)

    def read_ahead(self, offset: int, nbytes: int) -> None:
        """Have the system read a piece into its page cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._cached, offset, nbytes, os.POSIX_FADV_WILLNEED)
        else:
            os.pread(self._cached, nbytes, offset)

    def drop_cache(self, offset: int = 0, nbytes: int = 0) -> None:
        """The page cache need not keep this piece; 0 bytes are all up to the end."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._cached, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close both descriptors."""
        for descriptor in {self._cached, self._direct} - {-1}:
            os.close(descriptor)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _may_be_direct(self, offset: int, nbytes: int) -> bool:
        return self.is_direct and not (offset | nbytes) % BLOCK

    def _compare_direct(self) -> None:
        """Some file systems hand out rubbish when read directly: one block in the middle is read both ways."""
        middle = self.status().st_size // 2 // BLOCK * BLOCK
        with mmap.mmap(-1, BLOCK) as block, memoryview(block) as memory:
            direct = bytes(memory[: self.read(memory, middle)])
            self.is_direct = self.is_direct and direct == os.pread(self._cached, len(direct), middle)
        self.drop_cache(middle, BLOCK)

    def _give_up_direct(self, error: OSError) -> None:
        """Some file systems open a file for direct I/O and then refuse it, or want larger blocks."""
        if error.errno not in _NO_DIRECT:
            raise error
        self.is_direct = False  # not closed: other threads may be reading with it


def _open_direct(path: Path, access: int) -> int:
    """A second descriptor, past the page cache; -1 where there is no such thing."""
    try:
        if hasattr(fcntl, "F_NOCACHE"):  # macOS
            descriptor = os.open(path, access | os.O_CLOEXEC)
            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
            return descriptor
        return os.open(path, access | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):  # a file system in memory, for one
        return -1


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]


# -- JSON lines --------------------------------------------------------------------------------------------------------


class JsonLines:
    """A file of JSON lines that several threads append to, and that a kill may leave with half a line at its end.

    The constructor and `append` raise OSError. A context manager.
    """

    def __init__(self, path: Path, *, flags: int = 0) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)

    def fileno(self) -> int:
        """The file's descriptor, for `lock`."""
        return self._fd

    def read(self) -> list[Any]:
        """The values of all whole lines, None for one that is no JSON.

        A torn end is cut off: what was not a line once must not become one when something is appended.
        """
        os.lseek(self._fd, 0, os.SEEK_SET)
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        lines = data.split(b"\n")
        if torn := lines.pop():
            os.ftruncate(self._fd, len(data) - len(torn))
        return [_parsed(line) for line in lines]

    def begins_with(self, start: bytes) -> bool:
        """Whether the file begins so, as far as it goes: one that was killed early may have less."""
        return start.startswith(os.pread(self._fd, len(start), 0))

    def append(self, *values: Any) -> None:
        """Write a line for each of the values, all at once: lines of several threads never mix."""
        self._write(b"".join(json.dumps(value, separators=(",", ":")).encode() + b"\n" for value in values))

    def clear(self) -> None:
        """Begin anew."""
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Close the file, which gives up its lock."""
        os.close(self._fd)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        """In one call where the system takes that much: Linux takes 2 GiB. On a full disk the next one says so."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def whole_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of an open file that are whole: the last may have been cut off with the program that wrote it."""
    return (line for line in lines if line.endswith(b"\n"))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads`: of two values with one name one would be lost. Raises ValueError there."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{next(name for name, count in counts.items() if count > 1)!r:.80} stands twice")
    return found


# -- locks -------------------------------------------------------------------------------------------------------------


class NoLocks(UserWarning):
    """The file system has no locks, so nothing keeps two processes apart there."""


def lock(fd: int, path: Path) -> bool:
    """Take the lock of the file `path`, open as `fd`. False where another process has it; where the file system has no
    locks, warn once and go on without. Raises OSError.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        text = f"{path.parent}: this file system has no locks: see to it that only one grok-local works there at a time"
        warnings.warn(text, NoLocks, stacklevel=2)
    return True


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of the file `path`, which is made if need be; says whether it could be had. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield lock(fd, path)
    finally:
        os.close(fd)


# -- names -------------------------------------------------------------------------------------------------------------


PULL = ".pull"  # the folder, in a release's own, of what is half-fetched and what is known of it


def gone_mark(folder: Path) -> Path:
    """What is there where a release was let go file by file, as it was packed."""
    return folder / PULL / "packed-and-gone"


def partial_of(path: Path) -> Path:
    """What a file is called until it is complete."""
    return path.with_name(f"{path.name}.partial")


def journal_of(path: Path) -> Path:
    """Where the record is of what is packed of it."""
    return path.with_name(f"{path.name}.journal")


def is_part(path: Path) -> bool:
    """Whether the name is one that llama.cpp gives to a part of a split model."""
    return _PART.fullmatch(path.name) is not None


def part_name(name: str, number: int, count: int) -> str:
    """llama.cpp's name for part `number`, from 1, of the model `name`."""
    return f"{name.removesuffix('.gguf')}-{number:05d}-of-{count:05d}.gguf"


def part_names(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of, by its name; `path` itself if it is no part."""
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    return [path.with_name(part_name(match["stem"], number, count)) for number in range(1, count + 1)]


def linked_part(path: Path) -> Path:
    """The part of a split model that the link `path` leads to, where the others are not beside the link; else `path`.

    Hubs' caches and people link the first part alone, under any name.
    """
    target = path.resolve() if path.is_symlink() else path
    complete = is_part(path) and all(part.exists() for part in part_names(path))
    return target if is_part(target) and not complete else path


def first_part(path: Path) -> Path:
    """The part of a split model that llama.cpp wants to be given; `path` itself if it is no part."""
    return next(iter(part_names(path)), path)


# -- whole or not at all -----------------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that its name always leads to a whole one, whoever else writes it. Raises OSError."""
    partial = partial_of(path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write to, whose name leads to it when all is in it. Raises OSError.

    A link leads on to its file, which keeps its permissions.
    """
    target = path.resolve() if path.is_symlink() else path
    partial = partial_of(target.with_name(f"{target.name}.{secrets.token_hex(4)}"))
    try:
        with partial.open("x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            partial.chmod(target.stat().st_mode & 0o7777)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where its file system knows how. Raises OSError."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)
