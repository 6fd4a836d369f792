"""The public face of a loaded model: tokenize, score, generate, chat."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from grok_local.errors import ContextError, ModelError, OptionError
from grok_local.placement.load_options import LoadOptions, wishes_of
from grok_local.runtime.engine.llama import Engine
from grok_local.runtime.engine.opening import Placement
from grok_local.runtime.engine.sampling import PENALTY_WINDOW, Sampling
from grok_local.runtime.experts import ExpertStats
from grok_local.runtime.text.chat import Conversation, Message
from grok_local.runtime.text.stream import TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from 3.11 on

    from grok_local.runtime.remote.client import AnyEngine

__all__ = ["Model", "Reply", "Stats", "load"]

FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclass
class Stats:
    """What an answer took. Prompt tokens that were in the KV cache already are `cached_tokens`. The experts are those
    that were streamed, None where none are.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    evaluated_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    prompt_experts: ExpertStats | None = None
    generation_experts: ExpertStats | None = None

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens evaluated per second."""
        return self.evaluated_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_speed(self) -> float:
        """Tokens generated per second."""
        return self.generated_tokens / self.generation_seconds if self.generation_seconds else 0.0

    def described(self) -> dict[str, Any]:
        """For JSON; `experts` has what streaming read and waited for, for the prompt and for the generated tokens."""
        counts = {name: value for name, value in vars(self).items() if not name.endswith("_experts")}
        if not (self.prompt_experts and self.generation_experts):
            return counts
        prompt = self.prompt_experts.described(self.evaluated_tokens)
        return counts | {
            "experts": {"prompt": prompt, "generation": self.generation_experts.described(self.generated_tokens)}
        }


class Reply(Iterator[str]):
    """Streams an answer's text; nothing is computed before the first `next`.

    When it has ended, `text` is all of it, `tokens` its ids, `stats` what it took, and `finish_reason` why it ended:
    "stop" (the model's end token or a stop string), "length" (max_tokens), "context" (full), or "interrupted".
    """

    def __init__(
        self, engine: AnyEngine, ids: Sequence[int], *, sampling: Sampling, max_tokens: int | None, stop: Sequence[str]
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise OptionError(f"max_tokens {max_tokens}: must be at least 1")
        self.prompt = tuple(ids)
        self.tokens: list[int] = []
        self.text = ""
        self.stats = Stats(prompt_tokens=len(ids))
        self.finish_reason: FinishReason | None = None
        self._engine = engine
        self._limit = min(max_tokens or engine.context_size, engine.context_size - len(ids) + 1)
        self._limited_by: FinishReason = "length" if self._limit == max_tokens else "context"
        self._stream = TextStream(stop)
        self._pieces = self._run(sampling)

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, sampling: Sampling) -> Iterator[str]:
        if not self._evaluate_prompt():
            self.finish_reason = "interrupted"
            return
        started, before = time.monotonic(), self._engine.expert_stats()
        self._engine.begin_sampling(sampling, self.prompt[-PENALTY_WINDOW:])
        while self.finish_reason is None:
            text = self._next_piece()
            self.stats.generation_seconds = time.monotonic() - started
            if self.finish_reason:
                self.stats.generation_experts = self._streamed_since(before)
            if text:
                self.text += text
                yield text

    def _evaluate_prompt(self) -> bool:
        started, before = time.monotonic(), self._engine.expert_stats()
        self._engine.interrupted = False
        self.stats.evaluated_tokens = self._engine.evaluate(self.prompt)
        self.stats.prompt_seconds = time.monotonic() - started
        self.stats.prompt_experts = self._streamed_since(before)
        self.stats.cached_tokens = len(self._engine.cached) - self.stats.evaluated_tokens
        return not self._engine.interrupted

    def _streamed_since(self, before: ExpertStats | None) -> ExpertStats | None:
        now = self._engine.expert_stats()
        return now.since(before) if now and before else None

    def _next_piece(self) -> str:
        """Sample a token and return the text that may be shown; sets `finish_reason` at the end."""
        token = self._engine.sample()
        if self._engine.is_end(token):
            self.finish_reason = "stop"
            return self._stream.flush()
        self.tokens.append(token)
        self.stats.generated_tokens += 1
        text = self._stream.push(self._engine.piece(token))
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._limit:
            self.finish_reason = self._limited_by
        elif self._engine.interrupted or not self._engine.extend([token]):
            self.finish_reason = "interrupted"
        return text + self._stream.flush() if self.finish_reason else text


class ChatReply(Reply):
    """A reply in a conversation: without white space at its start; remembered, so that the next turn costs only
    its own tokens.
    """

    def __init__(self, conversation: Conversation, ids: Sequence[int], *, dropped: int, **options: Any) -> None:
        super().__init__(conversation.engine, ids, **options)
        self.dropped_messages = dropped  # of the conversation's oldest, to make room
        self._conversation = conversation

    def _run(self, sampling: Sampling) -> Iterator[str]:
        try:
            yield from super()._run(sampling)
        finally:
            with suppress(ModelError):  # of a model that has died nothing needs to be remembered
                self._conversation.remember(self.tokens, self.text)

    def _next_piece(self) -> str:
        text = super()._next_piece()
        return text if self.text else text.lstrip()


class Model:
    """A GGUF, loaded. A context manager; not thread-safe."""

    def __init__(self, path: Path, engine: AnyEngine) -> None:
        self.path = path
        self.engine = engine
        self._conversation = Conversation(engine)

    @property
    def context_size(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.context_size

    @property
    def placement(self) -> Placement:
        """Where the weights are: the plan, what each place holds, and what was changed on the way."""
        return self.engine.placement

    @property
    def metadata(self) -> dict[str, Any]:
        """The GGUF's metadata."""
        return self.engine.metadata

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, with BOS where the model wants one (no Grok does)."""
        return self.engine.tokenize(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Raises OptionError for ids outside the vocabulary."""
        return self.engine.detokenize(ids)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [len(ids), vocabulary]: the logits after each position. Raises ContextError, OptionError."""
        return self.engine.logits(ids)

    def generate(
        self, prompt: str, *, max_tokens: int | None = None, stop: str | Sequence[str] = (), **sampling: Any
    ) -> Reply:
        """Continue `prompt`; iterate over the result for the text. `sampling`: the fields of `Sampling`.

        Raises ContextError if the prompt does not fit, OptionError for values out of range, TypeError for unknown
        names.
        """
        ids = self.engine.tokenize(prompt)
        self._check_room(ids)
        options = Sampling(**sampling)
        return Reply(self.engine, ids, sampling=options, max_tokens=max_tokens, stop=_as_list(stop))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> ChatReply:
        """Answer the last of `messages` ({"role": "system" | "user" | "assistant", "content": text}).

        A GGUF with a chat template uses it; a base model, as Grok-1 is, gets a transcript to continue. Of a
        conversation that goes on, only the new tokens are evaluated. When the context is full the oldest turns are
        left out, and `dropped_messages` says how many. Raises as `generate` does.
        """
        options = Sampling(**sampling)
        ids, dropped = self._conversation.prompt(messages, reserve=max_tokens)
        stops = [*self._conversation.layout.stop, *_as_list(stop)]
        return ChatReply(self._conversation, ids, dropped=dropped, sampling=options, max_tokens=max_tokens, stop=stops)

    def interrupt(self) -> None:
        """End the answer under way; from a signal handler or another thread."""
        self.engine.interrupt()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_room(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ContextError("the prompt is empty: there is nothing to continue")
        if len(ids) > self.context_size:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and the context {self.context_size}: shorten it, or give --context"
            )


def load(path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Model:
    """Load the GGUF at `path`; the options are those of `grok_local.load`.

    Raises GGUFError, ModelError, OptionError, PlacementError or WorkerError.
    """
    threads, workers, wishes = options.get("threads"), options.get("workers") or (), wishes_of(options)
    if not workers:
        return Model(Path(path), Engine(Path(path), threads=threads, wishes=wishes, say=options.get("say")))
    from grok_local.runtime.remote.client import RemoteEngine

    remote = RemoteEngine(Path(path), workers=tuple(workers), say=options.get("say"), threads=threads, wishes=wishes)
    return Model(Path(path), remote)


def _as_list(stop: str | Sequence[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop)
