"""Turns the release's numbers into packed rows: transpose -> dequantize -> ggml_quantize_chunk.

The release stores weights [in, out], GGUF rows are [out, in], so every weight is transposed, and that decides the
speed of the cheap types. What measured fastest (numpy alone copies a transposed int8 matrix at 0.1 GB/s):
 * words of eight columns are transposed first, in tiles of 512 rows, then the bytes inside them: 2.5 x byte by byte;
 * floats are made and packed a few rows at a time, so that they never leave the core's cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from grok_local.errors import CheckpointError
from grok_local.ggml import quants
from grok_local.quantize.layout.pieces import Piece, PlannedTensor
from grok_local.quantize.output.part_file import aligned_empty
from grok_local.quantize.packing.slabs import WORD, Floats, Slab

__all__ = ["Workspace", "pack_piece", "weights_of"]

_TILE_ROWS = 512
_WORD_COLUMNS = 128
_BLOCK_WEIGHTS = 1 << 19
_F16_MAX = 65504.0

_Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("weights", "i1", 32)])
# The largest weight a type can hold; the others have half-precision scales.
_LIMITS = dict.fromkeys((GGMLQuantizationType.F32, GGMLQuantizationType.BF16), float(np.finfo(np.float32).max))


class Workspace(threading.local):
    """A thread's buffers, kept from one piece to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An uninitialised array; the same memory for every call with the same `name`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = aligned_empty(size)
        return self._buffers[name][:size].view(dtype).reshape(shape)

    @staticmethod
    def nbytes(tensor: PlannedTensor) -> int:
        """What it takes at most while rows of `tensor` are packed."""
        return block_rows(tensor.width) * tensor.width * (4 + 1) + _WORD_COLUMNS * tensor.width


