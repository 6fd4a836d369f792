"""Answers in a given form: whatever the model finds likely, they have it; and what cannot be enforced is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grok_local
from grok_local.errors import OptionError
from grok_local.runtime.text.structure import structure_of
from samples.grammars import AMBIGUOUS
from tests.conftest import Run

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= ("yes" | "no") " " [0-9]{1,3}\n'


class Person:
    """What Pydantic's models offer."""

    def __init__(self, name: str, age: int) -> None:
        self.name, self.age = name, age

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return PERSON

    @classmethod
    def model_validate_json(cls, text: str) -> Person:
        return cls(**json.loads(text))


def answer(model: grok_local.Model, **options: Any) -> grok_local.Reply:
    """Of random weights at a high temperature, which would write anything."""
    reply = model.generate("Once", **{"max_tokens": 200, "temperature": 1.5, **options})
    assert "".join(reply) == reply.text
    return reply


@pytest.mark.parametrize("seed", range(8))
def test_answers_have_the_form(model: grok_local.Model, seed: int) -> None:
    reply = answer(model, schema=PERSON, seed=seed)
    assert reply.finish_reason == "stop"
    assert set(reply.parsed) == {"name", "age"}
    assert 0 <= reply.parsed["age"] <= 99
    assert len(reply.parsed["name"]) <= 12
    assert re.fullmatch(r"[a-c]{3}-\d{2,4}", answer(model, regex=r"[a-c]{3}-\d{2,4}", seed=seed).text)
    assert answer(model, choice=["red", "green and blue", "ü\n"], seed=seed).text in ("red", "green and blue", "ü\n")
    assert re.fullmatch(r"(yes|no) \d{1,3}", answer(model, grammar=GRAMMAR, seed=seed).text)


def test_forms_in_a_conversation_and_as_a_class(model: grok_local.Model) -> None:
    reply = model.chat([{"role": "user", "content": "Who?"}], schema=Person, temperature=1.0, seed=1)
    text = "".join(reply)
    assert isinstance(reply.parsed, Person)
    assert json.loads(text) == vars(reply.parsed)
    assert answer(model, schema=json.dumps(PERSON)).parsed


def test_what_was_cut_off_is_not_parsed(model: grok_local.Model) -> None:
    reply = answer(model, schema=PERSON, max_tokens=3, seed=1)
    assert (reply.finish_reason, reply.parsed) == ("length", None)
    assert answer(model, max_tokens=3).parsed is None


def test_without_a_choice_nothing_is_sampled(model: grok_local.Model) -> None:
    """One text is possible: the same comes at any temperature and seed, and nothing beside it."""
    text = "The one and only answer there is."
    texts = {answer(model, choice=[text], temperature=5.0, seed=seed).text for seed in range(4)}
    assert texts == {text}


