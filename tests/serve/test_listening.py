"""When somebody is heard at an address, and what is said where another program has it."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from grok_local.errors import OptionError
from grok_local.serve.listening import bound, listen
from tests.serve.conftest import Start, started


def test_nobody_is_heard_before_there_is_somebody_to_answer() -> None:
    with bound("127.0.0.1", 0) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname()).close()


@pytest.mark.parametrize("is_early", [False, True])
def test_an_address_that_another_program_has(is_early: bool) -> None:
    with bound("127.0.0.1", 0) as first:
        if is_early:
            first.listen()
        port = first.getsockname()[1]
        line = rf"^cannot listen at 127\.0\.0\.1:{port}: Address already in use; give another --port$"
        with pytest.raises(OptionError, match=line):
            _served_at(port, meanwhile=first.listen)


def _served_at(port: int, *, meanwhile: Callable[[], object]) -> None:
    with bound("127.0.0.1", port) as sock:
        meanwhile()
        listen(_nothing, sock, ready=_never, leaving=_never, is_lost=_no)


async def _nothing(*_: object) -> None:
    raise AssertionError


def _never() -> None:
    raise AssertionError


def _no() -> bool:
    return False


def test_the_machine_at_work(start: Start) -> None:
    with start() as server, server.http() as http:
        http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 3, "temperature": 0})
        found = http.get("/local/machine").json()
        assert found["plan"] == {"verdict": "it fits"}
        assert (found["model"], found["context"], found["parallel"], found["experts"]) == ("tiny", 256, 4, None)
        now = found["now"]
        assert (now["running"], now["queued"], now["answers"], now["generated_tokens"]) == (0, 0, 1, 3)


def test_what_a_model_was_trained_on_is_said_as_its_plan_says() -> None:
    with started("tiny", loading={"context": 0}) as server, server.http() as http:
        told = http.get("/v1/models/tiny").json()
        plan = server.service.model.placement.plan
    assert told["meta"]["n_ctx_train"] == told["max_model_len"] == plan.trained_context == 512
    assert not any("trained on" in note for note in plan.notes)
