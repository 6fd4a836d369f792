"""Turns the release's numbers into packed rows: read -> transpose -> dequantize -> ggml_quantize_chunk.

The release stores weights [in, out], GGUF rows are [out, in], so every weight is transposed, and that decides the
speed of the cheap types. What measured fastest (numpy alone copies a transposed int8 matrix at 0.1 GB/s):
 * a slab's rows are 64 bytes apart from a power of two, or each column of a tile would land in the same cache set;
 * words of eight columns are transposed first, in tiles of 512 rows, then the bytes inside them: 2.5 x byte by byte.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from grok_local import ggml
from grok_local.errors import CheckpointError
from grok_local.quantize.checkpoint import SourceTensor, read_scales
from grok_local.quantize.layout import Piece, PlannedTensor

__all__ = ["BLOCK_ROWS", "Slab", "Workspace", "pack_piece", "read_slab", "slab_bytes", "weights_of"]

BLOCK_ROWS = 128
_PITCH_PADDING = 64  # bytes
_TILE_ROWS = 512
_WORD = 8  # int8 columns in a 64-bit word
_F16_MAX = 65504.0
_BATCH = 1000  # buffers in one preadv; Linux takes 1024

_Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("weights", "i1", 32)])
_QUANTIZED_FLOATS = {GGMLQuantizationType.F32, GGMLQuantizationType.BF16}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Slab:
    """The numbers behind some consecutive pieces of one matrix.

    `values` is [in, out columns] as the release has it where the tensor is transposed, else [rows, in].
    `scales` is [G, out columns]; row k of `values` belongs to group k // (in / G).
    """

    values: npt.NDArray[Any]
    scales: Floats | None
    start: int  # the row of the output that comes first

    def columns(self, start: int, stop: int) -> slice:
        return slice(start - self.start, stop - self.start)


class Workspace(threading.local):
    """A thread's buffers, kept from one piece to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An uninitialised array; the same memory for every call with the same `name`."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.uint8)
        return self._buffers[name][:size].view(dtype).reshape(shape)

    @staticmethod
    def nbytes(tensor: PlannedTensor, rows: int) -> int:
        """What packing a piece of `rows` rows of `tensor` takes at most."""
        block = BLOCK_ROWS * tensor.width
        return block * (4 + 1 + 1) + rows * tensor.row_bytes


def slab_bytes(tensor: PlannedTensor, rows: int) -> int:
    """Memory that a slab for `rows` rows of the output takes."""
    item = 4 if tensor.source.stored.scales is None else 1
    return tensor.width * (_padded(rows) if tensor.transposed else rows) * item


