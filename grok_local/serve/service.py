"""What all endpoints share: the model, who computes, and how bodies become answers.

A body under way is an exchange. A client that asks again, because it lost the connection, joins the exchange that
answers it already. Nothing in a request says whose it is, and identical ones are told apart by counting: each exchange
is taken once per attempt, and whoever was refused before begins its own.
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

from grok_local.errors import ContextError, GrokLocalError, RefusedError
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

_COUNT = "x-stainless-retry-count"  # of clients that ask again: which attempt it is
_REMEMBERED = 150.0  # seconds that a refusal counts: OpenAI's client comes again after two minutes at most
_LONGEST = 900.0  # seconds of a client's patience that are believed


@dataclass(eq=False)
class Exchange:
    """A body that is being answered: `asked` is what it says, in the words of whoever answers; `turn` its place in a
    session, if it has one.

    `attempt` is the last one that took it. It `is_lost` when whoever read it hung up, and `is_told` when somebody was
    sent all of it, which may have come to nobody: so many seconds of `patience` are left to ask again.
    """

    key: str
    id: str
    asked: Any
    answer: Answer
    attempt: int
    turn: SessionTurn | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.monotonic)
    readers: int = 0
    patience: float = 0.0
    is_lost: bool = False
    is_told: bool = False
    timer: asyncio.TimerHandle | None = None
    deadline: asyncio.TimerHandle | None = None


@dataclass(eq=False)
class _Refusal:
    """A client was told to come again later, and will: it was its attempt number `attempt`."""

    attempt: int


@dataclass(eq=False)
class Service:
    """A loaded model behind HTTP. `name` is what it is called, `describe` tells its plan; `batches` are None where
    another server keeps them. Exchanges are kept by what was asked: one that was lost for `grace` seconds, and of those
    that have ended the latest `most_kept`.
    """

    model: Model
    name: str
    loop: EngineLoop
    fingerprint: str
    describe: Callable[[], dict[str, Any]]
    say: Callable[[str], None]
    is_lenient: bool = False
    logs_prompts: bool = False
    grace: float = 15.0
    most_kept: int = 256
    batches: BatchQueue | None = None
    exchanges: dict[str, list[Exchange]] = field(default_factory=dict)
    refusals: dict[str, list[_Refusal]] = field(default_factory=dict)
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
        """The exchange that answers this body already, if the client says that it asks again: one that was lost, or one
        whose reader may only seem to be there; none for a client that was refused and never had one.
        """
        key, attempt = _key(request, data), _attempt(request)
        some = [one for one in self.exchanges.get(key, ()) if one.attempt < attempt]
        lost = [one for one in some if one.is_lost]
        if not some or (not lost and self._was_refused(key, attempt)):
            return None
        exchange = max(lost or some, key=lambda one: one.attempt)  # of one attempt, the oldest
        exchange.attempt, exchange.is_lost = attempt, False
        self._rest(exchange, self.grace)
        return exchange

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
        key, attempt = _key(request, data), _attempt(request)
        try:
            answer = self.loop.submit(tasks, is_streamed=is_streamed)
        except RefusedError as error:
            if _COUNT in request.headers and not error.is_final:
                self._remember(key, _Refusal(attempt))
            raise
        exchange = Exchange(key, id, asked, answer, attempt, turn)
        self.exchanges.setdefault(key, []).append(exchange)
        self._rest(exchange, self.grace)  # if nobody ever follows it
        if limit is not None:
            exchange.deadline = asyncio.get_running_loop().call_later(limit, self._expire, answer)
        return exchange

    @asynccontextmanager
    async def following(self, exchange: Exchange, request: Request) -> AsyncIterator[Answer]:
        """While somebody waits for an exchange. When nobody does any more it ends; of a client that will ask again, it
        rests for a while before, and what has ended stays.
        """
        exchange.readers += 1
        exchange.patience = max(exchange.patience, self._patience(request))
        self._rest(exchange, None)
        self.loop.hold(exchange.answer, False)
        try:
            yield exchange.answer
            exchange.is_told = True
        finally:
            exchange.readers -= 1
            if not exchange.readers:
                self._leave(exchange)

    def _patience(self, request: Request) -> float:
        """Seconds until a client that heard nothing more asks again; 0 for one that never does."""
        if _COUNT not in request.headers:
            return 0.0
        told = request.headers.get("x-stainless-read-timeout") or request.headers.get("x-stainless-timeout")
        try:
            return self.grace + min(max(0.0, float(told or 0)), _LONGEST)
        except ValueError:
            return self.grace

    def _leave(self, exchange: Exchange) -> None:
        exchange.is_lost = not exchange.is_told
        if not exchange.patience or exchange.answer.is_streamed or _has_failed(exchange.answer):
            self._give_up(exchange)
            return
        self.loop.hold(exchange.answer, True)
        self._rest(exchange, exchange.patience if exchange.is_told else self.grace)
        told = [one for some in self.exchanges.values() for one in some if one.is_told and not one.readers]
        for one in sorted(told, key=lambda one: one.began)[: -self.most_kept]:
            self._give_up(one)

    def _rest(self, exchange: Exchange, seconds: float | None) -> None:
        """Give it up after so many seconds without a reader, counted from now; None for never."""
        if exchange.timer:
            exchange.timer.cancel()
        events = asyncio.get_running_loop()
        exchange.timer = None if seconds is None else events.call_later(seconds, self._give_up, exchange)

    def _give_up(self, exchange: Exchange) -> None:
        if not exchange.readers:
            self._rest(exchange, None)
            self.loop.cancel(exchange.answer)
            if exchange.deadline:
                exchange.deadline.cancel()
            if exchange.turn:
                exchange.turn.close()
            _remove(self.exchanges, exchange.key, exchange)

    def _remember(self, key: str, refusal: _Refusal) -> None:
        self.refusals.setdefault(key, []).append(refusal)
        asyncio.get_running_loop().call_later(_REMEMBERED, _remove, self.refusals, key, refusal)

    def _was_refused(self, key: str, attempt: int) -> bool:
        """Whether a client that makes this attempt was refused before; each refusal counts once."""
        some = [one for one in self.refusals.get(key, ()) if one.attempt < attempt]
        if some:
            _remove(self.refusals, key, max(some, key=lambda one: one.attempt))  # others' are earlier
        return bool(some)

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


def _attempt(request: Request) -> int:
    """How often the client has asked the same before, as it says."""
    told = request.headers.get(_COUNT, "0").strip()
    return int(told) if told.isdecimal() and len(told) < 9 else 0


def _has_failed(answer: Answer) -> bool:
    try:
        answer.check()
    except GrokLocalError:
        return True
    return False


def _remove(table: dict[str, list[Any]], key: str, one: object) -> None:
    """Take one out, and its list with the last; safe to call twice."""
    some = table.get(key, [])
    if one in some:
        some.remove(one)
        if not some:
            del table[key]


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
