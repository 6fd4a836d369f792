"""Finds and opens llama.cpp's shared libraries, and says what happens where they abort."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from grok_local.errors import ModelError

__all__ = [
    "InitParams",
    "backend_libraries",
    "exit_on_abort",
    "exit_on_bus_error",
    "kept_off_stderr",
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
_TERMINATE = ctypes.CFUNCTYPE(None)
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_installed: list[object] = []
_terminal = [2]  # where the last words go
_installed_handlers: list[object] = []


def on_abort(handle: Callable[[str], None]) -> None:
    """Have `handle` called with ggml's message before it aborts the process; it must not return to survive.

    Also where a C++ exception would end it, as of a GPU's driver whose memory ran out: with the exception's type.
    """

    def call(message: bytes) -> None:
        handle(message.decode("utf-8", "replace"))

    callback, terminate = _ABORT(call), _TERMINATE(lambda: handle(_uncaught()))
    _installed[:] = [callback, terminate]  # C keeps no reference
    open_library("ggml-base").ggml_set_abort_callback(callback)  # which, as it is opened, sets a handler of its own
    if runtime := _cxx_runtime():
        runtime._ZSt13set_terminatePFvvE(terminate)


@cache
def _cxx_runtime() -> ctypes.CDLL | None:
    """The C++ library that llama.cpp's are linked with, where it is one of the usual two."""
    name = "/usr/lib/libc++abi.dylib" if sys.platform == "darwin" else "libstdc++.so.6"
    try:
        library = ctypes.CDLL(name)
        prototype(library, "_ZSt13set_terminatePFvvE", ctypes.c_void_p, _TERMINATE)
        prototype(library, "__cxa_current_exception_type", ctypes.c_void_p)
        arguments = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
        prototype(library, "__cxa_demangle", ctypes.c_char_p, *arguments)
    except (OSError, AttributeError):
        return None
    return library


def _uncaught() -> str:
    """What is thrown and caught by nobody."""
    runtime = _cxx_runtime()
    kind = runtime.__cxa_current_exception_type() if runtime else None
    if not (runtime and kind):
        return "it gave up without an exception"
    return f"an exception, {(runtime.__cxa_demangle(_type_name(kind), None, None, None) or b'unknown').decode()}"


def _type_name(kind: int) -> bytes:
    """As the compiler has it: the second pointer of a std::type_info, whose highest bit is a mark on some systems."""
    pointer = ctypes.cast(kind, ctypes.POINTER(ctypes.c_size_t))[1] & ~(1 << 63)
    return ctypes.string_at(pointer)


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


@contextmanager
def kept_off_stderr() -> Iterator[None]:
    """For programs that have said what happens on an abort: what C code prints to stderr by itself is not seen.

    Drivers do so where memory runs out, whether or not llama.cpp goes on without it.
    """
    if not _installed:
        yield
        return
    with suppress(OSError):  # there may be no stderr
        _terminal.append(os.dup(2))
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        if len(_terminal) > 1:
            os.dup2(_terminal[-1], 2)
            os.close(_terminal.pop())


def _exit_on_bus_error(_: int) -> None:
    text = "a file became shorter while it was read, or its disk failed: check the model with grok-local verify"
    os.write(_terminal[-1], f"\nerror: {text}\n".encode())
    os._exit(1)


def _exit(message: str) -> None:
    # abort() follows whatever happens here: leave as every other failure does, without a core dump.
    reason = message.rpartition("/")[2]
    advice = "memory ran out, the model is damaged (grok-local verify tells), or llama.cpp has a bug"
    os.write(_terminal[-1], f"error: llama.cpp gave up ({reason}): {advice}\n".encode())
    os._exit(1)