def _padded(columns: int) -> int:
    return -(-columns // _WORD) * _WORD + _PITCH_PADDING


def read_slab(pieces: list[Piece], memory: npt.NDArray[np.uint8]) -> Slab:
    """Read what `pieces`, consecutive ones of one matrix, are made from into `memory`. Raises CheckpointError."""
    tensor, expert = pieces[0].tensor, pieces[0].expert
    start, stop = pieces[0].start, pieces[-1].stop
    dtype = np.dtype(np.float32 if tensor.source.stored.scales is None else np.int8)
    if tensor.transposed:
        rows, columns, pitch, stride = tensor.width, stop - start, _padded(stop - start), tensor.rows
        first = expert * tensor.width * tensor.rows + start
    else:
        rows, columns, pitch, stride = stop - start, tensor.width, tensor.width, tensor.width
        first = start * tensor.width
    _read_rows(
        tensor.source,
        memoryview(memory)[: rows * pitch * dtype.itemsize],
        offset=first * dtype.itemsize,
        row=columns * dtype.itemsize,
        pitch=pitch * dtype.itemsize,
        stride=stride * dtype.itemsize,
    )
    values = memory[: rows * pitch * dtype.itemsize].view(dtype).reshape(rows, pitch)[:, :columns]
    scales = _scales(tensor.source, expert)
    return Slab(values, None if scales is None else np.ascontiguousarray(scales[:, start:stop]), start)


def _scales(source: SourceTensor, expert: int) -> Floats | None:
    if source.stored.scales is None:
        return None
    scales = read_scales(source)
    return scales[expert] if scales.ndim == 3 else scales


def _read_rows(source: SourceTensor, memory: memoryview, *, offset: int, row: int, pitch: int, stride: int) -> None:
    """Read rows of `row` bytes, `stride` apart from `offset` of the payload on, to places `pitch` apart in `memory`."""
    views = [memory] if row == pitch == stride else [memory[at : at + row] for at in range(0, len(memory), pitch)]
    batch = _BATCH if row == stride else 1
    at = source.stored.weight.offset + offset
    try:
        with source.path.open("rb", buffering=0) as file:
            for first in range(0, len(views), batch):
                _fill(file.fileno(), views[first : first + batch], at + first * stride)
    except EOFError:
        raise CheckpointError(f"{source.path.name}: became shorter while it was read") from None
    except OSError as error:
        raise CheckpointError(f"{source.path.name}: cannot be read ({error.strerror or error})") from None


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


def pack_piece(piece: Piece, slab: Slab, workspace: Workspace) -> npt.NDArray[np.uint8]:
    """The piece's bytes, in the workspace: valid until the thread packs its next piece. Raises CheckpointError."""
    tensor = piece.tensor
    out = workspace.array("out", (piece.rows, tensor.row_bytes), np.uint8)
    for start in range(piece.start, piece.stop, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, piece.stop)
        target = out[start - piece.start : stop - piece.start]
        block = _Block(tensor, slab, slab.columns(start, stop), workspace)
        exact = block.exact_rows if tensor.type == GGMLQuantizationType.Q8_0 else np.zeros(stop - start, bool)
        if not exact.all():
            ggml.quantize_rows(tensor.type, block.checked_floats(), target)
        if exact.any():
            block.copy_q8_0(target, exact)
    return out.reshape(-1)


def weights_of(piece: Piece, slab: Slab, start: int, stop: int, workspace: Workspace) -> Floats:
    """Rows [start, stop) of the piece's matrix in float32 [rows, in], at most BLOCK_ROWS of them: int8 times
    scale, not rounded.
    """
    return _Block(piece.tensor, slab, slab.columns(start, stop), workspace).floats


@dataclass
class _Block:
    """Up to BLOCK_ROWS rows of the output, in the forms they pass through."""

    tensor: PlannedTensor
    slab: Slab
    columns: slice
    workspace: Workspace

    @property
    def rows(self) -> int:
        return int(self.columns.stop - self.columns.start)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.tensor.width

    @cached_property
    def integers(self) -> npt.NDArray[np.int8]:
        """int8 [rows, in]."""
        out = self.workspace.array("integers", self.shape, np.int8)
        columns = self.slab.values[:, self.columns]  # [in, rows]
        if self.rows % _WORD:
            out[:] = columns.T
            return out
        words = self.workspace.array("words", (self.rows // _WORD, self.tensor.width), np.int64)
        for k in range(0, self.tensor.width, _TILE_ROWS):
            words[:, k : k + _TILE_ROWS] = columns[k : k + _TILE_ROWS].view(np.int64).T
        bytes_of_words = words.view(np.int8).reshape(self.rows // _WORD, self.tensor.width, _WORD)
        np.copyto(out.reshape(self.rows // _WORD, _WORD, self.tensor.width), bytes_of_words.transpose(0, 2, 1))
        return out

    @cached_property
    def scales(self) -> Floats:
        """float32 [G, rows]."""
        if self.slab.scales is None:
            raise AssertionError(f"{self.tensor.name} has no scales")
        return self.slab.scales[:, self.columns]

    @cached_property
    def floats(self) -> Floats:
        """float32 [rows, in]."""
        out: Floats = self.workspace.array("floats", self.shape, np.float32)
        if self.slab.scales is None:
            np.copyto(
                out, self.slab.values[:, self.columns].T if self.tensor.transposed else self.slab.values[self.columns]
            )
            return out
        np.copyto(out, self.integers)
        groups = len(self.scales)
        by_group = out.reshape(self.rows, groups, -1)
        np.multiply(by_group, self.scales.T[:, :, None], out=by_group)
        return out

    def checked_floats(self) -> Floats:
        """`floats`, once it is sure that the tensor's type can hold them."""
        if self.slab.scales is None:
            largest = np.abs(self.floats).max(initial=0)
        else:
            largest = 128 * np.abs(self.scales).max(initial=0)
        if not largest <= _F16_MAX and self.tensor.type not in _QUANTIZED_FLOATS:
            largest = np.abs(self.floats).max(initial=0)
        limit = np.finfo(np.float32).max if self.tensor.type in _QUANTIZED_FLOATS else _F16_MAX
        if not largest <= limit:
            leaf = self.tensor.source.leaf
            advice = "" if np.isnan(largest) else ": use --type f32"
            found = f"{leaf.path} has weights of {largest:.3g}"
            raise CheckpointError(f"{leaf.file_name}: {found}, more than {self.tensor.type.name} can hold{advice}")
        return self.floats

    @cached_property
    def exact_rows(self) -> npt.NDArray[np.bool_]:
        """Bool [rows]: whose int8 values and scales a Q8_0 block holds as they are."""
        if self.slab.scales is None or (self.tensor.width // len(self.scales)) % 32:
            return np.zeros(self.rows, bool)
        with np.errstate(over="ignore"):
            exact: npt.NDArray[np.bool_] = self.scales.astype(np.float16).astype(np.float32) == self.scales
        return np.asarray(exact.all(axis=0))

    def copy_q8_0(self, target: npt.NDArray[np.uint8], rows: npt.NDArray[np.bool_]) -> None:
        """Write the release's own int8 values, under its own scales, into `target` where `rows` is true."""
        blocks = target.view(_Q8_0_BLOCK)  # [rows, in / 32]
        per_group = blocks.shape[1] // len(self.scales)
        chosen = slice(None) if rows.all() else rows
        blocks["scale"][chosen] = np.repeat(self.scales.astype(np.float16).T[chosen], per_group, axis=1)
        blocks["weights"][chosen] = self.integers[chosen].reshape(-1, blocks.shape[1], 32)
