"""How much of the disk packing on arrival takes at most, said before it begins."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grok_local.errors import FetchError
from grok_local.hub.fetcher import SPARE
from grok_local.machine.disk import free_space, nearest_folder
from grok_local.units import format_bytes

__all__ = ["Room", "disk_used", "on_same_disk"]


@dataclass(frozen=True)
class Room:
    """Bytes of the disk of `folder`: what lots and what is made of them take `together`, and what else is `beside`.

    An earlier run has taken `there` of them. `output` are the packed model's, none where that goes to another disk.
    The release has `release` bytes.
    """

    folder: Path
    together: int
    beside: int
    there: int
    output: int
    release: int
    discard: bool

    @property
    def most(self) -> int:
        """At any time."""
        return self.together + self.beside

    @property
    def free(self) -> int:
        """As the system says now."""
        return free_space(self.folder)

    def check(self) -> None:
        """Raises FetchError where it does not fit."""
        needed = max(self.most - self.there, 0)
        if needed and needed + SPARE > self.free:
            advice = "" if self.discard else ", or let each file go once it is packed with --discard"
            raise FetchError(
                f"{self.folder}: {self.described}, {format_bytes(needed)} more than now, and only "
                f"{format_bytes(self.free)} are free: make room, or choose another disk with --to and -o{advice}"
            )

    def figures(self) -> dict[str, Any]:
        """For scripts."""
        told = {"folder": str(self.folder), "most": self.most, "there": self.there, "free": self.free}
        return told | {"output": self.output, "release": self.release, "discard": self.discard}

    @property
    def described(self) -> str:
        """For people."""
        packed = f"the packed model's {format_bytes(self.output)}" if self.output else ""
        if self.discard:
            rest = f"what of the release's {format_bytes(self.release)} is there at a time"
        else:
            rest = f"the release's {format_bytes(self.release)}"
        return f"this takes at most {format_bytes(self.most)} of the disk: {' and '.join(filter(None, (packed, rest)))}"


def on_same_disk(folder: Path, output: Path) -> bool:
    """Whether both take of one disk's room."""
    return nearest_folder(folder).stat().st_dev == nearest_folder(output.absolute().parent).stat().st_dev


def disk_used(paths: Iterable[Path]) -> int:
    """Bytes that files take of the disk, holes not counted."""
    used = 0
    for path in paths:
        try:
            used += os.lstat(path).st_blocks * 512
        except FileNotFoundError:
            continue
    return used
