"""A plugin for simonw's `llm`: the models of this machine, as grok-local/NAME. llm finds it by the entry point `llm`.

llm imports it whatever it is asked to do: what takes long to import is imported when a model is run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field

from grok_local.errors import GrokLocalError, ModelError, OptionError
from grok_local.library.built_in import BUILT_IN
from grok_local.library.names import load, model_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm.models import Conversation, Prompt, Response
    from llm.parts import Message

    from grok_local.runtime.text.chat import ChatReply
    from grok_local.runtime.text.model import Model

__all__ = ["GrokLocal", "register_models"]

_LOADING = {"context", "threads", "kv_type", "memory", "gpu_layers", "experts_on", "template"}


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Name them all: the built-in one, and each GGUF in the models folder."""
    try:
        names = model_names()
    except OSError:  # a folder that may not be read is no reason to take llm down
        names = [BUILT_IN]
    for name in names:
        register(GrokLocal(name))


class GrokLocal(llm.Model):
    """A model by its name. It is loaded by its first prompt, and stays loaded for the next."""

    can_stream = True
    supports_schema = True

    class Options(llm.Options):
        """What `-o` takes: options of sampling, then of loading. What is left out is as on grok-local's command line.

        What values can be used is said by whoever uses them.
        """

        temperature: float | None = Field(None, description="0 always takes the likeliest token")
        max_tokens: int | None = Field(None, description="Most tokens of the answer")
        top_k: int | None = Field(None, description="Choose among this many tokens; 0 is off")
        top_p: float | None = Field(None, description="Choose among the likeliest with this much probability")
        min_p: float | None = Field(None, description="Leave out tokens less likely than this much of the likeliest")
        repeat_penalty: float | None = Field(None, description="Above 1 makes the last 64 tokens less likely")
        seed: int | None = Field(None, description="The same seed gives the same answer")
        stop: str | None = Field(None, description="The answer ends before this text")
        context: int | None = Field(None, description="Tokens that conversation and answer may have together")
        threads: int | None = Field(None, description="CPU threads")
        kv_type: str | None = Field(None, description="Type of the KV cache: f16, bf16 or f32")
        memory: str | None = Field(None, description="What the model may take of RAM, such as 48G")
        gpu_layers: int | str | None = Field(None, description="So many of the last layers go to devices, or all")
        experts_on: str | None = Field(None, description="cpu, gpu, or of how many layers the experts go to devices")
        template: str | None = Field(None, description="none for a plain transcript, or a file with a Jinja template")

    def __init__(self, name: str) -> None:
        self.name, self.model_id = name, f"grok-local/{name}"

    def execute(
        self, prompt: Prompt, stream: bool, response: Response, conversation: Conversation | None
    ) -> Iterator[str]:
        """Answer the last message. Raises llm.ModelError for every known failure, with what helps."""
        given = {name: value for name, value in prompt.options.model_dump().items() if value is not None}
        loading = {name: given.pop(name) for name in _LOADING & set(given)}
        with _failures_for_llm():
            reply = _running.model(self.name, loading).chat(
                [_plain(message) for message in prompt.messages], schema=prompt.schema or None, **given
            )
            if stream:
                yield from reply
            else:
                yield "".join(reply)
            _report(reply, response)


class _Running:
    """The model that was loaded last: two of Grok's size do not fit a machine's memory."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._key = ""
        self._model: Model | None = None

    def model(self, name: str, loading: Mapping[str, Any]) -> Model:
        """The one of that name, loaded so; another one is closed first. Raises as `grok_local.load` does."""
        key = json.dumps([name, sorted(loading.items())])
        with self._changing:
            if self._model is None or key != self._key:
                self._forget()
                self._model, self._key = load(name, **loading), key
            return self._model

    def forget(self) -> None:
        """Close it; the next prompt loads anew."""
        with self._changing:
            self._forget()

    def _forget(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            model.close()


_running = _Running()


@contextmanager
def _failures_for_llm() -> Iterator[None]:
    """Known failures as llm shows them, in a line. A model that has failed, or whose file has changed, is not kept."""
    try:
        yield
    except GrokLocalError as error:
        if isinstance(error, ModelError):
            _running.forget()
        raise llm.ModelError(str(error)) from error


def _plain(message: Message) -> dict[str, str]:
    """A message as `chat` takes it. Raises OptionError for what is no text; reasoning is nobody's but its model's."""
    parts = [part.to_dict() for part in message.parts]
    strange = sorted({part["type"] for part in parts} - {"text", "reasoning"})
    if strange:
        raise OptionError(f"a message with a {strange[0]}: grok-local takes text only")
    texts = [str(part["text"]) for part in parts if part["type"] == "text"]
    return {"role": message.role, "content": "".join(texts)}


def _report(reply: ChatReply, response: Response) -> None:
    """What llm logs of an answer: tokens, and why it ended."""
    stats = reply.stats
    details = {"cached": stats.cached_tokens} if stats.cached_tokens else None
    response.set_usage(input=stats.prompt_tokens, output=stats.generated_tokens, details=details)
    response.response_json = {
        "finish_reason": reply.finish_reason,
        "dropped_messages": reply.dropped_messages,
        "notes": list(reply.notes),
        "stats": stats.described(),
    }
