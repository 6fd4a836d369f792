"""The memory of experts that come and go: slots of one size, one after the other, in huge pages where there are any."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from grok_local.pages import HUGE, Region
from grok_local.runtime.experts.residency import Expert

__all__ = ["Arena"]


class Arena:
    """`sizes` are bytes of the parts of an expert, in the order in which a slot has them. Raises OSError.

    Slots are handed out from the first on, so that what is given back lies at the end.
    """

    def __init__(self, sizes: Sequence[int], *, slots: int) -> None:
        self.slots = slots
        self.slot_bytes = sum(sizes)
        self.region = Region(0, slots * self.slot_bytes, huge=True)
        self._starts = list(accumulate(sizes, initial=0))
        self._taken: dict[Expert, int] = {}
        self._free = list(range(slots))

    def position(self, slot: int, part: int) -> int:
        """Where in the region a slot has that part."""
        return slot * self.slot_bytes + self._starts[part]

    def slots_of(self, layer: int, experts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The slots that a layer's experts have, in the shape of the experts' numbers; all of them must have one."""
        numbers = np.unique(experts)
        slots = np.array([self._taken[Expert(layer, int(number))] for number in numbers], np.int32)
        found: npt.NDArray[np.int32] = slots[np.searchsorted(numbers, experts)]
        return found

    def take(self, expert: Expert) -> int:
        """A slot for an expert that has none."""
        slot = self._taken[expert] = heapq.heappop(self._free)
        return slot

    def give_back(self, experts: Iterable[Expert]) -> None:
        """Their slots are free for others."""
        for expert in experts:
            heapq.heappush(self._free, self._taken.pop(expert))

    def beyond(self, count: int) -> list[Expert]:
        """Who has other slots than the first `count`."""
        return [expert for expert, slot in self._taken.items() if slot >= count]

    def release(self, count: int) -> None:
        """Give back the memory of all slots but the first `count`."""
        start = -(-count * self.slot_bytes // HUGE) * HUGE
        self.region.release(start, self.region.nbytes)

    def close(self) -> None:
        """Nobody may use it any more."""
        self.region.close()
