"""simonw's llm with our models: prompts, conversations and schemas say what `chat` says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import grok_local

pytest.importorskip("llm", reason="the group dev has llm")

import llm
from llm.parts import Message, ToolResultPart
from llm.plugins import load_plugins, pm

from grok_local.adapters import llm_plugin
from grok_local.adapters.llm_plugin import GrokLocal, register_models

QUESTION = "What is an expert?"
Get = Callable[[str], Any]


@pytest.fixture
def get(packed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Get:
    """llm's way to a model, with `small` in the models folder."""
    monkeypatch.setenv("LLM_USER_PATH", str(home / "llm"))
    (home / "models").mkdir(parents=True)
    shutil.copyfile(packed, home / "models" / "small.gguf")
    load_plugins()  # type: ignore[no-untyped-call]
    if not pm.is_registered(llm_plugin):  # this package was installed before it had the entry point
        pm.register(llm_plugin)
    return llm.get_model


def test_the_models_are_named(get: Get) -> None:
    names = {model.model_id for model in llm.get_models()}
    assert {"grok-local/tiny", "grok-local/small"} <= names
    registered: list[Any] = []
    register_models(registered.append)
    assert [model.model_id for model in registered] == ["grok-local/tiny", "grok-local/small"]
    assert isinstance(get("grok-local/small"), GrokLocal)


def test_an_answer_is_that_of_chat(get: Get) -> None:
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repeat_penalty": 1.1, "seed": 7}
    response = get("grok-local/tiny").prompt(QUESTION, system="Be brief.", max_tokens=30, **sampling)
    pieces = list(response)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    with grok_local.load("tiny") as model:
        reply = model.chat(messages, max_tokens=30, **sampling)  # type: ignore[arg-type]
        assert pieces == list(reply)
    assert len(pieces) > 5
    assert (response.input_tokens, response.output_tokens) == (reply.stats.prompt_tokens, reply.stats.generated_tokens)
    assert response.response_json["finish_reason"] == reply.finish_reason == "length"
    whole = get("grok-local/tiny").prompt(QUESTION, stream=False, stop="layer")
    assert len(list(whole)) == 1
    assert "layer" not in whole.text()


def test_a_conversation_goes_on_in_the_same_process(get: Get) -> None:
    conversation = get("grok-local/tiny").conversation()
    first = conversation.prompt(QUESTION, system="Be brief.", context=400)
    text = first.text()
    second = conversation.prompt("And a router?", context=400)
    answer = second.text()
    # The model is still there, and so is what it has read.
    assert second.token_details == {"cached": second.response_json["stats"]["cached_tokens"]}
    assert second.token_details["cached"] > first.input_tokens
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And a router?"}]
    with grok_local.load("tiny", context=400) as model:
        assert "".join(model.chat(messages)) == answer
    # Loaded otherwise, it has to read anew.
    third = conversation.prompt("And a layer?", context=300)
    assert third.text()
    assert third.token_details is None
    assert get("grok-local/small").prompt("Hi", max_tokens=3).text()


def test_a_schema_is_held_to(get: Get) -> None:
    schema = {
        "type": "object",
        "properties": {"command": {"enum": ["quantize", "pull"]}, "minutes": {"type": "integer", "maximum": 9}},
        "required": ["command", "minutes"],
        "additionalProperties": False,
    }
    answer = json.loads(get("grok-local/tiny").prompt("Which command packs?", schema=schema).text())
    assert answer["command"] in ("quantize", "pull")
    assert answer["minutes"] <= 9


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 0}, "max_tokens 0: must be at least 1"),
        ({"temperature": -1}, "temperature -1.0: must be 0"),
        ({"context": -5}, "context -5: must be 1 to"),
        ({"kv_type": "q3"}, "q3"),
        ({"memory": "7"}, "was 7G meant"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"messages": [Message("tool", [ToolResultPart(name="t", output="x")])]}, "a tool_result: .* text only"),
    ],
)
def test_known_failures_are_llms_errors(get: Get, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(llm.ModelError, match=reason):
        get("grok-local/tiny").prompt(QUESTION, **options).text()
    assert get("grok-local/tiny").prompt(QUESTION, max_tokens=3).text()


def test_a_model_whose_file_has_changed_is_loaded_again(get: Get, home: Path) -> None:
    assert get("grok-local/small").prompt("Hi", max_tokens=3).text()
    os.utime(home / "models" / "small.gguf", (1, 1))
    with pytest.raises(llm.ModelError, match="has changed since it was loaded"):
        get("grok-local/small").prompt("Hi", max_tokens=3).text()
    assert get("grok-local/small").prompt("Hi", max_tokens=3).text()


def test_importing_it_is_cheap() -> None:
    program = "import sys, llm; import grok_local.adapters.llm_plugin; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"llama_cpp", "gguf", "jinja2", "rich", "typer", "llguidance"} & set(done.stdout.split())


def test_llm_finds_it_where_it_is_installed(home: Path) -> None:
    names = [entry.name for entry in importlib.metadata.entry_points(group="llm")]
    if "grok-local" not in names:
        pytest.skip("this package was installed before it had the entry point: install it again")
    command = [sys.executable, "-m", "llm"]
    env = {**os.environ, "LLM_USER_PATH": str(home / "llm")}
    listed = subprocess.run([*command, "models"], env=env, capture_output=True, text=True, check=True).stdout
    assert "GrokLocal: grok-local/tiny" in listed
    failed = subprocess.run(
        [*command, "-m", "grok-local/tiny", "-o", "max_tokens", "0", "Hi"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (failed.returncode, failed.stderr) == (1, "Error: max_tokens 0: must be at least 1, or -1 for no limit\n")
