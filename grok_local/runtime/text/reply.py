"""An answer: streamed as it is computed, with what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from grok_local.errors import OptionError
from grok_local.runtime.engine.sampling import PENALTY_WINDOW, Sampling
from grok_local.runtime.text.stream import TextStream

if TYPE_CHECKING:
    from grok_local.runtime.engine.protocol import Engine
    from grok_local.runtime.experts.waiting import ExpertStats
    from grok_local.runtime.text.structure import Structure
    from grok_local.runtime.text.turns import Turns

__all__ = ["Reply", "Stats"]

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
    """Streams an answer's text; nothing is computed before the first piece is asked for.

    When it has ended, `text` is all of it, `tokens` its ids, `stats` what it took, and `finish_reason` why it ended:
    "stop" (the model's end token or a stop string), "length" (max_tokens), "context" (full), or "interrupted". Several
    replies of a model may be read in turns; each change costs reading prompt and answer anew.
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        turns: Turns,
        *,
        sampling: Sampling,
        max_tokens: int | None,
        stop: Sequence[str],
        structure: Structure | None = None,
        strip: bool = False,
    ) -> None:
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise OptionError(f"max_tokens {max_tokens}: must be at least 1, or -1 for no limit")
        self.prompt = tuple(ids)
        self.tokens: list[int] = []
        self.text = ""
        self.stats = Stats(prompt_tokens=len(ids))
        self.finish_reason: FinishReason | None = None
        self._engine, self._turns = engine, turns
        self._limit = min(max_tokens or engine.context_size, engine.context_size - len(ids) + 1)
        self._limited_by: FinishReason = "length" if self._limit == max_tokens else "context"
        self._stream, self._structure = TextStream(stop, strip=strip), structure
        self._pieces = self._run(sampling)

    @property
    def parsed(self) -> Any:
        """What a complete answer in the form of a schema says; None for others, and for one that was cut off."""
        return self._structure.parsed(self.text) if self._structure and self.is_whole else None

    @property
    def is_whole(self) -> bool:
        """Whether the answer has the form that was asked for, and not only the beginning of something that has."""
        return self._structure is not None and self.finish_reason == "stop"

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.finish_reason:
            return f"<{name}: {self.text!r}, ended by {self.finish_reason!r}>"
        state = f"{self.text!r} so far" if self.tokens else "not read yet"
        return f"<{name}: {state}; iterate over it, as in ''.join(reply)>"

    def _run(self, sampling: Sampling) -> Iterator[str]:
        with self._turns.step(self):
            started, before = time.monotonic(), self._engine.expert_stats()
            self._engine.interrupted = False
            evaluated = self._engine.evaluate(self.prompt)
            self._count_prompt(evaluated, time.monotonic() - started, before)
            if self.finish_reason is None:
                grammar = self._structure.grammar if self._structure else None
                chain = self._engine.begin_sampling(sampling, self.prompt[-PENALTY_WINDOW:], grammar)
        if self.finish_reason:
            self._turns.done(self)
            return
        try:
            while self.finish_reason is None:
                with self._turns.step(self) as undisturbed:
                    text = self._next(chain) if undisturbed or self._came_back() else ""
                if text:
                    yield text
        finally:
            self._turns.done(self)
            self._ended()
            self._engine.end_sampling(chain)

    def _came_back(self) -> bool:
        """Whether everything so far is evaluated again: another reply had the engine in between."""
        self._engine.interrupted = False
        self._engine.evaluate([*self.prompt, *self.tokens])
        if self._engine.interrupted:
            self.finish_reason = "interrupted"
        return not self._engine.interrupted

    def _next(self, chain: int) -> str:
        """Sample a token and have it evaluated, unless it is the last. Returns the text that may be shown."""
        # Where nothing is streamed nobody needs to ask: the engine may be in another process.
        started, before = time.monotonic(), self._engine.expert_stats() if self.stats.prompt_experts else None
        tokens = self._forced(chain) if self._structure else []
        if not tokens and self.finish_reason is None:
            tokens = [self._engine.sample(chain)]
        text = "".join(self._accept(token) for token in tokens if self.finish_reason is None)
        if self.finish_reason is None and (self._engine.interrupted or self._engine.extend(tokens) < len(tokens)):
            self.finish_reason = "interrupted"
        if self.finish_reason:
            text += self._stream.flush()
        self.stats.generation_seconds += time.monotonic() - started
        if before:
            self._count_experts(before)
        self.text += text
        return text

    def _forced(self, chain: int) -> list[int]:
        """The tokens that a form leaves no choice about; sets `finish_reason` where it has ended."""
        forced = self._engine.forced(chain)
        if forced is None:
            self.finish_reason = "stop"
        return forced or []

    def _accept(self, token: int) -> str:
        """Take a sampled token in, and return the text that may be shown; sets `finish_reason` where it is the last."""
        if self._engine.is_end(token):
            self.finish_reason = "stop"
            return ""
        self.tokens.append(token)
        self.stats.generated_tokens += 1
        text = self._stream.push(self._engine.piece(token))
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._limit:
            self.finish_reason = self._limited_by
        return text

    def _count_prompt(self, evaluated: int, seconds: float, before: ExpertStats | None) -> None:
        self.stats.evaluated_tokens = evaluated
        self.stats.prompt_seconds = seconds
        self.stats.prompt_experts = self._streamed_since(before)
        self.stats.cached_tokens = len(self._engine.cached) - evaluated
        if self._engine.interrupted:
            self.finish_reason = "interrupted"

    def _count_experts(self, before: ExpertStats) -> None:
        more, so_far = self._streamed_since(before), self.stats.generation_experts
        self.stats.generation_experts = so_far + more if so_far and more else more

    def _streamed_since(self, before: ExpertStats | None) -> ExpertStats | None:
        now = self._engine.expert_stats()
        return now.since(before) if now and before else None

    def _ended(self) -> None:
        """The answer is over, or nobody wants the rest."""
