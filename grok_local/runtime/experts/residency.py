"""Which experts memory holds: the policy, without any memory.

Layers come one after the other, over and over. The least recently used expert of all would always be the one needed
soonest, so each layer has a share of its own, and what it borrows beyond that is taken back first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Expert", "Residency"]


class Expert(NamedTuple):
    """One expert of one layer."""

    layer: int
    expert: int


class Residency:
    """`sizes` are bytes of an expert, by layer; `budget` is what all of them together may take."""

    def __init__(self, sizes: Sequence[int], *, experts: int, budget: int) -> None:
        self.sizes = tuple(sizes)
        self.budget = budget
        self.used = 0
        self.shares = _shares(self.sizes, experts=experts, budget=budget)
        self._held: list[list[int]] = [[] for _ in sizes]  # least recently used first

    def holds(self, layer: int, expert: int) -> bool:
        """Whether it is in memory."""
        return expert in self._held[layer]

    def is_complete(self, layer: int, *, experts: int) -> bool:
        """Whether all of a layer's are."""
        return len(self._held[layer]) == experts

    def fits_beside(self, layer: int, *, experts: int, busy: int) -> bool:
        """Whether all of a layer's experts can be held while those of `busy` are in use."""
        return experts * self.sizes[layer] + len(self._held[busy]) * self.sizes[busy] <= self.budget

    def request(self, layer: int, chosen: Sequence[int], *, busy: int = -1) -> tuple[list[Expert], list[int]]:
        """Make room for the layer's `chosen` experts, the most wanted last. Returns what has to go, and which of them
        have to be read. Where not even these fit, they alone are held until the next request.

        With `busy`, a layer whose experts are in use and stay, it must be known that they fit.
        """
        held, size = self._held[layer], self.sizes[layer]
        missing = [expert for expert in chosen if expert not in held]
        limit = max(self.budget, len(chosen) * size)
        victims = []
        while self.used + len(missing) * size > limit:
            victims.append(self._evict(self._victims_layer(layer, chosen, len(missing), busy), chosen, layer))
        held[:] = [expert for expert in held if expert not in chosen] + list(chosen)
        self.used += len(missing) * size
        return victims, missing

    def forget(self, layer: int, expert: int) -> None:
        """It could not be read after all."""
        if expert in self._held[layer]:
            self._held[layer].remove(expert)
            self.used -= self.sizes[layer]

    def _victims_layer(self, layer: int, chosen: Sequence[int], coming: int, busy: int) -> int:
        """Its own, when it has its share; else one above its share; else the one that comes again last."""
        spare = [expert for expert in self._held[layer] if expert not in chosen]
        if spare and len(self._held[layer]) + coming > self.shares[layer]:
            return layer
        others = [(layer - back) % len(self.sizes) for back in range(1, len(self.sizes))]
        having = [other for other in others if self._held[other] and other != busy]
        above = (other for other in having if len(self._held[other]) > self.shares[other])
        return next(above, having[0] if having else layer)

    def _evict(self, victim: int, chosen: Sequence[int], layer: int) -> Expert:
        held = self._held[victim]
        expert = next(expert for expert in held if victim != layer or expert not in chosen)
        held.remove(expert)
        self.used -= self.sizes[victim]
        return Expert(victim, expert)


def _shares(sizes: Sequence[int], *, experts: int, budget: int) -> list[int]:
    """How many experts each layer may keep: as equal as possible, what is left over spread evenly."""
    shares = [0] * len(sizes)
    left = budget
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
