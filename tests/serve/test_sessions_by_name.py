"""Sessions through the API: what is kept of them, by whom, and that two answers never mix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from grok_local.errors import OptionError
from grok_local.library.sessions import session_folder
from grok_local.runtime.text.session import Session, read_conversation
from tests.serve.conftest import Running, Start, started

QUESTION = {"role": "user", "content": "What is an expert?"}
SECOND = {"role": "user", "content": "And a router?"}


@pytest.fixture(scope="module")
def talking(packed: Path) -> Iterator[Running]:
    with started(packed) as running:
        yield running


def asked(server: Running, *messages: dict[str, str], session: str | None = "s", **body: Any) -> Any:
    body = {"messages": list(messages), "max_tokens": 6, "temperature": 0, "session": session, **body}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def messages_of(name: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = read_conversation(session_folder(name)).get("messages", [])
    return found


@pytest.mark.parametrize("name", ["", "x" * 101, ".x", "a/b"])
def test_what_makes_a_name_is_said_with_its_length(name: str) -> None:
    with pytest.raises(OptionError, match="1 to 100 letters, digits, blanks, dots and dashes make a name, a letter"):
        session_folder(name)
    assert session_folder("x" * 100).name == "x" * 100


def test_a_session_goes_on_as_its_messages_would(talking: Running) -> None:
    first = text_of(asked(talking, QUESTION))
    reply = {"role": "assistant", "content": first}
    second = asked(talking, SECOND)
    whole = asked(talking, QUESTION, reply, SECOND, session=None)
    assert text_of(second) == text_of(whole)
    assert second["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert messages_of("s") == [QUESTION, reply, SECOND, {"role": "assistant", "content": text_of(second)}]


def test_what_the_system_says_is_kept_until_it_says_otherwise(talking: Running) -> None:
    system = {"role": "system", "content": "Be brief."}
    asked(talking, system, QUESTION)
    assert read_conversation(session_folder("s"))["system"] == "Be brief."
    kept = asked(talking, SECOND)
    given = asked(talking, system, *messages_of("s")[:2], SECOND, session=None)
    assert kept["usage"]["prompt_tokens"] == given["usage"]["prompt_tokens"]
    asked(talking, {**system, "content": "Be long."}, QUESTION)
    assert read_conversation(session_folder("s"))["system"] == "Be long."


def test_a_stream_is_kept_when_it_has_ended(talking: Running) -> None:
    messages: Any = [QUESTION]
    create = talking.openai().chat.completions.create
    chunks = list(create(model="tiny", messages=messages, max_tokens=6, stream=True, extra_body={"session": "s"}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert messages_of("s") == [QUESTION, {"role": "assistant", "content": text}]


def test_the_command_line_goes_on_with_it(talking: Running) -> None:
    asked(talking, QUESTION)
    with Session(session_folder("s"), talking.service.model) as session:
        assert session.messages == messages_of("s")
        assert session.resume() is None
    asked(talking, SECOND)
    assert len(messages_of("s")) == 4


def test_two_at_once_are_refused(start: Start) -> None:
    with start(seconds=0.05) as server:
        client = server.openai(max_retries=0)
        messages: Any = [QUESTION]
        create = client.chat.completions.create
        stream = create(model="tiny", messages=messages, max_tokens=100, stream=True, extra_body={"session": "s"})
        next(iter(stream))
        with pytest.raises(openai.ConflictError) as caught:
            create(model="tiny", messages=messages, max_tokens=2, extra_body={"session": "s"})
        assert caught.value.code == "in_use"
        assert caught.value.response.headers["x-should-retry"] == "false"
        asked(server, QUESTION, session="other")
        stream.close()
        while server.service.exchanges:
            pass
        assert messages_of("s") == []  # what nobody read to its end is not kept
        asked(server, QUESTION, max_tokens=2)
        assert len(messages_of("s")) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"session": "../etc"}, "letters, digits"),
        ({"session": 5}, "a text is wanted"),
        ({"n": 2}, "n has to be 1"),
        ({"messages": []}, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"max_tokens": 100_000}, "ask for at most"),
    ],
)
def test_what_is_refused_costs_a_session_nothing(talking: Running, change: dict[str, Any], said: str) -> None:
    with talking.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": [QUESTION], "session": "s", **change})
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text
    assert messages_of("s") == []
    asked(talking, QUESTION)  # and it is free


def test_where_the_context_is_full_the_oldest_are_left_out(talking: Running) -> None:
    long = {"role": "user", "content": "What is an expert? " * 12}
    answers = [asked(talking, long) for _ in range(4)]
    assert "oldest messages of the session were left out" in answers[-1]["warnings"][0]
    assert len(messages_of("s")) == 8
