"""OpenAI's endpoints as the official client and plain HTTP see them, compared with the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from grok_local.library.built_in import MANNER
from samples.rewritten import rewritten
from tests.serve.conftest import Running, started

PROMPT = "Once upon a time"


def complete(server: Running, **body: Any) -> dict[str, Any]:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def generated(server: Running, prompt: Any, **options: Any) -> str:
    """What a model says with nobody beside it."""
    task = server.service.tasks.prepare(0, {"prompt": prompt, "temperature": 0, **options})
    (result,) = server.service.model.run([task])
    return result.text


def test_a_text_is_continued_as_the_model_does(server: Running) -> None:
    expected = generated(server, PROMPT, max_tokens=9)
    answer = server.openai().completions.create(model="tiny", prompt=PROMPT, max_tokens=9, temperature=0)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    assert answer.usage.prompt_tokens == len(server.service.model.tokenize(PROMPT))
    assert answer.system_fingerprint == "fp_test"


def test_a_stream_says_the_same(server: Running) -> None:
    expected = generated(server, PROMPT, max_tokens=9)
    create = server.openai().completions.create
    wanted: Any = {"stream_options": {"include_usage": True}, "temperature": 0}
    chunks = list(create(model="tiny", prompt=PROMPT, max_tokens=9, stream=True, extra_body=wanted))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert not chunks[-1].choices
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_wire_of_a_stream(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    with server.http() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line for line in answer.text.split("\n\n") if line]
    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(server: Running) -> None:
    prompts = ["one two", "three four five"]
    answer = complete(server, prompt=prompts, n=2, max_tokens=4)
    expected = [generated(server, prompt, max_tokens=4) for prompt in prompts for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    tokens = sum(len(server.service.model.tokenize(prompt)) for prompt in prompts)
    assert answer["usage"]["prompt_tokens"] == tokens


def test_token_ids_are_taken_as_they_are(server: Running) -> None:
    ids = [server.service.model.tokenize(text) for text in ("one two", "three four five")]
    alone = complete(server, prompt=ids[0], max_tokens=4)
    both = complete(server, prompt=ids, max_tokens=4)
    assert both["choices"][0]["text"] == alone["choices"][0]["text"] == generated(server, "one two", max_tokens=4)


def test_the_best_of_several_has_the_highest_mean_logprob(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 1.5, "seed": 3, "logprobs": 0}
    several = complete(server, n=4, **body)["choices"]
    best = complete(server, n=1, best_of=4, **body)["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]) for c in several]
    assert best[0]["text"] == several[means.index(max(means))]["text"]
    assert len({choice["text"] for choice in several}) == 4


def test_log_probabilities_of_a_prompt_are_the_models(trained_server: Running) -> None:
    server = trained_server
    model = server.service.model
    texts = ["a longer text about nothing " * 12, "short one", "another"]
    ids = [model.tokenize(text) for text in texts]
    answer = complete(server, prompt=ids, max_tokens=1, logprobs=1, echo=True)
    for choice, own, text, score in zip(answer["choices"], ids, texts, model.score(ids), strict=True):
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(own) + 1}
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:-1] == pytest.approx(score.logprobs[1:], abs=1e-4)
        assert choice["text"].startswith(text)
        for value, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
            assert value in top.values()
            assert value <= max(top.values())


def test_prompts_are_scored_in_pieces_beside_others_and_after_a_cached_one(trained_server: Running) -> None:
    server = trained_server
    model = server.service.model
    ids = [model.tokenize(f"{number} " + "words and words " * 30)[:250] for number in range(6)]
    first = complete(server, prompt=ids, max_tokens=0, logprobs=2, echo=True)["choices"]
    again = complete(server, prompt=ids[3], max_tokens=0, logprobs=2, echo=True)["choices"][0]
    for choice, score in zip(first, model.score(ids), strict=True):
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(score.logprobs[1:], abs=1e-4)
        assert choice["finish_reason"] == "length"
    assert again["logprobs"]["token_logprobs"][1:] == pytest.approx(
        first[3]["logprobs"]["token_logprobs"][1:], abs=1e-4
    )
    assert again["text"] == first[3]["text"]


def test_an_end_of_text_is_a_token_too(trained_server: Running) -> None:
    server = trained_server
    question = "Q: What is an expert?\nA:"
    (long,) = complete(server, prompt=question, max_tokens=200, logprobs=1)["choices"]
    assert (long["finish_reason"], long["ended_by"]) == ("stop", "stop")
    before = server.service.model.tokenize(question + long["text"])
    answer = complete(server, prompt=before, max_tokens=1, logprobs=1, echo=True)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert {len(values) for values in choice["logprobs"].values()} == {len(before) + 1}
    assert choice["logprobs"]["token_logprobs"][-1] == max(choice["logprobs"]["top_logprobs"][-1].values())


def test_offsets_are_where_tokens_begin(server: Running) -> None:
    (choice,) = complete(server, prompt=PROMPT, max_tokens=5, logprobs=0, echo=True)["choices"]
    told = choice["logprobs"]
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith(("bytes:", "token_id:")):
            assert choice["text"][offset:].startswith(token)


def test_a_streamed_echo_is_the_same(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 1, "echo": True}
    (whole,) = complete(server, **body)["choices"]
    with server.http() as http:
        text = http.post("/v1/completions", json={**body, "temperature": 0, "stream": True}).text
    chunks = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n")[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for c in choices if c["logprobs"] for value in c["logprobs"][name]] == whole["logprobs"][name]


def test_prompt_logprobs_as_vllm_tells_them(trained_server: Running) -> None:
    server = trained_server
    model = server.service.model
    ids = model.tokenize(PROMPT)
    (choice,) = complete(server, prompt=PROMPT, max_tokens=1, prompt_logprobs=1)["choices"]
    told, (score,) = choice["prompt_logprobs"], model.score([ids])
    assert told[0] is None
    assert [place[str(token)]["logprob"] for place, token in zip(told[1:], ids[1:], strict=True)] == pytest.approx(
        score.logprobs[1:], abs=1e-4
    )
    assert all(1 in [likely["rank"] for likely in place.values()] for place in told[1:])


def test_stop_strings(server: Running) -> None:
    whole = generated(server, PROMPT, max_tokens=12)
    stop = whole[6:9]
    (choice,) = complete(server, prompt=PROMPT, max_tokens=12, stop=[stop])["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_chat(server: Running) -> None:
    messages: Any = [{"role": "user", "content": "Who are you?"}]
    client = server.openai()
    answer = client.chat.completions.create(
        model="any", messages=messages, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.model == "any"
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 5
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    stream = client.chat.completions.create(
        model="any", messages=messages, max_tokens=5, temperature=0, stream=True, n=2
    )
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [answer.choices[0].message.content] * 2


class Verdict(pydantic.BaseModel):
    good: bool
    grade: int = pydantic.Field(ge=1, le=5)


def test_an_answer_is_parsed(server: Running) -> None:
    answer = server.openai().chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "Well?"}], response_format=Verdict, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_forms_of_our_own(server: Running) -> None:
    assert complete(server, prompt=PROMPT, choice=["yes", "no"])["choices"][0]["text"] in ("yes", "no")
    assert complete(server, prompt=PROMPT, regex="[0-9]{4}")["choices"][0]["text"].isdecimal()


@pytest.mark.parametrize(
    ("body", "part", "param"),
    [
        ({"prompt": "x", "max_token": 3}, "did you mean 'max_tokens'", "max_token"),
        ({"prompt": "x", "temperature": -1}, "0 (greedy) or more", "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "a number is wanted", "temperature"),
        ({"prompt": "x", "suffix": "y"}, "nothing is wanted", "suffix"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "at least n", "best_of"),
        ({"prompt": "x", "n": 1, "best_of": 2, "stream": True}, "not with stream", "best_of"),
        ({"prompt": [[]]}, "empty", "prompt"),
        ({"prompt": ""}, "empty", "prompt"),
        ({"prompt": []}, "empty", "prompt"),
        ({"prompt": [99999999]}, "not in the vocabulary", None),
        ({"prompt": {"a": 1}}, "a text, or a list of token ids", "prompt"),
        ({}, "a text, or a list of token ids", "prompt"),
        ({"prompt": "x", "temperature": 1e39}, "and finite", "temperature"),
        ({"prompt": "x", "logprobs": True}, "a whole number", "logprobs"),
        ({"prompt": "x", "stream_options": {"include_use": True}, "stream": True}, "did you mean", "stream_options"),
        ({"prompt": "x", "stream_options": {"include_obfuscation": True}, "stream": True}, "pieces", "stream_options"),
        ({"prompt": "x", "tool_choice": "auto"}, "'tool_choice' is not supported", "tool_choice"),
        ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "not with stream", "prompt_logprobs"),
        ({"prompt": "x", "progress": True}, "only with stream", "progress"),
        ({"prompt": "x", "regex": "(?=a)b"}, "regex", "regex"),
        ({"prompt": "x", "grammar": "root ::= ("}, "grammar", "grammar"),
    ],
)
def test_what_is_refused_says_why(server: Running, body: Any, part: str, param: str | None) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert part in error["message"]
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert answer.headers["x-should-retry"] == "false"


def test_a_schema_that_cannot_be_enforced_is_refused_before_any_token(server: Running) -> None:
    steps = server.engine.steps
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        server.openai().chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        )
    assert server.engine.steps == steps


def test_what_does_not_fit_is_refused_with_numbers(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        server.openai().completions.create(model="tiny", prompt="word " * 400, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="ask for at most 254"):
        server.openai().completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=255)
    assert complete(server, prompt=[5, 6, 7], max_tokens=254, stop=["\ufffd"])["choices"]


def test_lenient(start: Any) -> None:
    with start(is_lenient=True) as server:
        answer = complete(server, prompt="x", max_tokens=1, max_token=3)
        messages = [{"role": "user", "content": "x", "name": "me"}]
        with server.http() as http:
            chat = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
            count = http.post("/v1/messages/count_tokens", json={"messages": messages}).json()
    assert answer["warnings"] == ["ignored: 'max_token' is not supported here: did you mean 'max_tokens'?"]
    ignored = ["ignored: messages: 'name' is not supported here"]
    assert chat["warnings"] == count["warnings"] == ignored


@pytest.mark.parametrize(
    ("template", "system", "said"),
    [
        ("{% if %}", None, "as a transcript instead"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "Be brief.", "no system role"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", None, None),
    ],
)
def test_how_messages_were_laid_out_is_said(
    packed: Path, tmp_path: Path, template: str, system: str | None, said: str | None
) -> None:
    path = rewritten(packed, tmp_path / "x.gguf", keys={"tokenizer.chat_template": template})
    question = [{"role": "user", "content": "Who are you?"}]
    asked = [*([{"role": "system", "content": system}] if system else []), *question]
    with started(path) as server, server.http() as http:
        http.post("/v1/chat/completions", json={"messages": [{"role": "system", "content": "x"}, *question]})
        chat = http.post("/v1/chat/completions", json={"messages": asked, "max_tokens": 1}).json()
        body = {"messages": question, "max_tokens": 1} | ({"system": system} if system else {})
        message = http.post("/v1/messages", json=body).json()
        stream = http.post("/v1/chat/completions", json={"messages": asked, "max_tokens": 2, "stream": True}).text
    for warnings in (chat.get("warnings"), message.get("warnings")):
        assert warnings is None if said is None else said in warnings[0]
    assert said is None or said in stream


def test_what_the_built_in_model_was_trained_on_is_said_as_everywhere() -> None:
    with started(Path("tiny")) as running, running.http() as http:
        meta = http.get("/v1/models/tiny").json()["meta"]
        plan = running.service.model.placement.plan
    assert meta["n_ctx_train"] == plan.trained_context == MANNER.context
