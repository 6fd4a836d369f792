"""Brings one file to the disk, going on with what is there, over any number of cut connections."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from grok_local.errors import FetchError
from grok_local.hub.reasons import reason, status_of
from grok_local.hub.repositories import RemoteFile

__all__ = ["StopError", "digest_is_right", "download", "read_span"]

PAUSE = 1.0  # seconds after a first failure; doubled each time
_LONGEST_PAUSE = 30.0
_FAILURES = 6  # in a row without a byte between them
_BLOCK = 1 << 20

Count = Callable[[int], None]


class StopError(Exception):
    """Raised inside a download when everything is to end."""


def download(
    url: str, partial: Path, file: RemoteFile, *, headers: dict[str, str], stopped: threading.Event, count: Count
) -> None:
    """Append to `partial` until it has all of `file`; `count` gets the bytes as they come.

    Raises FetchError when the server refuses or the connection stays cut, OSError of the disk, StopError.
    """
    failures = 0
    while (have := _size(partial)) < file.size:
        try:
            _receive(url, partial, file, headers=headers, stopped=stopped, count=count)
        except Exception as error:
            if not _may_pass(error):
                raise
            failures = 1 if _size(partial) > have else failures + 1
            if failures > _FAILURES:
                raise FetchError(f"the connection fails again and again ({reason(error)})") from None
            if stopped.wait(min(PAUSE * 2 ** (failures - 1), _LONGEST_PAUSE)):
                raise StopError from None


def _receive(
    url: str, partial: Path, file: RemoteFile, *, headers: dict[str, str], stopped: threading.Event, count: Count
) -> None:
    """One connection's worth."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

    have = _size(partial)
    asked = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with get_session().stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # it sends everything from the beginning
            partial.unlink()
            count(-have)
        with partial.open("ab") as target:
            for block in response.iter_bytes():
                if stopped.is_set():
                    raise StopError
                if target.tell() + len(block) > file.size:
                    raise FetchError("the server sends more than the hub's listing says")
                target.write(block)
                count(len(block))
            target.flush()
            os.fsync(target.fileno())
    if _size(partial) < file.size:
        raise ConnectionError("the answer ended too early")


def read_span(url: str, span: range, *, headers: dict[str, str], stopped: threading.Event) -> bytes:
    """These bytes of a file. Raises FetchError, StopError, and what the server answers."""
    for failure in range(_FAILURES):
        try:
            return _receive_span(url, span, headers=headers)
        except Exception as error:
            if not _may_pass(error):
                raise
            why = reason(error)
        if stopped.wait(min(PAUSE * 2**failure, _LONGEST_PAUSE)):
            raise StopError
    raise FetchError(f"the connection fails again and again ({why})")


def _receive_span(url: str, span: range, *, headers: dict[str, str]) -> bytes:
    """A server that knows no ranges sends everything: of that no more is read than was asked for."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

    asked = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={span.start}-{span.stop - 1}"}
    with get_session().stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and span.start:
            raise FetchError("the server does not send parts of files, which packing on arrival needs")
        data = bytearray()
        for block in response.iter_bytes():
            data += block
            if len(data) > len(span):  # read to its end otherwise, so that the connection can be used again
                break
    if len(data) < len(span):
        raise ConnectionError("the answer ended too early")
    return bytes(data[: len(span)])


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: a cut or silent connection, a server in trouble."""
    import httpx2

    status = status_of(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    return isinstance(error, httpx2.TransportError | ConnectionError)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def digest_is_right(path: Path, file: RemoteFile, stopped: threading.Event) -> bool:
    """Read back what is on the disk. Raises StopError."""
    if _size(path) != file.size:
        return False
    git = len(file.digest) == 40
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if git else hashlib.sha256()
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
            if stopped.is_set():
                raise StopError
    return digest.hexdigest() == file.digest
