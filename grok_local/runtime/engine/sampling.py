"""How tokens are chosen: llama.cpp's sampler chains, behind what grammars allow."""

from __future__ import annotations

import ctypes
import numbers
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import llama_cpp
import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError, OptionError
from grok_local.runtime.engine.tokens import Tokens
from grok_local.runtime.graph.rows import Draw, Drawn, Likely, Token
from grok_local.units import whole_number

__all__ = [
    "PENALTY_WINDOW",
    "Draws",
    "Sampling",
    "SamplingOptions",
    "check_finite",
    "log_probabilities",
]

PENALTY_WINDOW = 64  # tokens
_MOST_FORCED = 1 << 16  # tokens in a row that a grammar leaves no choice for
_LARGEST = float(np.finfo(np.float32).max)  # what llama.cpp computes with


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `Model.generate` and `Model.chat`: the fields of `Sampling`; each may be left out."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """Options of a request. `temperature` 0 is greedy; `seed` None or -1 is another one each time; `top_k` -1 is off,
    as 0 is: other programs' users write so. The three penalties are for the tokens among the last 64.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)
        checks = {
            "temperature": (0 <= self.temperature <= _LARGEST, "0 (greedy) or more, and finite"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "0 (off) or more, less than 1"),
            "repeat_penalty": (0 < self.repeat_penalty <= _LARGEST, "more than 0, and finite; 1 is off"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2; 0 is off"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2; 0 is off"),
            "seed": (self.seed is None or 0 <= self.seed < 2**32 - 1, "0 to 4294967294"),
        }
        bad = [f"{name} {getattr(self, name)}: must be {rule}" for name, (good, rule) in checks.items() if not good]
        if bad:
            raise OptionError(bad)

    def _check_kinds(self) -> None:
        for name, value in list(vars(self).items()):
            if name != "seed" or value is not None:
                kind = whole_number if name in ("top_k", "seed") else _number
                object.__setattr__(self, name, kind(name, value))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"{name} {value!r:.40}: a number is wanted")
    return value if isinstance(value, int) else float(value)  # numpy's are no good everywhere


def check_finite(logits: npt.NDArray[np.float32]) -> None:
    """Raises ModelError where a row of logits has a NaN or an infinity, or nothing to choose by: ggml's integer
    products take a NaN for a zero. Tokens may be ruled out with -inf, not all.
    """
    highest = logits.max(axis=-1)
    if not np.isfinite(highest).all() or (logits.shape[-1] > 1 and (logits.min(axis=-1) == highest).any()):
        raise ModelError(
            "the model's logits are not finite (NaN or infinity), or all the same: its weights are damaged, or too "
            "large for this arithmetic; grok-local verify looks for such weights"
        )


def log_probabilities(logits: npt.NDArray[np.float32], ids: Sequence[int]) -> list[float]:
    """Natural logarithms of the probabilities that rows of logits [rows, vocabulary] give a token each."""
    highest = logits.max(1)
    totals = np.exp(logits - highest[:, None]).sum(1, dtype=np.float64)
    chosen = logits[np.arange(len(logits)), np.asarray(ids)].astype(np.float64)
    found: list[float] = (chosen - highest - np.log(totals)).tolist()
    return found


def _likeliest(
    logits: npt.NDArray[np.float32], chosen: int, *, count: int
) -> tuple[float, int, list[tuple[int, float]]]:
    """Natural logarithms of the probabilities of token `chosen`, its rank, and of the `count` likeliest ones by falling
    probability, equal ones by falling id, from a row of logits [vocabulary].
    """
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    count = min(count, len(logits))
    best = np.argpartition(logits, len(logits) - count)[len(logits) - count :] if count else np.empty(0, np.int64)
    ordered = sorted(((float(logits[token]) - total, int(token)) for token in best), reverse=True)
    rank = int((logits > logits[chosen]).sum()) + 1
    return float(logits[chosen]) - total, rank, [(token, value) for value, token in ordered]


