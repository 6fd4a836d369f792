"""The output's tensors, and the pieces in which they are packed.

Pieces are the unit of work, of resuming and of hashing. Their size depends on nothing but the tensor, so that any
number of threads and any memory limit gives the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from grok_local.ggml import quants
from grok_local.quantize.recipe import Recipe, choose_type
from grok_local.quantize.sources.checkpoint import Checkpoint, SourceTensor

__all__ = ["PIECE_WEIGHTS", "Piece", "PlannedTensor", "piece_rows", "pieces_of", "plan_tensors"]

PIECE_WEIGHTS = 1 << 23


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: `experts` matrices of `rows` rows of `width` weights each."""

    source: SourceTensor
    type: GGMLQuantizationType
    wanted: GGMLQuantizationType
    experts: int
    rows: int
    width: int
    shape: tuple[int, ...]  # as numpy has it, outermost first
    offset: int = 0  # in its part
    part: int = 0

    @property
    def name(self) -> str:
        return self.source.target.name

    @cached_property
    def row_bytes(self) -> int:
        return quants.bytes_per_row(self.type, self.width)

    @property
    def nbytes(self) -> int:
        return self.experts * self.rows * self.row_bytes

    @property
    def transposed(self) -> bool:
        """Whether the release stores it [in, out]."""
        return self.source.transposed


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one expert's matrix; `index` counts pieces through the whole plan."""

    index: int
    tensor: PlannedTensor
    expert: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        return self.rows * self.tensor.row_bytes

    @property
    def offset(self) -> int:
        """Where its bytes go in its part."""
        return self.tensor.offset + (self.expert * self.tensor.rows + self.start) * self.tensor.row_bytes

    @property
    def weights(self) -> int:
        return self.rows * self.tensor.width

    @property
    def paths(self) -> set[Path]:
        """The files that it is made from."""
        source, rows = self.tensor.source, range(self.start, self.stop)
        shards = source.matrices[self.expert]
        if self.tensor.transposed:
            inside = {shard.path for shard in shards if _meet(shard.columns, rows)}
        else:
            inside = {shard.path for shard in shards if _meet(shard.rows, rows)}
        return inside | ({source.scales.path} if source.scales else set())


def _meet(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def piece_rows(width: int) -> int:
    """Rows of a full piece: about 8 million weights, in whole blocks of 128 rows."""
    return max(PIECE_WEIGHTS // width // 128 * 128, 128)


def pieces_of(tensors: Iterable[PlannedTensor]) -> Iterator[Piece]:
    """All pieces of the tensors, in file order."""
    index = 0
    for tensor in tensors:
        step = piece_rows(tensor.width)
        for expert in range(tensor.experts):
            for start in range(0, tensor.rows, step):
                yield Piece(index, tensor, expert, start, min(start + step, tensor.rows))
                index += 1


def plan_tensors(checkpoint: Checkpoint, recipe: Recipe) -> list[PlannedTensor]:
    """The output's tensors in file order: those of no layer, then layer by layer."""
    ordered = sorted(checkpoint.tensors, key=lambda t: -1 if t.target.layer is None else t.target.layer)
    return [_planned(source, recipe) for source in ordered]


def _planned(source: SourceTensor, recipe: Recipe) -> PlannedTensor:
    target = source.target
    experts, rows, width = (1, 1, *target.shape)[-3:]
    kind = choose_type(recipe, target.kind, width)
    return PlannedTensor(source, kind, recipe.wanted(target.kind), experts, rows, width, target.shape)
