"""Weights whose place is not for the plan to decide: what overrides name, and the room that it takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from grok_local.placement.shape import ModelShape, Role

__all__ = ["bytes_by_place", "fixed_places", "free_bytes"]


def fixed_places(model: ModelShape, overrides: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The place of each tensor that an override names; of several, the first holds."""
    patterns = [(re.compile(pattern), place) for pattern, place in reversed(overrides)]
    return {w.name: place for pattern, place in patterns for w in model.weights if pattern.search(w.name)}


def bytes_by_place(model: ModelShape, fixed: Mapping[str, str]) -> Counter[str]:
    """What these tensors take of each place."""
    taken = Counter[str]()
    for weight in model.weights:
        if weight.name in fixed:
            taken[fixed[weight.name]] += weight.nbytes
    return taken


def free_bytes(model: ModelShape, fixed: Mapping[str, str], *roles: Role) -> list[int]:
    """What the others of these roles take, by layer, and at the end those of no layer."""
    sizes = [0] * (model.layers + 1)
    for weight in model.weights:
        if weight.role in roles and weight.name not in fixed:
            sizes[-1 if weight.layer is None else weight.layer] += weight.nbytes
    return sizes
