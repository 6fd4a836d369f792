"""Anthropic's endpoints as the official client and plain HTTP see them, compared with the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.serve.conftest import Running, Start

QUESTION = [{"role": "user", "content": "What is an expert?"}]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "messages": QUESTION}
GREEDY = {"temperature": 0}  # the client has no name for it any more, and sends it beside


@pytest.fixture
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none") as found:
        yield found


def said(server: Running, messages: Any, **options: Any) -> Any:
    """What a model says with nobody beside it."""
    task = server.service.tasks.prepare(0, {"messages": messages, "temperature": 0, **options})
    (result,) = server.service.model.run([task])
    assert result.error is None
    return result


def create(client: anthropic.Anthropic, **options: Any) -> anthropic.types.Message:
    more = {**GREEDY, **options.pop("extra_body", {})}
    found = client.messages.create(**{**BODY, **options}, extra_body=more)
    assert isinstance(found, anthropic.types.Message)
    return found


def text_of(message: anthropic.types.Message) -> str:
    (block,) = message.content
    assert isinstance(block, anthropic.types.TextBlock)
    return block.text


def refusal(server: Running, **body: Any) -> tuple[int, str, str]:
    with server.http() as http:
        answer = http.post("/v1/messages", json={**BODY, **GREEDY, **body})
    told = answer.json()
    assert set(told) == {"type", "error"}
    assert told["type"] == "error"
    return answer.status_code, told["error"]["type"], told["error"]["message"]


def test_an_answer_is_the_model_s(server: Running, client: anthropic.Anthropic) -> None:
    expected = said(server, QUESTION, max_tokens=8)
    message = create(client)
    assert text_of(message) == expected.text
    assert (message.type, message.role, message.model) == ("message", "assistant", "tiny")
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.input_tokens == expected.stats.prompt_tokens
    assert message.usage.output_tokens == 8


def test_a_stream_says_the_same(client: anthropic.Anthropic) -> None:
    whole = create(client)
    with client.messages.stream(**BODY, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(whole) == text_of(final)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert final.usage.input_tokens == whole.usage.input_tokens


def test_the_wire_of_a_stream(server: Running) -> None:
    with server.http() as http:
        answer = http.post("/v1/messages", json={**BODY, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == [json.loads(data.removeprefix("data: "))["type"] for _, data in events]
    assert names[:3] == ["message_start", "content_block_start", "ping"]
    assert set(names[3:-3]) <= {"content_block_delta", "ping"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_tokens_are_counted_as_they_are_read(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"messages": QUESTION, "system": "Be brief."}
    counted = client.messages.count_tokens(model="tiny", **asked)
    assert counted.input_tokens == create(client, **asked).usage.input_tokens
    assert counted.input_tokens != client.messages.count_tokens(model="tiny", messages=QUESTION).input_tokens  # type: ignore[arg-type]


def test_texts_and_blocks_are_one(server: Running, client: anthropic.Anthropic) -> None:
    blocks = [
        {"type": "text", "text": "What is "},
        {"type": "text", "text": "an expert?", "cache_control": {"type": "ephemeral"}},
    ]
    system = [{"type": "text", "text": "Be brief."}]
    message = create(client, messages=[{"role": "user", "content": blocks}], system=system)
    expected = said(server, [{"role": "system", "content": "Be brief."}, *QUESTION], max_tokens=8)
    assert text_of(message) == expected.text
    assert message.usage.input_tokens == expected.stats.prompt_tokens


def test_what_one_says_twice_is_one_turn(client: anthropic.Anthropic) -> None:
    parts = ["What is an expert?", "And a router?"]
    apart = create(client, messages=[{"role": "user", "content": text} for text in parts])
    together = create(client, messages=[{"role": "user", "content": "\n\n".join(parts)}])
    assert apart.usage.input_tokens == together.usage.input_tokens
    assert text_of(apart) == text_of(together)


def test_the_assistant_s_last_message_is_gone_on_with(server: Running, client: anthropic.Anthropic) -> None:
    model = server.service.model
    whole = said(server, QUESTION, max_tokens=12)
    begun = next(text for text in (model.detokenize(whole.tokens[:count]).strip() for count in (4, 5, 6)) if text)
    message = create(client, messages=[*QUESTION, {"role": "assistant", "content": begun}])
    laid = model.conversation.lay_out(QUESTION, reserve=1)
    reply = model.generate([*laid.ids, *model.engine.continue_ids(f" {begun}")], max_tokens=8, temperature=0)
    assert text_of(message) == "".join(reply)


def test_reasons_of_an_end(server: Running, client: anthropic.Anthropic) -> None:
    text = said(server, QUESTION, max_tokens=8).text
    stop = text[2:5]
    message = create(client, stop_sequences=["never said", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == text[: text.index(stop)]
    long = create(client, max_tokens=20_000)
    assert long.stop_reason in ("model_context_window_exceeded", "end_turn")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    formed = create(client, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=40)
    assert (formed.stop_reason, type(json.loads(text_of(formed))["ok"])) == ("end_turn", bool)
    chosen = create(client, extra_body={"choice": ["yes", "no"]})
    assert (chosen.stop_reason, text_of(chosen) in ("yes", "no")) == ("end_turn", True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"tools": [{"name": "x"}]}, "calls no tools"),
        ({"tool_choice": {"type": "auto"}}, "calls no tools"),
        ({"system": [{"type": "text", "text": ""}]}, "a text is empty"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "at least 1"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "type text"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "goes into system"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "Yes "}]}, "white space"),
        ({"messages": [{"role": "assistant", "content": "Yes"}]}, "user"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "the context 256"),
        ({"messages": "x"}, "a list is wanted"),
        ({"messages": [{**QUESTION[0], "name": "me"}]}, "messages: 'name'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "lang": "de"}]}]}, "'lang'"),
        ({"system": [{"type": "text", "text": "x", "texd": "y"}]}, "did you mean 'text'"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}, "name": "x"}}}, "'name'"),
        ({"metadata": {"session": "x"}}, "session"),
        ({"stop_sequences": [1]}, "stop_sequences: texts"),
        ({"stop_sequences": [""]}, "stop_sequences: texts"),
    ],
)
def test_what_is_refused(server: Running, change: dict[str, Any], said: str) -> None:
    status, kind, message = refusal(server, **change)
    assert (status, kind) == (400, "invalid_request_error")
    assert said in message


def test_errors_by_class(start: Start) -> None:
    with start(key="secret") as server:
        with (
            anthropic.Anthropic(base_url=server.url, api_key="wrong") as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            create(client)
        with anthropic.Anthropic(base_url=server.url, api_key="secret") as client:
            with pytest.raises(anthropic.BadRequestError) as caught:
                create(client, extra_body={"top_k": "x"})
            assert caught.value.body == {
                "type": "error",
                "error": {"type": "invalid_request_error", "message": "top_k 'x': a whole number is wanted"},
            }
            assert text_of(create(client))
        with server.http() as http:
            found = http.get("/v1/messages", headers={"x-api-key": "secret"})
        assert (found.status_code, found.json()["type"]) == (405, "error")


def test_a_full_queue(start: Start) -> None:
    with (
        start(seconds=0.05, queue=1) as server,
        anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client,
    ):
        streams = [client.messages.create(**{**BODY, "max_tokens": 100}, stream=True) for _ in range(5)]
        with pytest.raises(anthropic.RateLimitError) as caught:
            create(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()


def test_slow_answers_are_kept_alive(start: Start) -> None:
    with start(seconds=0.1) as server, server.http() as http:
        headers = {"x-stainless-read-timeout": "0.6"}
        answer = http.post("/v1/messages", json=BODY, headers=headers)
        assert answer.content.startswith(b" ")
        assert answer.json()["type"] == "message"


def test_a_slow_stream_pings(start: Start) -> None:
    with (
        start(seconds=1.5) as server,
        server.http() as http,
        http.stream("POST", "/v1/messages", json={**BODY, "stream": True}) as answer,
    ):
        seen = []
        for line in answer.iter_lines():
            seen.append(line)
            if seen.count("event: ping") == 2:
                break
    told = next(line for line in seen if line.startswith(": "))
    assert json.loads(told.removeprefix(": "))["prompt_tokens"] > 0


def test_an_error_amid_a_stream(start: Start) -> None:
    with start(seconds=0.05) as server, anthropic.Anthropic(base_url=server.url, api_key="x") as client:
        stream = client.messages.create(**{**BODY, "max_tokens": 100}, stream=True)
        next(iter(stream))
        server.service.loop.stop()
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(stream)
        assert "stopping" in str(caught.value)
