"""Reads a checkpoint in Grok-2's release format: finds its files, reads their headers, and lists all that is wrong.

No payload is read here. Files are told apart by the end of their names, as SGLang does: `-TP-common` for what every GPU
has, `-TP-000` and so on for what each of them has alone. Tensors go by the names in the headers, in whatever file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from grok_local.errors import CheckpointError
from grok_local.formats.safetensors import TensorInfo, read_safetensors
from grok_local.models.grok2 import NamedTensor, named_tensors
from grok_local.quantize.sources.checkpoint import (
    Checkpoint,
    NumberType,
    Shard,
    SourceTensor,
    check_file,
    names_in,
    stamp_of,
)
from grok_local.quantize.sources.config import grok2_of, read_config
from grok_local.units import printable

__all__ = ["has_shards", "open_grok2"]

_FILE_NAME = re.compile(r".+-TP-(common|\d{3})\.safetensors")
_TYPES: dict[str, NumberType] = {"BF16": "bf16", "F16": "f2", "F32": "f4"}
_MAX_LISTED = 40  # names that nobody expects
_MAX_RANKS = 1000  # whose numbers have three digits


@dataclass(frozen=True)
class _Found:
    """A tensor, or a rank's part of it, in a file."""

    path: Path
    info: TensorInfo


# By name, then by rank; None is the rank of what is common to all.
_Stored: TypeAlias = Mapping[str, Mapping[int | None, _Found]]
_Problem: TypeAlias = tuple[str, str]  # a tensor's name, and what is wrong with it


def has_shards(folder: Path) -> bool:
    """Whether `open_grok2` finds files there. Raises CheckpointError for a folder that cannot be read."""
    return any(map(_FILE_NAME.fullmatch, names_in(folder)))


