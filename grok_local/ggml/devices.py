"""llama.cpp's devices and the buffer types that weights can be put into (ggml-backend.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

from grok_local.ggml.libraries import open_library, prototype
from grok_local.ggml.log import listen_to_backends

__all__ = [
    "BackendDevice",
    "DeviceKind",
    "backend_devices",
    "backend_names",
    "buffer_name",
    "buffer_type",
    "can_allocate",
    "cpu_device",
    "cpu_features",
    "extra_buffer_types",
]

_P = ctypes.c_void_p
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


class _Feature(ctypes.Structure):
    """struct ggml_backend_feature."""

    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


_FEATURES = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), _P)


@cache
def _base() -> ctypes.CDLL:
    lib, size = open_library("ggml-base"), ctypes.POINTER(ctypes.c_size_t)
    prototype(lib, "ggml_backend_dev_name", ctypes.c_char_p, _P)
    prototype(lib, "ggml_backend_dev_description", ctypes.c_char_p, _P)
    prototype(lib, "ggml_backend_dev_memory", None, _P, size, size)
    prototype(lib, "ggml_backend_dev_type", ctypes.c_int, _P)
    prototype(lib, "ggml_backend_dev_backend_reg", _P, _P)
    prototype(lib, "ggml_backend_dev_buffer_type", _P, _P)
    prototype(lib, "ggml_backend_reg_name", ctypes.c_char_p, _P)
    prototype(lib, "ggml_backend_reg_get_proc_address", _P, _P, ctypes.c_char_p)
    prototype(lib, "ggml_backend_dev_host_buffer_type", _P, _P)
    prototype(lib, "ggml_backend_buft_name", ctypes.c_char_p, _P)
    prototype(lib, "ggml_backend_buft_alloc_buffer", _P, _P, ctypes.c_size_t)
    prototype(lib, "ggml_backend_buffer_get_type", _P, _P)
    prototype(lib, "ggml_backend_buffer_free", None, _P)
    return lib


@cache
def _registry() -> ctypes.CDLL:
    listen_to_backends()
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
    base, free, total = _base(), ctypes.c_size_t(), ctypes.c_size_t()
    base.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return BackendDevice(
        name=base.ggml_backend_dev_name(handle).decode(),
        description=base.ggml_backend_dev_description(handle).decode("utf-8", "replace"),
        backend=base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(handle)).decode(),
        kind=DeviceKind(base.ggml_backend_dev_type(handle)),
        free=free.value,
        total=total.value,
        handle=handle,
    )


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


def buffer_name(handle: int) -> str:
    """A buffer type's name, as llama.cpp's log has it."""
    return str(_base().ggml_backend_buft_name(handle).decode())


def _proc_address(device: BackendDevice, name: bytes) -> int | None:
    base = _base()
    address: int | None = base.ggml_backend_reg_get_proc_address(base.ggml_backend_dev_backend_reg(device.handle), name)
    return address
