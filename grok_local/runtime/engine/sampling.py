"""How the next token is chosen: llama.cpp's sampler chain."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp

from grok_local.errors import OptionError

__all__ = ["PENALTY_WINDOW", "Sampling", "new_chain"]

PENALTY_WINDOW = 64  # tokens


@dataclass(frozen=True)
class Sampling:
    """Options of a request. `temperature` 0 is greedy; `seed` None is another one each time."""

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
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


def new_chain(options: Sampling, vocabulary: int, *, recent: Sequence[int]) -> Any:
    """llama.cpp's sampler chain for `options`, that has seen the tokens `recent`. The caller frees it."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for link in _links(options, vocabulary):
        llama_cpp.llama_sampler_chain_add(chain, link)
    for token in recent:
        llama_cpp.llama_sampler_accept(chain, token)
    return chain


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
