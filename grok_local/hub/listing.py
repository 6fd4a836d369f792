"""What the hub says belongs to a checkpoint. A mirror may say anything: nothing is believed before it is checked."""

from __future__ import annotations

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

__all__ = ["Listing", "RemoteFile", "is_offline", "list_release"]

_NEEDED = re.compile(r"ckpt(-0)?/tensor\d{5}_\d{3}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. `digest` is its SHA-256, or git's SHA-1 for those small enough to be in git."""

    path: str
    size: int
    digest: str

    @property
    def partial_name(self) -> str:
        """What it is called while it grows: never the same for two files, or for two versions of one."""
        return f"{self.path.replace('/', '_')}.{self.digest[:16]}.partial"


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repository: str
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set. Raises FetchError where huggingface-hub cannot read its environment."""
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise FetchError(
            f"huggingface-hub does not understand its environment (HF_ENDPOINT, HF_...): {error}"
        ) from None
    return bool(constants.HF_HUB_OFFLINE)


def list_release(repository: str, saved: Path) -> Listing:
    """From the hub, and written to `saved`; offline, what it said the last time. Raises FetchError."""
    if is_offline():
        return _saved(repository, saved)
    try:
        listing = _from_hub(repository)
    except FetchError:
        raise
    except Exception as error:  # whatever huggingface-hub and the network raise
        where = os.environ.get("HF_ENDPOINT")
        raise FetchError(f"{repository}{f' at HF_ENDPOINT={where}' if where else ''}: {reason(error)}") from None
    saved.parent.mkdir(parents=True, exist_ok=True)
    write_whole(saved, json.dumps(asdict(listing)).encode())
    return listing


def _from_hub(repository: str) -> Listing:
    from huggingface_hub import HfApi

    api = HfApi()
    revision = _revision(api, repository)
    tree = api.list_repo_tree(repository, recursive=True, revision=revision)
    needed: list[Any] = [item for item in tree if _NEEDED.fullmatch(item.path)]
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


def _saved(repository: str, saved: Path) -> Listing:
    try:
        known = json.loads(saved.read_bytes())
        if known["repository"] != repository:
            raise FetchError(f"{saved.parent.parent}: holds {known['repository']}, not {repository}")
        files = [(file["path"], file["size"], file["digest"]) for file in known["files"]]
        return _checked(repository, str(known["revision"]), files)
    except (OSError, ValueError, KeyError, TypeError):
        raise FetchError(
            "HF_HUB_OFFLINE is set, and this folder has no listing of an earlier pull: unset it and pull again"
        ) from None


def _checked(repository: str, revision: str, files: Iterable[tuple[Any, Any, Any]]) -> Listing:
    """The listing, if its paths, sizes and digests can be meant. Raises FetchError."""
    good = []
    for path, size, digest in files:
        if not (isinstance(size, int) and size > 0 and _NEEDED.fullmatch(path) and _DIGEST.fullmatch(str(digest))):
            raise FetchError(f"{repository}: the listing's entry for {path!r} makes no sense ({size!r}, {digest!r})")
        good.append(RemoteFile(path, size, digest))
    if not good:
        raise FetchError(f"{repository}: the hub lists no ckpt-0/tensor00000_000 and so on there")
    return Listing(repository, revision, tuple(good))
