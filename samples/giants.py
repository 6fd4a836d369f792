"""Full-size models without weights: the header of a packed release, and a hole in the file where the tensors would be.

llama.cpp maps such a file and says what it would allocate (`no_alloc`); nothing ever reads the hole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from grok_local.formats.gguf_file import Header
from grok_local.quantize.outline import outline

__all__ = ["write_giant", "write_header"]


def write_giant(path: Path, release: str, *, type: str = "q4_k") -> Path:
    """Write the GGUF that `release` would become, of its true size, in a few kilobytes of disk."""
    header = outline(release, type=type)
    write_header(path, header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + header.size + (len(header.tensors) + 1) * 32)
    return path


def write_header(path: Path, header: Header, *, alignment: int = 32) -> None:
    """Write what comes before the tensors; without a vocabulary."""
    writer = gguf.GGUFWriter(path, "grok")
    writer.add_custom_alignment(alignment)
    for key, value in header.metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    writer.add_tokenizer_model("no_vocab")
    for tensor in header.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
