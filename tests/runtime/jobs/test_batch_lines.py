"""What lines of a batch ask, in both shapes, and how results are written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from grok_local.errors import ContextError, OptionError
from grok_local.runtime.jobs.batch_lines import Author, read_batch
from grok_local.runtime.scheduling.generation import Stats
from grok_local.runtime.text.batch import Result
from grok_local.runtime.text.reply import TokenLogprob

AUTHOR = Author("some-model", "fp_1")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def openai_line(url: str, body: dict[str, Any], id: str = "a") -> str:
    return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": body})


def result(text: str = "yes", *, index: int = 0, logprobs: Any = None) -> Result:
    stats = Stats(prompt_tokens=7, cached_tokens=3, generated_tokens=2)
    return Result(index, "a", text, "stop", [4, 5], logprobs, stats=stats)


def test_short_lines_of_every_kind() -> None:
    text = 'plain words\n{"prompt": [1, 2], "id": "x"}\r\n\n{"messages": [], "seed": 3}\r{"prompt": "last"}'
    asked = read_batch(text, as_text=False)
    assert [one.id for one in asked] == [1, "x", 4, 5]
    assert [one.tasks[0] for one in asked] == [
        {"prompt": "plain words", "id": 1},
        {"prompt": [1, 2], "id": "x"},
        {"messages": [], "seed": 3, "id": 4},
        {"prompt": "last", "id": 5},
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x", "promt": "y"}', "did you mean 'prompt'"),
        ('{"prompt": "x", "prompt": "y"}', "'prompt' stands twice"),
        ('{"prompt": ', "no JSON"),
        ('{"id": 1.5, "prompt": "x"}', "id: one text or whole number"),
        ('{"id": 1, "custom_id": "x", "url": "y"}', "id: one text or whole number"),
        ('{"prompt": "x", "url": "y"}', "'url' belongs to a line in OpenAI's shape"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "wanted: method POST"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": 3}', "body: an object"),
        ('{"custom_id": "a", "url": "/v1/completions", "prompt": "x"}', "'prompt' belongs into the body"),
        (openai_line(TEXT, {"prompt": "x", "max_token": 3}), "did you mean 'max_tokens'"),
        (openai_line(TEXT, {"prompt": "x", "suffix": "y"}), "suffix 'y': nothing is wanted"),
        (openai_line(TEXT, {"prompt": "x", "stream": True}), "stream"),
        (openai_line(CHAT, {"messages": [], "n": 0.5}), "n 0.5"),
        (openai_line(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "type text"),
        (openai_line(CHAT, {"messages": [], "response_format": {"type": "xml"}}), "response_format"),
        (openai_line(CHAT, {"messages": [{"role": "user", "contnet": "x"}]}), "did you mean 'content'"),
        (openai_line(CHAT, {"messages": [{"role": "user", "content": "x", "name": "me"}]}), "messages: 'name'"),
        (openai_line(CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}), "messages: 'tool_calls'"),
        (openai_line(CHAT, {"messages": [{"content": [{"type": "text", "text": "x", "lang": "de"}]}]}), "'lang'"),
        (openai_line(CHAT, {"messages": [], "response_format": {"type": "json_object", "schema": {}}}), "'schema'"),
    ],
)
def test_bad_lines_say_why(line: str, reason: str) -> None:
    (asked,) = read_batch(line, as_text=False)
    assert isinstance(asked.error, OptionError)
    assert reason in str(asked.error)
    assert not asked.tasks


def test_bodies_of_openai() -> None:
    body = {
        "model": "any",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
        ],
        "max_completion_tokens": 9,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": None,
        "seed": 5,
        "n": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
    }
    (asked,) = read_batch(openai_line(CHAT, body), as_text=False)
    assert [task["seed"] for task in asked.tasks] == [5, 6]
    assert [task["id"] for task in asked.tasks] == ["a#0", "a#1"]
    task = asked.tasks[0]
    assert task["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert (task["max_tokens"], task["logprobs"], task["schema"]) == (9, 2, {"type": "integer"})
    (several,) = read_batch(openai_line(TEXT, {"prompt": [[1], [2, 3]], "n": 2, "logprobs": 0}), as_text=False)
    assert [task["prompt"] for task in several.tasks] == [[1], [1], [2, 3], [2, 3]]
    assert {task["max_tokens"] for task in several.tasks} == {16}


def test_results_in_kind() -> None:
    short, chat, text = read_batch(
        "\n".join(
            [
                "x",
                openai_line(CHAT, {"messages": [], "n": 2, "logprobs": True}, "b"),
                openai_line(TEXT, {"prompt": "y", "logprobs": 1}, "c"),
            ]
        ),
        as_text=False,
    )
    tokens = [
        TokenLogprob(4, b"y", -0.5, ((4, b"y", -0.5),)),
        TokenLogprob(5, b"\xe2", -1e9, ((9, b"\xe2\x82", -2.0),)),
    ]
    written = AUTHOR.written(short, [result(logprobs=tokens)])
    assert written["tokens"] == {"prompt": 7, "cached": 3, "completion": 2}
    assert written["fingerprint"] == "fp_1"
    assert written["logprobs"][1]["bytes"] == [0xE2]
    written = AUTHOR.written(chat, [result(logprobs=tokens), result("no", index=1)])
    body = written["response"]["body"]
    assert (written["custom_id"], written["error"], written["response"]["status_code"]) == ("b", None, 200)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["yes", "no"]
    assert body["choices"][0]["logprobs"]["content"][1]["logprob"] == -9999.0
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 4
    legacy = AUTHOR.written(text, [result(logprobs=tokens)])["response"]["body"]["choices"][0]["logprobs"]
    assert legacy["tokens"] == ["y", "bytes:\\xe2"]
    assert legacy["text_offset"] == [0, 1]
    assert legacy["top_logprobs"][1] == {"bytes:\\xe2\\x82": -2.0, "bytes:\\xe2": -9999.0}


def test_what_short_lines_ask_for_is_told() -> None:
    (asked,) = read_batch('{"prompt": "Wh", "echo": true, "prompt_logprobs": 1}', as_text=False)
    prompt = [TokenLogprob(3, b"W", 0.0, ()), TokenLogprob(4, b"h", -0.25, ((4, b"h", -0.25),))]
    written = AUTHOR.written(asked, [replace(result("y?"), prompt="Wh", prompt_logprobs=prompt)])
    assert (written["prompt"], written["text"]) == ("Wh", "y?")
    assert [token["logprob"] for token in written["prompt_logprobs"]] == [None, -0.25]
    assert written["prompt_logprobs"][1]["top"][0]["id"] == 4
    assert "prompt" not in AUTHOR.written(read_batch("Wh", as_text=False)[0], [result()])


def test_refusals_in_kind() -> None:
    short, openai = read_batch("x\n" + openai_line(TEXT, {"prompt": "y"}, "c"), as_text=False)
    assert AUTHOR.refused(short, ContextError("too long")) == {
        "id": 1,
        "error": {"code": "context", "message": "line 1: too long"},
    }
    written = AUTHOR.refused(openai, ContextError("too long"))
    assert written["response"]["status_code"] == 400
    error = written["response"]["body"]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "context_length_exceeded"
    error = AUTHOR.refused(openai, OptionError("prompt: it is empty"))["response"]["body"]["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "prompt")
    (nowhere,) = read_batch('{"custom_id": "d", "url": ["x"], "body": {"prompt": "y"}}', as_text=False)
    assert nowhere.error
    assert AUTHOR.refused(nowhere, nowhere.error)["response"]["body"]["error"]["param"] is None


def test_a_digest_is_of_what_is_asked() -> None:
    first, same, other = read_batch('{"prompt": "a", "seed": 1}\n{"seed": 1, "prompt": "a"}\nb', as_text=False)
    assert first.digest == same.digest != other.digest


def test_what_says_nothing_may_stand_in_a_message() -> None:
    said: dict[str, Any] = {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": [], "annotations": []}
    (asked,) = read_batch(openai_line(CHAT, {"messages": [said]}), as_text=False)
    assert asked.error is None
    assert asked.tasks[0]["messages"] == [{"role": "assistant", "content": "Yes"}]


def test_notes_become_warnings() -> None:
    chat, short = read_batch(openai_line(CHAT, {"messages": []}) + '\n{"messages": []}', as_text=False)
    noted = replace(result(), notes=("laid out otherwise",))
    assert AUTHOR.written(chat, [noted, noted])["response"]["body"]["warnings"] == ["laid out otherwise"]
    assert AUTHOR.written(short, [noted])["warnings"] == ["laid out otherwise"]
    assert "warnings" not in AUTHOR.written(short, [result()])
