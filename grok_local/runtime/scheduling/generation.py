"""One answer that is being generated: its tokens, its text, and why it ended. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from grok_local.errors import GrokLocalError, OptionError
from grok_local.runtime.scheduling.stream import TextStream
from grok_local.units import whole_number

if TYPE_CHECKING:
    from grok_local.runtime.engine.sampling import Sampling
    from grok_local.runtime.experts.waiting import ExpertStats
    from grok_local.runtime.graph.rows import Drawn, Token

__all__ = ["FinishReason", "Generation", "Request", "Stats"]

FinishReason = Literal["stop", "length", "context", "interrupted"]
_MOST_LIKELY = 100  # tokens whose log-probabilities can be had at each place
_WHOLE = {"max_tokens": "max_tokens", "likely": "logprobs", "prompt_likely": "prompt_logprobs"}  # as they are asked for


@dataclass(frozen=True)
class Request:
    """What is to be continued, and how. `max_tokens` None is no limit but the context's; `grammar` is llguidance's.

    `strip`: white space at the answer's start is left out. `likely`: at each token, the log-probabilities of how many
    alternatives are wanted; None for none, not even the token's own. `prompt_likely`: likewise of the prompt's tokens.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    strip: bool = False
    likely: int | None = None
    prompt_likely: int | None = None

    def __post_init__(self) -> None:
        for field_, name in _WHOLE.items():
            if (value := getattr(self, field_)) is not None:
                object.__setattr__(self, field_, whole_number(name, value))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OptionError(f"max_tokens {self.max_tokens}: must be at least 1, or -1 for no limit")
        for name, likely in (("logprobs", self.likely), ("prompt_logprobs", self.prompt_likely)):
            if likely is not None and not 0 <= likely <= _MOST_LIKELY:
                raise OptionError(f"{name} {likely}: must be 0 to {_MOST_LIKELY}")


@dataclass
class Stats:
    """What an answer took. Prompt tokens that were in the KV cache already are `cached_tokens`. The experts are those
    that were streamed, None where none are. Steps that several answers share count for each of them.
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
        """Tokens generated per second, without the first: that one comes with the prompt."""
        return max(self.generated_tokens - 1, 0) / self.generation_seconds if self.generation_seconds else 0.0

    def count(self, *, prompt_rows: int, seconds: float, experts: ExpertStats | None) -> None:
        """A step took so long, in which so many rows were the prompt's: none where it was a generated token's."""
        if prompt_rows:
            self.evaluated_tokens += prompt_rows
            self.prompt_seconds += seconds
            self.prompt_experts = _sum(self.prompt_experts, experts)
        else:
            self.generation_seconds += seconds
            self.generation_experts = _sum(self.generation_experts, experts)

    def described(self) -> dict[str, Any]:
        """For JSON; `experts` has what streaming read and waited for, for the prompt and for the generated tokens."""
        counts = {name: value for name, value in vars(self).items() if not name.endswith("_experts")}
        parts = (
            ("prompt", self.prompt_experts, self.evaluated_tokens),
            ("generation", self.generation_experts, self.generated_tokens),
        )
        experts = {name: part.described(tokens) for name, part, tokens in parts if part}
        return counts | ({"experts": experts} if experts else {})


@dataclass(eq=False)
class Generation:
    """An answer to `request` as far as it has come; `size` is the context's, in tokens.

    It has ended when there is a `finish_reason`, or the `error` that it died of. `text` is what was taken of it so far;
    `scored` are the tokens that came with log-probabilities, the one that ended the text among them; `read`
    are the prompt's likewise. Those of a lower
    `rank` go first, and take the places of higher ones; while one is held, nobody computes it.
    """

    request: Request
    size: int
    rank: int = 0
    tokens: list[int] = field(default_factory=list)
    scored: list[Token] = field(default_factory=list)
    read: list[Token] = field(default_factory=list)
    text: str = ""
    stats: Stats = field(default_factory=Stats)
    finish_reason: FinishReason | None = None
    error: GrokLocalError | None = None
    is_cancelled: bool = False
    is_held: bool = False

    def __post_init__(self) -> None:
        wished, room = self.request.max_tokens, self.size - len(self.request.prompt) + 1
        self._limit = min(wished or room, room)
        self._limited_by: FinishReason = "length" if self._limit == wished else "context"
        self._stream = TextStream(self.request.stop, strip=self.request.strip)
        self._fresh: list[str] = []
        self.unread = 0  # tokens that came since somebody took the text
        self.stats.prompt_tokens = len(self.request.prompt)

    @property
    def ids(self) -> list[int]:
        """The tokens of prompt and answer."""
        return [*self.request.prompt, *self.tokens]

    @property
    def longest(self) -> int:
        """How many tokens prompt and answer may have together."""
        return len(self.request.prompt) + self._limit

    @property
    def settled(self) -> int:
        """How many of its tokens need not be evaluated again where their keys and values are still there."""
        ids = len(self.request.prompt) + len(self.tokens)
        return ids if self.tokens or self.request.prompt_likely is None else len(self.read)

    def follow(self, known: Sequence[Token], *, start: int) -> None:
        """Take in log-probabilities of the prompt's tokens after its first `start`, some of them perhaps once more."""
        self.read[start - 1 :] = known

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._stream.matched

    @property
    def has_begun(self) -> bool:
        """Whether anything was computed for it."""
        return bool(self.tokens or self.stats.cached_tokens or self.stats.evaluated_tokens)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def add(self, drawn: Drawn) -> None:
        """Take in what comes next, up to the end of the answer if that is among it."""
        for token in drawn.tokens:
            self._add(token)
            if self.has_ended:
                return
        if drawn.is_over:
            self.end("stop")

    def end(self, reason: FinishReason) -> None:
        """Nothing more will come; it has only one end."""
        if not self.has_ended:
            self.finish_reason = reason
            self._fresh.append(self._stream.flush())

    def fail(self, error: GrokLocalError) -> None:
        """It dies of an error."""
        if not self.has_ended:
            self.error = error

    def take(self) -> str:
        """The text that came since the last time."""
        # More may come meanwhile, in the thread of another reader.
        count = len(self._fresh)
        fresh = "".join(self._fresh[:count])
        del self._fresh[:count]
        self.unread = 0
        self.text += fresh
        return fresh

    @property
    def has_text(self) -> bool:
        """Whether there is text to be taken."""
        return any(self._fresh)

    def _add(self, token: Token) -> None:
        if token.likely:
            self.scored.append(token)
        if token.is_end:
            self.end("stop")
            return
        self.tokens.append(token.id)
        self.unread += 1
        self.stats.generated_tokens += 1
        self._fresh.append(self._stream.push(token.piece))
        if self._stream.stopped:
            self.end("stop")
        elif len(self.tokens) >= self._limit:
            self.end(self._limited_by)


def _sum(before: ExpertStats | None, more: ExpertStats | None) -> ExpertStats | None:
    return before + more if before and more else more or before
