"""Asks workers what they have, in ggml-rpc's protocol (ggml-rpc.cpp) but over a socket of our own.

llama.cpp's client aborts the process when an answer is not as it should be. This one believes nothing it is told: not
a length, not a number; and it waits only so long.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from grok_local.errors import OptionError, WorkerError
from grok_local.machine.facts import Device

__all__ = ["DEFAULT_PORT", "PROTOCOL", "complaints", "parse_endpoint", "probe_worker", "probe_workers"]

PROTOCOL = (7, 0)  # RPC_PROTO_MAJOR_VERSION and RPC_PROTO_MINOR_VERSION of ggml-rpc.h
DEFAULT_PORT = 50052
_TIMEOUT = 3.0  # seconds
_GET_DEVICE_MEMORY, _HELLO, _DEVICE_COUNT = 11, 14, 15  # enum rpc_cmd
_REQUEST = struct.Struct("<BQ")  # command, length of what follows
_LENGTH = struct.Struct("<Q")
_CAPABILITIES = 24  # RPC_CONN_CAPS_SIZE; all zero: TCP alone
_GREETING = struct.Struct(f"<BBBx{_CAPABILITIES}x")  # major, minor, patch
_COUNT = struct.Struct("<I")
_MEMORY = struct.Struct("<QQ")  # free, total
_MAX_DEVICES = 256
_MAX_MEMORY = 1 << 50
_ENDPOINT = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)(?::(?P<port>[0-9]{1,5}))?")

T = TypeVar("T")


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", or of "HOST" with the default port. Raises OptionError."""
    if (
        endpoint.count(":") > 1
        and re.fullmatch(r"[\[\]0-9a-fA-F:.]+", endpoint)
        and ("::" in endpoint or "[" in endpoint)
    ):
        raise OptionError(
            f"{endpoint}: llama.cpp's workers have no IPv6; give HOST:PORT with a name or an IPv4 address"
        )
    match = _ENDPOINT.fullmatch(endpoint)
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if not match or not 1 <= port < 1 << 16:
        raise OptionError(f"{endpoint!r} is no address of a worker: give HOST:PORT, or HOST for port {DEFAULT_PORT}")
    return match["host"], port


def probe_workers(endpoints: Sequence[str], *, timeout: float = _TIMEOUT) -> list[Device]:
    """The devices of all workers, named as llama.cpp will name them when it gets the workers in this order.

    Asks them all at once. Raises OptionError for endpoints that are none or are given twice, and WorkerError with a
    line for each worker that cannot be used.
    """
    found, problems = _ask_all(partial(probe_worker, timeout=timeout), endpoints)
    if problems:
        raise WorkerError(problems)
    _check_distinct(endpoints)
    devices = [device for of_worker in found for device in of_worker]
    return [replace(device, name=f"RPC{number}") for number, device in enumerate(devices)]


def _check_distinct(endpoints: Sequence[str]) -> None:
    # Under a second name llama.cpp would wait for the worker until its own first connection ends.
    known = set()
    for endpoint in endpoints:
        host, port = parse_endpoint(endpoint)
        address = socket.gethostbyname(host), port
        if address in known:
            raise OptionError(f"worker {endpoint} is given twice")
        known.add(address)


def probe_worker(endpoint: str, *, timeout: float = _TIMEOUT) -> list[Device]:
    """The devices of the worker at `endpoint`, RPC0 and on. `timeout` in seconds, for everything together.

    A worker has one client at a time, and this is one, for a moment. Raises WorkerError, and OptionError for an
    endpoint that is none.
    """
    host, port = parse_endpoint(endpoint)
    with _connection(endpoint, timeout) as connection:
        memories = _memories(connection)
    return [
        Device(
            name=f"RPC{number}",
            description=f"device {number} of {host}:{port}" if len(memories) > 1 else f"{host}:{port}",
            kind="worker",
            total=total,
            free=min(free, total),
            endpoint=f"{host}:{port}",
            offloads=False,
        )
        for number, (free, total) in enumerate(memories)
    ]


def complaints(endpoints: Sequence[str], *, timeout: float = 1.0) -> list[str]:
    """What is wrong with the workers, a line each: of those that cannot be reached, or if all can, of those that do
    not answer. A worker that has lost its client answers the next one only when it has finished its work.
    """
    for check in (_reach, probe_worker):
        _, problems = _ask_all(partial(check, timeout=timeout), endpoints)
        if problems:
            return problems
    return []


