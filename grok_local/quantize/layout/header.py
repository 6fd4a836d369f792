"""The headers of the output: all keys in the first part, and what llama.cpp needs of them in the others.

What is only known when everything is packed has its place there already: the hashes, the checkpoint's fingerprint, the
digest of the whole plan.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from grok_local.folders import scratch_folder
from grok_local.formats.gguf_file import KEYS, NO_DIGEST
from grok_local.models.release import Kind
from grok_local.quantize.layout.pieces import PIECE_WEIGHTS, PlannedTensor
from grok_local.quantize.recipe import Recipe
from grok_local.quantize.sources.checkpoint import Checkpoint
from grok_local.quantize.sources.vocabulary import Vocabulary

__all__ = ["ALIGNMENT", "HeaderWriter"]

ALIGNMENT = 4096  # of every tensor, so that it can be read past the page cache


@dataclass(frozen=True)
class HeaderWriter:
    """Writes headers of an output in `parts` files, of which there may be one that is a part by name (`split`)."""

    checkpoint: Checkpoint
    recipe: Recipe
    vocabulary: Vocabulary
    parts: int
    split: bool

    def header(self, number: int, tensors: Sequence[PlannedTensor]) -> bytes:
        """Of part `number`, from 0; with NO_DIGEST for what is filled in at the end."""
        writer = gguf.GGUFWriter(None, "grok")
        writer.add_custom_alignment(ALIGNMENT)
        if number == 0:
            self._describe(writer)
            self._add_hyperparameters(writer)
            self.vocabulary.add_to(writer)
        if self.split:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", self.parts)
            writer.add_int32("split.tensors.count", len(self.checkpoint.tensors))
        self._add_origin(writer, len(tensors))
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
        return _header_bytes(writer)

    def _describe(self, writer: gguf.GGUFWriter) -> None:
        dims, release = self.checkpoint.dimensions, self.checkpoint.release
        published = dims == release.published
        writer.add_type("model")
        writer.add_name(release.title if published else f"{release.title} format, {dims.layers} layers of {dims.width}")
        writer.add_basename(release.name)
        writer.add_size_label(self._size_label())
        writer.add_license(release.license)
        if published:
            writer.add_source_url(release.url)
        writer.add_file_type(self.recipe.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def _size_label(self) -> str:
        count = self.checkpoint.dimensions.experts
        targets = [tensor.target for tensor in self.checkpoint.tensors]
        sizes = [(target.kind, int(np.prod(target.shape, dtype=np.int64))) for target in targets]
        experts = sum(size for kind, size in sizes if kind is Kind.EXPERTS)
        total = sum(size for _, size in sizes)
        return gguf.size_label(total, total - experts, experts // count, count)

    def _add_hyperparameters(self, writer: gguf.GGUFWriter) -> None:
        for key, value in self.checkpoint.release.metadata(self.checkpoint.dimensions).items():
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"grok.{key}", value)  # type: ignore[arg-type]  # each takes what it is given

    def _add_origin(self, writer: gguf.GGUFWriter, tensors: int) -> None:
        writer.add_string(KEYS.PLAN, NO_DIGEST)
        writer.add_string(KEYS.CHECKPOINT, NO_DIGEST)
        writer.add_string(KEYS.TYPE, self.recipe.name)
        writer.add_uint32(KEYS.PIECE_WEIGHTS, PIECE_WEIGHTS)
        writer.add_array(KEYS.TENSOR_HASHES, [NO_DIGEST] * tensors)


def _header_bytes(writer: gguf.GGUFWriter) -> bytes:
    # The writer only writes to paths.
    with tempfile.TemporaryDirectory(prefix="grok-local-", dir=scratch_folder()) as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()
