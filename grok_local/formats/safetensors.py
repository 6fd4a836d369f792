"""Reads a safetensors header without trusting it: every size and offset is checked before it is believed.

A file is eight bytes with the header's length, the header in JSON, and the tensors one after the other, without
overlap and without holes. Nothing but the header is read here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from grok_local.errors import CheckpointError

__all__ = ["TensorInfo", "parse_safetensors", "read_safetensors"]

_ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_MAX_HEADER = 1 << 22  # bytes; the release's longest has 80,000
_MAX_RANK = 8
_MAX_SIZE = 1 << 48
_LENGTH = 8  # bytes of the header's length


@dataclass(frozen=True)
class TensorInfo:
    """What a file has of a tensor: `nbytes` in C order at `offset` of the file. `dtype` is as the format spells it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Where the tensors of a file lie, by name. Raises CheckpointError naming the file and what is wrong in it."""
    try:
        with path.open("rb") as file:
            return parse_safetensors(file, path.name)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror or error})") from None


def parse_safetensors(file: BinaryIO, name: str) -> dict[str, TensorInfo]:
    """The same of an open file, which may be anything that can be read and sought in. Raises CheckpointError."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header, start = _header(file, size)
        tensors = {key: _tensor(key, entry, start) for key, entry in header.items() if key != "__metadata__"}
        _check_layout(tensors, start, size)
    except _MalformedError as error:
        raise CheckpointError(f"{name}: {error}") from None
    return tensors


class _MalformedError(Exception):
    """The file is not what the format allows."""


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    start = file.read(_LENGTH)
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH or not 2 <= length <= _MAX_HEADER:
        raise _MalformedError(f"is no safetensors file: its header would have {length} bytes")
    if length > size - _LENGTH:
        raise _MalformedError(f"truncated: its header has {length} bytes and the file {size}; fetch it again")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _MalformedError("damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise _MalformedError("damaged: its header lists no tensors")
    return header, _LENGTH + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise _MalformedError(f"damaged: has {name!r:.80} twice")
        values[name] = value
    return values


def _tensor(name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _MalformedError(f"damaged: {name!r:.80} has not exactly a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise _MalformedError(f"{name!r:.80} is of type {dtype!r:.40}, which is unknown here")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise _MalformedError(f"damaged: {name!r:.80} has shape {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _MalformedError(f"damaged: {name!r:.80} has data_offsets {offsets!r:.80}")
    info = TensorInfo(dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise _MalformedError(
            f"damaged: {name!r:.80} has {offsets[1] - offsets[0]} bytes for shape {shape!r:.80} of {dtype}, "
            f"which takes {info.nbytes}"
        )
    return info


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _MAX_SIZE for size in value)


def _check_layout(tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """The tensors must follow each other from `start` to the file's end."""
    end, last = start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end:
            raise _MalformedError(f"damaged: {name!r:.80} overlaps {last!r:.80}")
        if info.offset > end:
            raise _MalformedError(f"damaged: {info.offset - end} bytes before {name!r:.80} belong to no tensor")
        end, last = info.offset + info.nbytes, name
    if end > size:
        raise _MalformedError(f"truncated: {end - size} bytes are missing; fetch it again")
    if end < size:
        raise _MalformedError(f"damaged: has {size - end} bytes after its last tensor")