def _reach(endpoint: str, *, timeout: float) -> None:
    with _connection(endpoint, timeout):
        pass


def _ask_all(ask: Callable[[str], T], endpoints: Sequence[str]) -> tuple[list[T], list[str]]:
    """What `ask` returns for each endpoint, and the problems of those for which it failed."""
    with ThreadPoolExecutor(max(len(endpoints), 1)) as pool:
        futures = [pool.submit(ask, endpoint) for endpoint in endpoints]
    errors = [error for error in (future.exception() for future in futures) if error]
    unknown = [error for error in errors if not isinstance(error, WorkerError)]
    if unknown:
        raise unknown[0]
    problems = [line for error in errors if isinstance(error, WorkerError) for line in error.problems]
    return [future.result() for future in futures if not future.exception()], problems


@dataclass(frozen=True)
class _Connection:
    """A worker's socket, and the moment until which everything must have been said."""

    endpoint: str
    peer: socket.socket
    deadline: float

    def ask(self, command: int, request: bytes, answer: struct.Struct) -> tuple[int, ...]:
        """A command's answer. Raises OSError, EOFError, or ValueError for one of another length."""
        self.peer.settimeout(_remaining(self.deadline))
        self.peer.sendall(_REQUEST.pack(command, len(request)) + request)
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        if length != answer.size:
            raise ValueError(f"{length} bytes where {answer.size} are due")
        return answer.unpack(self._receive(answer.size))

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self.peer.settimeout(_remaining(self.deadline))
            received = self.peer.recv(size - len(data))
            if not received:
                raise EOFError
            data += received
        return data


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextmanager
def _connection(endpoint: str, timeout: float) -> Iterator[_Connection]:
    """Connected to the worker; whatever goes wrong meanwhile is a WorkerError."""
    deadline = time.monotonic() + timeout
    with _connected(endpoint, timeout) as peer:
        try:
            yield _Connection(endpoint, peer, deadline)
        except TimeoutError:
            raise WorkerError(
                f"worker {endpoint} says nothing within {timeout:g} s: "
                "it is busy with another client, hangs, or is no worker"
            ) from None
        except (EOFError, ConnectionError):
            raise WorkerError(f"worker {endpoint} hangs up: it is no worker, or one of another version") from None
        except (ValueError, OSError) as error:
            raise WorkerError(
                f"worker {endpoint} answers nonsense ({error}): it is no worker, or one of another version"
            ) from None


def _connected(endpoint: str, timeout: float) -> socket.socket:
    peer = socket.socket(socket.AF_INET)
    try:
        peer.settimeout(timeout)
        peer.connect(parse_endpoint(endpoint))
    except (OSError, UnicodeError) as error:
        peer.close()
        raise WorkerError(f"worker {endpoint} {_why(error, timeout)}") from None
    return peer


def _why(error: OSError | UnicodeError, timeout: float) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "is not known: no machine has this name"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection: start grok-local worker there, listening on that address"
    if isinstance(error, TimeoutError):
        return f"cannot be reached within {timeout:g} s: a wrong address, a firewall, or others queue for it"
    return f"cannot be reached: {error.strerror or error}"


def _memories(connection: _Connection) -> list[tuple[int, int]]:
    """Free and total bytes of each device."""
    _greet(connection)
    (count,) = connection.ask(_DEVICE_COUNT, b"", _COUNT)
    if not 1 <= count <= _MAX_DEVICES:
        raise ValueError(f"{count} devices")
    return [_memory(connection, number) for number in range(count)]


def _greet(connection: _Connection) -> None:
    major, minor, _ = connection.ask(_HELLO, bytes(_CAPABILITIES), _GREETING)
    if major != PROTOCOL[0] or minor > PROTOCOL[1]:
        raise WorkerError(
            f"worker {connection.endpoint} speaks version {major}.{minor} of the RPC protocol, and this machine "
            f"{PROTOCOL[0]}.{PROTOCOL[1]}: install the same version of grok-local on both"
        )


def _memory(connection: _Connection, number: int) -> tuple[int, int]:
    free, total = connection.ask(_GET_DEVICE_MEMORY, _COUNT.pack(number), _MEMORY)
    if total > _MAX_MEMORY:
        raise ValueError(f"{total} bytes of memory")
    return free, total
