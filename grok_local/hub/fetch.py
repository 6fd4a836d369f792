"""The release as a whole: which of its files are missing, and all of those at once."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grok_local.errors import FetchError, GrokLocalError, OptionError, TokenizerError
from grok_local.files import JsonLines, locked
from grok_local.hub.download import StopError, digest_is_right, download
from grok_local.hub.listing import Listing, RemoteFile, is_offline, list_release
from grok_local.hub.reasons import is_disk_full, reason
from grok_local.models import grok1
from grok_local.units import format_bytes

__all__ = ["FetchProgress", "FetchReport", "fetch_release"]

_REPOSITORIES = {grok1.RELEASE.name: grok1.RELEASE.hub}
FILES = 770  # of the release
SPARE = 1 << 30  # bytes of the disk that stay free
_CONNECTIONS = 8
_SHOWN = 5  # problems, of hundreds that may be alike

TOKENIZER = RemoteFile("tokenizer.model", 2_229_219, "5c69d7cbad192fa2c9d14e2a77fbfdc11597c68907b043ddb0260e3d28eddd7f")
TOKENIZER_URL = "https://raw.githubusercontent.com/xai-org/grok-1/main/tokenizer.model"


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


@dataclass(frozen=True)
class FetchReport:
    """What is in `folder` now; `fetched` bytes came in this run."""

    folder: Path
    revision: str
    files: int
    bytes: int
    fetched: int
    seconds: float
    notes: tuple[str, ...]


Report = Callable[[FetchProgress], None]


def fetch_release(
    name: str, folder: Path, *, tokenizer: Path | None = None, progress: Report | None = None
) -> FetchReport:
    """Bring the release `name` into `folder`, or what of it is still missing there.

    Raises OptionError, FetchError (the hub refuses, a connection stays cut, a wrong hash, no space) or TokenizerError.
    """
    began = time.monotonic()
    if name not in _REPOSITORIES:
        raise OptionError(f"no release {name!r} to pull: choose {', '.join(_REPOSITORIES)}")
    if tokenizer is not None and not tokenizer.is_file():
        raise TokenizerError(f"{tokenizer}: no such tokenizer file")
    try:
        listing = list_release(_REPOSITORIES[name], folder / ".pull" / "listing.json")
        with _alone(folder / ".pull"):
            run = _Run(listing, folder, progress)
            run.check_space()
            run.fetch_all()
            notes = (*_notes(listing), *_place_tokenizer(tokenizer, folder, progress))
    except BrokenPipeError:  # of whoever is shown the progress
        raise
    except OSError as error:
        raise FetchError(f"{folder}: {reason(error)}") from None
    seconds = time.monotonic() - began
    return FetchReport(folder, listing.revision, len(listing.files), listing.nbytes, run.received, seconds, notes)


@contextmanager
def _alone(keep: Path) -> Iterator[None]:
    """The folder of what is half-fetched, for one process at a time. Raises FetchError."""
    keep.mkdir(parents=True, exist_ok=True)
    with locked(keep / "lock") as free:
        if not free:
            raise FetchError(f"{keep.parent}: another grok-local is pulling into this folder")
        yield


def _notes(listing: Listing) -> list[str]:
    if len(listing.files) == FILES:
        return []
    return [f"{listing.repository} has {len(listing.files)} tensors there, not the {FILES} of the release"]


class _Run:
    """One pull of a listing into a folder."""

    def __init__(self, listing: Listing, folder: Path, progress: Report | None) -> None:
        self.listing, self.folder, self.received = listing, folder, 0
        self._keep = folder / ".pull"
        self._verified = _Verified(self._keep / "verified.jsonl")
        self._progress = progress
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._raised: BaseException | None = None  # by whoever is shown the progress
        self._missing = self._not_verified()
        self._done = listing.nbytes - sum(file.size - self._fetched(file) for file in self._missing)

    def _not_verified(self) -> list[RemoteFile]:
        return [file for file in self.listing.files if not self._verified.has(self.folder / file.path, file)]

    def _fetched(self, file: RemoteFile) -> int:
        partial = self._keep / file.partial_name
        return min(partial.stat().st_size, file.size) if partial.is_file() else 0

    def check_space(self) -> None:
        """Raises FetchError if what is still to come does not fit on the disk."""
        there = [file for file in self._missing if _has_size(self.folder / file.path, file.size)]
        needed = sum(file.size - self._fetched(file) for file in self._missing if file not in there)
        free = shutil.disk_usage(self.folder).free
        if needed and needed + SPARE > free:
            raise FetchError(
                f"{self.folder}: {format_bytes(needed)} are still to come and only {format_bytes(free)} are free: "
                "make room, or pull to another disk with --to"
            )

    def fetch_all(self) -> None:
        """Every missing file, several at a time. Raises FetchError naming those that could not be had."""
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            work = [pool.submit(self._fetch, file) for file in self._missing]
            try:
                problems = [problem for future in as_completed(work) if (problem := future.result())]
            finally:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
        if self._raised:
            raise self._raised
        if problems or self._not_verified():
            raise FetchError(self._summary(problems))

    def _summary(self, problems: list[str]) -> list[str]:
        shown = problems[:_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more like these")
        missing, total = len(self._not_verified()), len(self.listing.files)
        return [*shown, f"{missing} of {total} files are not complete: the same command goes on from here"]

    def _fetch(self, file: RemoteFile) -> str | None:
        """Returns what went wrong, for the user."""
        try:
            self._bring(file)
        except StopError:
            pass
        except Exception as error:
            if is_disk_full(error):
                self._stopped.set()  # the others would fail alike
            return f"{file.path}: {reason(error)}"
        return None

    def _bring(self, file: RemoteFile) -> None:
        final, partial = self.folder / file.path, self._keep / file.partial_name
        if self._stopped.is_set():
            raise StopError
        if final.exists() and not final.is_file():
            raise FetchError(f"{final} is there, and is no file: move it away")
        final.parent.mkdir(parents=True, exist_ok=True)
        # Brought by other means, it is looked at before anything is fetched, and kept until something better is there.
        if final.is_file() and digest_is_right(final, file, self._stopped):
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
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.listing.repository, file.path, revision=self.listing.revision)
        download(
            url,
            partial,
            file,
            headers=build_hf_headers(),
            stopped=self._stopped,
            count=lambda count: self._count(file, count),
        )
        if digest_is_right(partial, file, self._stopped):
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
                if self._progress and not self._stopped.is_set():
                    self._progress(event)
            except BaseException as error:
                self._raised = error
                self._stopped.set()
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


def _place_tokenizer(given: Path | None, folder: Path, progress: Report | None) -> list[str]:
    """Put it beside the tensors; returns notes for the user. Raises TokenizerError."""
    target = folder / TOKENIZER.path
    if given is None and not target.exists():
        _fetch_tokenizer(folder, progress)
    elif given is not None and not (target.exists() and target.samefile(given)):
        partial = folder / ".pull" / "tokenizer.partial"
        with given.open("rb") as source, partial.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
        partial.replace(target)
    if not digest_is_right(target, TOKENIZER, threading.Event()):
        return [f"{target} is not the release's own tokenizer: it has another hash"]
    return []


def _fetch_tokenizer(folder: Path, progress: Report | None) -> None:
    partial, received = folder / ".pull" / TOKENIZER.partial_name, [0]

    def count(size: int) -> None:
        received[0] += size
        if progress:
            progress(FetchProgress("fetch", received[0], TOKENIZER.size, TOKENIZER.path, received[0]))

    try:
        if is_offline():
            raise FetchError("HF_HUB_OFFLINE is set")
        download(TOKENIZER_URL, partial, TOKENIZER, headers={}, stopped=threading.Event(), count=count)
        if not digest_is_right(partial, TOKENIZER, threading.Event()):
            partial.unlink()
            raise FetchError("what came has another hash than the release's tokenizer")
        partial.replace(folder / TOKENIZER.path)
    except BrokenPipeError:
        raise
    except Exception as error:
        why = str(error) if isinstance(error, GrokLocalError) else reason(error)
        raise TokenizerError(
            f"the tensors are complete in {folder}, but not the tokenizer: {TOKENIZER_URL}: {why}; run the same "
            "command again, or with --tokenizer FILE"
        ) from None
