"""What all endpoints share: the model, who computes, and how bodies become answers.

A body under way is an exchange. A client that asks again, because it lost the connection, joins the exchange that
answers it already.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import Request

from grok_local.errors import ContextError, RefusedError
from grok_local.runtime.jobs.openai import MOST_SECONDS
from grok_local.runtime.text.batch import Prepared
from grok_local.serve.engine_loop import Answer, EngineLoop

if TYPE_CHECKING:
    from grok_local.runtime.scheduling.generation import Stats
    from grok_local.runtime.text.batch import Tasks
    from grok_local.runtime.text.model import Model
    from grok_local.runtime.text.session import SessionTurn
    from grok_local.serve.jobs.batch_queue import BatchQueue

__all__ = ["Exchange", "Service", "new_id", "service_of"]

_GRACE = 15.0  # seconds that a client may take to ask again


@dataclass(eq=False)
class Exchange:
    """A body that is being answered: `asked` is what it says, in the words of whoever answers; `turn` its place in a
    session, if it has one.
    """

    key: str
    id: str
    asked: Any
    answer: Answer
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    readers: int = 0
    is_told: bool = False  # somebody has all of it
    turn: SessionTurn | None = None
    deadline: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class Service:
    """A loaded model behind HTTP. `name` is what it is called, `describe` tells its plan; `batches` are None where
    another server keeps them.
    """

    model: Model
    name: str
    loop: EngineLoop
    fingerprint: str
    describe: Callable[[], dict[str, Any]]
    say: Callable[[str], None]
    is_lenient: bool = False
    logs_prompts: bool = False
    batches: BatchQueue | None = None
    exchanges: dict[str, Exchange] = field(default_factory=dict)
    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.tasks: Tasks = self.model.tasks({})

    async def prepared(self, id: str, tasks: list[dict[str, Any]]) -> list[Prepared]:
        """Tasks that can be run, of which none is submitted where one cannot. Raises ContextError, OptionError."""
        return await asyncio.to_thread(self._prepared, id, tasks)

    def _prepared(self, id: str, tasks: list[dict[str, Any]]) -> list[Prepared]:
        found = []
        for index, task in enumerate(tasks):
            ready = self.tasks.prepare(index, {**task, "id": f"{id}#{index}"})
            if not isinstance(ready, Prepared):
                raise ready.error or RefusedError(400, "it cannot be answered")
            found.append(ready)
        return found

    def check_room(self, prepared: list[Prepared], needs: int) -> None:
        """Raises ContextError where prompts and answers of `needs` tokens do not fit together."""
        size = self.model.context_size
        longest = max(len(task.request.prompt) for task in prepared)
        if longest + needs > size + 1:  # the last token of an answer needs no room
            raise ContextError(
                f"max_tokens {needs}: with the prompt's {longest} tokens that makes {longest + needs}, and the context "
                f"has {size}: ask for at most {size + 1 - longest}"
            )

    def joined(self, request: Request, data: bytes) -> Exchange | None:
        """The exchange that answers this body already, if the client says that it asks again."""
        again = request.headers.get("x-stainless-retry-count", "0").strip()
        return self.exchanges.get(_key(request, data)) if again not in ("", "0") else None

    def begin(
        self,
        request: Request,
        data: bytes,
        asked: Any,
        tasks: list[Prepared],
        *,
        id: str,
        is_streamed: bool = False,
        timeout: float | None = None,
        turn: SessionTurn | None = None,
    ) -> Exchange:
        """Have a body answered, within `timeout` seconds. Raises RefusedError."""
        limit = timeout if timeout is not None else _seconds(request.headers.get("x-timeout"))
        answer = self.loop.submit(tasks, is_streamed=is_streamed)
        exchange = Exchange(_key(request, data), id, asked, answer, turn=turn)
        self.exchanges[exchange.key] = exchange
        asyncio.get_running_loop().call_later(_GRACE, self._give_up, exchange)  # if nobody ever follows it
        if limit is not None:
            exchange.deadline = asyncio.get_running_loop().call_later(limit, self._expire, answer)
        return exchange

    @asynccontextmanager
    async def following(self, exchange: Exchange, request: Request) -> AsyncIterator[Answer]:
        """While somebody waits for an exchange. When nobody does any more it ends; of a client that will ask again, it
        rests for a while before.
        """
        exchange.readers += 1
        self.loop.hold(exchange.answer, False)
        try:
            yield exchange.answer
        finally:
            exchange.readers -= 1
            if not exchange.readers:
                self._leave(exchange, "x-stainless-retry-count" in request.headers)

    def _leave(self, exchange: Exchange, asks_again: bool) -> None:
        if asks_again and not exchange.is_told and not exchange.answer.is_streamed:
            self.loop.hold(exchange.answer, True)
            asyncio.get_running_loop().call_later(_GRACE, self._give_up, exchange)
        else:
            self._give_up(exchange)

    def _give_up(self, exchange: Exchange) -> None:
        if not exchange.readers:
            self.loop.cancel(exchange.answer)
            if exchange.deadline:
                exchange.deadline.cancel()
            if exchange.turn:
                exchange.turn.close()
            if self.exchanges.get(exchange.key) is exchange:
                del self.exchanges[exchange.key]

    def _expire(self, answer: Answer) -> None:
        answer.expire()
        self.loop.wake()

    def log(self, exchange: Exchange, stats: Sequence[Stats]) -> None:
        """Say what an exchange took, and nothing of what it is about unless that is wanted."""
        seconds = time.monotonic() - exchange.began
        prompt, tokens = sum(one.prompt_tokens for one in stats), sum(one.generated_tokens for one in stats)
        shown = ""
        if self.logs_prompts:
            shown = f": {[self.model.detokenize(task.request.prompt) for task in exchange.answer.tasks]!r}"
        self.say(f"{exchange.id}: {prompt} + {tokens} tokens in {seconds:.1f} s{shown}")

    def count(self, endpoint: str, status: int) -> None:
        """A request was answered."""
        self.requests[endpoint, status] = self.requests.get((endpoint, status), 0) + 1


def service_of(request: Request) -> Service:
    """The one that a request came to."""
    return cast("Service", request.app.state.service)


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def _key(request: Request, data: bytes) -> str:
    who = request.headers.get("authorization") or request.headers.get("x-api-key") or ""
    return hashlib.sha256(f"{who}\n{request.url.path}\n".encode() + data).hexdigest()


def _seconds(text: str | None) -> float | None:
    """A deadline in a header. Raises RefusedError."""
    if text is None:
        return None
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < MOST_SECONDS:
        raise RefusedError(400, f"x-timeout {text!r:.40}: seconds are wanted, more than 0", code="invalid_value")
    return found
