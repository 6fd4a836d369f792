"""A conversation that is kept: what is taken back, and what the model died of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import grok_local
from grok_local.errors import WorkerLost
from grok_local.runtime.text.session import Session, read_conversation
from grok_local.views.conversation import Repl
from tests.workers import Worker

OPTIONS = {"max_tokens": 4, "temperature": 0}


def talk(packed: Path, folder: Path, lines: Iterable[str], **loading: Any) -> None:
    with (
        grok_local.load(packed, context=512, threads=1, **loading) as model,
        Session(folder, model) as session,
    ):
        assert session.resume() is None
        Repl(model, name=str(packed), system=None, options=OPTIONS, lines=lines, quiet=True, session=session).run()


def messages(folder: Path) -> list[str]:
    return [message["content"] for message in read_conversation(folder)["messages"] if message["role"] == "user"]


@pytest.mark.parametrize("command", ["/reset", "/undo"])
def test_what_was_forgotten_is_forgotten_on_disk(packed: Path, tmp_path: Path, command: str) -> None:
    def lines() -> Iterator[str]:
        yield "Hello"
        assert messages(tmp_path) == ["Hello"]
        yield command
        assert messages(tmp_path) == []  # whatever happens from here on
        yield "/exit"

    talk(packed, tmp_path, lines())
    assert messages(tmp_path) == []
    assert b"Hello" not in (tmp_path / "conversation.json").read_bytes()
    talk(packed, tmp_path, ["Hello"])
    assert (tmp_path / "state.bin").exists()
    talk(packed, tmp_path, [command])
    assert messages(tmp_path) == []
    assert not (tmp_path / "state.bin").exists()
    talk(packed, tmp_path, ["Hello again"])
    assert messages(tmp_path) == ["Hello again"]


def test_one_question_of_two_is_taken_back(packed: Path, tmp_path: Path) -> None:
    talk(packed, tmp_path, ["Hello", "And now?"])
    talk(packed, tmp_path, ["/undo"])
    assert messages(tmp_path) == ["Hello"]
    talk(packed, tmp_path, ["And then?"])
    assert messages(tmp_path) == ["Hello", "And then?"]


@pytest.mark.parametrize("lines", [[], ["/reset"], ["/undo"], ["/system Be brief."]])
def test_a_session_without_a_word_is_not_kept(packed: Path, tmp_path: Path, lines: list[str]) -> None:
    talk(packed, tmp_path, lines)
    assert not (tmp_path / "conversation.json").exists()


def test_what_the_model_died_of_is_told(packed: Path, tmp_path: Path) -> None:
    with Worker() as worker:

        def lines() -> Iterator[str]:
            yield "Hello"
            worker.end()
            yield "And now?"

        with pytest.raises(WorkerLost, match=worker.endpoint):
            talk(packed, tmp_path, lines(), workers=[worker.endpoint])
    assert messages(tmp_path) == ["Hello"]
