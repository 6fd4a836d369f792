"""OpenAI's completions: of texts, and of conversations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from grok_local.errors import GrokLocalError
from grok_local.library.sessions import session_folder
from grok_local.runtime.jobs.openai import CHAT, REQUIRED, TEXT, Inquiry, fields_of, inquiry
from grok_local.runtime.jobs.openai_results import Head, StreamedPiece, body_of, chunk_of, usage_chunk
from grok_local.runtime.text.session import Session, SessionTurn
from grok_local.serve.bodies import answered, asked, json_of
from grok_local.serve.engine_loop import Increment
from grok_local.serve.failures import refusal_of
from grok_local.serve.service import Exchange, Service, new_id, service_of
from grok_local.serve.wire import DONE, LOOK_EVERY, EventStream, SlowJson, comment, event, patience_of

__all__ = ["router"]

router = APIRouter()


@router.post(
    TEXT, openapi_extra=asked(fields_of(TEXT, served=True), *REQUIRED[TEXT]), responses=answered("text_completion")
)
async def completions(request: Request) -> Response:
    """Continue texts."""
    return await _answered(request, TEXT)


@router.post(
    CHAT, openapi_extra=asked(fields_of(CHAT, served=True), *REQUIRED[CHAT]), responses=answered("chat.completion")
)
async def chat_completions(request: Request) -> Response:
    """Answer the last message of a conversation."""
    return await _answered(request, CHAT)


async def _answered(request: Request, url: str) -> Response:
    service = service_of(request)
    data, body = await json_of(request)
    try:
        exchange = service.joined(request, data) or await _begun(service, request, data, body, url)
    except GrokLocalError as error:
        raise refusal_of(error, body=body, required=REQUIRED[url]) from None
    if exchange.asked.is_streamed:
        return EventStream(_events(service, request, exchange))
    return SlowJson(partial(_whole, service, request, exchange), patience=patience_of(request.headers))


async def _begun(service: Service, request: Request, data: bytes, body: Any, url: str) -> Exchange:
    asks = inquiry(url, body, served=True, lenient=service.is_lenient)
    if "session" not in asks.body:
        return await _submitted(service, request, data, asks)
    turn = await asyncio.to_thread(_turn, service, asks)
    try:
        return await _submitted(service, request, data, _within(asks, turn), turn=turn)
    except BaseException:
        turn.close()
        raise


async def _submitted(
    service: Service, request: Request, data: bytes, asks: Inquiry, *, turn: SessionTurn | None = None
) -> Exchange:
    id_ = new_id("chatcmpl" if asks.url == CHAT else "cmpl")
    prepared = await service.prepared(id_, list(asks.tasks))
    service.check_room(prepared, asks.needs)
    asks = asks.warned(note for task in prepared for note in task.notes)
    timeout = asks.body.get("timeout")
    return service.begin(
        request, data, asks, prepared, id=id_, is_streamed=asks.is_streamed, timeout=timeout, turn=turn
    )


def _turn(service: Service, asks: Inquiry) -> SessionTurn:
    """What the messages are in their session. Raises InUseError where another answer to it is under way."""
    (task,) = asks.tasks
    session = Session(session_folder(asks.body["session"]), service.model)
    try:
        return SessionTurn(session, task["messages"], reserve=max(asks.needs, 1))
    except BaseException:
        session.close()
        raise


def _within(asks: Inquiry, turn: SessionTurn) -> Inquiry:
    """The same with the session's messages before."""
    left = f"the context is full: the {turn.dropped} oldest messages of the session were left out"
    warnings = (*asks.warnings, *([left] if turn.dropped else []))
    return replace(asks, tasks=({**asks.tasks[0], "messages": turn.messages},), warnings=warnings)


async def _whole(service: Service, request: Request, exchange: Exchange) -> dict[str, Any]:
    asks: Inquiry = exchange.asked
    async with service.following(exchange, request) as answer:
        results = await answer.results()
        _keep(exchange, results[0].text)
        service.log(exchange, [result.stats for result in results])
        return body_of(asks, results, _head(service, exchange))


async def _events(service: Service, request: Request, exchange: Exchange) -> AsyncIterator[bytes]:
    """The chunks of a stream, and what says how far it is where none comes for a while."""
    asks: Inquiry = exchange.asked
    head, teller = _head(service, exchange), _Teller(exchange)
    async with service.following(exchange, request) as answer:
        async for part in answer.increments(LOOK_EVERY):
            if part is None:
                for line in _progress(service, exchange):
                    yield line
            else:
                yield event(chunk_of(asks, teller.piece(part), head))
        answer.check()
        _keep(exchange, answer.generations[0].text)
        service.log(exchange, answer.stats)
        if asks.has_usage:
            yield event(usage_chunk(asks, answer.stats, head))
        yield DONE


def _keep(exchange: Exchange, text: str) -> None:
    """In its session, which is free for the next question then, however long the answer can be had."""
    if exchange.turn:
        exchange.turn.keep(text)
        exchange.turn.close()


def _progress(service: Service, exchange: Exchange) -> list[bytes]:
    told = service.loop.progress(exchange.answer).described()
    wanted = exchange.asked.body.get("progress")
    return [comment(told), *([event(told, name="progress")] if wanted else [])]


class _Teller:
    """Makes pieces of parts: with the prompt before the first where it is to be repeated, and offsets."""

    def __init__(self, exchange: Exchange) -> None:
        self._asks: Inquiry = exchange.asked
        self._echoes = [task.echo for task in exchange.answer.tasks]
        self._offsets = [0] * len(self._echoes)

    def piece(self, part: Increment) -> StreamedPiece:
        """What is to be told of a part."""
        only_prompt = self._asks.is_prompt_only
        echo = self._echoes[part.index] if part.is_first else ""
        text = echo + ("" if only_prompt else part.text)
        offset = self._offsets[part.index]
        self._offsets[part.index] += len(text)
        return StreamedPiece(
            part.index,
            text,
            tokens=part.tokens,
            offset=offset,
            is_first=part.is_first,
            finish_reason="length" if only_prompt else part.finish_reason,
            stopped_by=part.stopped_by,
            prompt=part.prompt if self._asks.body.get("echo") else None,
            is_last=part.is_last,
        )


def _head(service: Service, exchange: Exchange) -> Head:
    model = str(exchange.asked.body.get("model") or service.name)
    return Head(exchange.id, exchange.created, model, service.fingerprint)
