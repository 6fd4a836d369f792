"""Reads a checkpoint in Grok-1's release format: finds its files, reads their headers, and lists all that is wrong.

No payload is read here.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from grok_local.errors import CheckpointError
from grok_local.formats.pickles import Array, StoredTensor, read_pickle
from grok_local.models import grok1
from grok_local.models.release import HEAD_SIZE, Dimensions, Kind
from grok_local.quantize.sources.checkpoint import (
    Checkpoint,
    Scales,
    Shard,
    SourceTensor,
    check_file,
    names_in,
    stamp_of,
)

__all__ = ["has_checkpoint", "open_grok1"]

_FILE_NAME = re.compile(r"tensor(\d{5,9})_000")
_NAMES = {"i1": "int8", "f4": "float32", "bf16": "bfloat16"}


def open_grok1(path: Path) -> Checkpoint:
    """Open the checkpoint in `path`, or in its folder ckpt-0 or ckpt. Raises CheckpointError listing every problem."""
    folder = _folder_in(path)
    if folder is None:
        raise CheckpointError(f"{path}: holds no tensor00000_000")
    files, problems = _list_files(folder)
    stored: dict[int, StoredTensor] = {}
    for index, file in files.items():
        try:
            stored[index] = _read(file)
        except CheckpointError as error:
            problems += error.problems
    dims, expected = _expected(stored, files)
    problems += _missing(expected, files) + _unexpected(expected, files)
    if dims:
        problems += _misshapen(dims, expected, stored)
    if problems or dims is None:
        raise CheckpointError(sorted(set(problems)) or f"{folder}: its shapes tell no dimensions")
    tensors = tuple(_source(leaf, files[leaf.index], stored[leaf.index]) for leaf in expected.values())
    return Checkpoint(folder, grok1.RELEASE, dims, tensors)


def _source(leaf: grok1.Leaf, path: Path, stored: StoredTensor) -> SourceTensor:
    """A leaf as packing sees it: each expert's matrix lies in one piece of the leaf's file."""
    *outer, rows, columns = (1, 1, *stored.weight.shape)[-3:]
    nbytes = stored.weight.nbytes // outer[0]
    matrices = tuple(
        (Shard(path, stored.weight.offset + expert * nbytes, range(rows), range(columns)),)
        for expert in range(outer[0])
    )
    scales = Scales(path, stored.scales.offset, stored.scales.shape) if stored.scales else None
    return SourceTensor(
        target=leaf.target,
        where=leaf.path,
        role=leaf.path.rpartition("decoder_layer_")[2].partition("/")[2] or leaf.path,
        dtype="i1" if scales else "f4",
        transposed=leaf.transposed,
        matrices=matrices,
        scales=scales,
        stamp=stamp_of([path]),
    )


def has_checkpoint(path: Path) -> bool:
    """Whether `open_grok1` finds tensors there. Raises CheckpointError for a folder that cannot be read."""
    return _folder_in(path) is not None


def _folder_in(path: Path) -> Path | None:
    folders = (folder for folder in (path, path / "ckpt-0", path / "ckpt") if folder.is_dir())
    return next((folder for folder in folders if any(map(_FILE_NAME.fullmatch, names_in(folder)))), None)


def _list_files(folder: Path) -> tuple[dict[int, Path], list[str]]:
    files, problems = {}, []
    for name in sorted(names_in(folder)):
        match = _FILE_NAME.fullmatch(name)
        if match:
            files[int(match[1])] = folder / name
        elif re.fullmatch(r"tensor\d+_\d+", name):
            problems.append(f"{name}: a tensor nobody expects; the release has none of this name")
    return files, problems


def _read(path: Path) -> StoredTensor:
    check_file(path)
    return read_pickle(path)


def _expected(stored: dict[int, StoredTensor], files: Iterable[int]) -> tuple[Dimensions | None, dict[int, grok1.Leaf]]:
    """The dimensions most files agree on, and the leaves those call for, by index."""
    layers = _count_layers(set(files))
    votes = _vote(stored)
    published = grok1.RELEASE.published
    if votes and (votes["width"], votes["vocabulary"]) == (published.width, published.vocabulary):
        layers = max(layers, published.layers)
    dims = Dimensions(layers=layers, **votes) if votes else None
    leaves = grok1.leaves(dims or Dimensions(layers, 1, 1, 1, 1, 1))
    return dims, {leaf.index: leaf for leaf in leaves}


def _count_layers(present: set[int]) -> int:
    per_layer = grok1.LEAVES_PER_LAYER
    guesses = [(len(present) - 2) // per_layer, (max(present) - 1) // per_layer]

    def cost(layers: int) -> int:
        known = 2 + per_layer * layers
        inside = sum(index < known for index in present)
        # Half-fetched checkpoints are more common than ones with tensors too many.
        return (known - inside) + 3 * (len(present) - inside)

    return min((max(n, 1) for guess in guesses for n in (guess, guess + 1)), key=cost)


def _vote(stored: dict[int, StoredTensor]) -> dict[str, int] | None:
    ballots: dict[str, Counter[int]] = {}
    for index, tensor in stored.items():
        for name, size in _dimensions_told_by(index, tensor.weight.shape):
            ballots.setdefault(name, Counter())[size] += 1
    if set(ballots) != {"width", "vocabulary", "experts", "expert_width", "kv_width"}:
        return None
    return {name: counter.most_common(1)[0][0] for name, counter in ballots.items()}


def _dimensions_told_by(index: int, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    slot = (index - 2) % grok1.LEAVES_PER_LAYER if index >= 2 else index - 2
    names: dict[int, tuple[str, ...]] = {
        -2: ("vocabulary", "width"),
        -1: ("width",),
        0: ("experts", "width", "expert_width"),
        1: ("experts", "expert_width", "width"),
        2: ("experts", "width", "expert_width"),
        3: ("width", "kv_width"),
        6: ("width", "kv_width"),
        **dict.fromkeys((7, 8, 9, 10), ("width",)),
    }
    dims = names.get(slot, ())
    return list(zip(dims, shape, strict=True)) if len(dims) == len(shape) else []


def _missing(expected: Iterable[int], files: dict[int, Path]) -> list[str]:
    absent = [index for index in expected if index not in files]
    problems = []
    for _, run in itertools.groupby(enumerate(absent), lambda pair: pair[1] - pair[0]):
        names = [f"tensor{index:05d}_000" for _, index in run]
        if len(names) > 24:
            problems.append(f"{names[0]} to {names[-1]}: {len(names)} files are missing")
        else:
            problems += [f"{name}: missing" for name in names]
    return problems


def _unexpected(expected: dict[int, grok1.Leaf], files: dict[int, Path]) -> list[str]:
    layers = (len(expected) - 2) // grok1.LEAVES_PER_LAYER
    return [
        f"{path.name}: a tensor nobody expects; {layers} layers end with tensor{max(expected):05d}_000"
        for index, path in files.items()
        if index not in expected
    ]


def _misshapen(dims: Dimensions, expected: dict[int, grok1.Leaf], stored: dict[int, StoredTensor]) -> list[str]:
    problems = _unrunnable(dims)
    query_widths = {
        stored[i].weight.shape[-1]
        for i, leaf in expected.items()
        if i in stored and leaf.gguf_name.endswith("attn_q.weight")
    }
    if len(query_widths) == 1 and dims.width not in query_widths:
        width = query_widths.pop()
        return [
            *problems,
            f"tensor00007_000: the query is {width} wide and the embedding {dims.width}: llama.cpp's graph for Grok "
            "cannot run a model where they differ",
        ]
    for index, leaf in expected.items():
        if index in stored:
            problems += [f"{leaf.file_name}: {problem}" for problem in _misfit(leaf, stored[index])]
    return problems


def _unrunnable(dims: Dimensions) -> list[str]:
    problems = []
    if dims.width % HEAD_SIZE or dims.kv_width % HEAD_SIZE:
        problems.append(f"width {dims.width} or key width {dims.kv_width} is no multiple of Grok-1's head size, 128")
    elif dims.heads % dims.kv_heads:
        problems.append(f"{dims.heads} query heads cannot share {dims.kv_heads} key heads evenly")
    if dims.experts < grok1.CONSTANTS.experts_used:
        problems.append(f"{dims.experts} expert: Grok-1 routes every token to 2")
    return problems


def _misfit(leaf: grok1.Leaf, stored: StoredTensor) -> Iterator[str]:
    weight, scales = stored.weight, stored.scales
    quantized = leaf.kind in (Kind.EXPERTS, Kind.ATTENTION)
    if weight.shape != leaf.shape:
        yield f"{leaf.path} has shape {list(weight.shape)} where {list(leaf.shape)} is due"
    elif weight.dtype != ("i1" if quantized else "f4") or (scales is not None) != quantized:
        due = "int8 with scales" if quantized else "plain float32"
        yield f"{leaf.path} is {_NAMES[weight.dtype]}{' with scales' if scales else ''} where {due} is due"
    elif scales and not _scales_fit(weight, scales):
        yield f"{leaf.path} has {_NAMES[scales.dtype]} scales of shape {list(scales.shape)} for {list(weight.shape)}"


def _scales_fit(weight: Array, scales: Array) -> bool:
    *outer, rows, columns = weight.shape
    *scales_outer, groups, scales_columns = scales.shape if len(scales.shape) >= 2 else (0, 0)
    return (
        scales.dtype == "bf16"
        and (scales_outer, scales_columns) == (outer, columns)
        and groups > 0
        and rows % groups == 0
    )
