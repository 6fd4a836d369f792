"""What a request's body asks in Anthropic's shapes, and how its answer is told: whole, and as named events.

Sources: Anthropic's API reference: Create a Message, Count tokens in a Message, Streaming Messages, Errors. An
assistant's message at the end is what the answer begins with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from grok_local.errors import OptionError
from grok_local.runtime.jobs.openai import CHAT, Inquiry, Schema, checked, fields_of, ignored, says_nothing, unknown_in

if TYPE_CHECKING:
    from grok_local.runtime.jobs.openai_results import Head
    from grok_local.runtime.scheduling.generation import FinishReason, Stats

__all__ = [
    "COUNT",
    "MESSAGES",
    "counted_fields",
    "ending_events",
    "failure",
    "message_fields",
    "message_of",
    "messages_inquiry",
    "opening_events",
    "text_event",
]

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"

NamedEvent = tuple[str, dict[str, Any]]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
_FORMS = ("regex", "choice", "grammar")
_SILENT = ("model", "service_tier", "stream", "timeout")
_BORROWED = {name: fields_of(CHAT, served=True)[name] for name in (*_SAMPLING, *_FORMS, *_SILENT)}
_TEXT: Schema = {"type": "string"}
_BLOCKS: Schema = {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object", "required": ["type", "text"]}}]}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": _BLOCKS},
    "required": ["role", "content"],
}
_SAID: dict[str, Schema] = {"messages": {"type": "array", "items": _MESSAGE}, "system": _BLOCKS}
_FIELDS: dict[str, Schema] = {
    **_SAID,
    **_BORROWED,
    "max_tokens": {"type": "integer", "minimum": 1},
    "stop_sequences": {"type": "array", "items": _TEXT},
    "metadata": {"type": "object", "properties": {"user_id": _TEXT}},
    "thinking": {"type": "object"},
    "output_config": {"type": "object", "properties": {"format": {"type": "object"}}},
    "cache_control": {"type": "object"},  # nothing to do: a beginning that was read is never read twice
}
_REFUSED = {
    "tools": "this model calls no tools",
    "tool_choice": "this model calls no tools",
    "mcp_servers": "this server connects to no others",
    "container": "nothing is executed here",
}
_OF_A_FORMAT = ("type", "schema")
_OF_A_BLOCK = ("type", "text", "cache_control", "citations")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_REASONS = {"length": "max_tokens", "context": "model_context_window_exceeded", "interrupted": "pause_turn"}


def message_fields() -> dict[str, Schema]:
    """What a body may have, as JSON Schema describes it."""
    return dict(_FIELDS)


def counted_fields() -> dict[str, Schema]:
    """Likewise of one whose tokens are to be counted."""
    names = ("model", "thinking", "output_config", "cache_control")
    return {**_SAID, **{name: _FIELDS[name] for name in names}}


def messages_inquiry(body: Any, *, lenient: bool = False) -> Inquiry:
    """What a body asks; `lenient` ignores fields that nobody knows. Raises OptionError."""
    return _inquiry(MESSAGES, body, _FIELDS, lenient=lenient)


def count_inquiry(body: Any, *, lenient: bool = False) -> Inquiry:
    """What is to be counted. Raises OptionError."""
    return _inquiry(COUNT, body, counted_fields(), lenient=lenient)


def _inquiry(url: str, body: Any, fields: Mapping[str, Schema], *, lenient: bool) -> Inquiry:
    _check_refused(body)
    given, warnings = checked(body, fields, lenient=lenient)
    if given.get("thinking", {}).get("type", "disabled") != "disabled":
        raise OptionError("thinking: this model answers without")
    limit = given.get("max_tokens", 1 if url == COUNT else None)
    if limit is None or limit < 1:
        raise OptionError(f"max_tokens {limit}: at least 1 is wanted")
    if not all(isinstance(text, str) and text for text in given.get("stop_sequences", ())):
        raise OptionError("stop_sequences: texts are wanted, none of them empty")
    tasks = (_task(given),)
    return Inquiry(url, given, tasks, (*warnings, *ignored(_unknown_inside(given), lenient=lenient)))


def _check_refused(body: Any) -> None:
    for name, reason in _REFUSED.items():
        if isinstance(body, Mapping) and not says_nothing(name, body.get(name), is_known=False):
            raise OptionError(f"{name}: {reason}")


def _unknown_inside(body: Mapping[str, Any]) -> Iterator[str]:
    yield from unknown_in("messages", body["messages"], _MESSAGE["properties"])
    for message in body["messages"]:
        yield from unknown_in("messages: content", message["content"], _OF_A_BLOCK)
    yield from unknown_in("system", body.get("system"), _OF_A_BLOCK)
    yield from unknown_in("output_config: format", [body.get("output_config", {}).get("format")], _OF_A_FORMAT)


def _task(body: Mapping[str, Any]) -> dict[str, Any]:
    messages, prefix = _turns(body.get("messages")), ""
    if messages and messages[-1]["role"] == "assistant":
        prefix = messages.pop()["content"]
        if prefix != prefix.rstrip():
            raise OptionError("messages: the assistant's last must not end in white space, which goes on otherwise")
    system = [{"role": "system", "content": _content("system", body["system"])}] if "system" in body else []
    task: dict[str, Any] = {"messages": [*system, *messages], "prefix": prefix}
    task |= {name: body[name] for name in ("max_tokens", *_SAMPLING, *_FORMS) if name in body}
    task |= _form(body.get("output_config", {}).get("format"))
    return task | ({"stop": body["stop_sequences"]} if body.get("stop_sequences") else {})


def _form(wanted: Mapping[str, Any] | None) -> dict[str, Any]:
    if wanted is None:
        return {}
    if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), Mapping):
        raise OptionError('output_config: format: wanted is {"type": "json_schema", "schema": {...}}')
    return {"schema": wanted["schema"]}


def _turns(messages: Any) -> list[dict[str, str]]:
    """The conversation; what one says in several messages, one after another, is one."""
    if not isinstance(messages, list):
        raise OptionError("messages: a list is wanted")
    said = [(_role(message), _content("messages", message["content"])) for message in messages]
    return [
        {"role": role, "content": "\n\n".join(content for _, content in some)}
        for role, some in groupby(said, key=lambda one: one[0])
    ]


def _role(message: Any) -> str:
    if not isinstance(message, Mapping) or "content" not in message:
        raise OptionError("messages: each has to be an object with role and content")
    role = message.get("role")
    if role not in ("user", "assistant"):
        raise OptionError(
            f"messages: role {role!r:.40}: user and assistant speak; what is the system's goes into system"
        )
    return str(role)


def _content(field: str, content: Any) -> str:
    text = content if isinstance(content, str) else "".join(_blocks(field, content))
    if not text.strip():
        raise OptionError(f"{field}: a text is empty")
    return text


def _blocks(field: str, content: Any) -> Iterator[str]:
    if not isinstance(content, list):
        raise OptionError(f"{field}: a text is wanted, or a list of blocks")
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise OptionError(f"{field}: only blocks of type text can be read, and this is {kind or block!r:.40}")
        yield block["text"]


# -- what is told ------------------------------------------------------------------------------------------------------


def message_of(
    asks: Inquiry, head: Head, text: str, *, reason: FinishReason | None, stopped_by: str | None, stats: Stats
) -> dict[str, Any]:
    """The whole answer."""
    told = _message(head, [{"type": "text", "text": text}], stats)
    told |= _ending(asks, reason, stopped_by)
    return told | ({"warnings": list(asks.warnings)} if asks.warnings else {})


def opening_events(asks: Inquiry, head: Head, stats: Stats) -> Iterable[NamedEvent]:
    """What a stream begins with."""
    message = _message(head, [], stats) | ({"warnings": list(asks.warnings)} if asks.warnings else {})
    yield _named("message_start", message=message)
    yield _named("content_block_start", index=0, content_block={"type": "text", "text": ""})
    yield _named("ping")


def text_event(text: str) -> NamedEvent:
    """More of the answer."""
    return _named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def ending_events(
    asks: Inquiry, *, reason: FinishReason | None, stopped_by: str | None, stats: Stats
) -> Iterable[NamedEvent]:
    """What a stream ends with."""
    yield _named("content_block_stop", index=0)
    yield _named("message_delta", delta=_ending(asks, reason, stopped_by), usage=_usage(stats))
    yield _named("message_stop")


def failure(status: int, message: str) -> dict[str, Any]:
    """What a request that failed is answered."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def _named(name: str, **data: Any) -> NamedEvent:
    return name, {"type": name, **data}


def _message(head: Head, content: list[dict[str, Any]], stats: Stats) -> dict[str, Any]:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(stats),
    }


def _ending(asks: Inquiry, reason: FinishReason | None, stopped_by: str | None) -> dict[str, Any]:
    """A form's own end, such as the human's name in a transcript, is the end of a turn."""
    if reason != "stop":
        return {"stop_reason": _REASONS[reason or "interrupted"], "stop_sequence": None}
    if stopped_by in asks.body.get("stop_sequences", ()):
        return {"stop_reason": "stop_sequence", "stop_sequence": stopped_by}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(stats: Stats) -> dict[str, int]:
    return {"input_tokens": stats.prompt_tokens, "output_tokens": stats.generated_tokens}
