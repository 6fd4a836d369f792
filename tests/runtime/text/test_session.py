"""A conversation that is kept goes on without being read anew; what does not fit is read anew, and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import grok_local
from grok_local.errors import InUseError, OutputError
from grok_local.runtime.text.session import Session
from samples.rewritten import rewritten
from tests.conftest import Run


def asked(model: grok_local.Model, session: Session, question: str) -> grok_local.Reply:
    messages = [*session.messages, {"role": "user", "content": question}]
    reply = model.chat(messages, max_tokens=6, temperature=0)
    text = "".join(reply)
    session.messages = [*messages, {"role": "assistant", "content": text}]
    session.keep(session.messages, None)
    return reply


def begun(folder: Path, packed: Path) -> None:
    with grok_local.load(packed, context=512) as model, Session(folder, model) as session:
        asked(model, session, "What is an expert?")
        session.keep_state()


def test_it_goes_on_without_reading(packed: Path, tmp_path: Path) -> None:
    begun(tmp_path, packed)
    with grok_local.load(packed, context=512) as model, Session(tmp_path, model) as session:
        assert session.resume() is None
        reply = asked(model, session, "And a router?")
        assert reply.stats.cached_tokens >= reply.stats.prompt_tokens - 20
        resumed = session.messages[-1]["content"]
    with grok_local.load(packed, context=512, kv_type="f16") as model:
        expected = "".join(model.chat(session.messages[:3], max_tokens=6, temperature=0))
    assert resumed.split()[:2] == expected.split()[:2]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"kv_type": "f32"}, "another model"), ({"context": 16}, "context is smaller"), ({}, None)],
)
def test_what_does_not_fit_says_why(
    packed: Path, tmp_path: Path, options: dict[str, int | str], reason: str | None
) -> None:
    begun(tmp_path, packed)
    with grok_local.load(packed, **{"context": 512, **options}) as model, Session(tmp_path, model) as session:  # type: ignore[arg-type]
        problem = session.resume()
        assert (problem is None) if reason is None else (problem is not None and reason in problem)


def test_other_arithmetic_reads_it_anew(packed: Path, small_grok2: Path, tmp_path: Path) -> None:
    """What the KV cache holds of Grok-2 depends on whose gates computed it; Grok-1's does not."""
    grok2 = grok_local.quantize_checkpoint(small_grok2, tmp_path / "grok2.gguf").path
    for path, problem in ((packed, False), (grok2, True)):
        begun(tmp_path / path.stem, path)
        with (
            grok_local.load(path, context=512, routing="llama.cpp") as model,
            Session(tmp_path / path.stem, model) as session,
        ):
            assert bool(session.resume()) == problem


def test_another_model_reads_it_anew(packed: Path, tmp_path: Path) -> None:
    begun(tmp_path, packed)
    other = rewritten(packed, tmp_path / "other.gguf", keys={"general.name": "another"})
    with grok_local.load(other, context=512) as model, Session(tmp_path, model) as session:
        assert "another model" in (session.resume() or "")
        assert len(session.messages) == 2
        assert asked(model, session, "And?").stats.cached_tokens == 0


@pytest.mark.parametrize("damage", [b"", b"abc", None])
def test_a_damaged_state_is_not_given_to_llama_cpp(packed: Path, tmp_path: Path, damage: bytes | None) -> None:
    begun(tmp_path, packed)
    state = tmp_path / "state.bin"
    state.unlink() if damage is None else state.write_bytes(damage or state.read_bytes()[:-7])
    with grok_local.load(packed, context=512) as model, Session(tmp_path, model) as session:
        assert "damaged" in (session.resume() or "")


def test_two_at_once(packed: Path, tmp_path: Path) -> None:
    with grok_local.load(packed, context=256) as model, Session(tmp_path, model), pytest.raises(InUseError):
        Session(tmp_path, model)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 9}'])
def test_a_damaged_conversation(packed: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "conversation.json").write_text(content)
    with grok_local.load(packed, context=256) as model, pytest.raises(OutputError, match="sessions rm"):
        Session(tmp_path, model)


def test_sessions_on_the_command_line(run: Run, packed: Path) -> None:
    options = ("chat", "-m", packed, "--max-tokens", 4, "--temperature", 0, "--session")
    assert run(*options, "a b", stdin="Hello\n").returncode == 0
    again = run(*options, "a b", stdin="And?\n")
    assert "goes on after 2 messages" in again.stderr
    assert " cached" in again.stderr
    assert json.loads(run("sessions", "list", "--json").stdout)[0]["messages"] == 4
    exported = json.loads(run("sessions", "export", "a b").stdout)
    assert [message["role"] for message in exported["messages"]] == ["user", "assistant"] * 2
    assert run("sessions", "rm", "--yes", "a b").returncode == 0
    assert run("sessions", "rm", "a b").returncode == 2
    assert run(*options, "../x", stdin="Hello\n").returncode == 2
