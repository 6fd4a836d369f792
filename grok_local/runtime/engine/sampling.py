"""How the next token is chosen: llama.cpp's sampler chain, behind what a grammar allows."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import llama_cpp
import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError, OptionError

__all__ = [
    "PENALTY_WINDOW",
    "Chain",
    "Constraint",
    "Sampling",
    "SamplingOptions",
    "check_finite",
    "likeliest",
    "log_probabilities",
]

PENALTY_WINDOW = 64  # tokens


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `Model.generate` and `Model.chat`: the fields of `Sampling`; each may be left out."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """Options of a request. `temperature` 0 is greedy; `seed` None or -1 is another one each time; `top_k` -1 is off,
    as 0 is: other programs' users write so.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)
        checks = {
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "0 (off) or more, less than 1"),
            "repeat_penalty": (self.repeat_penalty > 0, "more than 0; 1 is off"),
            "seed": (self.seed is None or 0 <= self.seed < 2**32 - 1, "0 to 4294967294"),
        }
        bad = [f"{name} {getattr(self, name)}: must be {rule}" for name, (good, rule) in checks.items() if not good]
        if bad:
            raise OptionError(bad)

    def _check_kinds(self) -> None:
        whole = {"top_k", "seed"}
        for name, value in vars(self).items():
            right = isinstance(value, int if name in whole else int | float) and not isinstance(value, bool)
            if not right and not (name == "seed" and value is None):
                raise OptionError(f"{name} {value!r:.40}: a {'whole ' if name in whole else ''}number is wanted")


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


def likeliest(logits: npt.NDArray[np.float32], chosen: int, *, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithms of the probabilities of token `chosen` and of the `count` likeliest ones by falling
    probability, equal ones by falling id, from a row of logits [vocabulary].
    """
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    count = min(count, len(logits))
    best = np.argpartition(logits, len(logits) - count)[len(logits) - count :] if count else np.empty(0, np.int64)
    ordered = sorted(((float(logits[token]) - total, int(token)) for token in best), reverse=True)
    return float(logits[chosen]) - total, [(token, value) for value, token in ordered]


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
    """How far an answer is in its grammar. Raises OptionError for a grammar that this vocabulary cannot follow."""

    def __init__(self, grammar: str, tokens: Any) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokens, grammar, log_level=0)
        self._try_first_step(self._matcher.deep_copy())

    @property
    def is_over(self) -> bool:
        """Whether nothing may come any more."""
        return bool(self._matcher.is_stopped())

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def masked(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A copy of a row of logits in which what is not allowed has no chance."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require(ModelError)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        found: npt.NDArray[np.float32] = np.where(allowed, logits, np.float32(-np.inf))
        return found

    def accept(self, tokens: Sequence[int]) -> None:
        """These came, which were allowed."""
        if not all(self._matcher.consume_token(token) for token in tokens):
            self._require(ModelError)

    def forced(self) -> list[int]:
        """The tokens that have to come next, whatever the model finds likely; none where there is a choice."""
        found: list[int] = self._matcher.compute_ff_tokens()
        return found

    def _try_first_step(self, matcher: Any) -> None:
        """What nothing fits, or what is too large, shows now."""
        matcher.compute_bitmask()
        for token in matcher.compute_ff_tokens():
            matcher.consume_token(token)
        self._require(OptionError, matcher)

    def _require(self, kind: type[ModelError | OptionError], matcher: Any = None) -> None:
        matcher = matcher or self._matcher
        if matcher.is_error():
            reason = matcher.get_error().partition("<state>")[0]
            raise kind(f"nothing can be written in this form, or it is too large ({' '.join(reason.split())})")


class Chain:
    """A way to choose tokens: llama.cpp's sampler chain, behind the mask of a grammar if there is one."""

    def __init__(
        self, options: Sampling, vocabulary: int, *, recent: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self._links = _new_chain(options, vocabulary, recent=recent)
        self._constraint = constraint

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose by a row of logits [vocabulary]. Raises ModelError where they are no numbers."""
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


def _links(options: Sampling, vocabulary: int) -> Iterator[Any]:
    if options.repeat_penalty != 1:
        yield llama_cpp.llama_sampler_init_penalties(vocabulary, PENALTY_WINDOW, options.repeat_penalty, 0.0, 0.0)
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
