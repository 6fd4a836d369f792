"""llama.cpp's devices and the buffer types that weights can be put into (ggml-backend.h)."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

from gguf.constants import GGMLQuantizationType

from grok_local.ggml.libraries import InitParams, open_library, prototype
from grok_local.ggml.log import listen_to_backends

__all__ = [
    "Abilities",
    "BackendDevice",
    "DeviceKind",
    "abilities_of",
    "allocatable",
    "backend_devices",
    "backend_names",
    "buffer_name",
    "buffer_type",
    "can_allocate",
    "cpu_device",
    "cpu_features",
    "extra_buffer_types",
    "own_gpus",
]

_P, _I64, _SIZE, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int, ctypes.c_bool
_F32, _I32 = 0, 26  # enum ggml_type
_ROW, _EXPERTS, _TOKENS = 256, 8, 512  # of what a backend is asked about: elements, matrices, a usual batch
_ROW_BYTES, _MOST_ROWS = 4 * _ROW, 1 << 34
_MOST_TENSORS = 512
_ENDLESS = 1 << 48  # bytes that no device has
_LARGEST_PIECE, _PRECISION = 1 << 30, 128  # bytes, and the share of all that is let go
_EXTRA_BUFFER_TYPES = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)


class DeviceKind(IntEnum):
    """enum ggml_backend_dev_type."""

    CPU = 0
    GPU = 1
    INTEGRATED = 2
    ACCELERATOR = 3
    META = 4


@dataclass(frozen=True)
class BackendDevice:
    """A device as llama.cpp knows it; memory in bytes, as the backend reports it. `handle` is a ggml_backend_dev_t."""

    name: str  # CUDA0, Metal, CPU, RPC0
    description: str
    backend: str  # CUDA, MTL, CPU, RPC
    kind: DeviceKind
    free: int
    total: int
    handle: int
    id: str | None = None  # of the card, whichever backend sees it: its PCI address; None: not known


@dataclass(frozen=True)
class Abilities:
    """What a device says that it can work with.

    `largest`: bytes of the largest tensor; None: any. `lacks`: GGML types that it has no matrix products for.
    `offloads`: products of many tokens with weights in RAM are its work as well, on copies of them. `piece`: bytes of
    its memory that can be had together; None: all.
    """

    largest: int | None = None
    lacks: frozenset[str] = frozenset()
    offloads: bool = True
    piece: int | None = None


class _Properties(ctypes.Structure):
    """struct ggml_backend_dev_props, and room for what may be added to its end."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("free", _SIZE),
        ("total", _SIZE),
        ("kind", ctypes.c_int),
        ("id", ctypes.c_char_p),
        ("more", ctypes.c_char * 256),
    ]


class _Feature(ctypes.Structure):
    """struct ggml_backend_feature."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


_FEATURES = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), _P)


@cache
def _base() -> ctypes.CDLL:
    lib = open_library("ggml-base")
    prototype(lib, "ggml_backend_dev_get_props", None, _P, ctypes.POINTER(_Properties))
    prototype(lib, "ggml_backend_dev_backend_reg", _P, _P)
    prototype(lib, "ggml_backend_dev_buffer_type", _P, _P)
    prototype(lib, "ggml_backend_reg_name", ctypes.c_char_p, _P)
    prototype(lib, "ggml_backend_reg_get_proc_address", _P, _P, ctypes.c_char_p)
    prototype(lib, "ggml_backend_dev_host_buffer_type", _P, _P)
    prototype(lib, "ggml_backend_buft_name", ctypes.c_char_p, _P)
    prototype(lib, "ggml_backend_buft_get_max_size", _SIZE, _P)
    prototype(lib, "ggml_backend_buft_alloc_buffer", _P, _P, _SIZE)
    prototype(lib, "ggml_backend_buffer_free", None, _P)
    prototype(lib, "ggml_backend_dev_supports_op", _BOOL, _P, _P)
    prototype(lib, "ggml_backend_dev_supports_buft", _BOOL, _P, _P)
    prototype(lib, "ggml_backend_dev_offload_op", _BOOL, _P, _P)
    prototype(lib, "ggml_init", _P, InitParams)
    prototype(lib, "ggml_free", None, _P)
    prototype(lib, "ggml_tensor_overhead", _SIZE)
    prototype(lib, "ggml_new_tensor", _P, _P, _INT, _INT, ctypes.POINTER(_I64))
    prototype(lib, "ggml_mul_mat", _P, _P, _P, _P)
    prototype(lib, "ggml_mul_mat_id", _P, _P, _P, _P, _P)
    prototype(lib, "ggml_soft_max", _P, _P, _P)
    prototype(lib, "ggml_backend_buffer_get_type", _P, _P)
    return lib


@cache
def _registry() -> ctypes.CDLL:
    listen_to_backends()
    # In pieces of a gigabyte, which is usual, Vulkan's buffers for what is computed take up to twice the memory.
    os.environ.setdefault("GGML_VK_SUBALLOCATION_BLOCK_SIZE", str(1 << 40))
    lib = open_library("ggml")
    prototype(lib, "ggml_backend_dev_count", ctypes.c_size_t)
    prototype(lib, "ggml_backend_dev_get", _P, ctypes.c_size_t)
    prototype(lib, "ggml_backend_reg_count", ctypes.c_size_t)
    prototype(lib, "ggml_backend_reg_get", _P, ctypes.c_size_t)
    return lib


def backend_devices() -> list[BackendDevice]:
    """Every registered device, the CPU among them. Opening a GPU's backend takes a moment, the first time."""
    registry = _registry()
    return [_described(registry.ggml_backend_dev_get(i)) for i in range(registry.ggml_backend_dev_count())]