def pack_piece(piece: Piece, slab: Slab, workspace: Workspace, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The piece's bytes, at the start of `memory`. Raises CheckpointError."""
    tensor = piece.tensor
    out = memory[: piece.nbytes].reshape(piece.rows, tensor.row_bytes)
    for block in _blocks(piece, slab, workspace):
        target = out[block.start - piece.start : block.start - piece.start + block.rows]
        exact = block.exact_rows() if tensor.type == GGMLQuantizationType.Q8_0 else np.zeros(block.rows, bool)
        if not exact.all():
            quants.quantize_rows(tensor.type, block.checked_floats(), target)
        if exact.any():
            block.copy_q8_0(target, exact)
    return out.reshape(-1)


def weights_of(piece: Piece, slab: Slab, workspace: Workspace) -> Iterator[tuple[int, Floats]]:
    """The piece in float32, int8 times scale without rounding and floats as they are: (first row, [rows, in]) a few
    rows at a time.

    Each array is valid until the next is asked for.
    """
    for block in _blocks(piece, slab, workspace):
        yield block.start, block.floats()


def _blocks(piece: Piece, slab: Slab, workspace: Workspace) -> Iterator[_Block]:
    """Blocks whose floats stay in a core's cache, from words transposed 128 columns at a time."""
    step = block_rows(piece.tensor.width)
    for start in range(piece.start, piece.stop, _WORD_COLUMNS):
        stop = min(start + _WORD_COLUMNS, piece.stop)
        words = None
        if slab.scales is not None and (stop - start) % WORD == 0:
            words = _transposed_words(slab.values[:, start - slab.start : stop - slab.start], workspace)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            inside = None if words is None else words[:, (first - start) // WORD : (last - start) // WORD]
            yield _Block(piece.tensor, slab, first, last - first, inside, workspace)


def _largest(values: Floats) -> float:
    """The largest absolute value, without an array of them; not a number where one is none."""
    return max(float(values.max(initial=0)), -float(values.min(initial=0)))


def _widen(values: npt.NDArray[Any], out: Floats) -> None:
    """Copy numbers of any type that releases have into float32; a bfloat16 is the upper half of one."""
    if values.dtype == np.uint16:
        bits = out.view(np.uint32)
        np.copyto(bits, values)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, values)


def block_rows(width: int) -> int:
    """Rows that are dequantized and packed at once: about 2 MB of float32."""
    rows = WORD
    while rows < _WORD_COLUMNS and rows * 2 * width <= _BLOCK_WEIGHTS:
        rows *= 2
    return rows


def _transposed_words(columns: npt.NDArray[np.int8], workspace: Workspace) -> npt.NDArray[np.int64]:
    """int64 [tiles, columns / 8, in / tiles]: words of eight columns each, from int8 [in, columns].

    The tiles stand outermost, so that one call copies tile by tile; a call for each would fight for the interpreter's
    lock.
    """
    width, count = len(columns), columns.shape[1] // WORD
    tiles = width // math.gcd(width, _TILE_ROWS)
    words: npt.NDArray[np.int64] = workspace.array("words", (tiles, count, width // tiles), np.int64)
    np.copyto(words, columns.view(np.int64).reshape(tiles, width // tiles, count).transpose(0, 2, 1))
    return words


@dataclass
class _Block:
    """A few rows of the output from `start` on, in the forms they pass through.

    Nothing is cached: before Python 3.12 a cached_property holds one lock for all instances, and the threads wait in
    line.
    """

    tensor: PlannedTensor
    slab: Slab
    start: int
    rows: int
    words: npt.NDArray[np.int64] | None  # [tiles, rows / 8, in / tiles], where rows come in eights
    workspace: Workspace

    @property
    def columns(self) -> slice:
        """Where they are among the slab's columns."""
        return slice(self.start - self.slab.start, self.start - self.slab.start + self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.tensor.width

    def integers(self) -> npt.NDArray[np.int8]:
        """int8 [rows, in]."""
        out = self.workspace.array("integers", self.shape, np.int8)
        if self.words is None:
            out[:] = self.slab.values[:, self.columns].T
        else:
            tiles, words, width = self.words.shape
            inside = self.words.view(np.int8).reshape(tiles, words, width, WORD)
            np.copyto(out.reshape(words, WORD, tiles, width), inside.transpose(1, 3, 0, 2))
        return out

    def scales(self) -> Floats:
        """float32 [G, rows]."""
        if self.slab.scales is None:
            raise AssertionError(f"{self.tensor.name} has no scales")
        return self.slab.scales[:, self.columns]

    def floats(self) -> Floats:
        """float32 [rows, in]."""
        out: Floats = self.workspace.array("floats", self.shape, np.float32)
        if self.slab.scales is None:
            _widen(
                self.slab.values[:, self.columns].T if self.tensor.transposed else self.slab.values[self.columns], out
            )
            return out
        np.copyto(out, self.integers())  # a multiplication that converts as well is slower than the two
        by_group = out.reshape(self.rows, len(self.slab.scales), -1)
        np.multiply(by_group, self.slab.scales.T[self.columns, :, None], out=by_group)
        return out

    def checked_floats(self) -> Floats:
        """`floats`, once it is sure that the tensor's type can hold them."""
        floats = self.floats()
        limit = _LIMITS.get(self.tensor.type, _F16_MAX)
        if not self.slab.bound <= limit and not (largest := _largest(floats)) <= limit:
            source = self.tensor.source
            advice = ": use --type f32" if np.isfinite(largest) else ""
            what = f"{source.where} has weights of {largest:.3g}"
            raise CheckpointError(f"{source.file_name}: {what}, more than {self.tensor.type.name} can hold{advice}")
        return floats

    def exact_rows(self) -> npt.NDArray[np.bool_]:
        """Bool [rows]: whose int8 values and scales a Q8_0 block holds as they are."""
        if self.slab.scales is None or (self.tensor.width // len(self.scales())) % 32:
            return np.zeros(self.rows, bool)
        with np.errstate(over="ignore"):
            exact: npt.NDArray[np.bool_] = self.scales().astype(np.float16).astype(np.float32) == self.scales()
        return np.asarray(exact.all(axis=0))

    def copy_q8_0(self, target: npt.NDArray[np.uint8], rows: npt.NDArray[np.bool_]) -> None:
        """Write the release's own int8 values, under its own scales, into `target` where `rows` is true."""
        blocks = target.view(_Q8_0_BLOCK)  # [rows, in / 32]
        per_group = blocks.shape[1] // len(self.scales())
        chosen = slice(None) if rows.all() else rows
        blocks["scale"][chosen] = np.repeat(self.scales().astype(np.float16).T[chosen], per_group, axis=1)
        blocks["weights"][chosen] = self.integers()[chosen].reshape(-1, blocks.shape[1], 32)
