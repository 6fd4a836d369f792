"""Remembers which pieces are packed, so that a killed run goes on where it stopped.

One JSON line per piece: its index, the SHA-256 of its bytes, and the stamp of the source it came from. A line counts
only if those bytes are really in the output and the source is unchanged; so neither a torn line, nor a power cut, nor a
tensor fetched again in between does any harm.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from grok_local.errors import InUseError, OutputError
from grok_local.files import JsonLines, lock
from grok_local.quantize.layout.output_plan import OutputPlan
from grok_local.quantize.layout.pieces import Piece

__all__ = ["Journal"]

_BEGINNING = b'{"plan":'  # of every journal


class Journal:
    """The open journal of one output; holds the lock that keeps a second run away. A context manager."""

    def __init__(self, path: Path, plan: OutputPlan, *, force: bool = False) -> None:
        """Open or start it. Raises OutputError if another run has it, or (without `force`) if it is of another plan."""
        self.path = path
        self._lines = JsonLines(path, flags=os.O_NOFOLLOW | os.O_NONBLOCK)
        self.entries: dict[int, dict[str, Any]] = {}
        self._recorded = False
        try:
            self._lock()
            self.resumed = self._read(plan.layout_digest, force)
        except BaseException:
            self._lines.close()
            raise

    def _lock(self) -> None:
        free = lock(self._lines.fileno(), self.path)
        try:
            same = os.path.samestat(os.fstat(self._lines.fileno()), self.path.stat())
        except FileNotFoundError:
            same = False  # it was removed before the lock
        if not (free and same):
            raise InUseError(f"{self.path}: another grok-local is packing this output")

    def _read(self, plan: str, force: bool) -> bool:
        """Whether there was something of the same plan to go on from."""
        if not force and not self._lines.begins_with(_BEGINNING):
            raise OutputError(f"{self.path}: is there, and no journal of grok-local: move it away, or give --force")
        header, *entries = self._lines.read() or [None]
        if isinstance(header, dict) and header.get("plan") == plan:
            known = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("piece"), int)]
            self.entries = {entry["piece"]: entry for entry in known}
            return True
        if header and not force:
            raise OutputError(
                f"{self.path.name}: an unfinished run with other options is in "
                f"{self.path.parent}: finish that one, or start anew with --force"
            )
        self._lines.clear()
        self._append({"plan": plan})
        return False

    @property
    def empty(self) -> bool:
        """Whether no piece is known, from this run or an earlier one."""
        return not self.entries and not self._recorded

    def record(self, piece: Piece, digest: bytes) -> None:
        """Note that the piece's bytes are written. Safe from any thread."""
        self._recorded = True
        self._append({"piece": piece.index, "sha256": digest.hex(), "source": list(piece.tensor.source.stamp)})

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._lines.append(entry)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OutputError(f"{self.path}: the disk is full") from None

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises OSError."""
        os.fsync(self._lines.fileno())

    def finish(self) -> None:
        """Remove the journal: the output is complete."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
