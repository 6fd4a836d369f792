"""Brings files of a listing into a folder, each checked before it gets its name."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grok_local.errors import FetchError
from grok_local.files import PULL, JsonLines
from grok_local.hub.download import StopError, digest_is_right, download
from grok_local.hub.listing import Listing, is_offline
from grok_local.hub.reasons import is_disk_full, reason
from grok_local.hub.repositories import RemoteFile
from grok_local.units import format_bytes

__all__ = ["CONNECTIONS", "SPARE", "FetchProgress", "Fetcher", "access"]

SPARE = 1 << 30  # bytes of the disk that stay free
CONNECTIONS = 8


@dataclass(frozen=True)
class FetchProgress:
    """Bytes that are there, of all; `bytes_read` are those that came in this run."""

    phase: str  # "fetch"
    done: int
    total: int
    file: str
    bytes_read: int

    @property
    def label(self) -> str:
        return self.file


Report = Callable[[FetchProgress], None]


def access(listing: Listing, file: RemoteFile) -> tuple[str, dict[str, str]]:
    """Where a file is, and what to say when it is asked for."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return hf_hub_url(listing.repository, file.path, revision=listing.revision), build_hf_headers()


class Fetcher:
    """Brings files of a listing into a folder, and knows which of them are there. Any thread may use it.

    Files that are `done` need not be there: what they were fetched for has been made of them.
    """

    def __init__(
        self, listing: Listing, folder: Path, progress: Report | None = None, *, done: Collection[RemoteFile] = ()
    ) -> None:
        self.listing, self.folder, self.received = listing, folder, 0
        self.stopped = threading.Event()
        self.raised: BaseException | None = None  # by whoever is shown the progress
        self._keep = folder / PULL
        self._verified = _Verified(self._keep / "verified.jsonl")
        self._progress, self._lock = progress, threading.Lock()
        self._wanted = [file for file in listing.files if file not in done]
        self._done = listing.nbytes - sum(file.size - self._fetched(file) for file in self.missing())

    def missing(self) -> list[RemoteFile]:
        """Those of the files that are not there, or not known to be right."""
        return [file for file in self._wanted if not self.has(file)]

    def has(self, file: RemoteFile) -> bool:
        """Whether it is there, and known to be right."""
        return self._verified.has(self.path_of(file), file)

    def path_of(self, file: RemoteFile) -> Path:
        """Where a file is when it is right."""
        return self.folder / file.path

    def _fetched(self, file: RemoteFile) -> int:
        partial = self._keep / file.partial_name
        return min(partial.stat().st_size, file.size) if partial.is_file() else 0

    def check_space(self) -> None:
        """Raises FetchError if what is still to come does not fit on the disk."""
        missing = self.missing()
        there = [file for file in missing if _has_size(self.folder / file.path, file.size)]
        needed = sum(file.size - self._fetched(file) for file in missing if file not in there)
        free = shutil.disk_usage(self.folder).free
        if needed and needed + SPARE > free:
            raise FetchError(
                f"{self.folder}: {format_bytes(needed)} are still to come and only {format_bytes(free)} are free: "
                "make room, or pull to another disk with --to"
            )

    def bring(self, file: RemoteFile) -> str | None:
        """Have a file there and right. Returns what went wrong, for the user."""
        try:
            self._bring(file)
        except StopError:
            pass
        except Exception as error:
            if is_disk_full(error):
                self.stopped.set()  # the others would fail alike
            return f"{file.path}: {reason(error)}"
        return None

    def _bring(self, file: RemoteFile) -> None:
        final, partial = self.folder / file.path, self._keep / file.partial_name
        if self.stopped.is_set():
            raise StopError
        if self.has(file):
            return
        if final.exists() and not final.is_file():
            raise FetchError(f"{final} is there, and is no file: move it away")
        final.parent.mkdir(parents=True, exist_ok=True)
        # Brought by other means, it is looked at before anything is fetched, and kept until something better is there.
        if final.is_file() and digest_is_right(final, file, self.stopped):
            self._verified.add(final, file)
            self._count(file, file.size - self._fetched(file), fetched=False)
            partial.unlink(missing_ok=True)
            return
        if is_offline():
            state = "damaged" if final.is_file() else "missing"
            raise FetchError(f"{state}, and HF_HUB_OFFLINE is set")
        tries = 2 + partial.exists()
        if not any(self._came_right(file, partial) for _ in range(tries)):
            raise FetchError("what comes has another hash than the hub's listing says")
        partial.replace(final)
        self._verified.add(final, file)

    def _came_right(self, file: RemoteFile, partial: Path) -> bool:
        """Whether the file is whole now; if what came is wrong, it is gone."""
        url, headers = access(self.listing, file)
        download(
            url,
            partial,
            file,
            headers=headers,
            stopped=self.stopped,
            count=lambda count: self._count(file, count),
        )
        if digest_is_right(partial, file, self.stopped):
            return True
        self._count(file, -self._fetched(file))
        partial.unlink()
        return False

    def _count(self, file: RemoteFile, count: int, *, fetched: bool = True) -> None:
        with self._lock:
            self._done += count
            self.received += max(count, 0) if fetched else 0
            event = FetchProgress("fetch", self._done, self.listing.nbytes, file.path, self.received)
            try:
                if self._progress and not self.stopped.is_set():
                    self._progress(event)
            except BaseException as error:
                self.raised = error
                self.stopped.set()
                raise StopError from None


class _Verified:
    """Which files were found right, by size and time: the 318 GB need not be read again at every start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with JsonLines(path) as lines:
            self._known = {tuple(line) for line in lines.read() if _is_stamp(line)}

    def has(self, path: Path, file: RemoteFile) -> bool:
        """Whether it is there as it was when it was hashed."""
        try:
            status = path.stat()
        except OSError:
            return False
        return status.st_size == file.size and (file.digest, status.st_size, status.st_mtime_ns) in self._known

    def add(self, path: Path, file: RemoteFile) -> None:
        status = path.stat()
        known = (file.digest, status.st_size, status.st_mtime_ns)
        with JsonLines(self._path) as lines:
            lines.append(known)
        self._known.add(known)


def _is_stamp(line: Any) -> bool:
    """Whether a line is a digest, a size and a time, and not what a power cut left."""
    return isinstance(line, list) and list(map(type, line)) == [str, int, int]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
