"""Which architectures the llama.cpp that is installed here knows."""

from __future__ import annotations

import ctypes
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import llama_cpp
from gguf.constants import GGUF_MAGIC, GGUF_VERSION, GGUFValueType

from grok_local.folders import scratch_folder

__all__ = ["is_known"]


@cache
def is_known(architecture: str) -> bool:
    """Whether llama.cpp has a graph for it. There is no list to be read, so it is given a GGUF that has only a name."""
    with tempfile.NamedTemporaryFile(suffix=".gguf", dir=scratch_folder()) as file, _log() as lines:
        file.write(_header(architecture))
        file.flush()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        llama_cpp.llama_model_load_from_file(file.name.encode(), params)
    return not any("unknown model architecture" in line for line in lines)


def _header(architecture: str) -> bytes:
    texts = [struct.pack("<Q", len(data)) + data for data in (b"general.architecture", architecture.encode())]
    start = struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, 0, 1)
    return start + texts[0] + struct.pack("<I", GGUFValueType.STRING) + texts[1]


@contextmanager
def _log() -> Iterator[list[str]]:
    """What llama.cpp logs in the meantime, instead of where it usually goes."""
    lines: list[str] = []
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    ours = llama_cpp.llama_log_callback(lambda _, text, __: lines.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(ours, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(before, data)
