"""Reads slabs: the numbers behind some consecutive pieces of one matrix, from however many shards it lies in."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.errors import CheckpointError
from grok_local.quantize.layout.pieces import Piece, PlannedTensor
from grok_local.quantize.sources.checkpoint import Shard, SourceTensor, read_scales

__all__ = ["WORD", "Floats", "Slab", "read_slab", "slab_bytes"]

WORD = 8  # int8 columns in a 64-bit word, as they are transposed
_PITCH_PADDING = 64  # bytes: a power of two between rows would land each column of a tile in the same cache set
_BATCH = 1000  # buffers in one preadv; Linux takes 1024
_TYPES = {"i1": np.int8, "bf16": np.uint16, "f2": np.float16, "f4": np.float32}  # numpy has no bfloat16

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Slab:
    """The numbers behind some consecutive pieces of one matrix.

    `values` is [in, out columns] as the release has it where the tensor is transposed, else [rows, in]; uint16 stands
    for bfloat16.
    `scales` is [G, out columns]; row k of `values` belongs to group k // (in / G).
    """

    values: npt.NDArray[Any]
    scales: Floats | None
    start: int  # the row of the output that comes first
    bound: float  # no weight is larger; not a number if that is unknown


def slab_bytes(tensor: PlannedTensor, rows: int) -> int:
    """Memory that a slab for `rows` rows of the output takes."""
    return tensor.width * (_padded(rows) if tensor.transposed else rows) * tensor.source.item_size


def _padded(columns: int) -> int:
    return -(-columns // WORD) * WORD + _PITCH_PADDING


def read_slab(pieces: list[Piece], memory: npt.NDArray[np.uint8]) -> Slab:
    """Read what `pieces`, consecutive ones of one matrix, are made from into `memory`. Raises CheckpointError."""
    tensor, expert = pieces[0].tensor, pieces[0].expert
    start, stop = pieces[0].start, pieces[-1].stop
    if tensor.transposed:
        rows, columns, pitch = range(tensor.width), range(start, stop), _padded(stop - start)
    else:
        rows, columns, pitch = range(start, stop), range(tensor.width), tensor.width
    dtype = np.dtype(_TYPES[tensor.source.dtype])
    used = memory[: len(rows) * pitch * dtype.itemsize]
    place = _Place(memoryview(used), rows, columns, pitch, dtype.itemsize)
    for shard in tensor.source.matrices[expert]:
        place.read(shard)
    values = used.view(dtype).reshape(len(rows), pitch)[:, : len(columns)]
    scales = _scales(tensor.source, expert)
    if scales is None:
        return Slab(values, None, start, math.nan)
    inside = np.ascontiguousarray(scales[:, start:stop])
    return Slab(values, inside, start, 128 * float(np.abs(inside).max()))


def _scales(source: SourceTensor, expert: int) -> Floats | None:
    if source.scales is None:
        return None
    scales = read_scales(source)
    return scales[expert] if scales.ndim == 3 else scales


@dataclass(frozen=True)
class _Place:
    """Memory for rows and columns of a stored matrix, its rows `pitch` numbers apart."""

    memory: memoryview
    rows: range
    columns: range
    pitch: int
    item: int  # bytes of a number

    def read(self, shard: Shard) -> None:
        """Read what lies in the shard. Raises CheckpointError."""
        rows, columns = _common(self.rows, shard.rows), _common(self.columns, shard.columns)
        if not (rows and columns):
            return
        width = len(shard.columns)
        first = (rows.start - shard.rows.start) * width + columns.start - shard.columns.start
        target = (rows.start - self.rows.start) * self.pitch + columns.start - self.columns.start
        row, pitch, stride = len(columns) * self.item, self.pitch * self.item, width * self.item
        ends = range(target * self.item, target * self.item + len(rows) * pitch, pitch)
        whole = row == pitch == stride
        views = (
            [self.memory[ends.start : ends.start + len(rows) * row]]
            if whole
            else [self.memory[at : at + row] for at in ends]
        )
        _read_rows(shard.path, views, shard.offset + first * self.item, stride=stride, together=row == stride)


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _read_rows(path: Path, views: Sequence[memoryview], offset: int, *, stride: int, together: bool) -> None:
    """Fill the views with rows that are `stride` apart in the file; many in one call where nothing lies between."""
    batch = _BATCH if together else 1
    try:
        with path.open("rb", buffering=0) as file:
            for first in range(0, len(views), batch):
                _fill(file.fileno(), list(views[first : first + batch]), offset + first * stride)
    except EOFError:
        raise CheckpointError(f"{path.name}: became shorter while it was read") from None
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror or error})") from None


def _fill(fd: int, views: list[memoryview], offset: int) -> None:
    while views:
        read = os.preadv(fd, views, offset)
        if read == 0:
            raise EOFError
        offset += read
        while views and read >= len(views[0]):
            read -= len(views.pop(0))
        if read:
            views[0] = views[0][read:]
