"""OpenAI's files: what batches are made of, and what they come to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse

from grok_local.errors import OptionError, RefusedError
from grok_local.runtime.jobs.openai import Schema, checked
from grok_local.serve.bodies import answered, check_is_plain, given_once
from grok_local.serve.failures import Json
from grok_local.serve.jobs.batch_queue import BatchQueue
from grok_local.serve.jobs.file_store import MOST_FILE_BYTES
from grok_local.serve.service import service_of

__all__ = ["listed", "queue_of", "router"]

router = APIRouter()

_PURPOSE = "batch"

_FORM = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": _PURPOSE}},
    "required": ["file", "purpose"],
    "additionalProperties": False,
}
_FORM_FIELDS: dict[str, Schema] = {"file": {}, "purpose": {}}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_CONTENT: dict[str, Any] = {"description": "The file", "content": {"application/octet-stream": {}}}
_ENVELOPE = 64 << 10  # bytes around the file
_PAGE = 20
_MOST_OF_A_PAGE = 10_000
_LISTED: dict[str, Schema] = {
    "after": {"type": "string"},
    "limit": {"type": "string"},
    "order": {"type": "string"},
    "purpose": {"type": "string"},
}


@router.post("/v1/files", openapi_extra=_UPLOAD, responses=answered())
async def upload(request: Request) -> Json:
    """Keep a batch's lines."""
    queue, form = queue_of(request), await _form(request)
    try:
        file = _checked(form)
        name = (file.filename or "file")[:255].encode("utf-8", "replace").decode()  # a form has any encoding
        kept = await asyncio.to_thread(queue.files.upload, file.file, filename=name, purpose=_PURPOSE)
    finally:
        await form.close()
    return Json(kept.described())


@router.get("/v1/files", responses=answered())
async def list_files(request: Request) -> Json:
    """All there are, the newest first."""
    some = queue_of(request).files.all()
    purpose = request.query_params.get("purpose")
    return listed(request, [file.described() for file in some if purpose in (None, file.purpose)], _LISTED)


@router.get("/v1/files/{id}", responses=answered())
async def one_file(request: Request, id: str) -> Json:
    """What is known of one."""
    return Json(queue_of(request).files.get(id).described())


@router.get("/v1/files/{id}/content", responses={**answered(), 200: _CONTENT})
async def content(request: Request, id: str) -> FileResponse:
    """What is in it."""
    return FileResponse(queue_of(request).files.path(id), media_type="application/octet-stream")


@router.delete("/v1/files/{id}", responses=answered())
async def delete(request: Request, id: str) -> Json:
    """Remove it, unless a batch still needs it."""
    await asyncio.to_thread(queue_of(request).remove_file, id)
    return Json({"id": id, "object": "file", "deleted": True})


def queue_of(request: Request) -> BatchQueue:
    """The batches, and their files. Raises RefusedError where another server keeps them."""
    found = service_of(request).batches
    if found is None:
        raise RefusedError(503, "files and batches are kept by another grok-local serve", code="not_kept")
    return found


def listed(request: Request, entries: Sequence[dict[str, Any]], known: Mapping[str, Schema]) -> Json:
    """A page of them: `limit` many after the one of id `after`. Raises OptionError."""
    query, _ = checked(given_once(request.query_params.multi_items()), known)
    limit, order = query.get("limit", str(_PAGE)), query.get("order", "desc")
    if not limit.isdecimal() or not 0 < int(limit) <= _MOST_OF_A_PAGE:
        raise OptionError(f"limit {limit!r:.40}: 1 to {_MOST_OF_A_PAGE} is wanted")
    if order not in ("asc", "desc"):
        raise OptionError(f"order {order!r:.40}: asc or desc is wanted")
    entries = entries if order == "desc" else entries[::-1]
    ids = [entry["id"] for entry in entries]
    if (after := query.get("after")) is not None and after not in ids:
        raise OptionError(f"after {after!r:.80}: there is none of that id")
    rest = entries[ids.index(after) + 1 :] if after else entries
    page = rest[: int(limit)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return Json({"object": "list", "data": list(page), **ends, "has_more": len(rest) > len(page)})


def _checked(form: FormData) -> UploadFile:
    """The file of a form that is as it should be. Raises OptionError."""
    given, _ = checked(given_once(form.multi_items()), _FORM_FIELDS)
    if (purpose := given.get("purpose")) != _PURPOSE:
        raise OptionError(f"purpose {purpose!r:.60}: {_PURPOSE} is wanted")
    if not isinstance(file := given.get("file"), UploadFile):
        raise OptionError("file: a file is wanted")
    return file


async def _form(request: Request) -> FormData:
    """The parts of the body, a large file among them on disk. Raises RefusedError."""
    check_is_plain(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        message = f"content-type {kind!r:.60}: multipart/form-data is wanted"
        raise RefusedError(415, message, code="wrong_content_type")
    try:
        parts = MultiPartParser(request.headers, _bounded(request), max_files=1, max_fields=8)
        return await parts.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise RefusedError(400, f"the body is no form: {error!s:.200}", code="invalid_form") from None


async def _bounded(request: Request) -> AsyncGenerator[bytes, None]:
    most, size = MOST_FILE_BYTES + _ENVELOPE, 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise RefusedError(413, f"the file has more than {MOST_FILE_BYTES} bytes", code="body_too_large")
        yield piece
