"""Lines of a file, each a task of its own: plain text, or JSON objects; a bad one costs the others nothing."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grok_local.errors import GrokLocalError, OptionError
from grok_local.files import named_once

__all__ = ["Line", "error_of", "is_encodable", "read_lines", "require_lines", "text_of", "texts_of"]

_ARRAY = re.compile(r"\[[ \t]*[{\r\n]")  # how one begins whose values are objects, or on lines of their own


@dataclass(frozen=True)
class Line:
    """A line by its number from 1, and its id, which is that number where it has none; `error` where it is no task.

    `given` are the names of all its fields, that of the id among them.
    """

    number: int
    id: str | int | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    given: frozenset[str] = frozenset()

    @property
    def key(self) -> str | int:
        """Its id, or its number."""
        return self.number if self.id is None else self.id

    @property
    def digest(self) -> str:
        """Changes with what the line says, and with nothing else."""
        text = json.dumps([self.fields, self.error], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def read_lines(text: str, *, known: Sequence[str], as_text: bool, ids: Sequence[str] = ("id",)) -> list[Line]:
    """The lines that are not blank. A line that begins with { is an object with `known` fields, unless all are text.

    `ids` are the names of the field that is its id. The id of a line that has none is its number, or where that is
    another's id, "line" and its number. Lines end as on any system. Files that were joined have byte order marks at the
    beginnings of lines: these are no text.
    """
    numbered = enumerate((line.lstrip("\ufeff") for line in re.split(r"\r\n|\n|\r", text)), 1)
    lines = [_line(n, line, known, as_text=as_text, ids=ids) for n, line in numbered if line.strip()]
    own = Counter[str | int | None](line.id for line in lines if line.id is not None)
    return [_named(line, own) for line in lines]


def require_lines(text: str, name: str) -> None:
    """Raises OptionError for JSON that is one array, or an object over several lines: they would be read as text."""
    text = text.lstrip("\ufeff \t\r\n")
    value, end = _first_value(text)
    is_whole, is_laid_out = not text[end:].strip(), re.search(r"[\r\n]", text[:end]) is not None
    if _ARRAY.match(text) or (isinstance(value, list) and (is_whole or is_laid_out)):
        raise OptionError(f"{name}: a JSON array, and an object a line is wanted (jq -c '.[]'); in a .txt all is text")
    if isinstance(value, dict) and is_laid_out:
        raise OptionError(f"{name}: JSON over several lines, and an object a line is wanted (jq -c .)")


def _first_value(text: str) -> tuple[Any, int]:
    """What JSON a text begins with, and where that ends; nothing where it does not."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def _named(line: Line, own: Mapping[str | int | None, int]) -> Line:
    named = f"line {line.number}" if line.number in own else line.number
    if line.id is None:
        return replace(line, id=named)
    if own[line.id] > 1:
        return replace(line, id=named, error=f"id {line.id!r} is another line's too")
    return line


def is_encodable(value: Any) -> bool:
    """Whether UTF-8 can write all texts in what JSON said: its escapes can stand for half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _line(number: int, line: str, known: Sequence[str], *, as_text: bool, ids: Sequence[str]) -> Line:
    if as_text or not line.lstrip().startswith("{"):
        return Line(number, None, {"text": line})
    try:
        fields = json.loads(line, object_pairs_hook=named_once)
    except (ValueError, RecursionError) as error:
        return Line(number, None, error=f"no JSON: {error}")
    given = frozenset(fields)
    own = [id_ for id_ in [fields.pop(name) for name in ids if name in fields] if id_ is not None]
    if len(own) > 1 or not all(isinstance(id_, str | int) and not isinstance(id_, bool) for id_ in own):
        return Line(number, None, error=f"{ids[0]}: one text or whole number is wanted", given=given)
    unknown = "; ".join(_unknown(fields, known))
    return Line(number, own[0] if own else None, fields, unknown or None, given)


def _unknown(fields: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            yield f"unknown field {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
