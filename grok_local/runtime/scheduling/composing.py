"""Which tokens of the running sequences are evaluated together in the next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from grok_local.runtime.scheduling.generation import Generation

__all__ = ["Apart", "Chunk", "Composer", "InParts", "Running", "Together"]

_PIECE = 256  # tokens of a prompt that are evaluated at once where it is evaluated alone
_MOST_OUTPUTS = 256  # tokens of prompts in a step whose logits llama.cpp keeps, float32 [tokens, vocabulary]


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
    """Composes a step of at most `room` tokens. `padded` are the places where the last one has a token nobody wants;
    `in_a_row`: steps are better the fewer gaps there are between the places in use.
    """

    padded: list[int]
    in_a_row: bool

    def compose(self, running: Sequence[Running], *, room: int) -> list[Chunk]: ...


class Together:
    """What continues answers, and then as much as fits of prompts, in the order of their turns: a prompt shares the
    reading of the weights with the answers beside it.
    """

    padded: list[int] = []  # noqa: RUF012  # never any
    in_a_row = False

    def compose(self, running: Sequence[Running], *, room: int) -> list[Chunk]:
        """The next step."""
        answers = [one for one in running if not one.in_prompt]
        prompts = sorted((one for one in running if one.in_prompt), key=lambda one: one.turn)
        return list(_filled([*answers, *prompts], room))


class InParts:
    """For a KV cache in parts: llama.cpp evaluates together as many tokens of each sequence as of the others, and only
    of those whose places follow each other. So a step has answers, or as many tokens each of some prompts, in turns.
    """

    padded: list[int] = []  # noqa: RUF012  # never any
    in_a_row = True

    def __init__(self) -> None:
        self._were_answers = False
        self._last = -1  # the place in which the last step of answers ended

    def compose(self, running: Sequence[Running], *, room: int) -> list[Chunk]:
        """The next step."""
        ready = [Chunk(one, [], True) for one in running if not one.pending]
        prompts = [one for one in running if len(one.pending) > 1]
        answering = len(prompts) < len(running) and not (prompts and self._were_answers)
        self._were_answers = answering
        return ready or (self._answers(running, room) if answering else _block(prompts, room))

    def _answers(self, running: Sequence[Running], room: int) -> list[Chunk]:
        """A token of each in the next run of places; one of a prompt's, where it lies between answers."""
        following = [one for one in running if one.place > self._last]
        run = (_answering(following) or _answering(running))[0][:room]
        self._last = run[-1].place if _count(run) < _count(running) else -1
        return [_chunk(one, 1) for one in run]


class Apart:
    """Steps in which the numbers of a sequence do not depend on those beside it.

    llama.cpp chooses its kernels by the number of rows, one or several; so a prompt is evaluated alone, in pieces of
    two tokens at least, and a token of an answer never alone. Where each sequence has its own part of the KV cache,
    llama.cpp evaluates together only places that follow each other: the gaps between them are padded. There has to be
    one place more than are taken.
    """

    in_a_row = False  # gaps are padded: what is moved would have been evaluated in another place

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


def _runs(some: Sequence[Running]) -> list[list[Running]]:
    """Those in places that follow each other, run by run."""
    runs: list[list[Running]] = []
    for one in sorted(some, key=lambda one: one.place):
        if runs and runs[-1][-1].place == one.place - 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


def _answering(some: Sequence[Running]) -> list[list[Running]]:
    """The runs of those, each from its first to its last that has one token pending."""
    return [run for run in map(_trimmed, _runs(some)) if run]


def _trimmed(run: list[Running]) -> list[Running]:
    single = [index for index, one in enumerate(run) if len(one.pending) == 1]
    return run[single[0] : single[-1] + 1] if single else []


def _count(some: Sequence[Running]) -> int:
    """How many have one token pending."""
    return sum(len(one.pending) == 1 for one in some)


def _block(prompts: Sequence[Running], room: int) -> list[Chunk]:
    """As many tokens of each of as many prompts as make the largest step that takes the oldest one on."""
    oldest = min(prompts, key=lambda one: one.turn)
    room = min(room, _MOST_OUTPUTS) if any(one.is_scored for one in prompts) else room
    blocks = [_beside(oldest, prompts, size, room) for size in {min(len(one.pending), room) for one in prompts}]
    return max(blocks, key=lambda block: sum(len(chunk.ids) for chunk in block))


def _beside(oldest: Running, prompts: Sequence[Running], size: int, room: int) -> list[Chunk]:
    size = min(size, len(oldest.pending))
    long = [one for one in prompts if len(one.pending) >= size]
    run = next(run for run in _runs(long) if oldest in run)
    first = max(run.index(oldest) - room // size + 1, 0)
    return [_chunk(one, size) for one in run[first : first + room // size]]


def _chunk(one: Running, size: int) -> Chunk:
    return Chunk(one, one.pending[:size], size >= len(one.pending))


def _filled(ordered: Sequence[Running], room: int) -> Iterator[Chunk]:
    outputs = _MOST_OUTPUTS
    for one in ordered:
        ids = one.pending[: min(room, outputs) if one.is_scored else room]
        if ids or not one.pending:  # where nothing is pending, the logits are kept
            yield Chunk(one, ids, len(ids) == len(one.pending))
        room -= len(ids)
        outputs -= len(ids) * one.is_scored
