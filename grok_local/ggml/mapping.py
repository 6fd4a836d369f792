"""Has llama.cpp map a file without reading it.

llama.cpp reads all of a file when it maps it (MAP_POPULATE), which of a model larger than memory leaves nothing but
lost minutes. Only where the CPU backend says that the machine has several NUMA nodes it does not. So while a model is
loaded that is what the backend says: in `struct ggml_backend_reg` (ggml-backend-impl.h) the function which looks up
others by name is replaced, tried through ggml's own, and put back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from grok_local.ggml.devices import cpu_device
from grok_local.ggml.libraries import open_library, prototype

__all__ = ["RegistryStruct", "unread_mappings"]

_P = ctypes.c_void_p
_LOOK_UP = ctypes.CFUNCTYPE(_P, _P, ctypes.c_char_p)
_IS_NUMA = b"ggml_backend_cpu_is_numa"
_ANOTHER = b"ggml_backend_set_n_threads"


class RegistryStruct(ctypes.Structure):
    """struct ggml_backend_reg."""

    _fields_ = [
        ("api_version", ctypes.c_int),
        ("get_name", _P),
        ("get_device_count", _P),
        ("get_device", _P),
        ("get_proc_address", _P),
        ("context", _P),
    ]


_yes = ctypes.CFUNCTYPE(ctypes.c_bool)(lambda: True)


@contextmanager
def unread_mappings(struct: Any = RegistryStruct) -> Iterator[bool]:
    """Whether it works with this build: then files that llama.cpp maps meanwhile stay on the disk. `struct` is how the
    build lays a registry out.
    """
    base = open_library("ggml-base")
    prototype(base, "ggml_backend_dev_backend_reg", _P, _P)
    prototype(base, "ggml_backend_reg_get_proc_address", _P, _P, ctypes.c_char_p)
    handle = base.ggml_backend_dev_backend_reg(cpu_device().handle)
    registry, look_up = struct.from_address(handle), base.ggml_backend_reg_get_proc_address
    original, another = registry.get_proc_address, look_up(handle, _ANOTHER)
    ours = _LOOK_UP(_answering(original))
    registry.get_proc_address = ctypes.cast(ours, _P)
    try:
        works = look_up(handle, _IS_NUMA) == ctypes.cast(_yes, _P).value and look_up(handle, _ANOTHER) == another
        if not works:  # it is something else that was replaced
            registry.get_proc_address = original
        yield works
    finally:
        registry.get_proc_address = original


def _answering(original: int | None) -> Callable[[int, bytes], int | None]:
    look_up = _LOOK_UP(original or 0)

    def answer(registry: int, name: bytes) -> int | None:
        if name == _IS_NUMA:
            return ctypes.cast(_yes, _P).value
        found: int | None = look_up(registry, name)
        return found

    return answer
