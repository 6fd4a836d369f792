"""What each place of the KV cache holds, so that a prompt is only evaluated as far as none has its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

__all__ = ["Sequences", "common_length"]


class Cache(Protocol):
    """The part of an engine that knows places."""

    @property
    def cached(self) -> list[list[int]]: ...
    def copy(self, source: int, target: int, *, length: int) -> int: ...
    def forget(self, sequence: int, *, start: int = 0) -> int: ...


class Found(NamedTuple):
    """The place that begins with most of some tokens, and how many."""

    place: int
    length: int


class Sequences:
    """The cache's first `count` places, each free or taken. What a free one held stays there until its room is needed.

    Knows what the engine's places hold without asking: whoever evaluates says so. A beginning shorter than
    `worth_copying` is rather evaluated again than copied from one place to another. In `strict` mode only tokens are
    used again that were evaluated as a prompt's, two of them at least, and two at least are evaluated after them: by
    those numbers llama.cpp chooses its kernels.
    """

    def __init__(self, cache: Cache, count: int, *, strict: bool = False, worth_copying: int = 1) -> None:
        self._cache, self._strict, self._worth_copying = cache, strict, worth_copying
        self._ids: list[list[int]] = [[] for _ in cache.cached]
        self._kept = [0] * len(self._ids)  # after how many tokens the logits are kept; 0 is nowhere
        self._free = list(range(count))  # the one that was free longest comes first
        self._awaited: int | None = None

    @property
    def has_free(self) -> bool:
        """Whether a place can be taken."""
        return bool(self._takeable)

    def is_reserved(self, place: int) -> bool:
        """Whether nobody may take this place, were it free."""
        return place == self._awaited

    def reserve(self, place: int) -> bool:
        """Nobody takes this place until `end_reserving`. Says whether it is free."""
        self._awaited = place
        return place in self._free

    def end_reserving(self) -> None:
        """All free places may be taken."""
        self._awaited = None

    def ids(self, place: int) -> Sequence[int]:
        """What a place holds."""
        return self._ids[place]

    def found(self, ids: Sequence[int]) -> Found:
        """Where most of the beginning of `ids` is, as far as it saves evaluating: unless logits are kept for all of
        them, the last has to be evaluated.
        """
        best, ids = Found(0, 0), list(ids)
        for place in (*self._free, *(p for p in range(len(self._ids)) if p not in self._free)):
            length = self._usable(place, ids)
            if length > best.length:
                best = Found(place, length)
        return best

    def take(self, ids: Sequence[int]) -> Found:
        """Take a free place for `ids`, with as much of their beginning as is anywhere. It stays free where the engine
        raises an error.
        """
        source, target = self.found(ids), self._emptiest()
        if source.length and source.place in self._takeable:
            found = Found(source.place, self.shorten(source.place, source.length))
        elif source.length < self._worth_copying:
            found = Found(target, self.shorten(target, 0))
        else:
            found = Found(target, self._copy(source.place, target, source.length))
        self._free.remove(found.place)
        return found

    def move(self, place: int, target: int) -> None:
        """What is in a taken place is in `target` from now on, which must be free; what was there is forgotten."""
        self._copy(place, target, len(self._ids[place]))
        self._free.remove(target)
        self._free.append(place)

    def may_take(self, place: int) -> bool:
        """Whether this place can be taken."""
        return place in self._takeable

    def grow(self, place: int, ids: Sequence[int], *, kept: bool = False) -> None:
        """These were evaluated after what the place holds; `kept`: the logits after them stay there."""
        self._ids[place] += ids
        if kept:
            self._kept[place] = len(self._ids[place])

    def release(self, place: int) -> None:
        """Nobody continues what is there; it may serve as a beginning."""
        self._free.append(place)

    def shorten(self, place: int, length: int) -> int:
        """Forget from position `length` on. Returns how many remain, none of a model that cannot forget a part."""
        if length < len(self._ids[place]):
            remain = self._cache.forget(place, start=length)
            del self._ids[place][remain:]
            self._kept[place] *= self._kept[place] <= remain
        return len(self._ids[place])

    def clear_free(self) -> bool:
        """Forget what free places hold. Says whether that was anything."""
        filled = [place for place in self._free if self._ids[place]]
        for place in filled:
            self.shorten(place, 0)
        return bool(filled)

    def read_again(self) -> None:
        """Something was evaluated, or was not, without being said: ask the engine."""
        for place, ids in enumerate(self._cache.cached):
            same = common_length(self._ids[place], ids)
            self._kept[place] *= self._kept[place] <= same
            self._ids[place] = list(ids)

    def _copy(self, source: int, target: int, length: int) -> int:
        found = self._cache.copy(source, target, length=length)
        self._ids[target] = self._ids[source][:found]
        self._kept[target] = self._kept[source] if self._kept[source] == found else 0
        return found

    def _emptiest(self) -> int:
        """Of the free places the first that holds nothing, or the one that was free longest."""
        takeable = self._takeable
        return next((place for place in takeable if not self._ids[place]), takeable[0])

    @property
    def _takeable(self) -> list[int]:
        return [place for place in self._free if place != self._awaited]

    def _usable(self, place: int, ids: list[int]) -> int:
        length = common_length(self._ids[place], ids)
        if length == len(ids):
            length -= self._kept[place] != length
        if not self._strict or length == len(ids):
            return length
        length = min(length, self._kept[place], len(ids) - 2)
        return length if length >= 2 else 0


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two lists share."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] is b[:low], and a[:high] is not b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
