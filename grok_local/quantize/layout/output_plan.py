"""Plans the output: every tensor's name, type, part and offset, before the first byte is packed.

A part is an ordinary GGUF.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grok_local.files import part_name
from grok_local.formats.gguf_file import KEYS, NO_DIGEST, fill_string, replace_strings
from grok_local.quantize.layout.header import ALIGNMENT, HeaderWriter
from grok_local.quantize.layout.pieces import Piece, PlannedTensor, pieces_of, plan_tensors
from grok_local.quantize.recipe import Recipe
from grok_local.quantize.sources.checkpoint import Checkpoint
from grok_local.quantize.sources.vocabulary import Vocabulary

__all__ = ["OutputPlan", "Part", "plan_output"]


@dataclass(frozen=True)
class Part:
    """One file of the output; `header` has NO_DIGEST where what is known at the end comes."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    size: int


@dataclass(frozen=True)
class OutputPlan:
    """Everything that decides the output's bytes but the checkpoint's numbers."""

    recipe: Recipe
    parts: tuple[Part, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    @property
    def layout_digest(self) -> str:
        """Stands for the plan, whatever the checkpoint's numbers are."""
        return hashlib.sha256(b"".join(part.header for part in self.parts)).hexdigest()

    def digest(self, fingerprint: str) -> str:
        """Stands for the plan with the numbers of the checkpoint that has this fingerprint."""
        headers = (fill_string(part.header, KEYS.CHECKPOINT, fingerprint) for part in self.parts)
        return hashlib.sha256(b"".join(headers)).hexdigest()

    def final_header(self, part: Part, fingerprint: str, piece_digests: Mapping[int, bytes]) -> bytes:
        """The part's header with everything filled in; `piece_digests` by piece index."""
        hashes = {tensor.name: hashlib.sha256() for tensor in part.tensors}
        for piece in self.pieces:
            if piece.tensor.name in hashes:
                hashes[piece.tensor.name].update(piece_digests[piece.index])
        header = fill_string(part.header, KEYS.CHECKPOINT, fingerprint)
        header = fill_string(header, KEYS.PLAN, self.digest(fingerprint))
        texts = [hashes[tensor.name].hexdigest() for tensor in part.tensors]
        return replace_strings(header, [NO_DIGEST] * len(texts), texts)


def plan_output(
    checkpoint: Checkpoint, recipe: Recipe, *, vocabulary: Vocabulary, name: str, split_size: int | None
) -> OutputPlan:
    """The plan for the file `name`, or for parts of it of at most `split_size` bytes of tensors."""
    groups = _split(plan_tensors(checkpoint, recipe), split_size)
    writer = HeaderWriter(checkpoint, recipe, vocabulary, parts=len(groups), split=split_size is not None)
    parts = []
    for number, group in enumerate(groups):
        header = writer.header(number, group)
        file_name = name if split_size is None else part_name(name, number + 1, len(groups))
        tensors, size = _placed(group, _pad(len(header)), number)
        parts.append(Part(file_name, tensors, header, size))
    return OutputPlan(recipe, tuple(parts), tuple(pieces_of(tensor for part in parts for tensor in part.tensors)))


def _split(tensors: list[PlannedTensor], split_size: int | None) -> list[list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if split_size is not None and groups[-1] and used + _pad(tensor.nbytes) > split_size:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += _pad(tensor.nbytes)
    return groups


def _placed(tensors: Sequence[PlannedTensor], start: int, part: int) -> tuple[tuple[PlannedTensor, ...], int]:
    placed = []
    for tensor in tensors:
        placed.append(replace(tensor, offset=start, part=part))
        start += _pad(tensor.nbytes)
    return tuple(placed), start


def _pad(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
