"""The seam between releases and packing: a checkpoint as tensors, and each tensor as the pieces of files it lies in."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from grok_local.errors import CheckpointError
from grok_local.models.release import Dimensions, Kind, Release, Target

__all__ = [
    "Checkpoint",
    "NumberType",
    "Place",
    "Scales",
    "Shard",
    "SourceTensor",
    "Span",
    "check_file",
    "check_scales",
    "check_unchanged",
    "check_whole",
    "fingerprint",
    "looked_at",
    "names_in",
    "read_scales",
    "stamp_of",
]

NumberType: TypeAlias = Literal["i1", "bf16", "f2", "f4"]

_SAMPLE = 1 << 16  # bytes
_SAMPLES = 16
_GLANCE = 4096  # bytes
_ITEM_SIZES = {"i1": 1, "bf16": 2, "f2": 2, "f4": 4}


@dataclass(frozen=True)
class Shard:
    """The part of a stored matrix, in C order, that lies at `offset` of a file: those rows and columns of the whole."""

    path: Path
    offset: int
    rows: range
    columns: range


@dataclass(frozen=True)
class Span:
    """Some bytes of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Scales:
    """Bfloat16 scales [..., groups, columns] at `offset` of a file; each group is of as many rows of the matrix."""

    path: Path
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the release: what it becomes, and where its numbers lie.

    `where` is what the release calls it, `role` the same within its layer. It has a matrix for each expert, each in one
    or more shards; `transposed` matrices are stored [in, out]. `stamp` tells versions of its files apart, as they were
    when they were listed.
    """

    target: Target
    where: str
    role: str
    dtype: NumberType
    transposed: bool
    matrices: tuple[tuple[Shard, ...], ...]
    scales: Scales | None
    stamp: tuple[int, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files."""
        return tuple(dict.fromkeys(shard.path for matrix in self.matrices for shard in matrix))

    @property
    def file_name(self) -> str:
        """Its file's name, or its first's and how many more there are; for people."""
        first, *others = self.paths
        return f"{first.name} and {len(others)} more" if others else first.name

    @property
    def item_size(self) -> int:
        """Bytes of a number."""
        return _ITEM_SIZES[self.dtype]

    @cached_property
    def stored_shape(self) -> tuple[int, ...]:
        """As the release has it."""
        *outer, rows, columns = (1, *self.target.shape)
        return (*outer, columns, rows)[1:] if self.transposed else self.target.shape

    @property
    def nbytes(self) -> int:
        """Of the numbers without their scales."""
        return math.prod(self.target.shape) * self.item_size


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and fit together; `tensors` are in the release's order."""

    folder: Path
    release: Release
    dimensions: Dimensions
    tensors: tuple[SourceTensor, ...]

    @property
    def nbytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def paths(self) -> set[Path]:
        """All its files."""
        return {path for tensor in self.tensors for path in tensor.paths}

    def moved(self, places: Mapping[Path, Place]) -> Checkpoint:
        """The same, with its files in other places, which need not be there yet."""
        return replace(self, tensors=tuple(_moved(tensor, places) for tensor in self.tensors))


@dataclass(frozen=True)
class Place:
    """Where a file will be, and its version, as a listing has it."""

    path: Path
    stamp: tuple[int, ...]


def _moved(tensor: SourceTensor, places: Mapping[Path, Place]) -> SourceTensor:
    return replace(
        tensor,
        matrices=tuple(
            tuple(replace(shard, path=places[shard.path].path) for shard in matrix) for matrix in tensor.matrices
        ),
        scales=tensor.scales and replace(tensor.scales, path=places[tensor.scales.path].path),
        stamp=tuple(number for path in tensor.paths for number in places[path].stamp),
    )


