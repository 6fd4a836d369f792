"""The other end: lends this machine's memory and arithmetic to a grok-local on another machine.

llama.cpp's server serves one client after another and never returns, so it gets a thread, and the process ends under
it. It is insecure, and says so: its protocol believes every client.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from grok_local.errors import OptionError, WorkerError
from grok_local.ggml.devices import BackendDevice, DeviceKind, backend_devices, own_gpus
from grok_local.ggml.libraries import on_abort
from grok_local.ggml.log import tell_errors
from grok_local.ggml.rpc import require_rpc, serve
from grok_local.machine.limits import core_count
from grok_local.runtime.remote.probing import DEFAULT_PORT, parse_endpoint
from grok_local.units import format_bytes

__all__ = ["serve_worker"]

_MAX_THREADS = 512  # GGML_MAX_N_THREADS
_INTERRUPTED = 130


def serve_worker(listen: str = f"127.0.0.1:{DEFAULT_PORT}", threads: int | None = None) -> NoReturn:
    """Be a worker at `listen`, HOST:PORT, with this machine's GPUs, or if it has none its CPU.

    A program of its own: ends the process, with code 0 on SIGTERM and 130 on Ctrl-C; stdout goes where stderr does.
    Raises OptionError, WorkerError where nothing can listen there or listening ends, ModelError without llama.cpp's
    RPC backend. To be called from the main thread.
    """
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise OptionError(f"{threads} threads: must be 1 to {_MAX_THREADS}")
    require_rpc()
    tell_errors(_say)
    endpoint = "{}:{}".format(*_free_address(listen))
    devices = _devices()
    _announce(endpoint, devices)
    on_abort(_give_up)
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server = threading.Thread(target=_serve, args=(endpoint, threads or core_count(), devices), daemon=True)
    server.start()
    server.join()
    raise WorkerError(f"the worker at {endpoint} has stopped listening")


def _serve(endpoint: str, threads: int, devices: list[BackendDevice]) -> None:
    # A signal in this thread would end accept() with an error before the main thread's handler has run.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with suppress(OSError):  # there may be no stderr
        os.dup2(2, 1)
    serve(endpoint, threads=threads, devices=devices)


def _free_address(listen: str) -> tuple[str, int]:
    """The address to listen at, a number as llama.cpp wants it. Raises WorkerError where nothing can listen."""
    host, port = parse_endpoint(listen)
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such name"
        raise WorkerError(f"cannot listen at {host}:{port}: {reason}; give another with --listen") from None
    return address, port


def _devices() -> list[BackendDevice]:
    devices = backend_devices()
    return own_gpus(devices) or [device for device in devices if device.kind is DeviceKind.CPU]


def _announce(endpoint: str, devices: list[BackendDevice]) -> None:
    for device in devices:
        memory = f"{format_bytes(device.free)} of {format_bytes(device.total)} free"
        _say(f"{device.name}: {device.description.strip()}, {memory}")
    _say(f"serving them at {endpoint}, to one grok-local at a time; Ctrl-C ends it")
    risk = (
        "this protocol has no authentication and no encryption: whoever reaches the port can use and crash this process"
    )
    if ipaddress.ip_address(endpoint.partition(":")[0]).is_loopback:
        _say(f"note: {risk}")
    else:
        _say(f"WARNING: {risk}, and read what others compute. Listen on a network only if you trust all of it.")


def _say(line: str) -> None:
    if sys.stderr:  # there is none when it was closed
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _give_up(message: str) -> None:
    # abort() follows whatever happens here: leave without a core dump.
    reason = message.rpartition("/")[2]
    os.write(2, f"error: llama.cpp gave up ({reason}): a client sent nonsense, or llama.cpp has a bug\n".encode())
    os._exit(1)
