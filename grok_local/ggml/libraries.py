"""Finds and opens llama.cpp's shared libraries, and says what happens where they abort."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from grok_local.errors import ModelError

__all__ = [
    "InitParams",
    "backend_libraries",
    "exit_on_abort",
    "exit_on_bus_error",
    "let_threads_rest",
    "library_path",
    "on_abort",
    "open_library",
    "prototype",
]


_SPINS = "100000"  # a third of the usual; benchmarks/README.md has what it costs and saves


class InitParams(ctypes.Structure):
    """struct ggml_init_params. A function of a library has one prototype, so all that call it share this one."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def library_path(name: str) -> Path:
    """The file of `name` ("ggml-base", "ggml", ...) in the installed llama-cpp-python. Raises ModelError.

    Under the name that libllama asks for: a wheel has no links, and another name is another copy in memory.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("llama-cpp-python is not installed: run pip install llama-cpp-python==0.3.36")
    file = f"lib{name}.0.dylib" if sys.platform == "darwin" else f"lib{name}.so.0"
    return Path(next(iter(spec.submodule_search_locations))) / "lib" / file


def backend_libraries() -> list[Path]:
    """The files of all of ggml's backends that are installed. Raises ModelError."""
    return sorted(library_path("ggml-base").parent.glob("libggml*"))


@cache
def open_library(name: str) -> ctypes.CDLL:
    """Open it once. Raises ModelError."""
    path = library_path(name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ModelError(f"{path.name} of llama-cpp-python does not load ({error}): reinstall it") from None


def prototype(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> None:
    """Declare a C function's types."""
    function = getattr(library, name)
    function.restype = result
    function.argtypes = list(arguments)


def let_threads_rest() -> None:
    """For programs: threads that have nothing to compute for a millisecond or so sleep, as while experts are read.

    GNU's OpenMP reads it once, when llama.cpp is loaded. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[object] = []
_installed_handlers: list[object] = []


def on_abort(handle: Callable[[str], None]) -> None:
    """Have `handle` called with ggml's message before it aborts the process; it must not return to survive."""

    def call(message: bytes) -> None:
        handle(message.decode("utf-8", "replace"))

    callback = _ABORT(call)
    _installed[:] = [callback]  # C keeps no reference
    open_library("ggml-base").ggml_set_abort_callback(callback)


def exit_on_abort() -> None:
    """For programs, not libraries: where llama.cpp would abort the process, end it with an error line and code 1."""
    on_abort(_exit)


def exit_on_bus_error() -> None:
    """For programs: where a mapped file loses its end, or its disk fails, end the process with an error line.

    The C handler runs in the thread that touched the page; a handler of Python's would never get its turn.
    """
    callback = _HANDLER(_exit_on_bus_error)
    _installed_handlers[:] = [callback]
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, _HANDLER], ctypes.c_void_p
    libc.signal(signal.SIGBUS, callback)


def _exit_on_bus_error(_: int) -> None:
    text = "a file became shorter while it was read, or its disk failed: check the model with grok-local verify"
    os.write(2, f"\nerror: {text}\n".encode())
    os._exit(1)


def _exit(message: str) -> None:
    # abort() follows whatever happens here: leave as every other failure does, without a core dump.
    reason = message.rpartition("/")[2]
    advice = "memory ran out, the model is damaged (grok-local verify tells), or llama.cpp has a bug"
    os.write(2, f"error: llama.cpp gave up ({reason}): {advice}\n".encode())
    os._exit(1)
