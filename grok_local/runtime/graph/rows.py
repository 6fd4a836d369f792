"""What goes into an evaluation, and what is chosen after it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Draw", "Drawn", "Likely", "Row", "Token"]


class Row(NamedTuple):
    """A token in an evaluation; `output`: its logits are wanted."""

    token: int
    position: int
    sequence: int
    output: bool


class Draw(NamedTuple):
    """A choice to be made of what follows a sequence's last token, by the sampler chain `chain`.

    With `keep`, the logits stay with the sequence, so that another choice can be made at the same place later.
    `likely`: of how many tokens the log-probabilities are wanted beside the chosen one's; None for none at all.
    """

    sequence: int
    chain: int
    keep: bool = False
    likely: int | None = None


class Likely(NamedTuple):
    """Natural logarithms of probabilities, as the model has them before any sampling option: of the chosen token, and
    of the likeliest ones by falling probability.
    """

    chosen: float
    top: tuple[tuple[int, bytes, float], ...]


class Token(NamedTuple):
    """A token that was chosen: its id, its bytes, and whether the model ends the text with it."""

    id: int
    piece: bytes
    is_end: bool
    likely: Likely | None = None


class Drawn(NamedTuple):
    """What comes next in a sequence: the chosen token, and those after it that a grammar leaves no choice about.

    None come, and `is_over`, where the grammar has ended.
    """

    tokens: tuple[Token, ...]
    is_over: bool = False
