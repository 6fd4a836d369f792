"""What a slow answer needs: to be waited for, joined, given up, overtaken, refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from grok_local.errors import ModelError
from grok_local.serve.engine_loop import BACKGROUND, Answer, EngineLoop
from samples.grammars import AMBIGUOUS
from tests.serve.conftest import Start

PROMPT = "Once upon a time"


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_answer_of_six_seconds_outlasts_a_client_of_two(start: Start) -> None:
    with start(seconds=0.5) as server:
        client = server.openai(timeout=httpx.Timeout(1.5), max_retries=0)
        began = time.monotonic()
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=11, temperature=0)
        assert time.monotonic() - began > 5
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 11
        assert server.service.requests == {("/v1/completions", 200): 1}


def test_an_error_after_the_white_space_is_told_in_the_body(start: Start) -> None:
    with start(seconds=0.3) as server, server.http() as http:
        headers = {"x-stainless-read-timeout": "1"}
        body = {"prompt": PROMPT, "max_tokens": 200}
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(http.post, "/v1/completions", json=body, headers=headers)
            until(lambda: server.engine.steps == 4)
            server.service.loop.stop()
        answer = asked.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (200, "server_stopping")
    assert answer.text.startswith(" ")


def test_a_stream_says_how_far_it_is_from_the_first_second(start: Start) -> None:
    with start(seconds=1.3) as server, server.http() as http:
        body = {"prompt": PROMPT, "max_tokens": 2, "stream": True, "progress": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        read = len(server.service.model.tokenize(PROMPT))
    comments = [json.loads(line.removeprefix(": ")) for line in lines if line.startswith(": ")]
    events = [
        json.loads(lines[i + 1].removeprefix("data: ")) for i, line in enumerate(lines) if line == "event: progress"
    ]
    assert events == comments
    assert comments[0]["state"] in ("queued", "prompt")
    assert comments[-1]["state"] == "answer"
    assert comments[-1]["tokens"] == 1
    assert comments[-1]["prompt_tokens_done"] == comments[-1]["prompt_tokens"] == read
    assert comments[0]["seconds_left"] > comments[-1]["seconds_left"] > 0


def test_a_retry_joins_the_answer_under_way(start: Start) -> None:
    with start(seconds=0.1) as server, server.http() as http, ThreadPoolExecutor() as pool:
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.0}
        headers = {"x-stainless-retry-count": "1"}
        first = pool.submit(http.post, "/v1/completions", json=body)
        until(lambda: server.service.loop.running == 1)
        again = pool.submit(http.post, "/v1/completions", json=body, headers=headers)
        other = pool.submit(http.post, "/v1/completions", json={**body, "max_tokens": 19}, headers=headers)
        assert first.result().json() == again.result().json()
        assert other.result().json()["id"] != first.result().json()["id"]
        assert server.service.loop.figures.answers == 2


def test_a_client_that_lost_its_connection_finds_its_answer_again(start: Start) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.0}
    with start(seconds=0.1) as server:
        with contextlib.suppress(httpx.TimeoutException), server.http() as http:
            http.post("/v1/completions", json=body, headers={"x-stainless-retry-count": "0"}, timeout=0.6)
        until(lambda: not server.service.loop.running)
        steps = server.engine.steps
        time.sleep(0.3)
        assert server.engine.steps == steps  # it rests
        with server.http() as http:
            answer = http.post("/v1/completions", json=body, headers={"x-stainless-retry-count": "1"})
        assert answer.json()["usage"]["completion_tokens"] == 12
        assert server.engine.steps <= 14
        assert server.service.loop.figures.answers == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_hang_up_ends_the_work_within_a_step(start: Start, stream: bool) -> None:
    with start(seconds=0.1) as server:
        body = {"prompt": PROMPT, "max_tokens": 200, "stream": stream}
        asked = httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=0.5)
        with contextlib.suppress(httpx.TimeoutException), asked as answer:
            next(answer.iter_lines())
        until(lambda: not server.service.loop.running, 1)
        steps = server.engine.steps
        time.sleep(0.4)
        assert server.engine.steps <= steps + 1
        assert not server.service.exchanges


def test_a_hang_up_within_a_prompt(start: Start) -> None:
    with start(seconds=0.3, loading={"context": 4096}) as server:
        body = {"prompt": [5 + i % 200 for i in range(3500)], "max_tokens": 2}
        with contextlib.suppress(httpx.TimeoutException), server.http() as http:
            http.post("/v1/completions", json=body, timeout=0.5)
        until(lambda: not server.service.loop.running, 2)
        time.sleep(0.5)
        assert server.engine.steps <= 4


def test_who_asks_now_goes_before_a_batch(start: Start) -> None:
    with start(seconds=0.02) as server, server.http() as http:
        loop: EngineLoop = server.service.loop
        tasks = [{"prompt": [7 + number, 8, 9], "max_tokens": 200} for number in range(6)]
        prepared = asyncio.run(server.service.prepared("batch", tasks))

        async def batch() -> Answer:
            return loop.submit(prepared, rank=BACKGROUND)

        answer = asyncio.run(batch())
        until(lambda: loop.running == 4)
        began = time.monotonic()
        http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 10})
        assert time.monotonic() - began < 1.5
        assert not any(one.has_ended for one in answer.generations)
        assert sum(bool(one.tokens) for one in answer.generations) >= 4  # the displaced one keeps what it had
        loop.cancel(answer)


def test_a_full_queue_says_when_to_come_again(start: Start) -> None:
    with start(seconds=0.2, queue=1) as server, server.http() as http, ThreadPoolExecutor() as pool:
        body = {"prompt": PROMPT, "max_tokens": 60}
        some = [pool.submit(http.post, "/v1/completions", json={**body, "seed": seed}) for seed in range(4)]
        until(lambda: server.service.loop.running == 4)
        some.append(pool.submit(http.post, "/v1/completions", json=body))
        until(lambda: len(server.service.loop.waiting) == 1)
        now = http.get("/local/machine").json()["now"]
        assert (now["running"], now["queued"]) == (4, 1)
        figures = http.get("/metrics").text
        assert "grok_local_running 4\n" in figures
        assert "grok_local_waiting 1\n" in figures
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-should-retry"] == "true"
        with pytest.raises(openai.RateLimitError):
            server.openai(max_retries=0).completions.create(model="x", prompt="y")
        server.service.loop.stop()
        assert {one.result().status_code for one in some} <= {200, 503}


def test_a_deadline_ends_an_answer_with_what_there_is(start: Start) -> None:
    with start(seconds=0.1, loading={"context": 4096}) as server, server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 200, "timeout": 0.7}).json()
        (choice,) = answer["choices"]
        assert 2 <= answer["usage"]["completion_tokens"] <= 8
        assert (choice["finish_reason"], choice["ended_by"]) == ("length", "deadline")
        body = {"prompt": [5 + i % 200 for i in range(3500)], "max_tokens": 200}
        late = http.post("/v1/completions", json=body, headers={"x-timeout": "0.01"})
        assert late.status_code == 408
        assert late.headers["x-should-retry"] == "false"
        assert http.post("/v1/completions", json=body, headers={"x-timeout": "soon"}).status_code == 400


def test_a_failure_of_the_engine_is_told_and_survived(start: Start) -> None:
    with start() as server, server.http() as http:
        damaged, step = {"on": True}, type(server.engine).step

        def fail(*arguments: Any) -> Any:
            if damaged["on"]:
                raise ModelError("broken")
            return step(server.engine, *arguments)

        server.engine.step = fail  # type: ignore[method-assign, assignment]
        answer = http.post("/v1/completions", json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_failed")
        damaged["on"] = False
        assert http.post("/v1/completions", json={"prompt": PROMPT}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_ones_grammar_costs_the_others_nothing(start: Start, stream: bool) -> None:
    with start(seconds=0.02) as server, server.http() as http, ThreadPoolExecutor() as pool:
        other = pool.submit(http.post, "/v1/completions", json={"prompt": PROMPT, "max_tokens": 60, "temperature": 1})
        until(lambda: server.service.loop.running == 1)
        body = {"prompt": PROMPT, "max_tokens": 60, "grammar": AMBIGUOUS, "stream": stream}
        refused = http.post("/v1/completions", json=body)
        (told,) = (line for line in refused.text.splitlines() if '"error"' in line)
        error = json.loads(told.removeprefix("data: "))["error"]
        assert (error["code"], "too large" in error["message"]) == ("invalid_value", True)
        assert (other.result().status_code, other.result().json()["usage"]["completion_tokens"]) == (200, 60)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_leaves_what_is_done(start: Start, stream: bool) -> None:
    with start(seconds=0.1) as server, server.http() as http:
        body = {"prompt": PROMPT, "max_tokens": 8, "n": 5, "timeout": 1.2, "stream": stream, "temperature": 1}
        answer = http.post("/v1/completions", json=body)
    ended: dict[int, tuple[str, str]] = {}
    for told in _told(answer.text):
        for choice in told["choices"]:
            if choice["finish_reason"]:
                ended[choice["index"]] = choice["finish_reason"], choice["ended_by"]
    assert len(ended) == 5
    assert set(ended.values()) <= {("length", "length"), ("stop", "stop"), ("length", "deadline")}
    assert ("length", "deadline") in ended.values()


def _told(text: str) -> list[Any]:
    """The objects of an answer, whole or streamed."""
    lines = [line.strip().removeprefix("data: ") for line in text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize(("path", "timeout"), [("completions", 10**400), ("messages", 1e300), ("messages", 0)])
def test_a_deadline_that_nobody_can_keep_is_refused(start: Start, path: str, timeout: float) -> None:
    body = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    with start() as server, server.http() as http:
        answer = http.post(f"/v1/{path}", json={**body, "max_tokens": 2, "timeout": timeout})
        assert (answer.status_code, "timeout" in answer.json()["error"]["message"]) == (400, True)
        assert not server.service.loop.running
        assert not server.service.loop.waiting


def test_a_deadline_is_forgotten_with_its_answer(start: Start) -> None:
    with start(seconds=0.1) as server, server.http() as http, ThreadPoolExecutor() as pool:
        body = {"prompt": PROMPT, "max_tokens": 10, "timeout": 1000}
        asked = pool.submit(http.post, "/v1/completions", json=body)
        until(lambda: bool(server.service.exchanges))
        ((exchange,),) = server.service.exchanges.values()
        assert asked.result().status_code == 200
        assert exchange.deadline
        until(exchange.deadline.cancelled)
