"""llama.cpp's RPC backend (ggml-rpc.h): devices of other machines, and serving one's own.

It aborts the process where a connection fails. So only processes that are made for it call this: runtime/child.py and
the worker.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from grok_local.errors import ModelError, WorkerError
from grok_local.ggml.devices import BackendDevice, backend_devices
from grok_local.ggml.libraries import library_path, open_library, prototype

__all__ = ["register_worker", "require_rpc", "serve"]

_P = ctypes.c_void_p


@cache
def _library() -> ctypes.CDLL:
    require_rpc()
    lib, size = open_library("ggml-rpc"), ctypes.c_size_t
    prototype(lib, "ggml_backend_rpc_add_server", _P, ctypes.c_char_p)
    prototype(lib, "ggml_backend_rpc_start_server", None, ctypes.c_char_p, ctypes.c_char_p, size, size, _P)
    return lib


@cache
def _registry() -> ctypes.CDLL:
    lib = open_library("ggml")
    prototype(lib, "ggml_backend_register", None, _P)
    return lib


def has_rpc() -> bool:
    """Whether the RPC backend is compiled in."""
    return library_path("ggml-rpc").exists()


def require_rpc() -> None:
    """Raises ModelError if it is not compiled in."""
    if not has_rpc():
        raise ModelError(
            "llama.cpp was built without its RPC backend, which workers need: "
            "CMAKE_ARGS=-DGGML_RPC=ON pip install --force-reinstall --no-cache-dir llama-cpp-python==0.3.36"
        )


def register_worker(endpoint: str) -> list[BackendDevice]:
    """Make the devices of the worker at HOST:PORT known to llama.cpp, and return them: RPC0, RPC1, ...

    To be called once for each worker, in the order in which its devices shall be numbered. Aborts the process if the
    worker does not answer. Raises WorkerError if it has no device, ModelError without the RPC backend.
    """
    registration = _library().ggml_backend_rpc_add_server(endpoint.encode())
    if not registration:
        raise WorkerError(f"worker {endpoint} has no device")
    _registry().ggml_backend_register(registration)
    # llama.cpp describes such a device by its endpoint.
    return [device for device in backend_devices() if device.backend == "RPC" and device.description == endpoint]


def serve(endpoint: str, *, threads: int, devices: Sequence[BackendDevice]) -> None:
    """Serve `devices` at IPV4:PORT, one client after another. Returns only where it fails, having said why on stderr;
    everything else it says goes to stdout. Raises ModelError without the RPC backend.
    """
    handles = (_P * len(devices))(*(device.handle for device in devices))
    _library().ggml_backend_rpc_start_server(endpoint.encode(), None, threads, len(devices), handles)
