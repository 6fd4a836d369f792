"""An engine without a model, which is small and fast: what comes next is a function of all tokens before it.

So an answer shows whether its place of the KV cache ever held anything else.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence

from grok_local.errors import ModelError, NoRoomError, OptionError
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.graph.rows import Draw, Drawn, Likely, Row, Token

END = 0
VOCABULARY = 50


def next_token(ids: Sequence[int]) -> int:
    """What the fake model finds after `ids`."""
    return zlib.crc32(bytes(ids)) % VOCABULARY


def likelihood(ids: Sequence[int]) -> float:
    """What the fake model says of any token after `ids`."""
    return -float(zlib.crc32(bytes(ids)) % 1000)


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """At most `count` tokens after a prompt."""
    ids = list(prompt)
    for _ in range(count):
        token = next_token(ids)
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _is_one_evaluation(sequences: Sequence[int]) -> bool:
    first, last = sequences[0], sequences[-1]
    each = len(sequences) // (last - first + 1)
    return list(sequences) == [sequence for sequence in range(first, last + 1) for _ in range(each)]


class FakeEngine:
    """`cells` tokens fit; `fails` and `interrupts` say of a step, by its number, what goes wrong with it, `breaks` of a
    copy or of what is forgotten. A grammar that is "bad" cannot be followed, and one that "breaks" not for long. One
    that `is_recurrent` cannot forget the end of a sequence, but all of it.

    With `in_parts` it refuses what llama.cpp would not evaluate at once where each sequence has a part of the KV cache:
    all but as many tokens each of sequences that follow each other.
    """

    def __init__(
        self,
        *,
        sequences: int,
        batch_size: int = 16,
        cells: int | None = None,
        in_parts: bool = False,
        is_recurrent: bool = False,
    ) -> None:
        self._is_recurrent = is_recurrent
        self.batch_size, self._cells, self._in_parts = batch_size, cells, in_parts
        self.interrupted = False
        self.cached: list[list[int]] = [[] for _ in range(sequences)]
        self.chains: dict[int, str | None] = {}
        self.steps = self.evaluated = self.most_rows = 0
        self.fails: set[int] = set()
        self.interrupts: set[int] = set()
        self.breaks: set[int] = set()
        self._changes = itertools.count()
        self._numbers = itertools.count()
        self._kept: list[list[int] | None] = [None] * sequences

    def expert_stats(self) -> None:
        return None

    def begin_sampling(self, options: Sampling, recent: Sequence[int], grammar: str | None = None) -> int:
        if grammar == "bad":
            raise OptionError("a grammar nobody can follow")
        number = next(self._numbers)
        self.chains[number] = grammar
        return number

    def end_sampling(self, chain: int) -> None:
        del self.chains[chain]

    def step(self, rows: Sequence[Row], draws: Sequence[Draw] = ()) -> list[Drawn] | None:
        self.steps += 1
        assert len(rows) <= self.batch_size
        if self.steps in self.fails:
            raise ModelError("the fake engine failed")
        if self.steps in self.interrupts:
            for row in rows if self._is_recurrent else ():
                self.cached[row.sequence].clear()
            return None
        if self._cells is not None and sum(map(len, self.cached)) + len(rows) > self._cells:
            raise NoRoomError("full")
        for row in rows:
            assert row.position == len(self.cached[row.sequence])
            self.cached[row.sequence].append(row.token)
        if self._in_parts and rows:
            assert _is_one_evaluation([row.sequence for row in rows])
        self.evaluated += len(rows)
        self.most_rows = max(self.most_rows, len({row.sequence for row in rows}))
        outputs: dict[int, list[int]] = {}
        for row in (row for row in rows if row.output):
            outputs.setdefault(row.sequence, []).append(row.position)
        return [self._drawn(draw, outputs.get(draw.sequence, [])) for draw in draws]

    def copy(self, source: int, target: int, *, length: int) -> int:
        self._change()
        if self._is_recurrent and length < len(self.cached[source]):
            length = 0
        self.cached[target] = self.cached[source][:length]
        kept = self._kept[source]
        self._kept[target] = kept if kept == self.cached[target] else None
        return length

    def forget(self, sequence: int, *, start: int = 0) -> int:
        self._change()
        if self._is_recurrent and start < len(self.cached[sequence]):
            start = 0
        del self.cached[sequence][start:]
        kept = self._kept[sequence]
        if kept is not None and len(kept) > start:
            self._kept[sequence] = None
        return start

    def _change(self) -> None:
        if next(self._changes) in self.breaks:
            raise ModelError("the fake engine broke")

    def _drawn(self, draw: Draw, outputs: Sequence[int]) -> Drawn:
        ids = self.cached[draw.sequence]
        known = tuple(self._known(draw, outputs))
        if draw.chain is None:
            return Drawn((), known=known)
        assert draw.chain in self.chains
        assert outputs or self._kept[draw.sequence] == ids
        if draw.keep:
            self._kept[draw.sequence] = list(ids)
        if self.chains[draw.chain] == "breaks" and len(ids) % 3 == 0:
            return Drawn((), known=known, error=OptionError("a grammar that is too large"))
        token = next_token(ids)
        return Drawn((Token(token, bytes([97 + token % 26]), token == END),), known=known)

    def _known(self, draw: Draw, outputs: Sequence[int]) -> Iterator[Token]:
        """What is likely after each token says which tokens were before it."""
        for position, token in zip(outputs, draw.known, strict=False):
            before = self.cached[draw.sequence][: position + 1]
            yield Token(token, b"", False, Likely(likelihood(before), (), 1))
