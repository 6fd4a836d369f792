"""The app: its routes, and what becomes of what none of them answers."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grok_local import __version__
from grok_local.errors import GrokLocalError, RefusedError
from grok_local.serve.failures import answer_to, refusal_of
from grok_local.serve.guard import Guard
from grok_local.serve.routes import about, batches, completions, local, messages, page, stored_files, tokenizing
from grok_local.serve.service import Service

__all__ = ["make_app"]

_GONE = 499  # as nginx has it in its log: nobody is there to be told

_ROUTERS = (
    completions.router,
    messages.router,
    tokenizing.router,
    stored_files.router,
    batches.router,
    about.router,
    local.router,
)


def make_app(service: Service, *, host: str, key: str | None, names: Collection[str] = ()) -> ASGIApp:
    """The whole of it, for a server that listens at `host` and is called by `names` too; with a `key`, for those alone
    who know it.
    """
    app = FastAPI(title="grok-local", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for router in (*_ROUTERS, page.router()):
        app.include_router(router)
    for kind in (GrokLocalError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _failed)
    app.add_exception_handler(ClientDisconnect, _left)
    return Guard(_Heads(_Counting(app, service)), host=host, key=key, names=names)


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        answer = answer_to(_of_http(request, error), path=request.url.path)
        answer.headers.update(error.headers or {})  # which methods may be
        return answer
    if isinstance(error, RequestValidationError):
        return answer_to(
            RefusedError(400, "the request is not what this endpoint takes", code="invalid_value"),
            path=request.url.path,
        )
    if not isinstance(error, GrokLocalError):
        request.app.state.service.say("".join(traceback.format_exception(error)))
    return answer_to(refusal_of(error), path=request.url.path)


async def _left(_: Request, __: Exception) -> Response:
    """Of a client that hung up amid its body, which is no error of anybody's."""
    return Response(status_code=_GONE)


def _of_http(request: Request, error: HTTPException) -> RefusedError:
    """What Starlette refuses: paths and methods."""
    path = request.url.path
    if error.status_code == 404:
        return RefusedError(404, f"{path!r:.120}: there is no such endpoint", code="unknown_url")
    if error.status_code == 405:
        return RefusedError(405, f"{request.method} {path}: not with this method", code="method_not_allowed")
    return RefusedError(error.status_code, str(error.detail), code="invalid_request")


class _Heads:
    """Answers HEAD wherever GET is answered: what listens leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self._app({**scope, "method": "GET"} if is_head else scope, receive, send)


class _Counting:
    """Counts what was answered, by the endpoint's pattern."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route: Any = scope.get("route")
                self._service.count(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
