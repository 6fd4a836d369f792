"""The one place that touches ctypes: what llama-cpp-python leaves out of its API.

libggml-base comes with the pinned llama-cpp-python and is loaded without importing that package, which takes a second.
The C functions release the GIL, so threads pack in parallel.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError

__all__ = ["bytes_per_row", "dequantize", "exit_on_abort", "quantize_rows"]

_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("llama-cpp-python is not installed: run pip install llama-cpp-python==0.3.36")
    # Under the name that libllama asks for: a wheel has no links, and another name is another copy in memory.
    name = "libggml-base.0.dylib" if sys.platform == "darwin" else "libggml-base.so.0"
    path = Path(next(iter(spec.submodule_search_locations))) / "lib" / name
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise ModelError(f"{path.name} of llama-cpp-python does not load ({error}): reinstall it") from None
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3]
    lib.ggml_quantize_chunk.argtypes += [ctypes.c_void_p]
    lib.ggml_row_size.restype = ctypes.c_size_t
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return lib


def bytes_per_row(ggml_type: int, width: int) -> int:
    """Bytes that `width` weights take; `width` must be a multiple of the type's block."""
    return int(_library().ggml_row_size(ggml_type, width))


def quantize_rows(ggml_type: int, rows: npt.NDArray[np.float32], out: npt.NDArray[np.uint8]) -> None:
    """Pack float32 `rows` [n, width] into `out` [n * bytes_per_row], both C-contiguous.

    The C function writes garbage, silently, when the type's block does not divide the width: that is the caller's to
    know.
    """
    n, width = rows.shape
    written = _library().ggml_quantize_chunk(ggml_type, _address(rows), _address(out), 0, n, width, None)
    if written != out.nbytes:
        raise AssertionError(f"ggml_quantize_chunk wrote {written} bytes where {out.nbytes} were due")


def dequantize(ggml_type: int, packed: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None:
    """Unpack whole blocks of `packed` into `out`, as llama.cpp reads them."""
    if ggml_type == 0:
        out.reshape(-1)[:] = packed.view(np.float32)
        return
    traits = _library().ggml_get_type_traits(ggml_type).contents
    traits.to_float(_address(packed), _address(out), out.size)


_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@_ABORT  # type: ignore[untyped-decorator]
def _exit(message: bytes) -> None:
    # abort() follows whatever happens here: leave as every other failure does, without a core dump.
    reason = message.decode("utf-8", "replace").rpartition("/")[2]
    advice = "the model is damaged, or llama.cpp has a bug: grok-local verify tells"
    os.write(2, f"error: llama.cpp gave up ({reason}): {advice}\n".encode())
    os._exit(1)


def exit_on_abort() -> None:
    """For programs, not libraries: where llama.cpp would abort the process, end it with an error line and code 1."""
    _library().ggml_set_abort_callback(_exit)


def _address(array: npt.NDArray[Any]) -> int:
    if not array.flags.c_contiguous:
        raise AssertionError("an array handed to C must be contiguous")
    return array.ctypes.data
