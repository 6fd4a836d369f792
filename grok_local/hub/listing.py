"""What the hub says belongs to a checkpoint. A mirror may say anything: nothing is believed before it is checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grok_local.errors import FetchError
from grok_local.files import write_whole
from grok_local.hub.reasons import reason
from grok_local.hub.repositories import RemoteFile, Repository

__all__ = ["Listing", "is_offline", "list_release"]

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TIMEOUT = 30.0  # seconds
_LARGEST = 1 << 40  # bytes of a file with tensors; the releases' largest have 34 GB
_LARGEST_OTHER = 1 << 25  # bytes of any other; the tokenizer has 8 million


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repository: str
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """Tells listings apart, whatever a mirror calls them."""
        lines = "".join(f"{file.path} {file.size} {file.digest}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set. Raises FetchError where huggingface-hub cannot read its environment."""
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise FetchError(
            f"huggingface-hub does not understand its environment (HF_ENDPOINT, HF_...): {error}"
        ) from None
    return bool(constants.HF_HUB_OFFLINE)


def list_release(repository: Repository, saved: Path) -> Listing:
    """From the hub, and written to `saved`; offline, what it said the last time. Raises FetchError."""
    if is_offline():
        return _saved(repository, saved)
    try:
        listing = _from_hub(repository)
    except FetchError:
        raise
    except Exception as error:  # whatever huggingface-hub and the network raise
        where = os.environ.get("HF_ENDPOINT")
        raise FetchError(f"{repository.hub}{f' at HF_ENDPOINT={where}' if where else ''}: {reason(error)}") from None
    saved.parent.mkdir(parents=True, exist_ok=True)
    write_whole(saved, json.dumps(asdict(listing)).encode())
    return listing


def _from_hub(repository: Repository) -> Listing:
    from huggingface_hub import HfApi

    api = HfApi()
    revision = _revision(api, repository.hub)
    tree = api.list_repo_tree(repository.hub, recursive=True, revision=revision)
    needed: list[Any] = [item for item in tree if repository.needs(item.path)]
    return _checked(repository, revision, [(item.path, item.size, _digest(item)) for item in needed])


def _digest(item: Any) -> str:
    return item.lfs.sha256 if item.lfs else item.blob_id  # type: ignore[no-any-return]


def _revision(api: Any, repository: str) -> str:
    """The commit to take everything from; a mirror that cannot say gets asked for its main branch."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.repo_info(repository, timeout=_TIMEOUT).sha or "main"
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return "main"


def _saved(repository: Repository, saved: Path) -> Listing:
    try:
        known = json.loads(saved.read_bytes())
        if known["repository"] != repository.hub:
            raise FetchError(f"{saved.parent.parent}: holds {known['repository']}, not {repository.hub}")
        files = [(file["path"], file["size"], file["digest"]) for file in known["files"]]
        return _checked(repository, str(known["revision"]), files)
    except (OSError, ValueError, KeyError, TypeError):
        raise FetchError(
            "HF_HUB_OFFLINE is set, and this folder has no listing of an earlier pull: unset it and pull again"
        ) from None


def _checked(repository: Repository, revision: str, files: Iterable[tuple[Any, Any, Any]]) -> Listing:
    """The listing, if its paths, sizes and digests can be meant. Raises FetchError."""
    good: dict[str, RemoteFile] = {}
    for path, size, digest in files:
        if path in good or not _makes_sense(repository, path, size, digest):
            why = f"{size!r}, {digest!r}" if path not in good else "it is there twice"
            raise FetchError(f"{repository.hub}: the listing's entry for {path!r} makes no sense ({why:.200})")
        good[path] = RemoteFile(path, size, digest)
    absent = sorted(repository.others - good.keys())
    if not any(map(repository.tensors.fullmatch, good)) or absent:
        missing = absent[0] if absent and good else f"{repository.example} and so on"
        raise FetchError(f"{repository.hub}: the hub lists no {missing} there")
    return Listing(repository.hub, revision, tuple(good.values()))


def _makes_sense(repository: Repository, path: Any, size: Any, digest: Any) -> bool:
    if not (isinstance(path, str) and repository.needs(path) and isinstance(digest, str)):
        return False
    largest = _LARGEST_OTHER if path in repository.others else _LARGEST
    return type(size) is int and 0 < size <= largest and _DIGEST.fullmatch(digest) is not None
