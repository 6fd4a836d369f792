"""Grammars that are hard to follow."""

from __future__ import annotations

__all__ = ["AMBIGUOUS"]

_RULES = 12
_PAIRS = " | ".join(f"x{number} x{number}" for number in range(_RULES))

# After its first letter there are more ways to read a text with every further one: at the eighth llguidance gives up.
AMBIGUOUS = f'root ::= ("y" | "z") {"x0 " * 7}\n' + "".join(f'x{n} ::= {_PAIRS} | "a"\n' for n in range(_RULES))
