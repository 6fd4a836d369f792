"""Files that clients leave, and those that batches come to, in a folder.

A file's content is there before what is said of it, so whatever is found half-written after a kill is nobody's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from grok_local.errors import OutputError, RefusedError
from grok_local.files import partial_of, write_whole

__all__ = ["MOST_FILE_BYTES", "FileStore"]

MOST_FILE_BYTES = 64 << 20  # a batch's lines are all in memory
_MOST_FILES = 1000
_MOST_BYTES = 4 << 30
_ID = re.compile(r"file-[0-9a-f]{8,32}")


@dataclass(frozen=True)
class StoredFile:
    """A file as its id, size in bytes, unix time of arrival, the name it came with and what it is for."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def described(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {**asdict(self), "object": "file", "status": "processed", "expires_at": None, "status_details": None}


class FileStore:
    """The files in `folder`. Any thread may use it. Raises OutputError where the folder cannot be used."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = self._found()
        except OSError as error:
            raise OutputError(f"{folder}: files cannot be kept there ({error.strerror or error})") from None

    def all(self) -> list[StoredFile]:
        """The newest first."""
        with self._lock:
            return sorted(self._files.values(), key=lambda file: (-file.created_at, file.id))

    def get(self, id: str, *, param: str = "id") -> StoredFile:
        """Raises RefusedError where there is none of that id, which the client said in `param`."""
        with self._lock:
            if id not in self._files:
                raise RefusedError(404, f"file {id!r:.80}: there is none", code="not_found", param=param)
            return self._files[id]

    def path(self, id: str) -> Path:
        """Where its content is. Raises RefusedError."""
        return self._content(self.get(id).id)

    def upload(self, source: IO[bytes], *, filename: str, purpose: str) -> StoredFile:
        """Keep what a client sends. Raises RefusedError where there is too much already, OutputError."""
        self._check_quota()
        return self.write(f"file-{uuid.uuid4().hex}", lambda to: shutil.copyfileobj(source, to), filename, purpose)

    def write(self, id: str, fill: Callable[[IO[bytes]], object], filename: str, purpose: str) -> StoredFile:
        """Keep a file of that id, in place of one that is there. Raises OutputError."""
        partial = partial_of(self._content(id))
        try:
            with partial.open("wb") as out:
                fill(out)
                out.flush()
                os.fsync(out.fileno())
            file = StoredFile(id, partial.stat().st_size, int(time.time()), filename, purpose)
            partial.replace(self._content(id))
            write_whole(self._about(id), json.dumps(asdict(file)).encode())
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{self._folder}: a file cannot be kept ({error.strerror or error})") from None
        with self._lock:
            self._files[id] = file
        return file

    def remove(self, id: str) -> None:
        """Raises RefusedError."""
        self.get(id)
        with self._lock:
            self._files.pop(id, None)
        self._about(id).unlink(missing_ok=True)
        self._content(id).unlink(missing_ok=True)

    def _check_quota(self) -> None:
        with self._lock:
            count, size = len(self._files), sum(file.bytes for file in self._files.values())
        if count >= _MOST_FILES or size >= _MOST_BYTES:
            raise RefusedError(
                413,
                f"{count} files with {size} bytes are here, and {_MOST_FILES} with {_MOST_BYTES} may be: delete some",
                code="quota_exceeded",
            )

    def _found(self) -> dict[str, StoredFile]:
        """What is there; what a kill left of others goes. What cannot be read now is left for the next start."""
        files, unread = dict[str, StoredFile](), set[str]()
        for about in self._folder.glob("file-*.json"):
            try:
                files |= filter(None, [self._read(about)])
            except OSError:
                unread.add(about.stem)
        for path in self._folder.iterdir():
            if path.name.split(".")[0] not in {*files, *unread}:
                path.unlink()
        return files

    def _read(self, about: Path) -> tuple[str, StoredFile] | None:
        """Raises OSError."""
        try:
            file = StoredFile(**json.loads(about.read_bytes()))
        except (ValueError, TypeError):
            return None
        there = _ID.fullmatch(file.id) and file.id == about.stem and self._content(file.id).is_file()
        return (file.id, file) if there else None

    def _content(self, id: str) -> Path:
        return self._folder / f"{id}.jsonl"

    def _about(self, id: str) -> Path:
        return self._folder / f"{id}.json"
