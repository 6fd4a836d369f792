"""Chooses what comes next in each sequence: the sampler chains of an engine, and the logits that sequences keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt

from grok_local.runtime.engine.protocol import Draw, Drawn, Likely, Token
from grok_local.runtime.engine.sampling import Chain, Constraint, Sampling, check_finite, likeliest
from grok_local.runtime.engine.tokens import Tokens

__all__ = ["Draws"]


class _Kept(NamedTuple):
    """The logits [vocabulary] after a sequence's first `length` tokens."""

    length: int
    logits: npt.NDArray[np.float32]


class Draws:
    """Chains by number, and kept logits by sequence. They belong to a llama_context and its vocabulary."""

    def __init__(self, context: Any, tokens: Tokens) -> None:
        self._context, self._tokens = context, tokens
        self._chains: dict[int, Chain] = {}
        self._next = 0
        self._kept: dict[int, _Kept] = {}

    def begin(self, options: Sampling, recent: Sequence[int], grammar: str | None) -> int:
        """A new chain's number. Raises OptionError for a grammar that this vocabulary cannot follow."""
        constraint = Constraint(grammar, self._tokens.for_grammars) if grammar else None
        self._next += 1
        self._chains[self._next] = Chain(options, self._tokens.count, recent=recent, constraint=constraint)
        return self._next

    def end(self, chain: int) -> None:
        """Free a chain; one that is gone already is no error."""
        if known := self._chains.pop(chain, None):
            known.close()

    def close(self) -> None:
        """Free all chains."""
        for chain in list(self._chains):
            self.end(chain)

    def drawn(self, draw: Draw, index: int | None) -> Drawn:
        """What a draw chooses by the logits of row `index` of the last evaluation, or by those its sequence kept.

        Raises ModelError where they are no numbers.
        """
        chain = self._chains[draw.chain]
        # Where log-probabilities are wanted, every token is chosen by its own logits.
        forced = chain.forced() if draw.likely is None else []
        if forced or chain.is_over:
            return self._named(forced, chain)
        logits = self._kept[draw.sequence].logits if index is None else self._logits_at(index)
        check_finite(logits)
        masked = index is None or chain.is_constrained
        chosen = chain.choose(logits) if masked else chain.choose_at(self._context, index)
        if draw.likely is None:
            return self._named([chosen, *chain.forced()], chain)
        return self._named([chosen], chain, likely=self._likely(logits, chosen, draw.likely))

    def keep(self, sequence: int, length: int, *, index: int) -> None:
        """Keep the logits of row `index`, which are those after the sequence's first `length` tokens."""
        self._kept[sequence] = _Kept(length, self._logits_at(index).copy())

    def copy(self, source: int, target: int, *, length: int) -> None:
        """`target` has become the first `length` tokens of `source`."""
        self._kept.pop(target, None)
        if (kept := self._kept.get(source)) and kept.length == length:
            self._kept[target] = kept

    def shorten(self, sequence: int, length: int) -> None:
        """Of a sequence only so many tokens remain."""
        if (kept := self._kept.get(sequence)) and kept.length > length:
            del self._kept[sequence]

    def _named(self, ids: Sequence[int], chain: Chain, *, likely: Likely | None = None) -> Drawn:
        tokens = (Token(id_, self._tokens.piece(id_), self._tokens.is_end(id_), likely) for id_ in ids)
        return Drawn(tuple(tokens), is_over=chain.is_over)

    def _likely(self, logits: npt.NDArray[np.float32], chosen: int, count: int) -> Likely:
        own, best = likeliest(logits, chosen, count=count)
        return Likely(own, tuple((token, self._tokens.piece(token), value) for token, value in best))

    def _logits_at(self, index: int) -> npt.NDArray[np.float32]:
        """[vocabulary], valid until the next evaluation."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, index), (self._tokens.count,))