def _described(handle: int) -> BackendDevice:
    base, found = _base(), _Properties()
    base.ggml_backend_dev_get_props(handle, ctypes.byref(found))
    return BackendDevice(
        name=found.name.decode(),
        description=found.description.decode("utf-8", "replace"),
        backend=base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(handle)).decode(),
        kind=DeviceKind(found.kind),
        free=found.free,
        total=found.total,
        handle=handle,
        id=found.id.decode() if found.id else None,
    )


def own_gpus(devices: Iterable[BackendDevice]) -> list[BackendDevice]:
    """Of these the GPUs of this machine, each once though several backends may see it: those llama.cpp would choose.

    An integrated one counts only where there is no other: it is no faster than the processor whose memory it shares.
    Workers, which llama.cpp lists once they are registered, are other machines'.
    """
    discrete: list[BackendDevice] = []
    integrated: list[BackendDevice] = []
    for device in devices:
        if device.kind is DeviceKind.GPU and device.backend != "RPC":
            if not device.id or all(device.id != other.id for other in discrete):
                discrete.append(device)
        elif device.kind is DeviceKind.INTEGRATED and all(device.backend == other.backend for other in integrated):
            integrated.append(device)  # not all backends say which card one is
    return discrete or integrated


def backend_names() -> list[str]:
    """The backends compiled in: CPU, CUDA, RPC, ..."""
    registry = _registry()
    handles = (registry.ggml_backend_reg_get(i) for i in range(registry.ggml_backend_reg_count()))
    return [_base().ggml_backend_reg_name(handle).decode() for handle in handles]


def cpu_device() -> BackendDevice:
    """The CPU as a device."""
    return next(device for device in backend_devices() if device.kind is DeviceKind.CPU)


def cpu_features() -> dict[str, str]:
    """What the CPU backend was compiled with and finds here: AVX512, AMX_INT8, REPACK, ..."""
    address = _proc_address(cpu_device(), b"ggml_backend_get_features")
    return dict(_features(address)) if address else {}


def _features(address: int) -> Iterator[tuple[str, str]]:
    base, handle = _base(), cpu_device().handle
    entries = _FEATURES(address)(base.ggml_backend_dev_backend_reg(handle))
    index = 0
    while entries[index].name:
        yield entries[index].name.decode(), entries[index].value.decode()
        index += 1


def buffer_type(device: BackendDevice) -> int:
    """The ggml_backend_buffer_type_t of a device's own memory."""
    return int(_base().ggml_backend_dev_buffer_type(device.handle))


def extra_buffer_types() -> dict[str, int]:
    """The CPU's buffer types that rearrange weights, by name: AMX, CPU_REPACK, ..."""
    device = cpu_device()
    address = _proc_address(device, b"ggml_backend_dev_get_extra_bufts")
    found: dict[str, int] = {}
    entries = _EXTRA_BUFFER_TYPES(address)(device.handle) if address else None
    while entries and entries[len(found)]:
        handle = int(entries[len(found)])
        found[buffer_name(handle)] = handle
    return found


# -- what a device can do ----------------------------------------------------------------------------------------------


def abilities_of(device: BackendDevice) -> Abilities:
    """Ask the backend, which takes a moment where the device was not used before."""
    plain = buffer_type(cpu_device())
    with _operations() as make:
        copies = not _base().ggml_backend_dev_supports_buft(device.handle, plain)
        product = make.experts(GGMLQuantizationType.F32)
        return Abilities(
            largest=_largest(device, make),
            lacks=frozenset(kind.name for kind in _asked_types() if not _multiplies(device, make, kind)),
            piece=_piece(device),
            offloads=copies and bool(_base().ggml_backend_dev_offload_op(device.handle, product)),
        )


def _piece(device: BackendDevice) -> int | None:
    size = int(_base().ggml_backend_buft_get_max_size(buffer_type(device)))
    return size if size < _ENDLESS else None


