"""OpenAI's shapes: what a request's body asks, and how a result is told.

Sources: OpenAI's openapi document: CreateCompletionRequest, CreateChatCompletionRequest, BatchRequestInput and -Output.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grok_local.errors import OptionError

if TYPE_CHECKING:
    from grok_local.runtime.text.batch import Result
    from grok_local.runtime.text.reply import TokenLogprob

__all__ = ["CHAT", "TEXT", "body_of", "choice_count", "error_body", "tasks_of"]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repeat_penalty",
    "seed",
)
_FORMS = ("regex", "choice", "grammar")
_SILENT = ("model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier")  # nothing to do
_COMMON = (*_SAMPLING, *_FORMS, *_SILENT, "max_tokens", "stop", "n", "stream", "logprobs")
_KNOWN = {
    CHAT: (*_COMMON, "messages", "max_completion_tokens", "top_logprobs", "response_format"),
    TEXT: (*_COMMON, "prompt", "special"),
}
_ROLES = {"developer": "system"}
_MOST_CHOICES = 128
_TEXT_MAX_TOKENS = 16  # OpenAI's default, of text alone
_LOWEST = -9999.0  # what OpenAI writes for no chance at all, which JSON has no number for


def tasks_of(url: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tasks that a body asks for, prompt by prompt, each as often as it wants choices. Raises OptionError."""
    given = {name: value for name, value in body.items() if value is not None}
    _check_names(url, given)
    if given.get("stream"):
        raise OptionError("stream: a batch has no streams")
    common = {name: given[name] for name in (*_SAMPLING, *_FORMS, "stop") if name in given}
    prompts = [_chat(given)] if url == CHAT else _texts(given)
    count = choice_count(given)
    return [_seeded({**common, **prompt}, number) for prompt in prompts for number in range(count)]


def choice_count(body: Mapping[str, Any]) -> int:
    """How many answers to a prompt are wanted. Raises OptionError."""
    count = body.get("n") or 1
    if type(count) is not int or not 1 <= count <= _MOST_CHOICES:
        raise OptionError(f"n {count!r:.40}: must be 1 to {_MOST_CHOICES}")
    return count


def body_of(
    url: str, results: Sequence[Result], *, id: str, created: int, model: str, fingerprint: str, prompts: int = 1
) -> dict[str, Any]:
    """A response's body, of the results of the tasks that its request asked for, in their order."""
    choices = [_chat_choice(i, r) if url == CHAT else _text_choice(i, r) for i, r in enumerate(results)]
    each = len(results) // prompts
    prompt = sum(result.stats.prompt_tokens for result in results[::each])
    cached = sum(result.stats.cached_tokens for result in results[::each])
    answers = sum(result.stats.generated_tokens for result in results)
    return {
        "id": id,
        "object": "chat.completion" if url == CHAT else "text_completion",
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": answers,
            "total_tokens": prompt + answers,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }


def error_body(message: str, *, code: str | None = None) -> dict[str, Any]:
    """What a refused request is answered."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


# -- requests ----------------------------------------------------------------------------------------------------------


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise OptionError("messages: a list is wanted")
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    likely = body.get("top_logprobs", 0) if body.get("logprobs") else None
    return {
        "messages": [_message(message) for message in messages],
        "max_tokens": limit,
        "logprobs": likely,
        **_response_format(body.get("response_format")),
    }


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise OptionError("messages: each has to be an object with role and content")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    role = message.get("role")
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else "", "content": content}  # type: ignore[dict-item]


def _part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise OptionError("content: only parts of type text can be read")


def _response_format(wanted: Any) -> dict[str, Any]:
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if wanted is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"schema": {"type": "object"}}
    inner = wanted.get("json_schema") if kind == "json_schema" else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        raise OptionError('response_format: wanted is {"type": "json_schema", "json_schema": {"name", "schema"}}')
    return {"schema": inner["schema"]}


def _texts(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not all(type(token) is int for token in prompt)
    prompts = prompt if several else [prompt]
    rest = {
        "max_tokens": body.get("max_tokens", _TEXT_MAX_TOKENS),
        "logprobs": body.get("logprobs"),
        "special": body.get("special"),
    }
    return [{"prompt": one, **rest} for one in prompts or []]


def _seeded(task: dict[str, Any], number: int) -> dict[str, Any]:
    """Of several choices each has a seed of its own."""
    seed = task.get("seed")
    return task | {"seed": seed + number} if number and type(seed) is int and seed >= 0 else task


def _check_names(url: str, body: Mapping[str, Any]) -> None:
    for name in body:
        if name not in _KNOWN[url]:
            close = difflib.get_close_matches(name, _KNOWN[url], 1)
            raise OptionError(f"{name!r} is not supported here" + (f": did you mean {close[0]!r}?" if close else ""))


# -- results -----------------------------------------------------------------------------------------------------------


def _chat_choice(index: int, result: Result) -> dict[str, Any]:
    likely = None
    if result.logprobs is not None:
        likely = {"content": [_token(token) for token in result.logprobs], "refusal": None}
    message = {"role": "assistant", "content": result.text, "refusal": None}
    return {"index": index, "message": message, "logprobs": likely, "finish_reason": _reason(result)}


def _token(token: TokenLogprob) -> dict[str, Any]:
    top = [_likely(piece, value) for _, piece, value in token.top]
    return {**_likely(token.piece, token.logprob), "top_logprobs": top}


def _likely(piece: bytes, value: float) -> dict[str, Any]:
    return {"token": _shown(piece), "logprob": max(value, _LOWEST), "bytes": list(piece)}


def _text_choice(index: int, result: Result) -> dict[str, Any]:
    likely = None if result.logprobs is None else _legacy(result.logprobs)
    return {"index": index, "text": result.text, "logprobs": likely, "finish_reason": _reason(result)}


def _legacy(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The older shape; the chosen token is always among the likeliest."""
    texts, offset, offsets = [_shown(token.piece) for token in tokens], 0, []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops = [
        {_shown(piece): max(value, _LOWEST) for _, piece, value in token.top}
        | {_shown(token.piece): max(token.logprob, _LOWEST)}
        for token in tokens
    ]
    values = [max(token.logprob, _LOWEST) for token in tokens]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _shown(piece: bytes) -> str:
    """A token's text; where its bytes are only a part of a character, their names, so that no two are alike."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _reason(result: Result) -> str | None:
    return "length" if result.finish_reason == "context" else result.finish_reason
