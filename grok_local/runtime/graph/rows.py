"""The tokens of an evaluation."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Row"]


class Row(NamedTuple):
    """A token in an evaluation; `output`: its logits are wanted."""

    token: int
    position: int
    sequence: int
    output: bool
