"""Reads a GGUF's header: metadata and tensor table, with every count and offset checked before it is believed.

gguf's own reader maps the whole file and trusts it; a truncated or hostile one makes it fail in any way at all. The
format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from grok_local.errors import GGUFError
from grok_local.files import is_part, part_names

__all__ = [
    "KEYS",
    "NO_DIGEST",
    "Header",
    "Tensor",
    "all_parts",
    "fill_string",
    "is_piece",
    "metadata_is_intact",
    "read_header",
    "read_model",
    "replace_strings",
]

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_OTHERS = {  # by what they begin with
    (b"version http",): "is a git-lfs pointer, not the model: run git lfs pull in its folder",
    (b"<!doc", b"<html", b"<?xml"): "is a web page: the download went wrong; fetch it again",
    (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zxz", b"7z\xbc\xaf", b"bzh"): "is compressed: unpack it first",
    (b"pk\x03\x04", b"\x80\x02", b"\x80\x04"): "is a Python checkpoint or an archive: only a GGUF can be run",
    (b"lmgg", b"fmgg", b"tjgg", b"algg"): "is of a format older than GGUF, which nobody reads any more: fetch a GGUF",
}
_PIECE_NAME = re.compile(r"\.(gguf[.-])?(part|split)[-_.]?([a-z]{1,2}|\d+(of\d+)?)$|\.gguf\.\d{2,3}$", re.IGNORECASE)
_PIECE = "is a piece of a file that was cut up: join all pieces in their order with cat, and give what comes out"
_MAX_LISTED = 10
_MAX_KEYS = 100_000
_MAX_TENSORS = 1_000_000
_MAX_HEADER = 1 << 30
_DEFAULT_ALIGNMENT = 32
_MAX_PADDING = 1 << 16


NO_DIGEST = "0" * 64


class KEYS:
    """What grok-local keeps in a GGUF beside the standard keys. Digests are SHA-256 in hex."""

    PLAN = "grok_local.plan"  # of all parts' headers with NO_DIGEST in place of this and of the tensors' hashes
    CHECKPOINT = "grok_local.checkpoint"  # the checkpoint's fingerprint
    TYPE = "grok_local.type"
    PIECE_WEIGHTS = "grok_local.piece_weights"
    TENSOR_HASHES = "grok_local.tensor_hashes"  # by tensor: of the digests of its pieces


@dataclass(frozen=True)
class Tensor:
    """`shape` is as numpy has it, outermost first; `offset` counts from the start of the file `path`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int
    path: Path


