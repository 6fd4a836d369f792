"""What llama.cpp writes to its log: the errors, since its functions only say that they failed, its warnings of a model,
and the buffers it allocated.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grok_local.ggml.libraries import open_library, prototype

__all__ = [
    "buffer_count",
    "buffers",
    "clear",
    "errors",
    "forget_buffers",
    "listen",
    "listen_to_backends",
    "reason",
    "tell_errors",
    "warnings",
]

_INFO, _WARNING, _ERROR = 2, 3, 4  # enum ggml_log_level of ggml.h
_BUFFER = re.compile(r": +(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")

# What is said of every model, or of what grok-local asked for; and lines of stars around the others.
_USUAL = re.compile(
    r"overrides to CPU|flash_attn|n_ctx|unused tensor|graph reuse|attribute to USER_DEFINED|QUALITY WILL|CONSIDER REGEN"
)

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_errors: list[str] = []
_warnings: list[str] = []
_buffers: list[str] = []
_told: list[Callable[[str], None]] = []


@dataclass(frozen=True)
class Buffer:
    """Memory llama.cpp took: `type` is the buffer type's name, `use` "model", "KV", "compute" or "output"."""

    type: str
    use: str
    nbytes: int


def _collect(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", "replace").strip()
    if level == _ERROR and line:
        _errors.append(line)
        for say in _told:
            say(line)
    elif level == _WARNING and re.search(r"\w", line.partition(": ")[2]) and not _USUAL.search(line):
        _warnings.append(line)
    elif level == _INFO and " buffer size = " in line:
        _buffers.append(line)


_collected = _CALLBACK(_collect)


def listen() -> None:
    """From now on llama.cpp's log comes here, and nowhere else."""
    import llama_cpp  # which has a copy of that library to itself

    llama_cpp.llama_log_set(_collected, None)


def listen_to_backends() -> None:
    """Likewise the log of the backends alone, without llama.cpp itself: each says what it finds as it is opened."""
    library = open_library("ggml-base")
    prototype(library, "ggml_log_set", None, _CALLBACK, ctypes.c_void_p)
    library.ggml_log_set(_collected, None)


def tell_errors(say: Callable[[str], None]) -> None:
    """For programs: errors are told as they come, too."""
    _told[:] = [say]


def clear() -> None:
    """Forget what came so far."""
    _errors.clear()
    _warnings.clear()
    _buffers.clear()


def errors() -> list[str]:
    """The error lines since `clear`."""
    return list(_errors)


def warnings() -> list[str]:
    """What llama.cpp has to say against the model, since `clear`, each kind once."""
    kinds = {re.sub(r"\d+|'[^']*'", "", line): line.partition(": ")[2] for line in reversed(_warnings)}
    return [f"llama.cpp: {re.sub(r'  +', ' ', text)}" for text in reversed(kinds.values())]


def reason() -> str:
    """Why the last call failed: the first error is the cause, the others follow from it."""
    return _errors[0] if _errors else "it gives no reason"


def buffer_count() -> int:
    """How many buffers were allocated since `clear`."""
    return len(_buffers)


def forget_buffers(count: int) -> None:
    """All but the first `count` are freed again."""
    del _buffers[count:]


def buffers() -> Iterator[Buffer]:
    """The buffers allocated since `clear`."""
    for line in _buffers:
        found = _BUFFER.search(line)
        if found:
            yield Buffer(found[1], found[2], int(float(found[3]) * 2**20))
