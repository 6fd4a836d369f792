"""Answers that take their time, on connections that would be given up for silence.

A stream is server-sent events with comments between; JSON begins with white space, which means nothing. When the client
hangs up, the work ends.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from grok_local.serve.failures import Json, answer_to, described, refusal_of

__all__ = ["EventStream", "SlowJson", "comment", "event", "patience_of"]

_PATIENCE = 2.0  # seconds of silence that every client bears
_LEAST = 0.2
LOOK_EVERY = 1.0  # seconds of silence in a stream
DONE = b"data: [DONE]\n\n"


def patience_of(headers: Any) -> float:
    """Seconds of silence that a client bears, well below those that it says."""
    told = headers.get("x-stainless-read-timeout") or headers.get("x-stainless-timeout")
    try:
        return max(_LEAST, min(_PATIENCE, float(told) / 3))
    except (TypeError, ValueError):
        return _PATIENCE


def event(data: Any, *, name: str | None = None) -> bytes:
    """An event of JSON."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def comment(data: Any) -> bytes:
    """What no client takes for an event."""
    return f": {json.dumps(data)}\n\n".encode()


class EventStream(Response):
    """Events as they come. `told` tells an error that came after the first."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], *, told: Callable[[Exception], bytes] | None = None) -> None:
        super().__init__()
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self.headers["cache-control"], self.headers["x-accel-buffering"] = "no-cache", "no"
        self._events, self._told = events, told or _told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them until the client has gone."""
        await _while_there(receive, self._sent(send))

    async def _sent(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await send(_more(data))
        except Exception as error:
            await send(_more(self._told(error)))
        await send({"type": "http.response.body", "body": b""})


class SlowJson(Response):
    """What `work` comes to. Where that takes longer than `patience` seconds, the status is 200 whatever comes."""

    media_type = "application/json"

    def __init__(
        self,
        work: Callable[[], Awaitable[Any]],
        *,
        patience: float,
        refused: Callable[[Exception], Response] = lambda e: answer_to(refusal_of(e)),
    ) -> None:
        super().__init__()
        self._work, self._patience, self._refused = work, patience, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, unless the client goes before."""
        await _while_there(receive, self._sent(scope, receive, send))

    async def _sent(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._outcome())
        try:
            await asyncio.wait({task}, timeout=self._patience)
            if task.done():
                await (await task)(scope, receive, send)
                return
            headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while not task.done():
                await send(_more(b" "))
                await asyncio.wait({task}, timeout=self._patience)
            await send({"type": "http.response.body", "body": (await task).body})
        finally:
            task.cancel()

    async def _outcome(self) -> Response:
        try:
            return Json(await self._work())
        except Exception as error:
            return self._refused(error)


async def _while_there(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work until it is done, or the client has hung up."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _more(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def _told(error: Exception) -> bytes:
    return event(described(refusal_of(error)))
