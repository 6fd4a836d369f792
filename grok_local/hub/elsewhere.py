"""Grok-1's tokenizer, which is not on the hub: from the release's git repository, or from the user's file."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from grok_local.errors import FetchError, GrokLocalError, OptionError, TokenizerError
from grok_local.files import PULL, partial_of
from grok_local.hub.download import digest_is_right, download
from grok_local.hub.listing import is_offline
from grok_local.hub.reasons import reason
from grok_local.hub.repositories import Repository

__all__ = ["check_tokenizer", "place_tokenizer"]

Count = Callable[[int], None]


def check_tokenizer(repository: Repository, given: Path | None) -> None:
    """Whether the file `given` can be put beside the tensors. Raises OptionError, TokenizerError."""
    if given is not None and repository.tokenizer is None:
        raise OptionError(f"--tokenizer {given}: {repository.hub} has its tokenizer itself; leave the option out")
    if given is not None and not given.is_file():
        raise TokenizerError(f"{given}: no such tokenizer file")


def place_tokenizer(repository: Repository, folder: Path, *, given: Path | None, count: Count) -> list[str]:
    """Put it beside the tensors, where the hub has none; returns notes for the user. Raises TokenizerError."""
    if repository.tokenizer is None:
        return []
    target = folder / repository.tokenizer.path
    if given is None and not target.exists():
        _fetch(repository, target, count)
    elif given is not None and not (target.exists() and target.samefile(given)):
        _copy(given, target)
    if not digest_is_right(target, repository.tokenizer, threading.Event()):
        return [f"{target} is not the release's own tokenizer: it has another hash"]
    return []


def _copy(given: Path, target: Path) -> None:
    partial = partial_of(target.parent / PULL / target.name)
    with given.open("rb") as source, partial.open("wb") as copy:
        shutil.copyfileobj(source, copy)
        copy.flush()
        os.fsync(copy.fileno())
    partial.replace(target)


def _fetch(repository: Repository, target: Path, count: Count) -> None:
    url, file = repository.tokenizer_url, repository.tokenizer
    assert file is not None
    partial = target.parent / PULL / file.partial_name
    try:
        if is_offline():
            raise FetchError("HF_HUB_OFFLINE is set")
        download(url, partial, file, headers={}, stopped=threading.Event(), count=count)
        if not digest_is_right(partial, file, threading.Event()):
            partial.unlink()
            raise FetchError("what came has another hash than the release's tokenizer")
        partial.replace(target)
    except BrokenPipeError:
        raise
    except Exception as error:
        why = str(error) if isinstance(error, GrokLocalError) else reason(error)
        raise TokenizerError(
            f"{target.parent}: the tokenizer is missing: {url}: {why}; run the same command again, or with "
            "--tokenizer FILE"
        ) from None