def _new_chain(options: Sampling, vocabulary: int, *, recent: Sequence[int]) -> Any:
    """llama.cpp's sampler chain for `options`, that has seen the tokens `recent`. The caller frees it."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for link in _links(options, vocabulary):
        llama_cpp.llama_sampler_chain_add(chain, link)
    for token in recent:
        llama_cpp.llama_sampler_accept(chain, token)
    return chain


def _sample_from(logits: npt.NDArray[np.float32], chain: Any) -> int:
    """What llama_sampler_sample does, from logits that are kept [vocabulary]."""
    choices = np.zeros(len(logits), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
    choices["id"], choices["logit"] = np.arange(len(logits)), logits
    pointer = choices.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    array = llama_cpp.llama_token_data_array(data=pointer, size=len(logits), selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    llama_cpp.llama_sampler_accept(chain, token)
    return token


class Constraint:
    """How far an answer is in its grammar. Raises OptionError for a grammar that this vocabulary cannot follow, at
    first or as soon as that shows.
    """

    def __init__(self, grammar: str, tokens: Any) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokens, grammar, log_level=0)
        self._try_first_step(self._matcher.deep_copy())

    @property
    def is_over(self) -> bool:
        """Whether nothing may come any more."""
        return bool(self._matcher.is_stopped())

    def masked(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A copy of a row of logits in which what is not allowed has no chance."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require(self._matcher)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        found: npt.NDArray[np.float32] = np.where(allowed, logits, np.float32(-np.inf))
        return found

    def accept(self, tokens: Sequence[int]) -> None:
        """These came, which were allowed."""
        if not all(self._matcher.consume_token(token) for token in tokens):
            self._require(self._matcher)

    def forced(self) -> list[int]:
        """The tokens that have to come next, whatever the model finds likely; none where there is a choice."""
        return self._forced_in(self._matcher)

    def _forced_in(self, matcher: Any) -> list[int]:
        found: list[int] = matcher.compute_ff_tokens()
        self._require(matcher)
        if len(found) > _MOST_FORCED:  # with half a million of them llguidance does not come back
            raise OptionError(f"this form leaves no choice for {len(found)} tokens: {_MOST_FORCED} at most")
        return found

    def _try_first_step(self, matcher: Any) -> None:
        """What nothing fits, or what is too large, shows now."""
        matcher.compute_bitmask()
        for token in self._forced_in(matcher):
            matcher.consume_token(token)
        self._require(matcher)

    def _require(self, matcher: Any) -> None:
        if matcher.is_error():
            reason = matcher.get_error().partition("<state>")[0]
            raise OptionError(f"nothing can be written in this form, or it is too large ({' '.join(reason.split())})")


class Chain:
    """A way to choose tokens: llama.cpp's sampler chain, behind the mask of a grammar if there is one."""

    def __init__(
        self, options: Sampling, vocabulary: int, *, recent: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self._links = _new_chain(options, vocabulary, recent=recent)
        self._constraint = constraint

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose by a row of logits [vocabulary]. Raises ModelError where they are no numbers, OptionError where the
        grammar cannot go on.
        """
        check_finite(logits)
        if self._constraint is None:
            return _sample_from(logits, self._links)
        token = _sample_from(self._constraint.masked(logits), self._links)
        self._constraint.accept([token])
        return token

    def choose_at(self, context: Any, index: int) -> int:
        """Choose by the logits that a llama_context has for row `index`, which are finite: nothing needs a copy."""
        return int(llama_cpp.llama_sampler_sample(self._links, context, index))

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar says what may come."""
        return self._constraint is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing may come any more."""
        return self._constraint is not None and self._constraint.is_over

    def forced(self) -> list[int]:
        """Tokens that have to come next, taken in; none where there is a choice."""
        if self._constraint is None or self._constraint.is_over:
            return []
        tokens = self._constraint.forced()
        self._constraint.accept(tokens)
        for token in tokens:
            llama_cpp.llama_sampler_accept(self._links, token)
        return tokens

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_sampler_free(self._links)


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

    def keep(self, draw: Draw, outputs: Sequence[int], *, length: int) -> None:
        """Keep the logits after a draw's sequence, which has so many tokens, if that is wanted; `outputs` are the rows
        of the sequence in the last evaluation.
        """
        if draw.keep and outputs:
            self._kept[draw.sequence] = _Kept(length, self._logits_at(outputs[-1]).copy())

    def known(self, draw: Draw, outputs: Sequence[int]) -> tuple[Token, ...]:
        """How likely a draw's known tokens are, each by the logits of the row before it. Raises ModelError where they
        are no numbers.
        """
        found = []
        for index, token in zip(outputs, draw.known, strict=False):  # after the last row there may be none
            logits = self._logits_at(index)
            check_finite(logits)
            likely = self._likely(logits, token, draw.known_likely)
            found.append(Token(token, self._tokens.piece(token), False, likely))
        return tuple(found)

    def drawn(self, draw: Draw, outputs: Sequence[int]) -> Drawn:
        """What a draw chooses by the logits of the last of its rows, or by those its sequence kept; or what its grammar
        dies of. Raises ModelError where they are no numbers.
        """
        if draw.chain is None:
            return Drawn(())
        chain, index = self._chains[draw.chain], outputs[-1] if outputs else None
        try:
            # Where log-probabilities are wanted, every token is chosen by its own logits.
            forced = chain.forced() if draw.likely is None else []
            if forced or chain.is_over:
                return self._named(forced, chain)
            logits = self._kept[draw.sequence].logits if index is None else self._logits_at(index)
            check_finite(logits)
            as_computed = index is not None and not chain.is_constrained
            chosen = chain.choose_at(self._context, index or 0) if as_computed else chain.choose(logits)
            if draw.likely is None:
                return self._named([chosen, *chain.forced()], chain)
            return self._named([chosen], chain, likely=self._likely(logits, chosen, draw.likely))
        except OptionError as error:
            return Drawn((), error=error)

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
        own, rank, best = _likeliest(logits, chosen, count=count)
        return Likely(own, tuple((token, self._tokens.piece(token), value) for token, value in best), rank)

    def _logits_at(self, index: int) -> npt.NDArray[np.float32]:
        """[vocabulary], valid until the next evaluation."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, index), (self._tokens.count,))


def _links(options: Sampling, vocabulary: int) -> Iterator[Any]:
    penalties = (options.repeat_penalty, options.frequency_penalty, options.presence_penalty)
    if penalties != (1, 0, 0):
        yield llama_cpp.llama_sampler_init_penalties(vocabulary, PENALTY_WINDOW, *penalties)
    if options.temperature == 0:
        yield llama_cpp.llama_sampler_init_greedy()
        return
    if options.top_k:
        yield llama_cpp.llama_sampler_init_top_k(options.top_k)
    yield llama_cpp.llama_sampler_init_top_p(options.top_p, 1)
    yield llama_cpp.llama_sampler_init_min_p(options.min_p, 1)
    yield llama_cpp.llama_sampler_init_temp(options.temperature)
    seed = options.seed if options.seed is not None else random.getrandbits(31)
    yield llama_cpp.llama_sampler_init_dist(seed)
