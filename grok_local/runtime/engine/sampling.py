"""How the next token is chosen: llama.cpp's sampler chain."""

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

__all__ = ["PENALTY_WINDOW", "Sampling", "SamplingOptions", "check_finite", "new_chain", "sample_from"]

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


def new_chain(options: Sampling, vocabulary: int, *, recent: Sequence[int]) -> Any:
    """llama.cpp's sampler chain for `options`, that has seen the tokens `recent`. The caller frees it."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for link in _links(options, vocabulary):
        llama_cpp.llama_sampler_chain_add(chain, link)
    for token in recent:
        llama_cpp.llama_sampler_accept(chain, token)
    return chain


def sample_from(logits: npt.NDArray[np.float32], chain: Any) -> int:
    """What llama_sampler_sample does, from logits that are kept [vocabulary]. Raises ModelError."""
    check_finite(logits)
    choices = np.zeros(len(logits), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
    choices["id"], choices["logit"] = np.arange(len(logits)), logits
    pointer = choices.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    array = llama_cpp.llama_token_data_array(data=pointer, size=len(logits), selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    llama_cpp.llama_sampler_accept(chain, token)
    return token


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
