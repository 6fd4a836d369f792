"""Bodies: reads the JSON of a request, as much of it as may be; and says what they are in the OpenAPI document."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from starlette.requests import Request

from grok_local.errors import OptionError, RefusedError
from grok_local.files import named_once
from grok_local.runtime.jobs.lines import is_encodable

__all__ = ["answered", "asked", "check_is_plain", "given_once", "json_of"]

MOST_BYTES = 16 << 20
_MOST_LEVELS = 64

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


async def bytes_of(request: Request, *, most: int = MOST_BYTES) -> bytes:
    """The whole body. Raises RefusedError where it is longer than `most`."""
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > most:
        raise _too_long(most)
    found = bytearray()
    async for piece in request.stream():
        found += piece
        if len(found) > most:
            raise _too_long(most)
    return bytes(found)


async def json_of(request: Request) -> tuple[bytes, Any]:
    """The body, and what it says. Raises RefusedError."""
    check_is_plain(request)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"content-type {kind!r:.60}: application/json is wanted", code="wrong_content_type")
    data = await bytes_of(request)
    return data, parsed(data)


def check_is_plain(request: Request) -> None:
    """Raises RefusedError for a body that was compressed: how large it would become nobody knows before."""
    told = request.headers.get("content-encoding", "").strip().lower()
    if told not in ("", "identity"):
        message = f"content-encoding {told!r:.40}: send it uncompressed"
        raise RefusedError(415, message, code="wrong_content_encoding")


def parsed(data: bytes) -> Any:
    """What JSON says. Raises RefusedError for what is none, for more than 64 levels, for halves of characters, and for
    objects with two fields of one name.
    """
    try:
        text = data.decode(json.detect_encoding(data))  # strictly, which json.loads does not do
        found = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=named_once)
        if "\\u" in text and not is_encodable(found):
            raise ValueError("a half of a character")
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {error!s:.200}", code="invalid_json") from None
    _check_levels(found)
    return found


def given_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a form or a query. Raises OptionError where two have one name."""
    try:
        return named_once(list(pairs))
    except ValueError as error:
        raise OptionError(str(error)) from None


def _check_levels(value: Any) -> None:
    layer = [value]
    for _ in range(_MOST_LEVELS):
        layer = [inner for outer in layer for inner in _inside(outer)]
        if not layer:
            return
    raise _too_deep()


def _inside(value: Any) -> list[Any]:
    """Lists and objects in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in inner if isinstance(one, dict | list)]


def _too_deep() -> RefusedError:
    return RefusedError(400, f"the body has more than {_MOST_LEVELS} levels", code="invalid_json")


def _too_long(most: int) -> RefusedError:
    return RefusedError(413, f"the body has more than {most} bytes", code="body_too_large")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text:.40} is larger than any number here")
    return number


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


# -- the OpenAPI document ----------------------------------------------------------------------------------------------


def asked(fields: Mapping[str, Mapping[str, Any]], *required: str) -> dict[str, Any]:
    """A body of these fields, each of which may be null instead."""
    properties = {name: field if name in required else _or_null(field) for name, field in fields.items()}
    schema = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answered(kind: str | None = None) -> dict[int | str, dict[str, Any]]:
    """What comes: an object, or an error."""
    schema: dict[str, Any] = {"type": "object"}
    if kind:
        schema |= {"required": ["id", "object", "choices"], "properties": {"object": {"const": kind}}}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if kind:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    failed = {"description": "What is wrong", "content": {"application/json": {"schema": _ERROR}}}
    return {200: {"description": "The answer", "content": content}, "4XX": failed, "5XX": failed}


def _or_null(field: Mapping[str, Any]) -> dict[str, Any]:
    if "anyOf" in field:
        return {"anyOf": [*field["anyOf"], {"type": "null"}]}
    return {**field, "type": [field["type"], "null"]} if field["type"] != "null" else dict(field)