@dataclass(frozen=True)
class Header:
    """One file's metadata and tensors; arrays are numpy arrays or lists of strings."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    size: int
    end: int  # of metadata and tensor table, where padding begins


def read_header(path: Path) -> Header:
    """Read and check the header of one file. Raises GGUFError."""
    try:
        if path.exists() and not path.is_file():
            raise GGUFError(f"{path}: not a file")
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_model(path: Path) -> list[Header]:
    """The headers of all parts of the model that `path` is a part of, the first one first. Raises GGUFError."""
    headers = [read_header(part) for part in all_parts(path)]
    count = headers[0].metadata.get("split.count", 1)
    if not isinstance(count, int) or count != len(headers):
        raise GGUFError(f"{path}: {_misnamed(headers[0], count)}")
    for number, header in enumerate(headers):
        if len(headers) > 1 and header.metadata.get("split.no") != number:
            raise GGUFError(f"{header.path}: is another part than its name says: give the parts their names back")
    return headers


def _misnamed(header: Header, count: Any) -> str:
    """Of a file that is one of several parts, and has another name."""
    end = max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=header.end)
    if header.size > end + _MAX_PADDING:
        return (
            f"holds {count} parts of a model one behind the other: parts are not joined; fetch them again, each alone"
        )
    return f"is one of {count} parts, but its name does not say so: give it the name it was made with"


def metadata_is_intact(headers: list[Header]) -> bool:
    """Whether metadata and tensor tables are still those that grok-local wrote; true for files of other programs."""
    plan = headers[0].metadata.get(KEYS.PLAN)
    if not isinstance(plan, str):
        return True
    digest = hashlib.sha256()
    for header in headers:
        with header.path.open("rb") as file:
            data = replace_strings(file.read(header.end), [plan], [NO_DIGEST])
        hashes = header.metadata.get(KEYS.TENSOR_HASHES)
        known = [text for text in hashes if isinstance(text, str)] if isinstance(hashes, list) else []
        digest.update(replace_strings(data, known, [NO_DIGEST] * len(known)))
    return digest.hexdigest() == plan


def replace_strings(data: bytes, old: list[str], new: list[str]) -> bytes:
    """`data` with the run of strings `old`, as GGUF stores them, replaced by `new`; unchanged where there is none."""
    return data.replace(b"".join(map(_stored_string, old)), b"".join(map(_stored_string, new)), 1)


def fill_string(data: bytes, key: str, text: str) -> bytes:
    """`data` with the value NO_DIGEST of a key replaced by `text`, of the same length."""
    before = _stored_string(key) + struct.pack("<I", GGUFValueType.STRING)
    return data.replace(before + _stored_string(NO_DIGEST), before + _stored_string(text), 1)


def _stored_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def all_parts(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of. Raises GGUFError naming those that are missing."""
    parts = part_names(path)
    missing = [part for part in parts if is_part(path) and not part.exists()]
    problems = [f"{part}: this part of the model is missing" for part in missing[:_MAX_LISTED]]
    if len(missing) > _MAX_LISTED:
        problems.append(f"{path}: {len(missing) - _MAX_LISTED} more parts are missing")
    if problems or not parts:
        raise GGUFError(problems or f"{path}: part of nothing")
    return parts


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def header(self) -> Header:
        if is_piece(self._path):
            raise self._error(_PIECE)
        magic = self._file.read(16)
        if not magic.startswith(b"GGUF"):
            raise self._error(_what_else(magic))
        self._file.seek(4)
        version = self._scalar("<I")
        if version in (2 << 24, 3 << 24):
            raise self._error(
                "is a GGUF of the other byte order (big-endian): fetch the little-endian one, or convert it"
            )
        if version not in (2, 3):
            raise self._error(f"is a GGUF of version {version}; 2 and 3 can be read")
        tensor_count, key_count = self._scalar("<Q"), self._scalar("<Q")
        if tensor_count > _MAX_TENSORS or key_count > _MAX_KEYS:
            raise self._error(f"damaged: claims {tensor_count} tensors and {key_count} keys")
        metadata = dict(self._key_value() for _ in range(key_count))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        return Header(self._path, metadata, self._place(infos, metadata), self._size, self._file.tell())

    def _error(self, message: str) -> GGUFError:
        return GGUFError(f"{self._path}: {message}")

    def _bytes(self, count: int) -> bytes:
        # Never ask for more than the file has: a hostile length must not allocate anything.
        if count > min(self._size - self._file.tell(), _MAX_HEADER):
            raise self._error("truncated or damaged: its header runs past its end; fetch or pack it again")
        return self._file.read(count)

    def _scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        return self._bytes(self._scalar("<Q")).decode("utf-8", "replace")

    def _key_value(self) -> tuple[str, Any]:
        key = self._string()
        return key, self._value(self._value_type(), depth=0)

    def _value_type(self) -> GGUFValueType:
        number = self._scalar("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._error(f"damaged: has a value of unknown type {number}") from None

    def _value(self, kind: GGUFValueType, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == GGUFValueType.STRING:
            return self._string()
        if depth > 2:
            raise self._error("damaged: arrays of arrays of arrays")
        item, count = self._value_type(), self._scalar("<Q")
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item]) if item != GGUFValueType.BOOL else np.dtype(np.bool_)
            return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)
        if count * 8 > self._size:  # each string or array takes 8 bytes at least
            raise self._error("truncated or damaged: an array runs past its end")
        return [self._value(item, depth + 1) for _ in range(count)]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        rank = self._scalar("<I")
        if not 1 <= rank <= 4:
            raise self._error(f"damaged: tensor {name!r:.80} has {rank} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(rank))[::-1]
        number = self._scalar("<I")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            text = f"tensor {name!r:.80} is of type {number}, which is unknown here: the file is damaged, or newer"
            raise self._error(text) from None
        return name, shape, kind, self._scalar("<Q")

    def _place(
        self, infos: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]], metadata: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._error("damaged: general.alignment is no power of two")
        start = -(-self._file.tell() // alignment) * alignment
        tensors = tuple(self._tensor(start, alignment, *info) for info in infos)
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self._error("damaged: two tensors have the same name")
        return tensors

    def _tensor(
        self, start: int, alignment: int, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
    ) -> Tensor:
        block, size = GGML_QUANT_SIZES[kind]
        if min(shape) == 0 or shape[-1] % block or offset % alignment:
            raise self._error(f"damaged: tensor {name!r:.80} has shape {list(shape)} at {offset}, as {kind.name}")
        nbytes = math.prod(shape) // block * size
        if start + offset + nbytes > self._size:
            missing = start + offset + nbytes - self._size
            raise self._error(f"truncated: {missing} bytes of tensor {name!r:.80} are missing; fetch or pack it again")
        return Tensor(name, shape, kind, start + offset, nbytes, self._path)


def is_piece(path: Path) -> bool:
    """Whether its name is one of a file cut into pieces that `cat` joins: model.gguf.part1of2, model.gguf-split-a."""
    return _PIECE_NAME.search(path.name) is not None


def _what_else(start: bytes) -> str:
    """What a file is that begins so, and no GGUF."""
    if not start.strip(b"\0"):
        return "is empty, or was never finished: run the command that makes it again"
    if start[8:9] == b"{":
        return "is a safetensors file, of a checkpoint: only a GGUF can be run"
    known = (text for magics, text in _OTHERS.items() if start.lstrip().lower().startswith(magics))
    return next(known, "is not a GGUF")