def _largest(device: BackendDevice, make: _Operations) -> int | None:
    """Bytes of the largest tensor: found by halving, down to a kilobyte."""
    takes, refuses = 0, _MOST_ROWS
    if _supports(device, make.scores(refuses)):
        return None
    while refuses - takes > 1:
        rows = (takes + refuses) // 2
        takes, refuses = (rows, refuses) if _supports(device, make.scores(rows)) else (takes, rows)
    return takes * _ROW_BYTES or None  # what refuses even the smallest is asked in vain


def _multiplies(device: BackendDevice, make: _Operations, kind: GGMLQuantizationType) -> bool:
    return _supports(device, make.experts(kind)) and _supports(device, make.dense(kind))


def _supports(device: BackendDevice, operation: int) -> bool:
    return bool(_base().ggml_backend_dev_supports_op(device.handle, operation))


def _asked_types() -> list[GGMLQuantizationType]:
    """Types that weights come in; integers and F64 are none."""
    return [kind for kind in GGMLQuantizationType if not re.fullmatch(r"I\d+|F64|Q8_1|Q8_K", kind.name)]


@dataclass(frozen=True)
class _Operations:
    """Makes operations that are asked about and never computed: they have no memory."""

    context: int

    def tensor(self, kind: int, *shape: int) -> int:
        return int(_base().ggml_new_tensor(self.context, kind, len(shape), (_I64 * len(shape))(*shape)))

    def scores(self, rows: int) -> int:
        return int(_base().ggml_soft_max(self.context, self.tensor(_F32, _ROW, rows)))

    def dense(self, kind: int) -> int:
        return int(_base().ggml_mul_mat(self.context, self.tensor(kind, _ROW, _ROW), self.tensor(_F32, _ROW, _TOKENS)))

    def experts(self, kind: int) -> int:
        weights, ids = self.tensor(kind, _ROW, _ROW, _EXPERTS), self.tensor(_I32, 2, _TOKENS)
        return int(_base().ggml_mul_mat_id(self.context, weights, self.tensor(_F32, _ROW, 2, _TOKENS), ids))


@contextmanager
def _operations() -> Iterator[_Operations]:
    base = _base()
    context = base.ggml_init(InitParams(_MOST_TENSORS * base.ggml_tensor_overhead(), None, True))
    try:
        yield _Operations(context)
    finally:
        base.ggml_free(context)


def can_allocate(device: BackendDevice, nbytes: int, *, staged: int = 0) -> bool:
    """Whether a device has so many bytes left, and its driver so many to stage copies in: tried, and given back.

    Staged copies lie in RAM that the driver pins, which of an integrated GPU is the same memory.
    """
    base = _base()
    wanted = [(buffer_type(device), nbytes), (base.ggml_backend_dev_host_buffer_type(device.handle), staged)]
    buffers: list[int] = []
    try:
        for kind, size in wanted:
            if kind and size:
                buffers.append(base.ggml_backend_buft_alloc_buffer(kind, size) or 0)
                # Where a driver can pin none, ggml gives other memory.
                if not buffers[-1] or base.ggml_backend_buffer_get_type(buffers[-1]) != kind:
                    return False
        return True
    finally:
        for buffer in filter(None, buffers):
            base.ggml_backend_buffer_free(buffer)


def allocatable(device: BackendDevice, most: int) -> int:
    """Bytes of its memory, `most` at most, that a device really gives: they are taken and returned."""
    if device.backend == "RPC":
        return _largest_piece(device, most)  # a worker that has given its last byte crashes
    found, piece, taken = 0, min(most, _LARGEST_PIECE), list[int]()
    try:
        while piece > most // _PRECISION and found < most:
            piece = min(piece, most - found)
            if buffer := _allocated(device, piece):
                taken.append(buffer)
                found += piece
            else:
                piece //= 2
    finally:
        for buffer in taken:
            _base().ggml_backend_buffer_free(buffer)
    return found


def _largest_piece(device: BackendDevice, most: int) -> int:
    """Bytes of the largest buffer, found by halving."""
    gives, refuses = 0, most + 1
    while refuses - gives > 1 + most // _PRECISION:
        size = (gives + refuses) // 2
        if buffer := _allocated(device, size):
            _base().ggml_backend_buffer_free(buffer)
        gives, refuses = (size, refuses) if buffer else (gives, size)
    return gives


def _allocated(device: BackendDevice, nbytes: int) -> int:
    """A ggml_backend_buffer_t, or 0."""
    return int(_base().ggml_backend_buft_alloc_buffer(buffer_type(device), nbytes) or 0)


def buffer_name(handle: int) -> str:
    """A buffer type's name, as llama.cpp's log has it."""
    return str(_base().ggml_backend_buft_name(handle).decode())


def _proc_address(device: BackendDevice, name: bytes) -> int | None:
    base = _base()
    address: int | None = base.ggml_backend_reg_get_proc_address(base.ggml_backend_dev_backend_reg(device.handle), name)
    return address
