"""What an answer has to look like: a JSON schema, a regular expression, one of several texts, or a GBNF grammar.

All become a grammar of llguidance. What it cannot enforce is refused before any token, and the message says where it
stands in the schema.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from grok_local.errors import ModelError, OptionError
from grok_local.files import named_once

__all__ = ["Structure", "structure_of"]

Schema = Any  # a dict, its JSON, or a class with model_json_schema and model_validate_json, as Pydantic's models have

# Of JSON Schema 2020-12 and the drafts before it, what names schemas by name, and what is one or a list of them.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NESTED = (
    *("additionalProperties", "allOf", "anyOf", "contains", "else", "if", "items", "not", "oneOf", "prefixItems"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
)
_OTHERS = (
    *("$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength"),
    *("pattern", "format", "enum", "const", "type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", "uniqueItems", "dependentRequired", "additionalItems", "dependencies"),
)
_SILENT = (
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("$schema", "$id", "id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
    *("$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "nullable", "xml"),
    *("discriminator", "externalDocs", "minContains", "maxContains"),
)
_VALUES = ("const", "enum", "default", "examples", "example", "required", "dependentRequired", "xml", "discriminator")
_KNOWN = (*_NAMED, *_NESTED, *_OTHERS, *_SILENT)
_LITERAL = r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*'  # of a grammar: a text, a class, a remark
_TWICE_REPEATED = _LITERAL + r"|([*+?}])(\s*\))(?=\s*[*+?{])"
_EXACT = 1 << 53
_CLOSE = 0.85  # likeness of a misspelt keyword: others are the schema's own, and mean nothing
_CLOSE_IF_LONG, _LONG = 0.8, 8  # letters
_ONE_OF = "Enable 'coerce_one_of' option to approximate oneOf with anyOf"  # which nobody has here
_SETTINGS = {"whitespace_pattern": r"(\n? {0,20})?"}  # between JSON's tokens: models may write blanks for ever


class StructureOptions(TypedDict, total=False):
    """Keyword arguments of `Model.generate` and `Model.chat`, of which at most one may be given."""

    schema: Schema
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None


@dataclass(frozen=True)
class Structure:
    """A grammar as llguidance reads it; `schema` is where JSON is to be parsed as."""

    grammar: str
    schema: Schema = None

    def parsed(self, text: str) -> Any:
        """A whole answer as what its schema describes: an instance of the class, or what JSON says.

        Raises ModelError where the class refuses it.
        """
        if self.schema is None:
            return None
        if not hasattr(self.schema, "model_validate_json"):
            return json.loads(text)
        try:
            return self.schema.model_validate_json(text)
        except ValueError as error:  # the class has checks that its schema does not tell
            raise ModelError(f"the answer fits the schema, and {self.schema.__name__} refuses it: {error}") from None


def structure_of(options: StructureOptions) -> Structure | None:
    """What the options ask for; None if nothing. Raises OptionError where it cannot be enforced."""
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        raise OptionError(f"{' and '.join(sorted(given))}: an answer can have one of them")
    if not given:
        return None
    name, value = next(iter(given.items()))
    return _WAYS[name](value)


def _by_schema(schema: Schema) -> Structure:
    described = _enforceable(_described(schema), "$")
    if described is False:
        raise OptionError("schema: nothing fits `false`")
    try:
        text = json.dumps({} if described is True else described)
        grammar = _llguidance().grammar_from_json_schema(text, overrides=_SETTINGS)
    except ValueError as error:
        raise OptionError(f"schema: {' '.join(str(error).split())}") from None
    problem = _problem(grammar)
    if problem:
        raise OptionError(f"schema: {_place_of(problem, described)}{problem}")
    return Structure(grammar, schema)


def _described(schema: Schema) -> Any:
    """The schema as JSON has it."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        found = json.loads(text, parse_constant=_no_number, object_pairs_hook=named_once)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"schema: no JSON ({error})") from None
    if not isinstance(found, dict | bool):
        raise OptionError(f"schema {schema!r:.60}: an object is wanted, or a Pydantic model")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _enforceable(value: Any, path: str, *, kind: Literal["schema", "names", "data"] = "schema") -> Any:
    """The schema without what asks for nothing. Raises OptionError for what would be taken for something else."""
    if isinstance(value, list):
        return [_enforceable(item, f"{path}[{number}]", kind=kind) for number, item in enumerate(value)]
    if isinstance(value, float | int) and not isinstance(value, bool) and abs(value) > _EXACT:
        raise OptionError(f"schema: {path}: numbers beyond {_EXACT} are not told apart")
    if not isinstance(value, dict):
        return value
    found = {}
    for name, inner in value.items():
        if kind == "schema":
            _check_keyword(name, path)
        if kind != "schema" or (name, inner) != ("uniqueItems", False):
            found[name] = _enforceable(inner, f"{path}.{name}", kind=_kind_in(kind, name))
    return found


