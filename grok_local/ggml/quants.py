"""Packs and unpacks rows, as llama.cpp does."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.ggml.libraries import open_library, prototype

__all__ = ["bytes_per_row", "dequantize", "is_finite", "quantize_rows"]

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
    lib, pointer, size = open_library("ggml-base"), ctypes.c_void_p, ctypes.c_int64
    prototype(lib, "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, pointer, pointer, size, size, size, pointer)
    prototype(lib, "ggml_validate_row_data", ctypes.c_bool, ctypes.c_int, pointer, ctypes.c_size_t)
    prototype(lib, "ggml_row_size", ctypes.c_size_t, ctypes.c_int, size)
    prototype(lib, "ggml_get_type_traits", ctypes.POINTER(_TypeTraits), ctypes.c_int)
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


def is_finite(ggml_type: int, packed: npt.NDArray[np.uint8]) -> bool:
    """Whether no value, or scale of a block, in `packed` is NaN or infinite. ggml says on stderr which block is."""
    return bool(_library().ggml_validate_row_data(ggml_type, _address(packed), packed.nbytes))


def dequantize(ggml_type: int, packed: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None:
    """Unpack whole blocks of `packed` into `out`, as llama.cpp reads them."""
    if ggml_type == 0:
        out.reshape(-1)[:] = packed.view(np.float32)
        return
    traits = _library().ggml_get_type_traits(ggml_type).contents
    traits.to_float(_address(packed), _address(out), out.size)


def _address(array: npt.NDArray[Any]) -> int:
    if not array.flags.c_contiguous:
        raise AssertionError("an array handed to C must be contiguous")
    return array.ctypes.data
