"""Plans the output: every tensor's name, type, part and offset, before the first byte is packed.

A part is an ordinary GGUF. All of its tensors start at multiples of 4096, so that they can be read past the page cache.
Pieces are the unit of work, of resuming and of hashing; their size depends on nothing but the tensor, so that any
number of threads and any memory limit gives the same file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType

from grok_local.formats import gguf_file
from grok_local.formats.gguf_file import KEYS, NO_DIGEST
from grok_local.ggml import quants
from grok_local.models import grok1
from grok_local.models.grok1 import Kind
from grok_local.quantize.recipe import Recipe, choose_type
from grok_local.quantize.sources.checkpoint import Checkpoint, SourceTensor
from grok_local.quantize.sources.sentencepiece import Tokenizer

__all__ = ["ALIGNMENT", "PIECE_WEIGHTS", "Part", "Piece", "Plan", "PlannedTensor", "piece_rows", "plan_output"]

ALIGNMENT = 4096
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
        return self.source.leaf.gguf_name

    @cached_property
    def row_bytes(self) -> int:
        return quants.bytes_per_row(self.type, self.width)

    @property
    def nbytes(self) -> int:
        return self.experts * self.rows * self.row_bytes

    @property
    def transposed(self) -> bool:
        """Whether the release stores it [in, out]."""
        return self.source.leaf.kind not in (Kind.EMBEDDING, Kind.NORM)


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


@dataclass(frozen=True)
class Part:
    """One file of the output; `header` has zeros where the tensors' hashes come."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    size: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides the output's bytes. `digest` stands for it."""

    recipe: Recipe
    parts: tuple[Part, ...]
    pieces: tuple[Piece, ...]
    digest: str
    layout_digest: str  # the same whatever the checkpoint's numbers are

    @property
    def nbytes(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    def final_header(self, part: Part, piece_digests: Sequence[bytes]) -> bytes:
        """The part's header with its tensors' hashes in place; `piece_digests` by piece index."""
        digests = {tensor.name: hashlib.sha256() for tensor in part.tensors}
        for piece in self.pieces:
            if piece.tensor.name in digests:
                digests[piece.tensor.name].update(piece_digests[piece.index])
        hashes = [digests[tensor.name].hexdigest() for tensor in part.tensors]
        return gguf_file.replace_strings(part.header, [NO_DIGEST] * len(hashes), hashes)


def piece_rows(width: int) -> int:
    """Rows of a full piece: about 8 million weights, in whole blocks of 128 rows."""
    return max(PIECE_WEIGHTS // width // 128 * 128, 128)


def plan_tensors(checkpoint: Checkpoint, recipe: Recipe) -> list[PlannedTensor]:
    """The output's tensors in file order: embedding and final norm, then layer by layer."""
    ordered = sorted(checkpoint.tensors, key=lambda t: (-1 if t.leaf.layer is None else t.leaf.layer, t.leaf.index))
    return [_planned(source, recipe) for source in ordered]


def _planned(source: SourceTensor, recipe: Recipe) -> PlannedTensor:
    leaf = source.leaf
    shape = (
        leaf.shape if leaf.kind in (Kind.EMBEDDING, Kind.NORM) else (*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-2])
    )
    experts, rows, width = (1, 1, 1, *shape)[-3:]
    kind = choose_type(recipe, leaf.kind, width)
    return PlannedTensor(source, kind, recipe.wanted(leaf.kind), experts, rows, width, shape)


def plan_output(
    checkpoint: Checkpoint, recipe: Recipe, *, tokenizer: Tokenizer, fingerprint: str, name: str, split_size: int | None
) -> Plan:
    """The plan for the file `name`, or for parts of it of at most `split_size` bytes of tensors."""
    groups = _split(plan_tensors(checkpoint, recipe), split_size)
    metadata = _Metadata(checkpoint, recipe, tokenizer, fingerprint, parts=len(groups), split=split_size is not None)
    digest, layout_digest = hashlib.sha256(), hashlib.sha256()
    for number, group in enumerate(groups):
        header = metadata.header(number, group, NO_DIGEST)
        digest.update(header)
        layout_digest.update(gguf_file.replace_strings(header, [fingerprint], [NO_DIGEST]))
    parts = []
    for number, group in enumerate(groups):
        header = metadata.header(number, group, digest.hexdigest())
        part = name if split_size is None else gguf_file.part_name(name, number + 1, len(groups))
        tensors, size = _place(group, _pad(len(header)), number)
        parts.append(Part(part, tensors, header, size))
    return Plan(recipe, tuple(parts), tuple(_pieces(parts)), digest.hexdigest(), layout_digest.hexdigest())


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


