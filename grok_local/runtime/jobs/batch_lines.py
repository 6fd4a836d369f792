"""Lines of a batch: what each asks, in our own short shape or in OpenAI's, and how its result is written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grok_local.errors import ContextError, GrokLocalError, OptionError
from grok_local.runtime.jobs.lines import Line, error_of, read_lines
from grok_local.runtime.jobs.openai import CHAT, REQUIRED, TEXT, Inquiry, inquiry
from grok_local.runtime.jobs.openai_results import Head, blamed, body_of, error_body
from grok_local.runtime.text.batch import TASK_FIELDS

if TYPE_CHECKING:
    from grok_local.runtime.text.batch import Result
    from grok_local.runtime.text.reply import TokenLogprob

__all__ = ["Asked", "Author", "id_of", "read_batch"]

_CODES = ((ContextError, "context_length_exceeded"), (OptionError, "invalid_value"))  # as a server has them
_OPENAI_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Asked:
    """A line, and the tasks it asks for; none where it has an `error`. One in OpenAI's shape has an `inquiry`."""

    line: Line
    tasks: tuple[dict[str, Any], ...] = ()
    error: GrokLocalError | None = None
    inquiry: Inquiry | None = None

    @property
    def id(self) -> str | int:
        """The line's id, or where it has none of its own, its number."""
        return self.line.key

    @property
    def digest(self) -> str:
        """Changes with what the line asks, and with nothing else."""
        return self.line.digest

    @property
    def is_openai(self) -> bool:
        """Whether it is in OpenAI's shape, and its result is to be."""
        return "custom_id" in self.line.given


@dataclass(frozen=True)
class Author:
    """Writes results: `model` and `fingerprint` are what they say they come from."""

    model: str
    fingerprint: str

    def written(self, asked: Asked, results: Sequence[Result]) -> dict[str, Any]:
        """The line of the output, of the results of all tasks of a line."""
        failed = next((result.error for result in results if result.error), None)
        if failed:
            return self.refused(asked, failed)
        return self._openai(asked, asked.inquiry, results) if asked.inquiry else self._short(asked, results[0])

    def refused(self, asked: Asked, error: GrokLocalError) -> dict[str, Any]:
        """The line of the output for one that cannot be answered."""
        if not asked.is_openai:
            return error_of(asked.line, error)
        code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
        url, asks = asked.line.fields.get("url"), asked.line.fields.get("body")
        param = blamed(error, asks, required=REQUIRED[url] if url in (CHAT, TEXT) else ())
        body = error_body(f"line {asked.line.number}: {error}", code=code, param=param)
        return _response(asked, 400, body)

    def _short(self, asked: Asked, result: Result) -> dict[str, Any]:
        stats = result.stats
        echo = {"prompt": result.prompt} if asked.tasks[0].get("echo") else {}
        found: dict[str, Any] = {
            "id": asked.id,
            **echo,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "tokens": {
                "prompt": stats.prompt_tokens,
                "cached": stats.cached_tokens,
                "completion": stats.generated_tokens,
            },
        }
        if result.parsed is not None:
            found["parsed"] = result.parsed
        if result.logprobs is not None:
            found["logprobs"] = [_described(token) for token in result.logprobs]
        if result.prompt_logprobs is not None:
            first, *others = result.prompt_logprobs
            found["prompt_logprobs"] = [{**_described(first), "logprob": None}, *map(_described, others)]
        if result.notes:
            found["warnings"] = list(result.notes)
        seconds = {"prompt": round(stats.prompt_seconds, 4), "generation": round(stats.generation_seconds, 4)}
        return {**found, "timings": seconds, "fingerprint": self.fingerprint}

    def _openai(self, asked: Asked, asks: Inquiry, results: Sequence[Result]) -> dict[str, Any]:
        name = _name("chatcmpl" if asks.url == CHAT else "cmpl", asked)
        head = Head(name, int(time.time()), str(asks.body.get("model") or self.model), self.fingerprint)
        noted = asks.warned(note for result in results for note in result.notes)
        return _response(asked, 200, body_of(noted, results, head))


def read_batch(text: str, *, as_text: bool) -> list[Asked]:
    """The lines of an input that are not blank, in either shape, mixed if need be."""
    known = (*TASK_FIELDS, *_OPENAI_FIELDS)
    lines = read_lines(text, known=known, as_text=as_text, ids=("id", "custom_id"))
    return [_asked(line) for line in lines]


def id_of(result: Mapping[str, Any]) -> str | int | None:
    """Which line a line of the output is the result of."""
    found = result.get("custom_id", result.get("id"))
    return found if isinstance(found, str | int) else None


def _asked(line: Line) -> Asked:
    try:
        if line.error:
            raise OptionError(line.error)
        return _short(line) if "custom_id" not in line.given else _openai(line)
    except OptionError as error:
        return Asked(line, error=error)


def _short(line: Line) -> Asked:
    if stray := [name for name in line.fields if name in _OPENAI_FIELDS]:
        raise OptionError(f"{stray[0]!r} belongs to a line in OpenAI's shape, which has a custom_id")
    fields = {("prompt" if name == "text" else name): value for name, value in line.fields.items()}
    return Asked(line, ({**fields, "id": line.id},))


def _openai(line: Line) -> Asked:
    url, body = line.fields.get("url"), line.fields.get("body")
    if stray := [name for name in line.fields if name not in _OPENAI_FIELDS]:
        raise OptionError(f"{stray[0]!r} belongs into the body")
    if line.fields.get("method", "POST") != "POST" or url not in (CHAT, TEXT):
        raise OptionError(f"wanted: method POST, and url {CHAT} or {TEXT}")
    asks = inquiry(url, body)
    ids = [line.id] if len(asks.tasks) == 1 else [f"{line.id}#{number}" for number in range(len(asks.tasks))]
    tasks = tuple({**task, "id": id_} for task, id_ in zip(asks.tasks, ids, strict=True))
    return Asked(line, tasks, inquiry=asks)


def _response(asked: Asked, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _name("batch_req", asked),
        "custom_id": asked.id,
        "response": {"status_code": status, "request_id": _name("req", asked), "body": body},
        "error": None,
    }


def _name(kind: str, asked: Asked) -> str:
    digest = hashlib.sha256(f"{asked.id}:{asked.digest}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{kind}_{digest[:24]}"


def _described(token: TokenLogprob) -> dict[str, Any]:
    return {**_likely(token.token, token.piece, token.logprob), "top": [_likely(*likely) for likely in token.top]}


def _likely(token: int, piece: bytes, value: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "id": token, "logprob": value, "bytes": list(piece)}
