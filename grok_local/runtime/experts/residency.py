"""Which experts memory holds: the policy, without any memory.

Layers come one after the other, over and over. The least recently used expert of all would always be the one needed
soonest, so each layer has a share of its own. Room for one token's experts is shared by all layers: what a layer needs
beyond its share, the next one takes back, and that expert goes which the last tokens chose least, be it the one just
used. On a trained model more of the choices are hits than if the least recently used one goes, and as many as if the
hottest ones, known before, stayed (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Expert", "Residency"]

# Two averages of how often an expert is chosen, half-life in tokens and weight: what a text is about, and what the last
# token was. On a trained model the first is worth most; where tokens repeat the one before, the second.
_AVERAGES = ((32, 1.0), (1, 0.5))


class Expert(NamedTuple):
    """One expert of one layer."""

    layer: int
    expert: int


class Residency:
    """`sizes` are bytes of an expert, by layer; `budget` is what all of them together may take; a token has `used`."""

    def __init__(self, sizes: Sequence[int], *, experts: int, used: int, budget: int) -> None:
        self.sizes = tuple(sizes)
        self.used = 0
        self._experts, self._shared = experts, used * max(self.sizes, default=0)
        self._held: list[list[int]] = [[] for _ in sizes]  # least recently used first
        self.resize(budget)
        self._averages = [[[0.0] * experts for _ in sizes] for _ in _AVERAGES]

    def count(self, layer: int, choices: Mapping[int, int], *, tokens: int) -> None:
        """So many of the `tokens` that came by have chosen each expert; in the last layer there may have been none."""
        if not tokens:
            return
        for (half_life, _), averages in zip(_AVERAGES, self._averages, strict=True):
            left = 0.5 ** (tokens / half_life)
            averages[layer] = [
                average * left + (1 - left) * choices.get(expert, 0) / tokens
                for expert, average in enumerate(averages[layer])
            ]

    def holds(self, layer: int, expert: int) -> bool:
        """Whether it is in memory."""
        return expert in self._held[layer]

    def fits_beside(self, layer: int, *, experts: int, busy: int) -> bool:
        """Whether all of a layer's experts can be held while those of `busy` are in use."""
        return experts * self.sizes[layer] + len(self._held[busy]) * self.sizes[busy] <= self.budget

    def request(self, layer: int, chosen: Sequence[int], *, busy: int = -1) -> tuple[list[Expert], list[int]]:
        """Make room for the layer's `chosen` experts. Returns what has to go, and which of them have to be read. Where
        not even these fit, they alone are held until the next request.

        With `busy`, a layer whose experts are in use and stay, it must be known that they fit.
        """
        held, size = self._held[layer], self.sizes[layer]
        missing = [expert for expert in chosen if expert not in held]
        limit = max(self.budget, len(chosen) * size)
        victims = []
        while self.used + len(missing) * size > limit:
            victims.append(self._evict(self._victims_layer(layer, chosen, busy), chosen, layer))
        held[:] = [expert for expert in held if expert not in chosen] + list(chosen)
        self.used += len(missing) * size
        return victims, missing

    def resize(self, budget: int) -> None:
        """Have another budget from now on; of what does not fit into it, everything must have been dropped."""
        self.budget = budget
        self.shares = _shares(self.sizes, experts=self._experts, budget=budget - self._shared)

    def drop(self, expert: Expert) -> None:
        """It is no longer held."""
        self._held[expert.layer].remove(expert.expert)
        self.used -= self.sizes[expert.layer]

    def clear(self) -> None:
        """Nothing is held any more."""
        self.used = 0
        for held in self._held:
            held.clear()

    def _victims_layer(self, layer: int, chosen: Sequence[int], busy: int) -> int:
        """One above its share, the last one first; else its own; else the one that comes again last."""
        furthest = layer
        for back in range(1, len(self.sizes)):
            other = (layer - back) % len(self.sizes)
            if not self._held[other] or other == busy:
                continue
            if len(self._held[other]) > self.shares[other]:
                return other
            furthest = other if furthest == layer else furthest
        spare = any(expert not in chosen for expert in self._held[layer])
        return layer if spare else furthest

    def _score(self, layer: int, expert: int) -> float:
        pairs = zip(_AVERAGES, self._averages, strict=True)
        return sum(weight * averages[layer][expert] for (_, weight), averages in pairs)

    def _evict(self, victim: int, chosen: Sequence[int], layer: int) -> Expert:
        held = self._held[victim]
        spare = (expert for expert in held if victim != layer or expert not in chosen)
        found = Expert(victim, min(spare, key=lambda expert: self._score(victim, expert)))
        self.drop(found)
        return found


def _shares(sizes: Sequence[int], *, experts: int, budget: int) -> list[int]:
    """How many experts each layer may keep: as equal as possible, what is left over spread evenly."""
    shares = [0] * len(sizes)
    left = max(budget, 0)
    while True:
        room = sum(size for size, share in zip(sizes, shares, strict=True) if share < experts)
        if not room or room > left:
            break
        for layer, size in enumerate(sizes):
            if shares[layer] < experts:
                shares[layer] += 1
                left -= size
    for layer in _spread(len(sizes), left, sizes):
        if shares[layer] < experts and sizes[layer] <= left:
            shares[layer] += 1
            left -= sizes[layer]
    return shares


def _spread(count: int, left: int, sizes: Sequence[int]) -> list[int]:
    """The layers that get one more, at equal distances, then the rest."""
    extra = max(left // max(max(sizes, default=1), 1), 1)
    first = [number * count // extra for number in range(min(extra, count))]
    return first + [layer for layer in range(count) if layer not in first]
