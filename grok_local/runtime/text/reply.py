"""An answer: streamed as it is computed, with what it took."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from grok_local.runtime.scheduling.generation import FinishReason, Generation, Request, Stats

if TYPE_CHECKING:
    from grok_local.runtime.graph.rows import Token
    from grok_local.runtime.scheduling.turns import Turns
    from grok_local.runtime.text.structure import Structure

__all__ = ["AsyncReply", "Reply", "Stats", "TokenLogprob"]

_MOST_READERS = 256  # sequences that llama.cpp takes together


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer with the natural logarithm of its probability as the model has it, before any sampling
    option; `piece` are its bytes, of which the token that ends the text has none, and `top` the likeliest tokens at its
    place, among which it has a `rank`.
    """

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]
    rank: int = 1

    @classmethod
    def of(cls, token: Token) -> TokenLogprob:
        """Of a token that came with them."""
        assert token.likely is not None
        return cls(token.id, token.piece, token.likely.chosen, token.likely.top, token.likely.rank)


class Reply(Iterator[str]):
    """Streams an answer's text; nothing is computed before the first piece is asked for.

    When it has ended, `text` is all of it, `tokens` its ids, `stats` what it took, and `finish_reason` why it ended:
    "stop" (the model's end token or a stop string), "length" (max_tokens), "context" (full), or "interrupted". Several
    replies of a model may be read in turns and by several threads. Those that the model has places for go on together;
    others wait, or where nobody reads the ones before them, take their places: going on later costs those reading
    prompt and answer anew.
    """

    def __init__(self, request: Request, turns: Turns, *, size: int, structure: Structure | None = None) -> None:
        self._generation = Generation(request, size)
        self._turns, self._structure = turns, structure
        self._is_submitted = self._is_over = False

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that are continued."""
        return self._generation.request.prompt

    @property
    def tokens(self) -> list[int]:
        """The tokens so far, without the one that ends the text."""
        return self._generation.tokens

    @property
    def text(self) -> str:
        """The text that was read so far."""
        return self._generation.text

    @property
    def stats(self) -> Stats:
        """What it took so far."""
        return self._generation.stats

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while there is text to be read."""
        return None if self._generation.has_text else self._generation.finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of each token so far; None where they were not asked for."""
        wanted = self._generation.request.likely is not None
        return [TokenLogprob.of(token) for token in self._generation.scored] if wanted else None

    @property
    def parsed(self) -> Any:
        """What a complete answer in the form of a schema says; None for others, and for one that was cut off."""
        return self._structure.parsed(self.text) if self._structure and self.is_whole else None

    @property
    def is_whole(self) -> bool:
        """Whether the answer has the form that was asked for, and not only the beginning of something that has."""
        return self._structure is not None and self.finish_reason == "stop"

    def cancel(self) -> None:
        """Nobody wants the rest: it ends with the step under way. From any thread."""
        self._generation.is_cancelled = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        generation = self._generation
        if not self._is_submitted:
            self._is_submitted = True
            self._turns.submit(generation)
        self._turns.until(lambda: generation.has_text or generation.has_ended, reading=[generation])
        text = generation.take()
        if generation.has_ended and not self._is_over:
            self._is_over = True
            self._ended()
        if text:
            return text
        if generation.error:
            raise generation.error
        raise StopIteration

    def __del__(self) -> None:
        if hasattr(self, "_generation"):
            self.cancel()

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.finish_reason:
            return f"<{name}: {self.text!r}, ended by {self.finish_reason!r}>"
        state = f"{self.text!r} so far" if self.tokens else "not read yet"
        return f"<{name}: {state}; iterate over it, as in ''.join(reply)>"

    def _ended(self) -> None:
        """The answer is over."""


class AsyncReply(AsyncIterator[str]):
    """Streams an answer's text in an event loop, which goes on with other things meanwhile.

    `reply` has what is known of it: its text, tokens, finish_reason, stats. Cancelling the task that reads it ends it.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        try:
            piece = await asyncio.get_running_loop().run_in_executor(_readers(), next, self.reply, None)
        except asyncio.CancelledError:
            self.reply.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece


@cache
def _readers() -> ThreadPoolExecutor:
    """Threads that wait for text: as many as answers are read at once, so that these go on together."""
    return ThreadPoolExecutor(_MOST_READERS, thread_name_prefix="grok-local-reader")
