"""Looks into the tensors of a running graph, and changes where one has its data, a product its experts, or an operation
what it computes.

`struct ggml_tensor` is public (ggml.h) but not part of an interface that stays: `layout_is_known` must be true before
`sources`, `compute_buffer`, `move_data`, `set_clamp`, `set_scale`, a StandIn and RowFactors may be used. The other
functions use ggml's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.ggml.libraries import InitParams, open_library, prototype

__all__ = [
    "Names",
    "RowFactors",
    "StandIn",
    "TensorStruct",
    "compute_buffer",
    "data_address",
    "layout_is_known",
    "move_data",
    "multiplies_experts",
    "read_floats",
    "read_ints",
    "set_clamp",
    "set_scale",
    "size_of",
    "sources",
    "tensor_name",
    "write_floats",
]

_P = ctypes.c_void_p
_DIMS, _SOURCES, _NAME, _PARAMS = 4, 10, 64, 16  # GGML_MAX_DIMS, _SRC, _NAME, _OP_PARAMS / 4 of ggml.h
_F32, _I32 = 0, 26  # enum ggml_type
_COMPUTE = 2  # enum ggml_backend_buffer_usage


class TensorStruct(ctypes.Structure):
    """struct ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", _P),
        ("ne", ctypes.c_int64 * _DIMS),
        ("nb", ctypes.c_size_t * _DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * _PARAMS),
        ("flags", ctypes.c_int32),
        ("src", _P * _SOURCES),
        ("view_src", _P),
        ("view_offs", ctypes.c_size_t),
        ("data", _P),
        ("name", ctypes.c_char * _NAME),
        ("extra", _P),
        ("padding", ctypes.c_char * 8),
    ]


