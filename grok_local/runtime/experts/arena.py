"""The memory of experts that come and go, and what llama.cpp lends to it.

Slots of one size lie one after the other, in huge pages where there are any. llama.cpp's memory for what it computes is
touched all over by wide batches, and by single tokens next to nowhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from grok_local.ggml.tensors import compute_buffer
from grok_local.pages import HUGE, Region, release_pages
from grok_local.runtime.experts.residency import Expert

__all__ = ["Arena", "Scratch"]

_NARROW = 16  # tokens; what fewer of them take less is not worth evicting an expert for


class Arena:
    """`sizes` are bytes of the parts of an expert, in the order in which a slot has them. Raises OSError.

    Slots are handed out from the first on, so that what is given back lies at the end.
    """

    def __init__(self, sizes: Sequence[int], *, slots: int) -> None:
        self.touched = 0  # slots from the first on whose memory may be in use
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
        self.touched = max(self.touched, slot + 1)
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
        self.touched = min(self.touched, count)

    def close(self) -> None:
        """Nobody may use it any more."""
        self.region.close()


class Scratch:
    """Knows what evaluations have left in llama.cpp's memory, and gives it back before a narrower one.

    Nobody reads it again.
    """

    def __init__(self) -> None:
        self._buffer: tuple[int, int] | None = None  # addresses
        self._width = _NARROW

    def look_at(self, node: int) -> None:
        """Learn from a node of the graph that is being computed where the buffer is."""
        self._buffer = compute_buffer(node)

    def width_for(self, tokens: int) -> int:
        """The tokens for which there has to be room while so many are evaluated, and until the next evaluation."""
        width = max(_NARROW, 1 << (tokens - 1).bit_length())
        if width < self._width and self._buffer:
            release_pages(*self._buffer)
            self._width = width
        self._width = max(self._width, width)
        return self._width
