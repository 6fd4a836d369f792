"""Slabs from tensors in several shards are those of whole ones."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from grok_local.quantize.layout.pieces import Piece, pieces_of, plan_tensors
from grok_local.quantize.packing.blocks import Workspace, pack_piece
from grok_local.quantize.packing.slabs import read_slab, slab_bytes
from grok_local.quantize.recipe import RECIPES
from grok_local.quantize.sources.checkpoint import Shard, SourceTensor, fingerprint
from grok_local.quantize.sources.recognise import open_checkpoint


@pytest.mark.parametrize("along", ["rows", "columns", "both"])
@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_tensors_in_shards_are_packed_as_whole_ones(small: Path, tmp_path: Path, along: str, name: str) -> None:
    """Cut along rows or columns of the stored matrices, into files of their own: as releases for several GPUs are."""
    checkpoint, recipe = open_checkpoint(small), RECIPES[name]
    cut = replace(checkpoint, tensors=tuple(cut_up(tensor, tmp_path, along) for tensor in checkpoint.tensors))
    for whole, sharded in zip(plan_tensors(checkpoint, recipe), plan_tensors(cut, recipe), strict=True):
        assert len(sharded.source.paths) > 1 or len(whole.shape) == 1
        for piece, same in zip(pieces_of([whole]), pieces_of([sharded]), strict=True):
            assert np.array_equal(packed(piece), packed(same)), whole.name
    if along == "rows":  # the same bytes in the same order
        assert fingerprint(cut) == fingerprint(checkpoint)


def packed(piece: Piece) -> npt.NDArray[np.uint8]:
    slab = read_slab([piece], np.empty(slab_bytes(piece.tensor, piece.rows), np.uint8))
    return pack_piece(piece, slab, Workspace(), np.empty(piece.nbytes, np.uint8)).copy()


def cut_up(tensor: SourceTensor, folder: Path, along: str) -> SourceTensor:
    """The tensor with each of its matrices in uneven shards."""
    if len(tensor.target.shape) == 1:
        return tensor
    return replace(
        tensor, matrices=tuple(shards_of(tensor, number, folder, along) for number in range(len(tensor.matrices)))
    )


def shards_of(tensor: SourceTensor, number: int, folder: Path, along: str) -> tuple[Shard, ...]:
    (whole,) = tensor.matrices[number]
    height, width = len(whole.rows), len(whole.columns)
    dtype = np.int8 if tensor.dtype == "i1" else np.float32
    values = np.fromfile(whole.path, dtype, height * width, offset=whole.offset).reshape(height, width)
    shards = []
    for rows, columns in itertools.product(
        cuts(height) if along != "columns" else [range(height)], cuts(width) if along != "rows" else [range(width)]
    ):
        path = folder / f"{tensor.file_name}-{number}-{rows.start}-{columns.start}"
        path.write_bytes(b"lead" + values[rows.start : rows.stop, columns.start : columns.stop].tobytes())
        shards.append(Shard(path, 4, rows, columns))
    return tuple(shards)


def cuts(size: int) -> list[range]:
    ends = sorted({0, min(size // 3 + 1, size), min(size // 2 + 3, size), size})
    return [range(first, last) for first, last in itertools.pairwise(ends)]
