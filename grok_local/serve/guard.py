"""Keeps out whom the server is not for: pages of other origins, names that were bound anew, those without the key."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Collection, Iterable, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grok_local.errors import OptionError, RefusedError
from grok_local.serve.failures import answer_to

__all__ = ["Guard", "is_loopback", "names_of"]

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_OPEN = ("/", "/health")  # what needs no key: the page has no secrets
_PAGE = "/page/"
_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_MOST_HEADER_BYTES = 32 << 10
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


class Guard:
    """In front of an app. `key` is what clients have to know, None for nothing; `host` is where the server listens.

    By `names` it may be called too, at whatever port, and pages of these names may ask: a proxy gives them theirs.
    """

    def __init__(self, app: ASGIApp, *, host: str, key: str | None, names: Collection[str] = ()) -> None:
        self._app, self._key = app, key
        self._given = frozenset(names)
        self._is_local = is_loopback(host)
        own = socket.gethostname().lower()
        self._names = _LOCAL if self._is_local else _LOCAL | {host.lower(), own, f"{own}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except RefusedError as error:
            await answer_to(error, path=scope["path"])(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _check(self, path: str, headers: Headers) -> None:
        if sum(len(name) + len(value) for name, value in headers.raw) > _MOST_HEADER_BYTES:
            raise RefusedError(431, f"more than {_MOST_HEADER_BYTES} bytes of headers", code="headers_too_large")
        host = headers.get("host", "")
        if not self.is_known(_name_of(host)):
            message = f"host {host!r:.80}: this server is not called so; serve --name NAME gives it a name"
            raise RefusedError(403, message, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            message = f"origin {origin!r:.80}: pages from elsewhere may not ask; serve --name NAME lets those of a name"
            raise RefusedError(403, message, code="wrong_origin")
        if origin is None and _is_foreign(headers):
            raise RefusedError(403, "pages from elsewhere may not ask", code="wrong_origin")
        if self._key is not None and path not in _OPEN and not path.startswith(_PAGE):
            self._check_key(headers)

    def is_known(self, name: str) -> bool:
        """Whether that is a name of this server. One elsewhere may be called by any address: none can be bound anew."""
        known = name in self._names or name in self._given
        return known or (not self._is_local and _is_address(name)) or is_loopback(name)

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page is this server's: of the name it was called by, or as a proxy shows it."""
        scheme, _, rest = origin.partition("://")
        return scheme in ("http", "https") and (rest.lower() == host.lower() or _name_of(rest) in self._given)

    def _check_key(self, headers: Headers) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), (self._key or "").encode()):
            message = "wrong API key" if given else "an API key is wanted: Authorization: Bearer KEY"
            raise RefusedError(401, message, code="invalid_api_key")


def names_of(given: Iterable[str]) -> frozenset[str]:
    """Names as they are compared. Raises OptionError for what is none."""
    found = {name: name.strip().lower().rstrip(".") for name in given}
    for name, one in found.items():
        if not (_NAME.fullmatch(one) or _is_address(one)):
            raise OptionError(f"--name {name!r:.80}: a name is wanted as in http://NAME:8080, without http:// and port")
    return frozenset(found.values())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """Without the port: whoever forwards one may change it."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site asks without saying its origin, as for a picture; a link may lead here."""
    site = headers.get("sec-fetch-site", "none")
    return site in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate"
