"""Which tokens of the running sequences are evaluated together in the next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from grok_local.runtime.scheduling.generation import Generation

__all__ = ["Apart", "Chunk", "Composer", "Running", "Together"]

_PIECE = 256  # tokens of a prompt that are evaluated at once where it is evaluated alone
_MOST_OUTPUTS = (
    256  # tokens of prompts in a step whose logits are wanted: llama.cpp keeps them, float32 [tokens, vocabulary]
)


@dataclass(eq=False)
class Running:
    """A generation in a place of the KV cache, and the tokens of it that are still to be evaluated there.

    `number` says who came first among those of one rank.
    """

    generation: Generation
    number: int
    chain: int | None = None
    place: int = -1
    pending: list[int] = field(default_factory=list)

    @property
    def turn(self) -> tuple[int, int]:
        """Smaller is earlier."""
        return self.generation.rank, self.number

    @property
    def is_scored(self) -> bool:
        """Whether it is a prompt whose tokens' log-probabilities are wanted."""
        return self.in_prompt and self.generation.request.prompt_likely is not None

    @property
    def in_prompt(self) -> bool:
        """Whether no token of the answer has come yet."""
        return not self.generation.tokens


class Chunk(NamedTuple):
    """Tokens of one sequence that are evaluated in a step; `is_last` where none remain, so that one can be drawn."""

    running: Running
    ids: list[int]
    is_last: bool


class Composer(Protocol):
    """Composes a step of at most `room` tokens. `padded` are the places where the last one has a token nobody wants."""

    padded: list[int]

    def compose(self, running: Sequence[Running], *, room: int) -> list[Chunk]: ...


class Together:
    """What continues answers, and then as much as fits of prompts, in the order of their turns: a prompt shares the
    reading of the weights with the answers beside it.
    """

    padded: list[int] = []  # noqa: RUF012  # never any

    def compose(self, running: Sequence[Running], *, room: int) -> list[Chunk]:
        """The next step."""
        answers = [one for one in running if not one.in_prompt]
        prompts = sorted((one for one in running if one.in_prompt), key=lambda one: one.turn)
        return list(_filled([*answers, *prompts], room))


class Apart:
    """Steps in which the numbers of a sequence do not depend on those beside it.

    llama.cpp chooses its kernels by the number of rows, one or several; so a prompt is evaluated alone, in pieces of
    two tokens at least, and a token of an answer never alone. Where each sequence has its own part of the KV cache,
    llama.cpp evaluates together only places that follow each other: the gaps between them are padded. There has to be
    one place more than are taken.
    """

    def __init__(self) -> None:
        self.padded: list[int] = []

    def compose(self, running: Sequence[Running], *, room: int) -> list[Chunk]:
        """The next step."""
        self.padded = []
        ready = [Chunk(one, [], True) for one in running if not one.pending]
        long = [one for one in running if one.pending and (one.in_prompt or len(one.pending) > 1)]
        if ready or long:
            return ready or [self._piece(min(long, key=lambda one: one.turn))]
        chunks = [Chunk(one, list(one.pending), True) for one in sorted(running, key=lambda one: one.place)]
        self.padded = self._gaps({one.place for one in running})
        return chunks

    def _piece(self, one: Running) -> Chunk:
        size = _PIECE - (len(one.pending) == _PIECE + 1)  # none of one token is left over
        return Chunk(one, one.pending[:size], size >= len(one.pending))

    def _gaps(self, places: set[int]) -> list[int]:
        first, last = min(places), max(places)
        if first == last:
            return [last + 1]
        return [place for place in range(first, last) if place not in places]


def _filled(ordered: Sequence[Running], room: int) -> Iterator[Chunk]:
    outputs = _MOST_OUTPUTS
    for one in ordered:
        ids = one.pending[: min(room, outputs) if one.is_scored else room]
        if ids or not one.pending:  # where nothing is pending, the logits are kept
            yield Chunk(one, ids, len(ids) == len(one.pending))
        room -= len(ids)
        outputs -= len(ids) * one.is_scored
