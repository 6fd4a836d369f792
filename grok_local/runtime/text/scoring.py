"""How likely texts are: log-probabilities of tokens and choices, perplexity, and how far two models are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from grok_local.errors import ContextError, OptionError

if TYPE_CHECKING:
    import numpy.typing as npt

    from grok_local.runtime.engine.protocol import Engine

__all__ = ["Divergence", "Estimate", "Score", "divergence", "perplexity", "score_choices", "score_ids"]

WINDOW = 512  # tokens: llama-perplexity's context, of which the second half is scored
_BLOCK = 64  # tokens whose distributions are compared at once
_NORMAL_95 = 1.959964  # standard deviations around the mean

Done = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """Natural logarithms of the tokens' probabilities, each after all before it; None for a text's first."""

    tokens: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        """Of all that have one."""
        return math.fsum(value for value in self.logprobs if value is not None)


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values, and how far the mean of endlessly many may be from it in 95 of 100 cases."""

    mean: float
    margin: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of values that are taken for independent."""
        array = np.asarray(values, np.float64)
        spread = float(array.std(ddof=1)) if len(array) > 1 else math.inf
        return cls(float(array.mean()), _NORMAL_95 * spread / math.sqrt(len(array)), len(array))

    @property
    def exponentials(self) -> tuple[float, float, float]:
        """E to the mean, and to both ends: a perplexity where the values are negative log-probabilities."""
        low, high = self.mean - self.margin, self.mean + self.margin
        return _exp(self.mean), _exp(low), _exp(high)


@dataclass(frozen=True)
class Divergence:
    """How far a model is from another, over the same tokens.

    Kullback-Leibler divergence in nats a token, the largest, and the share of tokens where both find the same one
    likeliest.
    """

    nats: Estimate
    largest: float
    same_top: float


def score_ids(engine: Engine, ids: Sequence[int]) -> Score:
    """Score a text. Raises ContextError if it does not fit."""
    if not ids:
        return Score([], [])
    return Score(list(ids), [None, *engine.score(ids, 1)])


def score_choices(engine: Engine, ids: Sequence[int], choices: Sequence[str]) -> list[Score]:
    """Score each choice as what comes next after a text, which is evaluated once. Raises ContextError, OptionError."""
    if not ids:
        raise OptionError("choices come after a text, and this one is empty")
    found = []
    for choice in choices:
        tokens = engine.continue_ids(choice)
        if not tokens:
            raise OptionError(f"choice {choice!r}: it is empty")
        found.append(Score(tokens, list(engine.score([*ids, *tokens], len(ids)))))
    return found


def perplexity(engine: Engine, ids: Sequence[int], *, window: int = WINDOW, done: Done = lambda *_: None) -> Estimate:
    """Negative log-probabilities of a long text's tokens, as llama-perplexity takes them.

    The text is cut into windows, each read anew; its first half is what the second is predicted from, and only that
    counts. What is left over at the end does not. `done` is told how many windows of how many. Raises ContextError.
    """
    values: list[float] = []
    for chunk in _windows(engine, ids, window, done):
        values += [-value for value in engine.score(chunk, window // 2 + 1)]
    return Estimate.of(values)


def divergence(
    engine: Engine, base: Engine, ids: Sequence[int], *, window: int = WINDOW, done: Done = lambda *_: None
) -> Divergence:
    """Compare a model's distributions with those of `base`, over the tokens that `perplexity` counts.

    Raises OptionError where the two have different vocabularies, and ContextError.
    """
    if engine.vocabulary != base.vocabulary:
        raise OptionError(f"vocabularies of {engine.vocabulary} and {base.vocabulary} tokens cannot be compared")
    values: list[float] = []
    same: list[bool] = []
    for chunk in _windows(engine, ids, window, done):
        for at in range(window // 2, window - 1, _BLOCK):
            end = min(at + _BLOCK, window - 1)
            theirs, ours = (_log_softmax(side.tail_logits(chunk[:end], at)) for side in (base, engine))
            values += (np.exp(theirs) * (theirs - ours)).sum(1, dtype=np.float64).tolist()
            same += (theirs.argmax(1) == ours.argmax(1)).tolist()
    return Divergence(Estimate.of(values), max(values), sum(same) / len(same))


def _windows(engine: Engine, ids: Sequence[int], window: int, done: Done) -> Iterator[list[int]]:
    if not 4 <= window <= engine.context_size:
        raise OptionError(f"windows of {window} tokens: between 4 and the context of {engine.context_size} can be read")
    count = len(ids) // window
    if not count:
        raise ContextError(f"the text has {len(ids)} tokens: at least {window} are needed for one window")
    begins = engine.tokenize("0")[:1] == [engine.bos]
    for number in range(count):
        done(number, count)
        chunk = list(ids[number * window : (number + 1) * window])
        yield [engine.bos, *chunk[1:]] if begins else chunk
    done(count, count)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    logits = logits - logits.max(1, keepdims=True)
    totals = np.exp(logits).sum(1, keepdims=True, dtype=np.float64)
    found: npt.NDArray[np.float32] = logits - np.log(totals).astype(np.float32)
    return found


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