@cache
def _base() -> ctypes.CDLL:
    lib = open_library("ggml-base")
    prototype(lib, "ggml_init", _P, InitParams)
    prototype(lib, "ggml_free", None, _P)
    prototype(lib, "ggml_tensor_overhead", ctypes.c_size_t)
    prototype(lib, "ggml_new_tensor_2d", _P, _P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    prototype(lib, "ggml_new_tensor_3d", _P, _P, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    prototype(lib, "ggml_new_tensor_1d", _P, _P, ctypes.c_int, ctypes.c_int64)
    prototype(lib, "ggml_mul_mat_id", _P, _P, _P, _P, _P)
    prototype(lib, "ggml_mul", _P, _P, _P, _P)
    prototype(lib, "ggml_clamp", _P, _P, _P, ctypes.c_float, ctypes.c_float)
    prototype(lib, "ggml_set_name", _P, _P, ctypes.c_char_p)
    prototype(lib, "ggml_get_name", ctypes.c_char_p, _P)
    prototype(lib, "ggml_get_data", _P, _P)
    prototype(lib, "ggml_nbytes", ctypes.c_size_t, _P)
    prototype(lib, "ggml_nelements", ctypes.c_int64, _P)
    prototype(lib, "ggml_nrows", ctypes.c_int64, _P)
    prototype(lib, "ggml_backend_buffer_get_base", _P, _P)
    prototype(lib, "ggml_backend_buffer_get_size", ctypes.c_size_t, _P)
    prototype(lib, "ggml_backend_buffer_get_type", _P, _P)
    prototype(lib, "ggml_backend_buffer_get_usage", ctypes.c_int, _P)
    prototype(lib, "ggml_backend_buft_name", ctypes.c_char_p, _P)
    prototype(lib, "ggml_backend_tensor_get", None, _P, _P, ctypes.c_size_t, ctypes.c_size_t)
    prototype(lib, "ggml_backend_tensor_set", None, _P, _P, ctypes.c_size_t, ctypes.c_size_t)
    prototype(lib, "ggml_backend_alloc_ctx_tensors_from_buft", _P, _P, _P)
    prototype(lib, "ggml_backend_buffer_free", None, _P)
    return lib


def tensor_name(tensor: int) -> bytes:
    """The name, as llama.cpp's graph or the GGUF has it."""
    name: bytes = _base().ggml_get_name(tensor)
    return name


class Names:
    """Tells names as `tensor_name` does, in a sixth of the time where llama.cpp's graphs lie where earlier ones did."""

    _MOST = 1 << 16  # addresses; graphs have some thousands of nodes, and lie in a few places

    def __init__(self) -> None:
        self._offset = TensorStruct.name.offset if layout_is_known() else None
        self._views: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def of(self, tensor: int) -> bytes:
        """The name that the tensor at this address has now."""
        view = self._views.get(tensor)
        return view.value if view is not None else self._first(tensor)

    def _first(self, tensor: int) -> bytes:
        if self._offset is not None:
            if len(self._views) >= self._MOST:
                self._views.clear()
            self._views[tensor] = (ctypes.c_char * _NAME).from_address(tensor + self._offset)
        return tensor_name(tensor)


def size_of(tensor: int) -> int:
    """Bytes from its first element to its last."""
    return int(_base().ggml_nbytes(tensor))


def data_address(tensor: int) -> int:
    """Where its data is, 0 if nowhere yet."""
    return int(_base().ggml_get_data(tensor) or 0)


def read_ints(tensor: int) -> npt.NDArray[np.int32]:
    """int32 [rows, elements of a row]: a computed tensor of integers, wherever it is; its rows may lie apart."""
    base = _base()
    rows, nbytes = base.ggml_nrows(tensor), base.ggml_nbytes(tensor)
    width = TensorStruct.from_address(tensor).ne[0]
    if not rows:  # as in the last layer, where no token has an output
        return np.empty((0, width), np.int32)
    data = np.empty(nbytes // 4, np.int32)
    base.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, nbytes)
    stride = (len(data) - width) // (rows - 1) if rows > 1 else width
    return np.lib.stride_tricks.as_strided(data, (rows, width), (4 * stride, 4))


def read_floats(tensor: int) -> npt.NDArray[np.float32]:
    """float32 [rows, elements of a row]: a computed tensor without gaps, wherever it is."""
    base = _base()
    data = np.empty(base.ggml_nbytes(tensor) // 4, np.float32)
    if not data.size:
        return data.reshape(0, 0)
    base.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
    return data.reshape(base.ggml_nrows(tensor), -1)


def write_floats(tensor: int, values: npt.NDArray[np.float32]) -> None:
    """Have a tensor without gaps hold as many `values` as it has, wherever it is."""
    data = np.ascontiguousarray(values, np.float32)
    if data.size:
        _base().ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)


def sources(tensor: int) -> Iterator[int]:
    """What a node of the graph is computed from."""
    yield from filter(None, TensorStruct.from_address(tensor).src)


def compute_buffer(node: int) -> tuple[int, int] | None:
    """Where the buffer lies that a node's result is in: its first address, and its end.

    None where it is not one for what is computed, in memory that is the CPU's alone: drivers pin theirs.
    """
    base, buffer = _base(), TensorStruct.from_address(node).buffer
    if not buffer or base.ggml_backend_buffer_get_usage(buffer) != _COMPUTE:
        return None
    if base.ggml_backend_buft_name(base.ggml_backend_buffer_get_type(buffer)) != b"CPU":
        return None
    start = int(base.ggml_backend_buffer_get_base(buffer) or 0)
    return start, start + int(base.ggml_backend_buffer_get_size(buffer))


def move_data(tensor: int, address: int) -> None:
    """From now on the tensor's data is at `address`."""
    TensorStruct.from_address(tensor).data = address


class StandIn:
    """What an expert product multiplies with in place of the model's experts: slots of memory, and their numbers."""

    def __init__(self) -> None:
        self._weights, self._ids = TensorStruct(), TensorStruct()
        self._numbers = np.empty((0, 0), np.int32)

    def put(self, product: int, *, address: int, stride: int, slots: npt.NDArray[np.int32]) -> bool:
        """Have a product, before it is computed, use those of the slots, every `stride` bytes from `address` on.

        `slots`, int32 [tokens, experts used], stand for the experts that it was to use. Returns whether they are as
        many. The tensors of the model stay as they are.
        """
        node = TensorStruct.from_address(product)
        ours = ctypes.addressof(self._weights), ctypes.addressof(self._ids)
        for number, copy in ((0, self._weights), (2, self._ids)):
            if node.src[number] not in ours:
                ctypes.memmove(ctypes.addressof(copy), node.src[number], ctypes.sizeof(copy))
        if slots.shape != (self._ids.ne[1], self._ids.ne[0]):
            return False
        self._numbers = np.ascontiguousarray(slots)
        self._weights.data, self._weights.ne[2] = address, int(slots.max(initial=0)) + 1
        self._weights.nb[2] = self._weights.nb[3] = stride
        self._ids.data, self._ids.nb[0], self._ids.nb[1] = self._numbers.ctypes.data, 4, 4 * slots.shape[1]
        self._ids.view_src, self._ids.view_offs = None, 0
        node.src[0], node.src[2] = ours
        return True


def set_clamp(node: int, *, low: float, high: float) -> None:
    """Have a node that clamps do so between these, once it is computed (ggml_compute_forward_clamp)."""
    _set_parameters(TensorStruct.from_address(node), low, high)


def set_scale(node: int, factor: float) -> None:
    """Have a node that multiplies with one number take this one, once it is computed (ggml_compute_forward_scale)."""
    _set_parameters(TensorStruct.from_address(node), factor)


def _set_parameters(struct: TensorStruct, *values: float) -> None:
    ctypes.memmove(struct.op_params, (ctypes.c_float * len(values))(*values), 4 * len(values))


class RowFactors:
    """Has nodes that multiply with one number give each of their rows a factor of its own, where they are computed.

    ggml scales by a number and multiplies by a tensor, and the results lie alike; so the node becomes a product whose
    second source is ours, in a buffer of the device's own memory.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, _DeviceRow] = {}  # by type of buffer

    def put(self, scaling: int, factors: npt.NDArray[np.float32]) -> bool:
        """Before it is computed, have a node scale row r of each of its matrices by `factors[r]`.

        `factors` has one for each row of a matrix, of all matrices along the last axis. Returns whether they fit.
        """
        node = TensorStruct.from_address(scaling)
        rows, last = node.ne[1], node.ne[3]
        if rows * last != len(factors):
            return False
        kind = int(_base().ggml_backend_buffer_get_type(node.buffer))
        row = self._tensors.setdefault(kind, _DeviceRow(kind))
        row.hold(factors, rows=rows, last=last)
        node.op, node.src[1] = _ops()["multiply"], ctypes.addressof(row.struct)
        return True

    def holds(self, node: int) -> bool:
        """Whether a node was changed already: llama.cpp computes a graph again while its shape stays."""
        return int(TensorStruct.from_address(node).op) == _ops()["multiply"]

    def close(self) -> None:
        """Only when no graph with changed nodes is computed any more."""
        for row in self._tensors.values():
            row.close()
        self._tensors.clear()


class _DeviceRow:
    """Numbers in memory of one type of buffer, as ggml sees them in `struct`."""

    def __init__(self, kind: int) -> None:
        self.struct = TensorStruct()
        self._kind, self._room = kind, 0
        self._context = self._buffer = None
        self._held = np.empty(0, np.float32)

    def hold(self, values: npt.NDArray[np.float32], *, rows: int, last: int) -> None:
        """As [last, 1, rows, 1], outermost first. What is there already is not written again."""
        if len(values) > self._room:
            self._allocate(len(values))
        self.struct.ne[:] = (1, rows, 1, last)
        self.struct.nb[:] = (4, 4, 4 * rows, 4 * rows)
        if not np.array_equal(values, self._held):
            write_floats(ctypes.addressof(self.struct), values)
            self._held = values

    def _allocate(self, room: int) -> None:
        self.close()
        base = _base()
        self._context = base.ggml_init(InitParams(2 * (base.ggml_tensor_overhead() + 64), None, True))
        tensor = base.ggml_new_tensor_1d(self._context, _F32, room)
        self._buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(self._context, self._kind)
        if not self._buffer:
            raise MemoryError("a device has no memory left for a number for each token")
        ctypes.memmove(ctypes.addressof(self.struct), tensor, ctypes.sizeof(self.struct))
        self._room, self._held = room, np.empty(0, np.float32)

    def close(self) -> None:
        if self._context:
            _base().ggml_backend_buffer_free(self._buffer)
            _base().ggml_free(self._context)
        self._context, self._room = None, 0


@cache
def _ops() -> dict[str, int]:
    """The enum ggml_op of a product with experts, and of one element by element."""
    base = _base()
    context = base.ggml_init(InitParams(8 * (base.ggml_tensor_overhead() + 64), None, True))
    try:
        weights = base.ggml_new_tensor_3d(context, _F32, 32, 5, 3)
        inputs, ids = base.ggml_new_tensor_3d(context, _F32, 32, 1, 7), base.ggml_new_tensor_2d(context, _I32, 2, 7)
        nodes = {
            "experts": base.ggml_mul_mat_id(context, weights, inputs, ids),
            "multiply": base.ggml_mul(context, inputs, inputs),
        }
        return {name: int(TensorStruct.from_address(node).op) for name, node in nodes.items()}
    finally:
        base.ggml_free(context)


def multiplies_experts(node: int) -> bool:
    """Whether a node multiplies with the experts that its third source names."""
    return int(TensorStruct.from_address(node).op) == _ops()["experts"]


@cache
def layout_is_known(struct: Any = TensorStruct) -> bool:
    """Whether struct ggml_tensor is laid out like `struct`: tried on tensors made for this, which nobody computes."""
    base = _base()
    context = base.ggml_init(InitParams(8 * (base.ggml_tensor_overhead() + 64), None, True))
    try:
        weights = base.ggml_new_tensor_3d(context, _F32, 32, 5, 3)
        inputs = base.ggml_new_tensor_3d(context, _F32, 32, 1, 7)
        ids = base.ggml_new_tensor_2d(context, _I32, 2, 7)
        product = base.ggml_mul_mat_id(context, weights, inputs, ids)
        base.ggml_set_name(weights, b"layout")
        clamped = struct.from_address(base.ggml_clamp(context, weights, 2.0, 3.0))
        has_parameters = list((ctypes.c_float * 2).from_buffer(clamped.op_params)) == [2.0, 3.0]
        return has_parameters and _looks_right(struct, weights, product, [weights, inputs, ids])
    finally:
        base.ggml_free(context)


def _looks_right(struct: Any, weights: int, product: int, used: list[int]) -> bool:
    seen = struct.from_address(weights)
    if _base().ggml_tensor_overhead() < ctypes.sizeof(struct) or (seen.type, list(seen.ne)) != (_F32, [32, 5, 3, 1]):
        return False
    if list(seen.nb) != [4, 128, 640, 1920] or seen.name != b"layout" or seen.data is not None:
        return False
    if list(filter(None, struct.from_address(product).src)) != used:
        return False
    seen.data = 4096
    return data_address(weights) == 4096
