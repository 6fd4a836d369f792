"""Lines of a file, each a task of its own: plain text, or JSON objects; a bad one costs the others nothing."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grok_local.errors import GrokLocalError, OptionError

__all__ = ["Line", "error_of", "read_lines", "text_of", "texts_of"]


@dataclass(frozen=True)
class Line:
    """A line by its number from 1, and its id, which is that number where it has none; `error` where it is no task."""

    number: int
    id: str | int | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_lines(text: str, *, known: Sequence[str], as_text: bool) -> list[Line]:
    """The lines that are not blank. A line that begins with { is an object with `known` fields, unless all are text.

    The id of a line that has none is its number, or where that is another's id, "line" and its number.
    """
    numbered = enumerate(text.removeprefix("\ufeff").split("\n"), 1)
    lines = [_line(n, line.removesuffix("\r"), known, as_text=as_text) for n, line in numbered if line.strip()]
    own = Counter[str | int | None](line.id for line in lines if line.id is not None)
    return [_named(line, own) for line in lines]


def _named(line: Line, own: Mapping[str | int | None, int]) -> Line:
    named = f"line {line.number}" if line.number in own else line.number
    if line.id is None:
        return replace(line, id=named)
    if own[line.id] > 1:
        return Line(line.number, named, error=f"id {line.id!r} is another line's too")
    return line


def error_of(line: Line, error: GrokLocalError) -> dict[str, Any]:
    """A result that says why there is none; `code` is the error's kind."""
    code = type(error).__name__.removesuffix("Error").lower()
    return {"id": line.id, "error": {"code": code, "message": f"line {line.number}: {error}"}}


def text_of(line: Line, name: str) -> str:
    """A field that has to be a text. Raises OptionError."""
    value = line.fields.get(name)
    if not isinstance(value, str):
        raise OptionError(f"{name}: a text is wanted")
    return value


def texts_of(line: Line, name: str) -> list[str]:
    """A field that has to be a list of texts, at least one. Raises OptionError."""
    value = line.fields.get(name)
    if not (isinstance(value, list) and value and all(isinstance(text, str) for text in value)):
        raise OptionError(f"{name}: a list of texts is wanted")
    return value


def _line(number: int, line: str, known: Sequence[str], *, as_text: bool) -> Line:
    if as_text or not line.lstrip().startswith("{"):
        return Line(number, None, {"text": line})
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Line(number, None, error=f"no JSON: {error}")
    own = fields.pop("id", None)
    if not isinstance(own, str | int | None) or isinstance(own, bool):
        return Line(number, None, error="id: a text or a whole number is wanted")
    unknown = "; ".join(_unknown(fields, known))
    return Line(number, own, fields, unknown or None)


def _unknown(fields: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            yield f"unknown field {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
