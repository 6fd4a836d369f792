"""Clients that ask again: each finds its own answer, and nobody another's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from grok_local.errors import ModelError
from grok_local.library.sessions import session_folder
from grok_local.runtime.text.session import read_conversation
from tests.serve.conftest import Running, Start

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4, "session": "s"}


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(server: Running, attempt: int, body: Any = BODY, *, url: str = "/v1/completions", **more: Any) -> Any:
    """The answer to an attempt; None where the client hung up before it came."""
    headers = {"x-stainless-retry-count": str(attempt)}
    with contextlib.suppress(httpx.TimeoutException), server.http() as http:
        return http.post(url, json=body, headers=headers, **more)
    return None


def asked(server: Running, attempts: Sequence[int], body: Any = BODY, **more: Any) -> list[Any]:
    with ThreadPoolExecutor(len(attempts)) as pool:
        return list(pool.map(lambda attempt: ask(server, attempt, body, **more), attempts))


def ids(answers: Sequence[Any]) -> set[str]:
    assert {answer.status_code for answer in answers} == {200}
    return {answer.json()["id"] for answer in answers}


def test_who_was_refused_begins_an_answer_of_its_own(start: Start) -> None:
    with start(seconds=0.5, queue=1) as server, ThreadPoolExecutor(5) as pool:
        body = {**BODY, "max_tokens": 60}
        taken = [pool.submit(ask, server, 0, body) for _ in range(5)]
        until(lambda: len(server.service.loop.waiting) == 1 and server.service.loop.running == 4)
        assert {answer.status_code for answer in asked(server, [0, 0, 0], body)} == {429}
        assert {answer.status_code for answer in asked(server, [1, 1], body)} == {429}  # and joins nobody
        server.engine.seconds = 0.0
        first = ids([one.result() for one in taken])
        rest = ids(asked(server, [1, 2, 2], body))
        assert (len(first), len(rest), len(first | rest)) == (5, 3, 8)
        assert not server.service.refusals


def test_each_of_eight_finds_its_lost_answer_again(start: Start) -> None:
    with start(seconds=0.1) as server:
        asked(server, [0] * 8, {**BODY, "max_tokens": 60}, timeout=1.0)
        until(lambda: not server.service.loop.running)
        server.engine.seconds = 0.0
        ours = {one.id for some in server.service.exchanges.values() for one in some}
        found = ids(asked(server, [1] * 8, {**BODY, "max_tokens": 60}))
        assert found == ours
        assert (len(found), server.service.loop.figures.answers) == (8, 8)


def test_an_answer_that_was_sent_into_the_void_is_found_again_once(start: Start) -> None:
    with start() as server:
        first, second = ids([ask(server, 0)]), ids([ask(server, 0)])
        steps = server.engine.steps
        assert ids(asked(server, [1, 1])) == first | second
        assert server.engine.steps == steps
        assert not ids([ask(server, 1)]) & (first | second)
        assert server.service.loop.figures.answers == 3


def test_an_answer_under_way_is_taken_by_one_retry(start: Start) -> None:
    with start(seconds=0.1) as server, ThreadPoolExecutor(1) as pool:
        silent = pool.submit(ask, server, 0)
        until(lambda: server.service.loop.running == 1)
        both = [answer.json()["id"] for answer in asked(server, [1, 1])]
        assert silent.result().json()["id"] in both
        assert len(set(both)) == 2


def test_a_session_has_a_turn_once_that_was_asked_for_twice(start: Start) -> None:
    with start() as server:
        url = "/v1/chat/completions"
        answers = [ask(server, attempt, CHAT, url=url).json() for attempt in (0, 1)]
        assert answers[0] == answers[1]
        said = read_conversation(session_folder("s"))["messages"]
        assert [message["role"] for message in said] == ["user", "assistant"]
        assert ask(server, 0, CHAT, url=url).json()["id"] != answers[0]["id"]  # and the session is free
        assert len(read_conversation(session_folder("s"))["messages"]) == 4


def test_messages_as_anthropic_has_them_are_found_again(start: Start) -> None:
    with start() as server:
        body = {"messages": CHAT["messages"], "max_tokens": 4}
        assert ids([ask(server, attempt, body, url="/v1/messages") for attempt in (0, 1)]) == {
            one.id for some in server.service.exchanges.values() for one in some
        }


def test_what_rests_has_all_of_its_time(start: Start) -> None:
    headers, body = {"x-stainless-retry-count": "0"}, {**BODY, "max_tokens": 200}
    with start(seconds=0.1, grace=4.0) as server, server.http() as http:
        with http.stream("POST", "/v1/completions", json=body, headers=headers):  # until the first white space
            ((exchange,),) = server.service.exchanges.values()
            until(lambda: time.monotonic() > exchange.began + 2.5)
        until(lambda: time.monotonic() > exchange.began + 4.2)  # which is less after the hang-up
        assert server.service.exchanges
        assert server.service.loop.figures.answers == 0


def test_what_nobody_comes_for_is_given_up(start: Start) -> None:
    with start(seconds=0.1, grace=0.3) as server:
        assert ask(server, 0, {**BODY, "max_tokens": 200}, timeout=0.6) is None
        until(lambda: not server.service.exchanges, 5)
        until(lambda: server.service.loop.figures.answers == 1, 5)
        ask(server, 0, {**BODY, "max_tokens": 1})
        until(lambda: not server.service.exchanges, 5)


def test_a_patient_client_finds_its_answer_late(start: Start) -> None:
    with start(grace=0.1) as server, server.http() as http:
        found = []
        for attempt in (0, 1):
            headers = {"x-stainless-retry-count": str(attempt), "x-stainless-read-timeout": "600"}
            found.append(http.post("/v1/completions", json=BODY, headers=headers).json()["id"])
            time.sleep(0.5)
        assert found[0] == found[1]


def test_only_so_many_are_kept(start: Start) -> None:
    with start(most_kept=2) as server:
        answers = [ids([ask(server, 0, {**BODY, "seed": seed})]) for seed in range(3)]
        again = [ids([ask(server, 1, {**BODY, "seed": seed})]) == answers[seed] for seed in (2, 1, 0)]
        assert again == [True, True, False]


def test_a_failure_is_not_kept(start: Start) -> None:
    with start() as server:
        step, damaged = type(server.engine).step, [True]

        def fail(*arguments: Any) -> Any:
            if damaged:
                raise ModelError("broken")
            return step(server.engine, *arguments)

        server.engine.step = fail  # type: ignore[method-assign, assignment]
        assert ask(server, 0).status_code == 500
        damaged.clear()
        assert ask(server, 1).status_code == 200