def open_grok2(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`. Raises CheckpointError listing every problem."""
    stored, problems = _read_headers(folder)
    try:
        dims, release = grok2_of(read_config(folder))
    except CheckpointError as error:
        raise CheckpointError([*problems, *error.problems]) from None
    expected = list(named_tensors(dims))
    wrong = [problem for tensor in expected for problem in _misfits(tensor, stored)]
    problems += _together(wrong) + _unexpected(expected, stored)
    if problems:
        raise CheckpointError(problems)
    return Checkpoint(folder, release, dims, tuple(_source(tensor, stored) for tensor in expected))


def _read_headers(folder: Path) -> tuple[_Stored, list[str]]:
    """All tensors of all files, and what is wrong with the files."""
    stored: dict[str, dict[int | None, _Found]] = {}
    problems: list[str] = []
    for name in sorted(names_in(folder)):
        match = _FILE_NAME.fullmatch(name)
        if match:
            rank = None if match[1] == "common" else int(match[1])
            try:
                problems += _together(_add(stored, rank, folder / name))
            except CheckpointError as error:
                problems += error.problems
    return stored, problems


def _add(stored: dict[str, dict[int | None, _Found]], rank: int | None, path: Path) -> list[_Problem]:
    check_file(path)
    problems = []
    for name, info in read_safetensors(path).items():
        parts = stored.setdefault(name, {})
        if rank in parts:
            problems.append((printable(name[:120]), f"is in {parts[rank].path.name}, and in {path.name} again"))
        parts[rank] = _Found(path, info)
    return problems


def _misfits(tensor: NamedTensor, stored: _Stored) -> Iterator[_Problem]:
    """What is wrong with a tensor, by the names the release has for it."""
    shape = tensor.target.shape[-2:]
    types = Counter(found.info.dtype for name in tensor.names for found in stored.get(name, {}).values())
    usual = types.most_common(1)[0][0] if types else ""
    for name in tensor.names:
        parts = stored.get(name, {})
        if not parts:
            where = tensor.file_name() if tensor.axis is None else f"{tensor.file_name(0)} and the other ranks' files"
            yield name, f"missing; the release has it in {where}"
        elif set(parts) == {None}:
            yield from ((name, text) for text in _wrong_part(parts[None], shape, usual))
        elif tensor.axis is None or None in parts:
            yield name, f"is in {_file_names(parts)}, where one file is due"
        else:
            yield from ((name, text) for text in _wrong_shards(tensor, parts, usual))


def _wrong_shards(tensor: NamedTensor, parts: Mapping[int | None, _Found], usual: str) -> Iterator[str]:
    """Of a matrix of which each rank has a part: all must be there, equal, and as large together as is due."""
    shape, axis = tensor.target.shape[-2:], tensor.axis or 0
    most = Counter(found.info.shape for found in parts.values()).most_common(1)[0][0]
    step = most[axis] if len(most) == 2 else 0
    if not step or shape[axis] % step or shape[axis] // step > _MAX_RANKS:
        yield f"has shards of shape {list(most)}, of which no number makes {list(shape)}"
        return
    due = tuple(step if number == axis else size for number, size in enumerate(shape))
    ranks = range(shape[axis] // step)
    for rank in ranks:
        if rank not in parts:
            yield f"one of its {len(ranks)} shards is missing; the release has it in {tensor.file_name(rank)}"
    for number, found in parts.items():
        if number not in ranks:
            yield f"has a shard too many in {found.path.name}: {len(ranks)} of shape {list(due)} are due"
        else:
            yield from _wrong_part(found, due, usual)


def _wrong_part(found: _Found, shape: tuple[int, ...], usual: str) -> Iterator[str]:
    if found.info.shape != shape:
        yield f"has shape {list(found.info.shape)} in {found.path.name}, where {list(shape)} is due"
    if found.info.dtype not in _TYPES:
        yield f"is of type {found.info.dtype} in {found.path.name}, where BF16 is due, or F16 or F32"
    elif found.info.dtype != usual:
        yield f"is of type {found.info.dtype} in {found.path.name}, and of {usual} elsewhere"


def _unexpected(expected: Iterable[NamedTensor], stored: _Stored) -> list[str]:
    known = {name for tensor in expected for name in tensor.names}
    strangers = [name for name in stored if name not in known]
    files = ((name, next(iter(stored[name].values())).path.name) for name in strangers[:_MAX_LISTED])
    problems = [f"{file}: {printable(name[:120])}: a tensor nobody expects" for name, file in files]
    more = len(strangers) - _MAX_LISTED
    return [*problems, f"{more} more tensors that nobody expects"] if more > 0 else problems


def _together(problems: Iterable[_Problem]) -> list[str]:
    """A line for each thing that is wrong, however many tensors have it: files hold the same one of all layers."""
    names: dict[str, list[str]] = {}
    for name, text in problems:
        names.setdefault(text, []).append(name)
    return [
        f"{first}{f' and {len(others)} more' if others else ''}: {text}" for text, (first, *others) in names.items()
    ]


def _file_names(parts: Mapping[int | None, _Found]) -> str:
    return " and ".join(found.path.name for found in list(parts.values())[:3])


def _source(tensor: NamedTensor, stored: _Stored) -> SourceTensor:
    matrices = tuple(_shards(tensor, stored[name]) for name in tensor.names)
    first = next(iter(stored[tensor.names[0]].values()))
    paths = dict.fromkeys(shard.path for matrix in matrices for shard in matrix)
    return SourceTensor(
        target=tensor.target,
        where=tensor.title,
        role=tensor.title.partition(f"model.layers.{tensor.target.layer}.")[2] or tensor.title,
        dtype=_TYPES[first.info.dtype],
        transposed=False,
        matrices=matrices,
        scales=None,
        stamp=stamp_of(paths),
    )


def _shards(tensor: NamedTensor, parts: Mapping[int | None, _Found]) -> tuple[Shard, ...]:
    """Where the parts of one matrix lie in the whole; a vector is a matrix of one row."""
    rows, columns = (1, *tensor.target.shape)[-2:]
    if None in parts:
        return (Shard(parts[None].path, parts[None].info.offset, range(rows), range(columns)),)
    shards = []
    for rank, found in sorted((rank, found) for rank, found in parts.items() if rank is not None):
        height, width = found.info.shape
        top, left = (rank * height, 0) if tensor.axis == 0 else (0, rank * width)
        shards.append(Shard(found.path, found.info.offset, range(top, top + height), range(left, left + width)))
    return tuple(shards)