def _kind_in(kind: Literal["schema", "names", "data"], name: str) -> Literal["schema", "names", "data"]:
    """What is under a name in a schema, in what names schemas, or in values that are no schema."""
    if kind == "names":
        return "schema"
    return "names" if kind == "schema" and name in _NAMED else "data" if name in _VALUES or kind == "data" else "schema"


def _check_keyword(keyword: str, path: str) -> None:
    if keyword == "x-guidance":
        raise OptionError(f"schema: {path}.{keyword} changes what JSON is: leave it out")
    if keyword in _KNOWN:
        return
    plain = {known.lower(): known for known in _KNOWN}
    written = keyword.replace("_", "").lower()
    close = difflib.get_close_matches(written, plain, 1, _CLOSE if len(written) < _LONG else _CLOSE_IF_LONG)
    slips = [known for known in plain if _is_slip(written, known)]
    meant = plain.get(next(iter([*plain.keys() & {written}, *slips, *close]), ""))
    if meant:
        raise OptionError(f"schema: {path}.{keyword} is no keyword: did you mean {meant}?")


def _is_slip(written: str, meant: str) -> bool:
    """Whether one letter is another one, not the first, or two of them changed places."""
    if len(written) != len(meant) or len(meant) < 4 or written[0] != meant[0]:
        return False
    wrong = [place for place, pair in enumerate(zip(written, meant, strict=True)) if pair[0] != pair[1]]
    swapped = len(wrong) == 2 and wrong[1] == wrong[0] + 1 and sorted(written) == sorted(meant)
    return len(wrong) == 1 or swapped


def _by_regex(pattern: str) -> Structure:
    return _checked("regex", _llguidance().grammar_from_regex(_text("regex", pattern)))


def _by_choice(choices: Sequence[str]) -> Structure:
    listed = [choices] if isinstance(choices, str) else list(choices) if isinstance(choices, Iterable) else []
    if not listed or not all(isinstance(text, str) and text and "\0" not in text for text in listed):
        raise OptionError("choice: texts are wanted, none of them empty, and none with a NUL")
    rule = " | ".join(json.dumps(_text("choice", text), ensure_ascii=False) for text in listed)
    return _checked("choice", _llguidance().grammar_from_lark(f"start: {rule}"))


def _by_grammar(text: str) -> Structure:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        lark = gbnf_to_lark(_plain_grammar(_text("grammar", text)))
    except OptionError:
        raise
    except Exception as error:  # it raises its own, and plain ones
        raise OptionError(f"grammar: {' '.join(str(error).split())}") from None
    return _checked("grammar", _llguidance().grammar_from_lark(lark))