def test_the_likeliest_allowed_token_is_taken(model: grok_local.Model) -> None:
    engine, logits = model.engine, model.logits(model.tokenize("Once"))[-1]
    digits = [token for token in range(engine.vocabulary) if engine.piece(token) in [b"%d" % n for n in range(10)]]
    likeliest = max(digits, key=lambda token: logits[token])
    assert answer(model, regex="[0-9]", temperature=0).tokens == [likeliest]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"type": "object", "properties": {"a": {"not": {}}}}}, r"schema: \$\.properties\.a\.not: Unimpl"),
        ({"schema": {"anyOf": [True, {"uniqueItems": True}]}}, r"schema: \$\.anyOf\[1\]\.uniqueItems: "),
        ({"schema": {"properties": {"d": {"type": "string", "format": "dat"}}}}, r"\$\.properties\.d\.format\.dat: "),
        ({"schema": {"type": "string", "maxLenght": 3}}, r"schema: \$\.maxLenght is no keyword: did you mean maxLen"),
        ({"schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "schema: .*minLength"),
        ({"schema": {"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}}, "schema: .*not present"),
        ({"schema": False}, "nothing fits"),
        ({"schema": "{"}, "schema: no JSON"),
        ({"schema": '{"type": "boolean", "type": "null"}'}, "schema: no JSON .'type' stands twice"),
        ({"schema": {"properties": {1: True, "1": False}}}, "'1' stands twice"),
        ({"schema": 5}, "an object is wanted"),
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": "a(?=b)"}, "regex: .*look-ahead"),
        ({"regex": 5}, "regex 5: a text is wanted"),
        ({"choice": []}, "choice: texts are wanted"),
        ({"choice": ["a", ""]}, "choice: texts are wanted"),
        ({"grammar": "root ::= ("}, "grammar: "),
        ({"grammar": "root ::= other\n"}, "grammar: Rule 'other' not found"),
        ({"grammar": ""}, "grammar: No 'root' rule"),
        ({"regex": "a", "choice": ["a"]}, "choice and regex: an answer can have one of them"),
        ({"schema": {"const": 12345678901234567890123}}, r"schema: \$\.const: numbers beyond 9007199254740992"),
        ({"schema": {"enum": [1, {"a": -(10**20)}]}}, r"schema: \$\.enum\[1\]\.a: numbers beyond"),
        ({"schema": '{"const": 1e400}'}, r"schema: \$\.const: numbers beyond"),
        ({"schema": {"const": float("nan")}}, "schema: no JSON"),
        ({"schema": '{"const": NaN}'}, "NaN is no number in JSON"),
        ({"schema": {"enum": {1, 2}}}, "schema: no JSON"),
        ({"schema": {"const": "\ud800"}}, "schema: "),
        ({"schema": {"x-guidance": {"item_separator": ";"}, "type": "array"}}, r"\$\.x-guidance changes what JSON is"),
        ({"schema": {"properties": {"a": {"max_length": 3}}}}, r"\$\.properties\.a\.max_length .*maxLength\?"),
        ({"schema": {"one_of": []}}, "did you mean oneOf"),
        ({"schema": {"type": "object", "propertys": {}}}, "did you mean properties"),
        ({"schema": {"emum": ["a"]}}, "did you mean enum"),
        ({"schema": {"tpye": "null"}}, "did you mean type"),
        ({"schema": {"minItms": 2}}, "did you mean minItems"),
        ({"schema": {"Type": "null"}}, "did you mean type"),
        ({"schema": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, r"\$\.oneOf: .*anyOf can be enforced"),
        ({"regex": "\ud800"}, "half of a character"),
        ({"choice": 5}, "choice: texts are wanted"),
        ({"choice": ["a\0b"]}, "none with a NUL"),
        ({"choice": ["\udcff"]}, "half of a character"),
        ({"grammar": 5}, "grammar 5: a text is wanted"),
        ({"grammar": 'root ::= a\na ::= "x"\na ::= "y"\n'}, "grammar: the rule a is defined twice"),
        ({"grammar": "root ::= [+--]\n"}, "two dashes in a class"),
        ({"grammar": 'root ::= "\\ud800"\n'}, "is no character"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before_any_token(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        structure_of(options)  # type: ignore[arg-type]


def test_what_asks_for_nothing_is_no_reason_to_refuse() -> None:
    for schema in (
        {"type": "array", "uniqueItems": False},
        {"const": {"max_length": 1, "Type": 2}},
        {"type": "object", "properties": {"max_length": {"type": "integer"}, "uniqueItems": {"const": False}}},
        {"type": "string", "example": "x", "nullable": False},
        {"type": "string", "name": "x", "label": "y", "version": 2, "order": 1, "unit": "s", "options": {}, "group": 1},
    ):
        assert structure_of({"schema": schema}) is not None


@pytest.mark.parametrize(
    ("grammar", "answers"),
    [
        ('root ::= "\\u0041BC"\n', "ABC"),
        ('root ::= "\\u00e9" "\\U0001F600"\n', "é\U0001f600"),
        ("root ::= [\\u0041-\\u0043]{3}\n", "[ABC]{3}"),
        ("root ::= [a-c&&x]{4}\n", "[abc&x]{4}"),
        ("root ::= [a~~]{4}\n", "[a~]{4}"),
        ('root ::= start "b"\nstart ::= "start "\n', "start b"),
        ('root ::= A a # A a\nA ::= [A]\na ::= "b"\n', "Ab"),
        ('root ::= a-b a_b "a-b"\na-b ::= "x"\na_b ::= "y"\n', "xya-b"),
        ('root ::= ("a"?){2,3} (b+)? "*)?"\nb ::= "c"{2}\n', r"a{0,3}(cc)*\*\)\?"),
    ],
)
def test_escapes_classes_and_names_of_grammars(model: grok_local.Model, grammar: str, answers: str) -> None:
    for seed in range(3):
        assert re.fullmatch(answers, answer(model, grammar=grammar, seed=seed).text)


@pytest.mark.parametrize(
    "options", [{"schema": {"$ref": "#"}}, {"regex": r"[^\s\S]"}, {"grammar": 'root ::= "a" root\n'}]
)
def test_what_nothing_fits_is_refused_at_once(model: grok_local.Model, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"^(?!.*<state>)"):
        answer(model, **options)


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "b(a{1000}){1000}"])
def test_a_form_that_leaves_no_choice_for_very_long_is_refused(model: grok_local.Model, pattern: str) -> None:
    with pytest.raises(OptionError, match=r"leaves no choice for .* tokens"):
        answer(model, regex=pattern, max_tokens=3)


def test_a_grammar_that_becomes_too_large_costs_its_own_answer_alone(model: grok_local.Model) -> None:
    tasks = [{"prompt": "Once", "grammar": AMBIGUOUS}, {"prompt": "Once", "max_tokens": 40}]
    wide, plain = sorted(model.batch(tasks, parallel=2, temperature=1.0), key=lambda result: result.index)
    assert isinstance(wide.error, OptionError)
    assert "too large" in str(wide.error)
    assert wide.text in ("", "y", "z")
    assert plain.error is None
    assert len(plain.tokens) == 40 or plain.finish_reason == "stop"


def test_a_form_and_stop_strings_exclude_each_other(model: grok_local.Model) -> None:
    with pytest.raises(OptionError, match="leave one of the two out"):
        model.generate("x", regex="[a-z]{20}", stop=["e"])
    reply = model.chat([{"role": "user", "content": "?"}], choice=["  yes\nHuman: x"])
    assert "".join(reply) == "  yes\nHuman: x"


def test_an_answer_may_be_null(model: grok_local.Model) -> None:
    reply = answer(model, schema={"type": "null"})
    assert (reply.text.strip(), reply.parsed, reply.is_whole) == ("null", None, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_schema_is_taken_or_refused(schema: Any) -> None:
    refused = ""
    try:
        assert structure_of({"schema": schema}) is not None or schema is None
    except OptionError as error:
        refused = str(error)
    assert "\n" not in refused


def test_from_the_command_line(run: Run, packed: Path, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "person.json", tmp_path / "answer.gbnf"
    schema.write_bytes(b"\xef\xbb\xbf" + json.dumps(PERSON).encode())
    grammar.write_text(GRAMMAR)
    common = ("generate", "-m", packed, "Once", "--context", 512, "--seed", 1)
    found = json.loads(run(*common, "--json-schema", schema, "--json").stdout)
    assert found["parsed"] == json.loads(found["text"])
    cut = json.loads(run(*common, "--json-schema", schema, "--json", "--max-tokens", 2).stdout)
    assert (cut["finish_reason"], "parsed" in cut) == ("length", False)
    assert run(*common, "--choice", "one of two", "--choice", "two of two").stdout.strip() in (
        "one of two",
        "two of two",
    )
    assert re.fullmatch(r"(yes|no) \d{1,3}\n", run(*common, "--grammar", grammar).stdout)
    assert re.fullmatch(r"[xy]{4}\n", run(*common, "--regex", "[xy]{4}").stdout)
    schema.write_text('{"not": {}}')
    refused = run(*common, "--json-schema", schema)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "error: schema: $.not: " in refused.stderr
