"""Splits layers among devices in proportion to their room."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["balanced"]

_STEPS = 512  # shares of the rooms that are tried, the smallest first


def balanced(costs: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """Split `costs` into runs, one a room, that fill the rooms in equal proportion; None if they do not fit."""
    for step in range(1, _STEPS + 1):
        counts = _filled(costs, [room * step // _STEPS for room in rooms])
        if sum(counts) == len(costs):
            return counts
    return None


def _filled(costs: Sequence[int], limits: Sequence[int]) -> list[int]:
    counts, at = [], 0
    for limit in limits:
        used, first = 0, at
        while at < len(costs) and used + costs[at] <= limit:
            used += costs[at]
            at += 1
        counts.append(at - first)
    return counts
