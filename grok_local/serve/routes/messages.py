"""Anthropic's messages, and how many tokens they have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from grok_local.errors import GrokLocalError
from grok_local.runtime.jobs import anthropic
from grok_local.runtime.jobs.openai_results import Head
from grok_local.serve.bodies import answered, asked, json_of
from grok_local.serve.failures import Json, answer_to, refusal_of
from grok_local.serve.service import Exchange, Service, new_id, service_of
from grok_local.serve.wire import LOOK_EVERY, EventStream, SlowJson, comment, event, patience_of

__all__ = ["router"]

router = APIRouter()

_CREATE = asked(anthropic.message_fields(), "messages", "max_tokens")
_COUNT = asked(anthropic.counted_fields(), "messages")


@router.post(anthropic.MESSAGES, openapi_extra=_CREATE, responses=answered())
async def messages(request: Request) -> Response:
    """Answer a conversation, or go on with its last answer."""
    service = service_of(request)
    data, body = await json_of(request)
    try:
        exchange = service.joined(request, data) or await _begun(service, request, data, body)
    except GrokLocalError as error:
        raise refusal_of(error, body=body) from None
    if exchange.asked.is_streamed:
        return EventStream(_events(service, request, exchange), told=_told)
    return SlowJson(
        partial(_whole, service, request, exchange), patience=patience_of(request.headers), refused=_refused
    )


@router.post(anthropic.COUNT, openapi_extra=_COUNT, responses=answered())
async def count_tokens(request: Request) -> Json:
    """How many tokens a conversation has as it would be read."""
    service = service_of(request)
    _, body = await json_of(request)
    try:
        asks = anthropic.count_inquiry(body, lenient=service.is_lenient)
        (prepared,) = await service.prepared("count", list(asks.tasks))
    except GrokLocalError as error:
        raise refusal_of(error, body=body) from None
    warnings = asks.warned(prepared.notes).warnings
    counted: dict[str, Any] = {"input_tokens": len(prepared.request.prompt)}
    return Json(counted | ({"warnings": list(warnings)} if warnings else {}))


async def _begun(service: Service, request: Request, data: bytes, body: Any) -> Exchange:
    """What an answer needs beyond the context's room it does without, and says so."""
    asks = anthropic.messages_inquiry(body, lenient=service.is_lenient)
    id_ = new_id("msg")
    prepared = await service.prepared(id_, list(asks.tasks))
    asks = asks.warned(note for task in prepared for note in task.notes)
    return service.begin(
        request, data, asks, prepared, id=id_, is_streamed=asks.is_streamed, timeout=asks.body.get("timeout")
    )


async def _whole(service: Service, request: Request, exchange: Exchange) -> dict[str, Any]:
    async with service.following(exchange, request) as answer:
        (result,) = await answer.results()
        service.log(exchange, [result.stats])
        return anthropic.message_of(
            exchange.asked,
            _head(service, exchange),
            result.text,
            reason=result.finish_reason,
            stopped_by=result.stopped_by,
            stats=result.stats,
        )


async def _events(service: Service, request: Request, exchange: Exchange) -> AsyncIterator[bytes]:
    """Named events from the first moment, and a ping whenever nothing comes for a while."""
    async with service.following(exchange, request) as answer:
        (stats,) = answer.stats
        yield _written(anthropic.opening_events(exchange.asked, _head(service, exchange), stats))
        async for part in answer.increments(LOOK_EVERY):
            if part is None:
                yield comment(service.loop.progress(answer).described()) + event({"type": "ping"}, name="ping")
            elif part.text:
                yield _written([anthropic.text_event(part.text)])
        answer.check()
        service.log(exchange, answer.stats)
        last = answer.parts[-1]
        yield _written(
            anthropic.ending_events(exchange.asked, reason=last.finish_reason, stopped_by=last.stopped_by, stats=stats)
        )


def _written(events: Iterable[anthropic.NamedEvent]) -> bytes:
    return b"".join(event(data, name=name) for name, data in events)


def _told(error: Exception) -> bytes:
    refused = refusal_of(error)
    return event(anthropic.failure(refused.status, str(refused)), name="error")


def _refused(error: Exception) -> Response:
    return answer_to(refusal_of(error), path=anthropic.MESSAGES)


def _head(service: Service, exchange: Exchange) -> Head:
    model = str(exchange.asked.body.get("model") or service.name)
    return Head(exchange.id, exchange.created, model, service.fingerprint)