def check_whole(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError listing the files with holes, where a download left out what it had made room for.

    Not in an embedding: rows of tokens that nobody uses may be zeros, and some file systems keep zeros as holes.
    """
    spans: dict[Path, list[Span]] = {}
    for tensor in checkpoint.tensors:
        for span in _spans(tensor) if tensor.target.kind is not Kind.EMBEDDING else ():
            spans.setdefault(span.path, []).append(span)
    problems = [
        f"{path.name}: a part of it was never written: let the download end, or fetch it again"
        for path in sorted(spans)
        if _has_holes(path, spans[path])
    ]
    if problems:
        raise CheckpointError(problems)


def _spans(tensor: SourceTensor) -> Iterator[Span]:
    for shard in (shard for matrix in tensor.matrices for shard in matrix):
        yield Span(shard.path, shard.offset, len(shard.rows) * len(shard.columns) * tensor.item_size)


def _has_holes(path: Path, spans: Iterable[Span]) -> bool:
    if not hasattr(os, "SEEK_HOLE"):
        return False
    with path.open("rb") as file:
        try:
            return any(os.lseek(file.fileno(), s.offset, os.SEEK_HOLE) < s.offset + s.nbytes for s in spans)
        except OSError:  # the file system knows of none, or the file ends before
            return False


def stamp_of(paths: Iterable[Path]) -> tuple[int, ...]:
    """What tells versions of files apart, wherever they are, also where a file system gives all the same time. Raises
    OSError.
    """
    return tuple(number for path in paths for number in _stamp(path))


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    # What is in the file cannot change without its ctime: that nobody can set.
    version = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    return status.st_size, status.st_mtime_ns, _glance(path, version)


@lru_cache(maxsize=4096)
def _glance(path: Path, version: tuple[int, ...]) -> int:
    """A number that stands for what is in the middle of a file; `version` begins with its size."""
    with path.open("rb") as file:
        file.seek(version[0] // 2)
        return int.from_bytes(hashlib.sha256(file.read(_GLANCE)).digest()[:6], "big")


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError listing the tensors whose files are no longer those that were opened."""
    problems = [
        f"{tensor.file_name}: {change}: run the same command again"
        for tensor in checkpoint.tensors
        if (change := _change_of(tensor))
    ]
    if problems:
        raise CheckpointError(problems)


def _change_of(tensor: SourceTensor) -> str:
    try:
        return "changed while it was packed" if stamp_of(tensor.paths) != tensor.stamp else ""
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def names_in(folder: Path) -> list[str]:
    """Of what a folder holds. Raises CheckpointError."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror or error})") from None


def check_file(path: Path) -> None:
    """Raises CheckpointError where there is nothing that a reader could find sense in: downloads end in many ways."""
    try:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path.name}: missing: the link leads to {path.readlink()}, where nothing is")
        if not path.is_file():
            raise CheckpointError(f"{path.name}: not a file")
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror or error})") from None
    if not start:
        raise CheckpointError(f"{path.name}: empty, fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path.name}: a git-lfs pointer, not the tensor: run git lfs pull in its folder")


def read_scales(tensor: SourceTensor) -> npt.NDArray[np.float32]:
    """The scales [..., G, N] as float32, which holds every bfloat16. Raises CheckpointError."""
    scales = tensor.scales
    if scales is None:
        raise AssertionError(f"{tensor.where} has no scales")
    raw = np.frombuffer(_read(_span_of(scales)), np.uint16)
    return (raw.astype(np.uint32) << 16).view(np.float32).reshape(scales.shape)


def check_scales(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError listing the tensors whose scales are not finite: nothing can be packed from those."""
    problems = [
        f"{tensor.file_name}: {tensor.where} has scales that are not finite"
        for tensor in checkpoint.tensors
        if tensor.scales and not np.isfinite(read_scales(tensor)).all()
    ]
    if problems:
        raise CheckpointError(problems)


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, shapes, all scales, and up to 16 samples of 64 KiB of every tensor, or one of each shard.

    It tells checkpoints apart without reading 318 GB; `verify --against` reads them whole. Raises CheckpointError.
    """
    digest = hashlib.sha256()
    for tensor in checkpoint.tensors:
        digest.update(f"{tensor.where} {tensor.stored_shape} {tensor.dtype}\n".encode())
        if tensor.scales:
            digest.update(read_scales(tensor))
        for span in _samples(tensor):
            digest.update(_read(span))
    return digest.hexdigest()


def looked_at(checkpoint: Checkpoint) -> Iterator[Span]:
    """What `fingerprint` reads: files that have nothing else any more still tell it."""
    for tensor in checkpoint.tensors:
        if tensor.scales:
            yield _span_of(tensor.scales)
        yield from _samples(tensor)


def _span_of(scales: Scales) -> Span:
    return Span(scales.path, scales.offset, 2 * math.prod(scales.shape))


def _samples(tensor: SourceTensor) -> Iterator[Span]:
    shards = [shard for matrix in tensor.matrices for shard in matrix]
    smallest = min(len(shard.rows) * len(shard.columns) for shard in shards) * tensor.item_size
    step = max(min(tensor.nbytes // _SAMPLES, smallest), _SAMPLE)
    for start in range(0, tensor.nbytes, step):
        yield from _stored(tensor, start, min(start + _SAMPLE, tensor.nbytes))


def _stored(tensor: SourceTensor, start: int, stop: int) -> Iterator[Span]:
    """Where the bytes from `start` to `stop` of all shards lie, one after the other."""
    at = 0
    for shard in (shard for matrix in tensor.matrices for shard in matrix):
        size = len(shard.rows) * len(shard.columns) * tensor.item_size
        first, last = max(start, at), min(stop, at + size)
        if first < last:
            yield Span(shard.path, shard.offset + first - at, last - first)
        at += size


def _read(span: Span) -> bytes:
    try:
        with span.path.open("rb") as file:
            file.seek(span.offset)
            data = file.read(span.nbytes)
    except OSError as error:
        raise CheckpointError(f"{span.path.name}: cannot be read ({error.strerror or error})") from None
    if len(data) < span.nbytes:
        raise CheckpointError(f"{span.path.name}: became shorter while it was read")
    return data
