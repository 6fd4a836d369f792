"""The release as a whole: which of its files are missing, and all of those at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from grok_local.errors import FetchError
from grok_local.files import PULL, locked
from grok_local.hub.elsewhere import check_tokenizer, place_tokenizer
from grok_local.hub.fetcher import CONNECTIONS, Fetcher, FetchProgress
from grok_local.hub.listing import Listing, list_release
from grok_local.hub.reasons import reason
from grok_local.hub.repositories import Repository, repository_of

__all__ = ["FetchReport", "fetch_release", "fetch_tokenizer", "pulling"]

_SHOWN = 5  # problems, of hundreds that may be alike


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
    began, repository = time.monotonic(), repository_of(name)
    check_tokenizer(repository, tokenizer)
    with pulling(repository, folder) as listing:
        fetcher = Fetcher(listing, folder, progress)
        fetcher.check_space()
        _fetch_all(fetcher)
        notes = (*_notes(repository, listing), *fetch_tokenizer(repository, folder, given=tokenizer, progress=progress))
    seconds = time.monotonic() - began
    return FetchReport(folder, listing.revision, len(listing.files), listing.nbytes, fetcher.received, seconds, notes)


@contextmanager
def pulling(repository: Repository, folder: Path) -> Iterator[Listing]:
    """What the hub has, with `folder` for this process alone. Raises FetchError, of the disk too."""
    try:
        listing = list_release(repository, folder / PULL / "listing.json")
        with _alone(folder / PULL):
            yield listing
    except BrokenPipeError:  # of whoever is shown the progress
        raise
    except OSError as error:
        raise FetchError(f"{folder}: {reason(error)}") from None


@contextmanager
def _alone(keep: Path) -> Iterator[None]:
    """The folder of what is half-fetched, for one process at a time. Raises FetchError."""
    keep.mkdir(parents=True, exist_ok=True)
    with locked(keep / "lock") as free:
        if not free:
            raise FetchError(f"{keep.parent}: another grok-local is pulling into this folder")
        yield


def _notes(repository: Repository, listing: Listing) -> list[str]:
    tensors = sum(repository.tensors.fullmatch(file.path) is not None for file in listing.files)
    if tensors == repository.count:
        return []
    return [f"{listing.repository} has {tensors} files of tensors there, not the {repository.count} of the release"]


def _fetch_all(fetcher: Fetcher) -> None:
    """Every missing file, several at a time. Raises FetchError naming those that could not be had."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        work = [pool.submit(fetcher.bring, file) for file in fetcher.missing()]
        try:
            problems = [problem for future in as_completed(work) if (problem := future.result())]
        finally:
            fetcher.stopped.set()
            pool.shutdown(cancel_futures=True)
    if fetcher.raised:
        raise fetcher.raised
    if problems or fetcher.missing():
        raise FetchError(_summary(fetcher, problems))


def _summary(fetcher: Fetcher, problems: list[str]) -> list[str]:
    shown = problems[:_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more like these")
    missing, total = len(fetcher.missing()), len(fetcher.listing.files)
    return [*shown, f"{missing} of {total} files are not complete: the same command goes on from here"]


def fetch_tokenizer(
    repository: Repository, folder: Path, *, given: Path | None, progress: Report | None = None
) -> list[str]:
    """Put what the hub does not have beside the tensors; returns notes for the user. Raises TokenizerError."""
    received = 0

    def count(size: int) -> None:
        nonlocal received
        received += size
        if progress and repository.tokenizer:
            file = repository.tokenizer
            progress(FetchProgress("fetch", received, file.size, file.path, received))

    return place_tokenizer(repository, folder, given=given, count=count)
