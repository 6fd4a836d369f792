"""The process that holds the engine of a RemoteEngine: python -m grok_local.runtime.remote.child FD PARENT.

It answers what comes over the socket FD: (name, arguments, options, interrupted), a method or attribute of the engine,
gets (kind, value), where the kind is "result", "error" (one of our tree), "failure" (likewise, after which the engine
never computes again) or "aborted" (ggml's message, the last there is). It ends when its parent does.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grok_local.errors import GrokLocalError, ModelError
from grok_local.ggml import log
from grok_local.ggml.libraries import on_abort
from grok_local.ggml.rpc import register_worker
from grok_local.machine.facts import Device
from grok_local.placement.load_options import LoadRequest
from grok_local.runtime.engine.llama import LlamaEngine

__all__ = ["INTERRUPT", "LOAD"]

INTERRUPT = signal.SIGUSR1
LOAD = "load"  # (request, devices of the workers); the answer is the engine's FACTS, by name
FACTS = ("batch_size", "bos", "context_size", "headers", "placement", "threads", "vocabulary")

_WATCH_SECONDS = 1.0
# Seconds of silence, and between the three questions that follow; the second name is macOS's for the first.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_TCP_INFO = struct.Struct("=24xI28xI")  # of struct tcp_info: unacknowledged segments, milliseconds since the last ACK
_DEAF_MILLISECONDS = 30_000


class _Host:
    """The engine, and the connection over which it is used."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._engine: LlamaEngine | None = None

    def run(self) -> None:
        """Answer until the parent hangs up."""
        log.listen()
        on_abort(self._give_up)
        signal.signal(INTERRUPT, self._interrupt)
        # Else a signal in the thread that waits for a worker would be a failure to ggml-rpc.
        signal.siginterrupt(INTERRUPT, False)
        with suppress(EOFError, ConnectionError):
            while True:
                self._answer(*self._connection.recv())

    def _answer(self, name: str, arguments: Sequence[Any], options: dict[str, Any], interrupted: bool) -> None:
        try:
            self._send("result", self._do(name, arguments, options, interrupted))
        except GrokLocalError as error:
            self._send("failure" if self._engine and self._engine.failure is error else "error", error)
        except (EOFError, ConnectionError):
            raise
        except Exception:
            self._send("error", ModelError(f"the model's process failed:\n{traceback.format_exc()}"))

    def _do(self, name: str, arguments: Sequence[Any], options: dict[str, Any], interrupted: bool) -> Any:
        if self._engine is None:
            return self._load(*arguments)
        self._engine.interrupted = interrupted
        value = getattr(self._engine, name)
        return value(*arguments, **options) if callable(value) else value

    def _load(self, request: LoadRequest, workers: Sequence[Device]) -> dict[str, Any]:
        for endpoint in dict.fromkeys(device.endpoint for device in workers):
            register_worker(endpoint)
        self._engine = LlamaEngine(request, workers=workers)
        return {name: getattr(self._engine, name) for name in FACTS}

    def _interrupt(self, *_: object) -> None:
        if self._engine:
            self._engine.interrupt()

    def _give_up(self, message: str) -> None:
        # abort() follows whatever happens here: leave without a core dump as large as the model.
        try:
            self._send("aborted", message.rpartition("/")[2])
        finally:
            os._exit(1)

    def _send(self, kind: str, value: Any) -> None:
        with self._sending:  # ggml aborts in any thread
            self._connection.send((kind, value))


def _watch(parent: int) -> None:
    """End with the parent, however busy the engine is, and look after the connections to workers."""
    while os.getppid() == parent:
        for connection in _tcp_connections():
            with connection, suppress(OSError):
                _look_after(connection)
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _tcp_connections() -> Iterator[socket.socket]:
    """Those of this process, which are the workers': llama.cpp opens them when it likes, and keeps them to itself."""
    for entry in filter(Path.is_socket, Path("/dev/fd").iterdir()):
        with suppress(OSError):  # closed meanwhile
            found = socket.socket(fileno=os.dup(int(entry.name)))
            if found.family == socket.AF_INET:
                yield found
            else:
                found.close()


def _look_after(connection: socket.socket) -> None:
    """Have ggml-rpc notice within half a minute that the machine at the other end is gone.

    Not by TCP_USER_TIMEOUT: it also ends a connection to a worker that lives and computes, and reads nothing meanwhile.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if sys.platform == "linux" and _is_deaf(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)):
        connection.shutdown(socket.SHUT_RDWR)


def _is_deaf(info: bytes) -> bool:
    """Whether data is on its way that no kernel at the other end acknowledges; keep-alive begins only after it."""
    unacknowledged, silence = _TCP_INFO.unpack(info)
    return bool(unacknowledged and silence > _DEAF_MILLISECONDS)


def main() -> None:
    """Serve the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    descriptor, parent = map(int, sys.argv[1:])
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    _Host(Connection(descriptor)).run()
    os._exit(0)  # nothing that C code might still do is worth waiting for


if __name__ == "__main__":
    main()
