"""Text to tokens and back, in vLLM's shape and in llama-server's: with it evaluation needs no other tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from grok_local.errors import GrokLocalError, OptionError
from grok_local.runtime.jobs.openai import Schema, checked
from grok_local.serve.bodies import answered, asked, json_of
from grok_local.serve.failures import Json, refusal_of
from grok_local.serve.service import Service, service_of

__all__ = ["router"]

router = APIRouter()

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_IDS: Schema = {"type": "array", "items": {"type": "integer"}}
_TOKENIZE = {
    "model": _TEXT,
    "prompt": _TEXT,
    "content": _TEXT,
    "add_special_tokens": _FLAG,
    "add_special": _FLAG,
    "parse_special": _FLAG,
    "with_pieces": _FLAG,
}
_DETOKENIZE = {"model": _TEXT, "tokens": _IDS}


@router.post("/tokenize", openapi_extra=asked(_TOKENIZE), responses=answered())
async def tokenize(request: Request) -> Json:
    """Tokens of a text: `prompt` as vLLM has it, or `content` as llama-server has it."""
    return await _told(request, _TOKENIZE, _tokenized)


@router.post("/detokenize", openapi_extra=asked(_DETOKENIZE, "tokens"), responses=answered())
async def detokenize(request: Request) -> Json:
    """The text of tokens."""
    return await _told(request, _DETOKENIZE, _detokenized)


@router.get("/tokenizer_info", responses=answered())
async def tokenizer_info(request: Request) -> Json:
    """What vLLM tells of its tokenizer."""
    service = service_of(request)
    return Json(await asyncio.to_thread(_described, service))


async def _told(request: Request, fields: Mapping[str, Any], tell: Any) -> Json:
    service = service_of(request)
    _, body = await json_of(request)
    try:
        given, ignored = checked(body, fields, lenient=service.is_lenient)
        found = await asyncio.to_thread(tell, service, given)
    except GrokLocalError as error:
        raise refusal_of(error, body=body, required=("prompt", "tokens")) from None
    return Json(found | ({"warnings": ignored} if ignored else {}))


def _tokenized(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    if ("prompt" in body) == ("content" in body):
        raise OptionError("prompt: a text is wanted, or content as llama-server has it")
    text = body.get("prompt", body.get("content"))
    # vLLM adds BOS unless told otherwise, llama-server if told to.
    add = body.get("add_special_tokens", True) if "prompt" in body else body.get("add_special", False)
    engine = service.model.engine
    ids = engine.tokenize(text, add_bos=add, special=body.get("parse_special", True))
    if "content" not in body:
        return {"count": len(ids), "max_model_len": service.model.context_size, "tokens": ids}
    if not body.get("with_pieces"):
        return {"tokens": ids}
    return {"tokens": [{"id": id_, "piece": _piece(engine.piece(id_, special=True))} for id_ in ids]}


def _piece(data: bytes) -> str | list[int]:
    """As llama-server has it: bytes where they are no text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _detokenized(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    ids = body.get("tokens")
    if not isinstance(ids, list) or not all(type(id_) is int for id_ in ids):
        raise OptionError("tokens: a list of whole numbers is wanted")
    text = service.model.detokenize(ids)
    return {"prompt": text, "content": text}


def _described(service: Service) -> dict[str, Any]:
    engine = service.model.engine
    return {
        "tokenizer_class": "grok-local",
        "eos_token": engine.special_text("eos") or None,
        "bos_token": engine.special_text("bos") or None,
        "pad_token": engine.special_text("padding") or None,
        "unk_token": engine.special_text("unknown") or None,
        "chat_template": engine.metadata.get("tokenizer.chat_template"),
        "vocab_size": engine.vocabulary,
        "model_max_length": service.model.context_size,
    }
