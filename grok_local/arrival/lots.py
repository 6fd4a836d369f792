"""Which files must be on the disk together, in which order they are best fetched, and how much room that takes.

A piece of the output needs the files that its numbers lie in. Of Grok-1 that is one file. Of Grok-2 a rank has whole
rows of the experts' w1 and w3, and a piece has fewer rows, so each of those files can be packed and let go alone. Of w2
a rank has columns, so its eight files, 137 GB, are needed at once. They come first, when nothing else is on the disk
yet: then they hardly cost more room than the packed model takes in the end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grok_local.quantize.layout.pieces import Piece

__all__ = ["Gate", "Lot", "least_room", "lots_of"]


@dataclass(frozen=True, eq=False)
class Lot:
    """Files that are needed together, of `nbytes`, and the pieces that are made of them.

    `packed` is how many bytes of the files' disk those take: none where the output goes to another one.
    """

    files: tuple[Path, ...]
    pieces: tuple[Piece, ...]
    nbytes: int
    packed: int


def lots_of(pieces: Iterable[Piece], sizes: Mapping[Path, int], *, same_disk: bool) -> list[Lot]:
    """All lots, the largest first, which is what takes the least room: packed bytes stay, and fetched ones go."""
    leaders = {path: path for path in sizes}
    made: dict[Path, list[Piece]] = {path: [] for path in sizes}
    for piece in pieces:
        first, *others = sorted(piece.paths)
        for path in others:
            leaders[_leader(leaders, path)] = _leader(leaders, first)
        made[first].append(piece)
    together: dict[Path, list[Path]] = {}
    for path in sizes:
        together.setdefault(_leader(leaders, path), []).append(path)
    lots = [_lot(files, made, sizes, same_disk) for files in together.values()]
    return sorted(lots, key=lambda lot: (-lot.nbytes, lot.files))


def _leader(leaders: Mapping[Path, Path], path: Path) -> Path:
    while leaders[path] != path:
        path = leaders[path]
    return path


def _lot(
    files: Sequence[Path], made: Mapping[Path, Sequence[Piece]], sizes: Mapping[Path, int], same_disk: bool
) -> Lot:
    pieces = sorted((piece for path in files for piece in made[path]), key=lambda piece: piece.index)
    packed = sum(piece.nbytes for piece in pieces) if same_disk else 0
    return Lot(tuple(files), tuple(pieces), sum(sizes[path] for path in files), packed)


def least_room(lots: Iterable[Lot], *, discard: bool) -> int:
    """The bytes that must fit on the disk so that the lots can come in this order, one after the other."""
    stays = most = 0
    for lot in lots:
        most = max(most, stays + lot.packed + lot.nbytes)
        stays += lot.packed + (0 if discard else lot.nbytes)
    return max(most, stays)


class Gate:
    """Lets lots come while all that is on the disk then takes at most `room` bytes."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._taken = self._in_flight = 0
        self._closed = False
        self._changed = threading.Condition()

    def count(self, lot: Lot) -> None:
        """What is made of the lot is there already."""
        self._taken += lot.packed

    def enter(self, lot: Lot) -> bool:
        """Wait until there is room for the files and for what is made of them; False where the gate was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(lot))
            self._taken += lot.packed
            self._in_flight += lot.nbytes
            return not self._closed

    def _has_room(self, lot: Lot) -> bool:
        needed = self._taken + self._in_flight + lot.packed + lot.nbytes
        # Nothing that could be waited for is in flight: then waiting would be for ever.
        return needed <= self._room or not self._in_flight

    def leave(self, lot: Lot) -> None:
        """The lot's files are gone."""
        with self._changed:
            self._in_flight -= lot.nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody needs to wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
