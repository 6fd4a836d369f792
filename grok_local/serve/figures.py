"""What a server counts, and what follows from it for those that wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grok_local.runtime.scheduling.generation import Generation

__all__ = ["AnswerProgress", "Figures"]

_WINDOW = 10.0  # seconds that "now" means
_LOOK_EVERY = 0.25


@dataclass(frozen=True)
class AnswerProgress:
    """How far an answer is: its place in the queue counts from 1, None where it has one in the model. `seconds_left` is
    at most so much, as far as can be said.
    """

    state: Literal["queued", "prompt", "answer"]
    place_in_queue: int | None
    prompt_tokens: int
    prompt_tokens_done: int
    tokens: int
    seconds_left: float

    @classmethod
    def of(cls, generations: Sequence[Generation], *, place: int | None, seconds_left: float) -> AnswerProgress:
        """Of the generations of one request."""
        prompt = sum(one.stats.prompt_tokens for one in generations)
        done = sum(_read(one) for one in generations)
        tokens = sum(len(one.tokens) for one in generations)
        begun = any(one.has_begun for one in generations)
        state: Literal["queued", "prompt", "answer"] = "answer" if tokens else "prompt" if begun else "queued"
        return cls(state, None if begun else place, prompt, done, tokens, round(seconds_left, 1))

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class Figures:
    """Counts since the start. `per_token` and `per_prompt_token` are the seconds that are assumed of a token of an
    answer, and of one of a prompt, until one was measured.
    """

    def __init__(self, *, per_token: float, per_prompt_token: float) -> None:
        self.answers = self.prompt_tokens = self.cached_tokens = self.tokens = 0
        self.prompt_seconds = self.generation_seconds = 0.0
        self._per_token, self._per_prompt_token = per_token, per_prompt_token
        self._seen: deque[tuple[float, int]] = deque(maxlen=round(_WINDOW / _LOOK_EVERY))

    def count(self, generation: Generation) -> None:
        """One has ended."""
        stats = generation.stats
        self.answers += 1
        self.prompt_tokens += stats.evaluated_tokens
        self.cached_tokens += stats.cached_tokens
        self.tokens += stats.generated_tokens
        self.prompt_seconds += stats.prompt_seconds
        self.generation_seconds += stats.generation_seconds
        if stats.generated_tokens and stats.generation_seconds:
            self._per_token = _mixed(self._per_token, stats.generation_seconds / stats.generated_tokens)
        if stats.evaluated_tokens and stats.prompt_seconds:
            self._per_prompt_token = _mixed(self._per_prompt_token, stats.prompt_seconds / stats.evaluated_tokens)

    def look(self, live: Iterable[Generation]) -> None:
        """A step was taken."""
        now = time.monotonic()
        if not self._seen or now - self._seen[-1][0] >= _LOOK_EVERY:
            self._seen.append((now, self.tokens + sum(len(one.tokens) for one in live)))

    @property
    def speed(self) -> float:
        """Tokens of answers a second, all together, in the last seconds."""
        now = time.monotonic()
        recent = [(at, tokens) for at, tokens in list(self._seen) if now - at <= _WINDOW]
        if len(recent) < 2:
            return 0.0
        return (recent[-1][1] - recent[0][1]) / (now - recent[0][0])

    def seconds_left(self, one: Generation, *, ahead: Sequence[Generation], places: int) -> float:
        """At most, for one that has so many ahead of it in the queue."""
        if one.has_ended:
            return 0.0
        waits = self.queue_seconds(ahead, places=places) if not one.has_begun else 0.0
        return waits + self._own_seconds(one)

    def queue_seconds(self, waiting: Sequence[Generation], *, places: int) -> float:
        """Until all of them are done."""
        return sum(map(self._own_seconds, waiting)) / places

    def _own_seconds(self, one: Generation) -> float:
        stats = one.stats
        per_token = stats.generation_seconds / stats.generated_tokens if stats.generation_seconds else self._per_token
        prompt = max(stats.prompt_tokens - _read(one), 0)
        rest = one.longest - stats.prompt_tokens - len(one.tokens)
        return prompt * self._per_prompt_token + rest * per_token


def _read(one: Generation) -> int:
    """Tokens of its prompt that were read, however often."""
    return min(one.stats.cached_tokens + one.stats.evaluated_tokens, one.stats.prompt_tokens)


def _mixed(before: float, now: float) -> float:
    return before + 0.2 * (now - before)
