"""What a request's body asks in OpenAI's shapes.

Sources: OpenAI's openapi document: CreateCompletionRequest, CreateChatCompletionRequest, BatchRequestInput. A field is
described as JSON Schema does it, once for what is checked here and for what a server says of itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grok_local.errors import OptionError

__all__ = [
    "CHAT",
    "MOST_SECONDS",
    "REQUIRED",
    "TEXT",
    "Inquiry",
    "Schema",
    "checked",
    "fields_of",
    "ignored",
    "inquiry",
    "says_nothing",
    "unknown_in",
]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

REQUIRED = {CHAT: ("messages",), TEXT: ("prompt",)}

Schema = dict[str, Any]

MOST_SECONDS = 10**9  # of a deadline
_MOST_CHOICES = 128
_MOST_TASKS = 1024
_MOST_LIKELY = 100
_TEXT_MAX_TOKENS = 16  # OpenAI's default, of text alone
_ROLES = {"developer": "system"}
_NOTHING: dict[str, tuple[Any, ...]] = {"tool_choice": ("none", {"type": "none"}), "suffix": ("",), "system": ("", [])}

_TEXT_: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_TOKENS: Schema = {"type": "integer", "minimum": -1}
_COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": _MOST_CHOICES}
_LIKELY: Schema = {"type": "integer", "minimum": 0, "maximum": _MOST_LIKELY}
_TEXTS: Schema = {"type": "array", "items": _TEXT_}
_PENALTY: Schema = {"type": "number", "minimum": -2, "maximum": 2}
_IDS: Schema = {"type": "array", "items": {"type": "integer"}}

_SAMPLING: dict[str, Schema] = {
    "temperature": {"type": "number", "minimum": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "repeat_penalty": {"type": "number", "exclusiveMinimum": 0},
    "seed": {"type": "integer", "minimum": -1, "maximum": 2**32 - 2},
}
_FORMS: dict[str, Schema] = {"regex": _TEXT_, "choice": _TEXTS, "grammar": _TEXT_}
_SILENT: dict[str, Schema] = {  # there is nothing to do for them
    "model": _TEXT_,
    "user": _TEXT_,
    "metadata": {"type": "object"},
    "store": _FLAG,
    "service_tier": _TEXT_,
    "safety_identifier": _TEXT_,
}
_COMMON: dict[str, Schema] = {
    **_SAMPLING,
    **_FORMS,
    **_SILENT,
    "max_tokens": _TOKENS,
    "stop": {"anyOf": [_TEXT_, _TEXTS]},
    "n": _COUNT,
    "prompt_logprobs": _LIKELY,
    "stream": _FLAG,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": _FLAG, "include_obfuscation": _FLAG},
        "additionalProperties": False,
    },
}
_SERVED: dict[str, Schema] = {  # of a server alone
    "timeout": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": MOST_SECONDS},
    "progress": _FLAG,
}
_SERVED_CHAT: dict[str, Schema] = {**_SERVED, "session": _TEXT_}
_PART: Schema = {
    "type": "object",
    # As in Anthropic's shapes nothing is to be done for cache_control.
    "properties": {"type": {"const": "text"}, "text": _TEXT_, "cache_control": {"type": "object"}},
    "required": ["type", "text"],
}
_CONTENT: Schema = {"anyOf": [_TEXT_, {"type": "array", "items": _PART}]}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {"role": _TEXT_, "content": _CONTENT},
    "required": ["role", "content"],
}
_OF_A_FORMAT = ("type", "json_schema")
_OF_A_SCHEMA = ("name", "description", "schema", "strict")  # enforced it is always
_FIELDS: dict[str, dict[str, Schema]] = {
    CHAT: {
        **_COMMON,
        "messages": {"type": "array", "items": _MESSAGE},
        "max_completion_tokens": _TOKENS,
        "logprobs": _FLAG,
        "top_logprobs": _LIKELY,
        "response_format": {"type": "object"},
    },
    TEXT: {
        **_COMMON,
        "prompt": {"anyOf": [_TEXT_, _TEXTS, _IDS, {"type": "array", "items": _IDS}]},
        "best_of": _COUNT,
        "echo": _FLAG,
        "logprobs": _LIKELY,
        "special": _FLAG,
        "suffix": {"type": "null"},
    },
}
_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (),
}
_NAMES = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "nothing",  # text is continued at its end alone
}


def fields_of(url: str, *, served: bool = False) -> dict[str, Schema]:
    """What a body may have, as JSON Schema describes it; `served`: by a server, and not in a batch."""
    extra = _SERVED_CHAT if url == CHAT else _SERVED
    return {**_FIELDS[url], **(extra if served else {})}


@dataclass(frozen=True)
class Inquiry:
    """What a body asks of an endpoint: `tasks`, prompt by prompt, each as often as answers are to be tried for it.

    `body` has no field that is null; `warnings` say which were ignored.
    """

    url: str
    body: Mapping[str, Any]
    tasks: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()

    @property
    def choices(self) -> int:
        """How many answers to each prompt are told."""
        return int(self.body.get("n", 1))

    @property
    def tries(self) -> int:
        """How many there are to choose from."""
        return _tries(self.body)

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self.tasks) // self.tries

    @property
    def is_streamed(self) -> bool:
        """Whether the answer is wanted piece by piece."""
        return bool(self.body.get("stream"))

    def warned(self, notes: Iterable[str]) -> Inquiry:
        """The same with more to be said, each once."""
        return replace(self, warnings=tuple(dict.fromkeys((*self.warnings, *notes))))

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def is_prompt_only(self) -> bool:
        """Whether no token is to come after the prompt."""
        return self._limit == 0

    @property
    def needs(self) -> int:
        """Tokens that an answer has to have room for, as the body says."""
        return max(self._limit or 0, 0)

    @property
    def likely(self) -> int | None:
        """How many alternatives' log-probabilities each token of an answer is told with; None for not even its own."""
        return _likely(self.url, self.body)

    @property
    def _limit(self) -> int | None:
        found = self.body.get("max_completion_tokens", self.body.get("max_tokens"))
        return found if isinstance(found, int) else None


