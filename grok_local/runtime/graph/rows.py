"""What goes into an evaluation, and what is chosen after it."""

from __future__ import annotations

from typing import NamedTuple

from grok_local.errors import OptionError

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

    Where all rows of the sequence have outputs, `known` are the tokens that follow them, whose log-probabilities are
    wanted with those of `known_likely` others; there is one less of them where another one is to be chosen after the
    last row. Without a chain none is.
    """

    sequence: int
    chain: int | None
    keep: bool = False
    likely: int | None = None
    known: tuple[int, ...] = ()
    known_likely: int = 0


class Likely(NamedTuple):
    """Natural logarithms of probabilities, as the model has them before any sampling option: of the chosen token, and
    of the likeliest ones by falling probability. `rank` 1 is the likeliest token's.
    """

    chosen: float
    top: tuple[tuple[int, bytes, float], ...]
    rank: int


class Token(NamedTuple):
    """A token that was chosen: its id, its bytes, and whether the model ends the text with it."""

    id: int
    piece: bytes
    is_end: bool
    likely: Likely | None = None


class Drawn(NamedTuple):
    """What comes next in a sequence: the chosen token, and those after it that a grammar leaves no choice about.

    None come, and `is_over`, where the grammar has ended; or the `error` that it died of, which costs no other draw
    anything. `known` are the draw's, with their log-probabilities.
    """

    tokens: tuple[Token, ...]
    is_over: bool = False
    known: tuple[Token, ...] = ()
    error: OptionError | None = None
