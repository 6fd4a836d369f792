"""Remembers which pieces are packed, so that a killed run goes on where it stopped.

One JSON line per piece: its index, the SHA-256 of its bytes, and the size and time of the file it came from. A line
counts only if those bytes are really in the output and the source is unchanged; so neither a torn line, nor a power
cut, nor a tensor fetched again in between does any harm.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from grok_local.errors import InUseError, OutputError
from grok_local.quantize.layout.output_plan import Piece, Plan

__all__ = ["Journal"]


class Journal:
    """The open journal of one output; holds the lock that keeps a second run away. A context manager."""

    def __init__(self, path: Path, plan: Plan, *, force: bool = False) -> None:
        """Open or start it. Raises OutputError if another run has it, or (without `force`) if it is of another plan."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        self.entries: dict[int, dict[str, Any]] = {}
        self._recorded = False
        try:
            self._lock()
            self.resumed = self._read(plan, force)
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(self._fd), self.path.stat())  # it may have been removed before the lock
        except OSError:
            same = False
        if not same:
            raise InUseError(f"{self.path}: another grok-local is packing this output")

    def _read(self, plan: Plan, force: bool) -> bool:
        """Whether there was something of the same plan to go on from."""
        with open(self._fd, "rb", closefd=False) as file:
            lines = file.read().split(b"\n")
        complete, torn = lines[:-1], lines[-1]
        header = _parse(complete[0]) if complete else {}
        if header.get("plan") == plan.layout_digest:
            for entry in map(_parse, complete[1:]):
                if isinstance(entry.get("piece"), int):
                    self.entries[entry["piece"]] = entry
            if torn:
                self._append(b"\n")
            return True
        if header and not force:
            raise OutputError(
                f"{self.path.name}: an unfinished run with other options is in "
                f"{self.path.parent}: finish that one, or start anew with --force"
            )
        os.ftruncate(self._fd, 0)
        self._append(json.dumps({"plan": plan.layout_digest}).encode() + b"\n")
        return False

    @property
    def empty(self) -> bool:
        """Whether no piece is known, from this run or an earlier one."""
        return not self.entries and not self._recorded

    def record(self, piece: Piece, digest: bytes, stamp: list[int]) -> None:
        """Note that the piece's bytes are written. Safe from any thread."""
        self._recorded = True
        entry = {"piece": piece.index, "sha256": digest.hex(), "source": stamp}
        self._append(json.dumps(entry).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        # One write to a file opened for appending: lines of several threads never mix.
        if os.write(self._fd, line) != len(line):
            raise OutputError(f"{self.path}: the disk is full")

    def finish(self) -> None:
        """Remove the journal: the output is complete."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