def inquiry(url: str, body: Any, *, served: bool = False, lenient: bool = False) -> Inquiry:
    """What a body asks; `lenient` ignores fields that nobody knows. Raises OptionError."""
    given, warnings = checked(body, fields_of(url, served=served), lenient=lenient)
    _check_options(url, given, served=served)
    tasks = tuple(_tasks(url, given))
    return Inquiry(url, given, tasks, (*warnings, *ignored(_unknown_inside(given), lenient=lenient)))


def checked(body: Any, fields: Mapping[str, Schema], *, lenient: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The fields of a body that say something, and which are ignored because nobody knows them. Raises OptionError."""
    if not isinstance(body, Mapping):
        raise OptionError("body: an object is wanted")
    given = {name: value for name, value in body.items() if not says_nothing(name, value, is_known=name in fields)}
    warnings = ignored(_unknown(given, fields), lenient=lenient)
    given = {name: value for name, value in given.items() if name in fields}
    _check_kinds(given, fields)
    return given, warnings


def ignored(problems: Iterable[str], *, lenient: bool) -> list[str]:
    """What is said of fields that nobody knows, each once. Raises OptionError unless they may be ignored."""
    unknown = list(dict.fromkeys(problems))
    if unknown and not lenient:
        raise OptionError(unknown)
    return [f"ignored: {text}" for text in unknown]


def unknown_in(place: str, values: Any, known: Collection[str]) -> Iterator[str]:
    """What objects in a list say in fields beside `known`; null and an empty list say nothing."""
    for value in values if isinstance(values, list) else ():
        if isinstance(value, Mapping):
            said = [name for name, part in value.items() if part is not None and part != []]
            yield from (f"{place}: {problem}" for problem in _unknown(said, known))


def says_nothing(name: str, value: Any, *, is_known: bool) -> bool:
    """Whether a field asks for nothing: with null, with an empty list or object where there is nothing to ask for, or
    as clients write that they want none of it.
    """
    return value is None or (not is_known and value in ([], {})) or value in _NOTHING.get(name, ())


def _tasks(url: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompts = [_chat(body)] if url == CHAT else list(_texts(body))
    if not 0 < len(prompts) * _tries(body) <= _MOST_TASKS:
        raise OptionError(f"prompt: {len(prompts)} times {_tries(body)} answers; 1 to {_MOST_TASKS} can be asked for")
    common = {name: body[name] for name in (*_SAMPLING, *_FORMS, "stop", "prompt_logprobs") if name in body}
    likely = _likely(url, body)
    chosen_by = 0 if likely is None and _tries(body) > body.get("n", 1) else likely
    common |= {"logprobs": chosen_by}
    return [_seeded({**common, **prompt}, number) for prompt in prompts for number in range(_tries(body))]


def _chat(body: Mapping[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise OptionError("messages: a list is wanted")
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    return {
        "messages": [_message(message) for message in messages],
        "max_tokens": 1 if limit == 0 else limit,
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


def _texts(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not all(type(token) is int for token in prompt)
    limit, echo = body.get("max_tokens", _TEXT_MAX_TOKENS), body.get("echo", False)
    rest = {"max_tokens": 1 if limit == 0 else limit, "special": body.get("special"), "echo": echo}
    if echo and "logprobs" in body:
        rest["prompt_logprobs"] = max(body["logprobs"], body.get("prompt_logprobs", 0))
    for one in prompt if isinstance(prompt, list) and several else [prompt]:
        yield {"prompt": one, **rest}


def _seeded(task: dict[str, Any], number: int) -> dict[str, Any]:
    """Of several choices each has a seed of its own."""
    seed = task.get("seed")
    return task | {"seed": (seed + number) % (2**32 - 1)} if number and seed is not None and seed >= 0 else task


def _tries(body: Mapping[str, Any]) -> int:
    return max(int(body.get("n", 1)), int(body.get("best_of", 1)))


def _likely(url: str, body: Mapping[str, Any]) -> int | None:
    if url == CHAT:
        return int(body.get("top_logprobs", 0)) if body.get("logprobs") else None
    found = body.get("logprobs")
    return None if found is None else int(found)


# -- what is refused ---------------------------------------------------------------------------------------------------


def _unknown(names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            yield f"{name!r:.80} is not supported here" + (f": did you mean {close[0]!r}?" if close else "")


def _unknown_inside(body: Mapping[str, Any]) -> Iterator[str]:
    messages, wanted = body.get("messages", []), body.get("response_format", {})
    yield from unknown_in("messages", messages, _MESSAGE["properties"])
    for message in messages:
        yield from unknown_in("messages: content", message.get("content"), _PART["properties"])
    yield from unknown_in("response_format", [wanted], _OF_A_FORMAT)
    yield from unknown_in("response_format: json_schema", [wanted.get("json_schema")], _OF_A_SCHEMA)


def _check_kinds(body: Mapping[str, Any], known: Mapping[str, Schema]) -> None:
    for name, value in body.items():
        kind: str | None = known[name].get("type")
        if kind is not None and not _is_kind(value, kind):
            raise OptionError(f"{name} {value!r:.40}: {_NAMES[kind]} is wanted")
        low, high = known[name].get("minimum"), known[name].get("maximum")
        if low is not None and high is not None and not low <= value <= high:
            raise OptionError(f"{name} {value!r:.40}: must be {low} to {high}")
        above, below = known[name].get("exclusiveMinimum"), known[name].get("exclusiveMaximum")
        if above is not None and below is not None and not above < value < below:
            raise OptionError(f"{name} {value!r:.40}: must be more than {above} and less than {below}")
        inner = known[name].get("properties")
        if inner is not None:
            if unknown := list(_unknown(value, inner)):
                raise OptionError([f"{name}: {problem}" for problem in unknown])
            _check_kinds({key: part for key, part in value.items() if part is not None}, inner)


def _is_kind(value: Any, kind: str) -> bool:
    return isinstance(value, _PYTHON[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _check_options(url: str, body: Mapping[str, Any], *, served: bool) -> None:
    if body.get("stream") and not served:
        raise OptionError("stream: a batch has no streams")
    if body.get("stream") and "prompt_logprobs" in body:
        raise OptionError("prompt_logprobs: not with stream, which does not tell them")
    if body.get("progress") and not body.get("stream"):
        raise OptionError("progress: only with stream")
    if "stream_options" in body and not body.get("stream"):
        raise OptionError("stream_options: only with stream")
    if (body.get("stream_options") or {}).get("include_obfuscation"):
        raise OptionError("stream_options: include_obfuscation: nothing is added here to the pieces of a stream")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise OptionError("top_logprobs: only with logprobs true")
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise OptionError("max_tokens and max_completion_tokens: give one of the two")
    if "session" in body and _tries(body) > 1:
        raise OptionError("session: one answer is kept, so n has to be 1")
    best_of, n = body.get("best_of"), body.get("n", 1)
    if best_of is not None and best_of < n:
        raise OptionError(f"best_of {best_of}: must be at least n, which is {n}")
    if best_of is not None and best_of > n and body.get("stream"):
        raise OptionError("best_of: not with stream, where nothing can be taken back")