def _place(tensors: list[PlannedTensor], start: int, part: int) -> tuple[tuple[PlannedTensor, ...], int]:
    placed = []
    for tensor in tensors:
        placed.append(replace(tensor, offset=start, part=part))
        start += _pad(tensor.nbytes)
    return tuple(placed), start


def _pieces(parts: list[Part]) -> Iterator[Piece]:
    index = 0
    for tensor in (tensor for part in parts for tensor in part.tensors):
        step = piece_rows(tensor.width)
        for expert in range(tensor.experts):
            for start in range(0, tensor.rows, step):
                yield Piece(index, tensor, expert, start, min(start + step, tensor.rows))
                index += 1


def _pad(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Metadata:
    """Writes headers: all keys into the first part, and what llama.cpp needs of them into the others."""

    checkpoint: Checkpoint
    recipe: Recipe
    tokenizer: Tokenizer
    fingerprint: str
    parts: int
    split: bool

    def header(self, number: int, tensors: list[PlannedTensor], digest: str) -> bytes:
        writer = gguf.GGUFWriter(None, "grok")
        writer.add_custom_alignment(ALIGNMENT)
        if number == 0:
            self._describe(writer)
            self._add_hyperparameters(writer)
            self.tokenizer.add_to(writer)
        if self.split:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", self.parts)
            writer.add_int32("split.tensors.count", len(self.checkpoint.tensors))
        self._add_origin(writer, tensors, digest)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
        return _header_bytes(writer)

    def _describe(self, writer: gguf.GGUFWriter) -> None:
        dims, facts = self.checkpoint.dimensions, grok1.CONSTANTS
        released = dims == grok1.RELEASE
        writer.add_type("model")
        writer.add_name(facts.name if released else f"{facts.name} format, {dims.layers} layers of {dims.width}")
        writer.add_basename("grok-1")
        writer.add_size_label(self._size_label())
        writer.add_license(facts.license)
        if released:
            writer.add_source_url("https://github.com/xai-org/grok-1")
        writer.add_file_type(self.recipe.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def _size_label(self) -> str:
        dims = self.checkpoint.dimensions
        sizes = [(t.leaf.kind, int(np.prod(t.leaf.shape, dtype=np.int64))) for t in self.checkpoint.tensors]
        experts = sum(size for kind, size in sizes if kind is Kind.EXPERTS)
        total = sum(size for _, size in sizes)
        return gguf.size_label(total, total - experts, experts // dims.experts, dims.experts)

    def _add_hyperparameters(self, writer: gguf.GGUFWriter) -> None:
        dims, facts = self.checkpoint.dimensions, grok1.CONSTANTS
        writer.add_block_count(dims.layers)
        writer.add_context_length(facts.context)
        writer.add_embedding_length(dims.width)
        writer.add_feed_forward_length(dims.expert_width)
        writer.add_vocab_size(dims.vocabulary)
        writer.add_head_count(dims.heads)
        writer.add_head_count_kv(dims.kv_heads)
        writer.add_key_length(grok1.HEAD_SIZE)
        writer.add_value_length(grok1.HEAD_SIZE)
        writer.add_rope_dimension_count(grok1.HEAD_SIZE)
        writer.add_rope_freq_base(facts.rope_base)
        writer.add_layer_norm_rms_eps(facts.norm_epsilon)
        writer.add_expert_count(dims.experts)
        writer.add_expert_used_count(facts.experts_used)
        writer.add_embedding_scale(facts.embedding_scale)
        writer.add_logit_scale(facts.logit_scale)
        writer.add_float32("grok.attention.output_scale", facts.attention_scale)
        writer.add_attn_logit_softcapping(facts.attention_softcap)

    def _add_origin(self, writer: gguf.GGUFWriter, tensors: list[PlannedTensor], digest: str) -> None:
        writer.add_string(KEYS.PLAN, digest)
        writer.add_string(KEYS.CHECKPOINT, self.fingerprint)
        writer.add_string(KEYS.TYPE, self.recipe.name)
        writer.add_uint32(KEYS.PIECE_WEIGHTS, PIECE_WEIGHTS)
        writer.add_array(KEYS.TENSOR_HASHES, [NO_DIGEST] * len(tensors))


def _header_bytes(writer: gguf.GGUFWriter) -> bytes:
    # The writer only writes to paths.
    with tempfile.TemporaryDirectory(prefix="grok-local-") as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()
