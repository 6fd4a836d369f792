"""OpenAI's batches: many requests in a file, answered in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.background import BackgroundTask
from starlette.requests import Request

from grok_local.errors import GrokLocalError, OptionError
from grok_local.runtime.jobs.openai import CHAT, TEXT, Schema, checked
from grok_local.serve.bodies import answered, asked, json_of
from grok_local.serve.failures import Json, refusal_of
from grok_local.serve.routes.stored_files import listed, queue_of

__all__ = ["router"]

router = APIRouter()

_FIELDS: dict[str, Schema] = {
    "input_file_id": {"type": "string"},
    "endpoint": {"type": "string", "enum": [CHAT, TEXT]},
    "completion_window": {"type": "string", "enum": ["24h"]},
    "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
}
_REQUIRED = ("input_file_id", "endpoint", "completion_window")
_LISTED: dict[str, Schema] = {"after": {"type": "string"}, "limit": {"type": "string"}}
_MOST_METADATA = 16
_MOST_CHARACTERS = 512


@router.post("/v1/batches", openapi_extra=asked(_FIELDS, *_REQUIRED), responses=answered())
async def create(request: Request) -> Json:
    """Have the lines of a file answered. They are looked at right after."""
    queue = queue_of(request)
    _, body = await json_of(request)
    try:
        given, _ = checked(body, _FIELDS)
        _check(given)
        record = await asyncio.to_thread(queue.create, metadata=given.pop("metadata", None), **given)
    except GrokLocalError as error:
        raise refusal_of(error, body=body, required=_REQUIRED) from None
    return Json(record.described(), background=BackgroundTask(queue.validate, record))


@router.get("/v1/batches", responses=answered())
async def list_batches(request: Request) -> Json:
    """All there are, the newest first."""
    return listed(request, [record.described() for record in queue_of(request).all()], _LISTED)


@router.get("/v1/batches/{id}", responses=answered())
async def one_batch(request: Request, id: str) -> Json:
    """How far one is."""
    return Json(queue_of(request).get(id).described())


@router.post("/v1/batches/{id}/cancel", responses=answered())
async def cancel(request: Request, id: str) -> Json:
    """End it; what is done can be had."""
    record = await asyncio.to_thread(queue_of(request).cancel, id)
    return Json(record.described())


@router.delete("/v1/batches/{id}", responses=answered())
async def delete(request: Request, id: str) -> Json:
    """Forget one that has ended. Its files are deleted as others are."""
    await asyncio.to_thread(queue_of(request).remove, id)
    return Json({"id": id, "object": "batch", "deleted": True})


def _check(body: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        known = _FIELDS[name].get("enum")
        if name not in body or (known and body[name] not in known):
            wanted = " or ".join(known) if known else "the id of a file"
            raise OptionError(f"{name} {body.get(name)!r:.60}: {wanted} is wanted")
    metadata = body.get("metadata") or {}
    texts = [text for pair in metadata.items() for text in pair]
    if len(metadata) > _MOST_METADATA or not all(isinstance(t, str) and len(t) <= _MOST_CHARACTERS for t in texts):
        raise OptionError(f"metadata: at most {_MOST_METADATA} texts of {_MOST_CHARACTERS} characters are wanted")