def _plain_grammar(text: str) -> str:
    """Without what llguidance's translation takes for something else. Raises OptionError where that cannot be had."""
    names = re.findall(r"^[ \t]*([\w-]+)[ \t]*::=", text, re.MULTILINE)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise OptionError(f"grammar: the rule {sorted(twice)[0]} is defined twice")
    if re.search(r"\[[^\]]*--[^\]]*\]", text):
        raise OptionError("grammar: two dashes in a class of characters are not understood: write one, as the first")
    text = _renamed(text, names)
    # It drops the parentheses between two repetitions: ("a"*)+
    text = re.sub(_TWICE_REPEATED, lambda found: f'{found[1]} ""{found[2]}' if found[1] else found[0], text)
    text = re.sub(r"\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})", _character, text)
    # A class is a set, in which nothing is there twice; doubled, these are operators to a regular expression.
    return re.sub(r"\[(?:\\.|[^\]\\])*\]", lambda found: re.sub(r"([&~])\1+", r"\1", found[0]), text)


def _renamed(text: str, names: Sequence[str]) -> str:
    """Without rules whose names that translation takes for another's: it has a `start` of its own, and tells neither
    capitals nor dashes.
    """
    taken, changed = {"START"}, dict[str, str]()
    for name in names:
        new, number = name, 2
        while new.upper().replace("-", "_") in taken:
            new, number = f"{name}-{number}", number + 1
        taken.add(new.upper().replace("-", "_"))
        changed[name] = new
    return re.sub(_LITERAL + r"|[\w-]+", lambda found: changed.get(found[0], found[0]), text)


def _character(found: re.Match[str]) -> str:
    code = int(found[1] or found[2], 16)
    if code >= 0x110000 or 0xD800 <= code < 0xE000:
        raise OptionError(f"grammar: {found[0]} is no character")
    character = chr(code)
    return f"\\x{code:02x}" if code < 0x80 and not character.isalnum() else character


def _text(name: str, value: object) -> str:
    """A text that has bytes. Raises OptionError."""
    if not isinstance(value, str):
        raise OptionError(f"{name} {value!r:.60}: a text is wanted")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{name} {value!r:.60}: it has a half of a character") from None
    return value


def _checked(name: str, grammar: str) -> Structure:
    problem = _problem(grammar)
    if problem:
        raise OptionError(f"{name}: {problem}")
    return Structure(grammar)


def _problem(grammar: str) -> str:
    """Why llguidance does not take a grammar as it is meant, in one line; empty if it does."""
    _, messages = _llguidance().validate_grammar_with_warnings(grammar)
    return "; ".join(" ".join(text.split()) for text in messages).replace(_ONE_OF, "anyOf can be enforced")


def _llguidance() -> Any:
    from llguidance import LLMatcher

    return LLMatcher


_WAYS: dict[str, Callable[[Any], Structure]] = {
    "schema": _by_schema,
    "regex": _by_regex,
    "choice": _by_choice,
    "grammar": _by_grammar,
}


# -- where it stands in the schema -------------------------------------------------------------------------------------


def _place_of(problem: str, schema: Any) -> str:
    """The paths of the keywords that a message names, or of the values."""
    named = re.search(r"Unimplemented keys: (\[.*?\])", problem)
    words = set(json.loads(named[1])) if named else set(re.findall(r"[\w$/:.-]+", problem))
    found = [f"{path}.{keyword}" for path, keyword in _keywords(schema, "$") if keyword in words]
    if not found:
        found = [f"{path}.{keyword}" for path, keyword in _keywords(schema, "$", values=True) if keyword in words]
    return f"{', '.join(found[:3])}: " if found else ""


def _keywords(schema: Any, path: str, *, values: bool = False) -> Iterator[tuple[str, str]]:
    """Every keyword of a schema and of those in it, with the path of the schema; or its value where that is a text."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if values and isinstance(value, str):
            yield f"{path}.{keyword}", value
        elif not values:
            yield path, keyword
        if keyword in _NAMED and isinstance(value, Mapping):
            for name, inner in value.items():
                yield from _keywords(inner, f"{path}.{keyword}.{name}", values=values)
        elif keyword in _NESTED:
            listed = value if isinstance(value, list) else [value]
            for number, inner in enumerate(listed):
                place = f"{path}.{keyword}[{number}]" if isinstance(value, list) else f"{path}.{keyword}"
                yield from _keywords(inner, place, values=values)
