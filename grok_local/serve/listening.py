"""Listens: an address is taken, said, and served until a signal comes, or nothing can be answered any more."""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from starlette.types import ASGIApp

from grok_local.errors import OptionError
from grok_local.serve.guard import is_loopback

__all__ = ["Server", "bound", "key_for", "listen"]

_MOST_UNHEARD = 512  # connections that wait to be accepted
_LAST_WORDS = 3  # seconds for answers to end
_MOST_INCOMPLETE = 64 << 10  # bytes of headers that are kept of a request that has not come whole


def key_for(host: str, given: str | None) -> tuple[str | None, bool]:
    """The key that clients have to know, and whether it is a new one: elsewhere than on this machine nobody is let in
    without. Raises OptionError.
    """
    if given is not None:
        if not given.strip() or not given.isprintable() or not given.isascii():
            raise OptionError("--api-key: letters, digits and signs are wanted")
        return given, False
    return (None, False) if is_loopback(host) else (secrets.token_urlsafe(24), True)


def bound(host: str, port: int) -> socket.socket:
    """A socket with that address, at which nobody is heard yet; port 0 is a free one. Raises OptionError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise OptionError(f"--host {host}: {error.strerror or error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _occupied(host, port, error) from None
    return sock


def _occupied(host: str, port: int, error: OSError) -> OptionError:
    return OptionError(f"cannot listen at {host}:{port}: {error.strerror or error}; give another --port")


def listen(
    app: ASGIApp,
    sock: socket.socket,
    *,
    ready: Callable[[], None],
    leaving: Callable[[], None],
    is_lost: Callable[[], bool],
) -> None:
    """Serve until a signal comes, or `is_lost` says that it is of no use; to be called from the main thread. `ready` is
    called when it listens, `leaving` as soon as a signal ends it. Raises KeyboardInterrupt after Ctrl-C, SystemExit
    after SIGTERM, OptionError where another program has taken the address meanwhile.
    """
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(_MOST_UNHEARD)
    except OSError as error:
        raise _occupied(host, port, error) from None
    signal.signal(signal.SIGTERM, _end)
    Server(app, ready=ready, leaving=leaving, is_lost=is_lost).run([sock])


def _end(*_: object) -> NoReturn:
    raise SystemExit(0)


class Server(uvicorn.Server):
    """Serves an app, in whatever thread; handles signals only in the main one."""

    def __init__(
        self, app: ASGIApp, *, ready: Callable[[], None], leaving: Callable[[], None], is_lost: Callable[[], bool]
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="h11",
            ws="none",
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=_MOST_INCOMPLETE,
            timeout_graceful_shutdown=_LAST_WORDS,
            backlog=_MOST_UNHEARD,
        )
        super().__init__(config)
        self._ready, self._leaving, self._is_lost = ready, leaving, is_lost

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """It listens."""
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Say whether it is to end."""
        return await super().on_tick(counter) or self._is_lost()

    def handle_exit(self, sig: int, frame: FrameType | None) -> Any:
        """It is to end: answers under way do, too."""
        self._leaving()
        return super().handle_exit(sig, frame)
