"""Sizes as people write them: G = 10^9, Gi = 2^30 bytes; and whole numbers, as Python and numpy have them."""

from __future__ import annotations

import operator
import re
from contextlib import suppress
from typing import Any

from grok_local.errors import OptionError

__all__ = ["format_bytes", "format_figure", "format_seconds", "parse_size", "printable", "whole_number"]

_FACTORS = {"": 1, **{unit: 1000 ** (i + 1) for i, unit in enumerate("KMGT")}}
_FEWEST = 4096  # bytes: fewer are nobody's size
_FACTORS |= {unit + "i": 1024 ** (i + 1) for i, unit in enumerate("KMGT")}


def parse_size(text: str | int) -> int:
    """Bytes meant by "4G", "1.5Gi", "500M" or a plain number. Raises OptionError, for a few bytes too."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kKMGTmgt]?i?)[bB]?\s*", str(text))
    unit = match and match[2][:1].upper() + match[2][1:]
    if not match or unit not in _FACTORS:
        raise OptionError(f"{text!r} is not a size: write 4G (10^9 bytes) or 4Gi (2^30), for example")
    if isinstance(text, str) and not unit and 0 < float(match[1]) < _FEWEST:
        raise OptionError(f"{text} would be {text} bytes: was {text}G meant?")
    return int(float(match[1]) * _FACTORS[unit])


def whole_number(name: str, value: Any) -> int:
    """The value of option `name`, numpy's too, as Python's int. Raises OptionError for others, booleans among them."""
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        with suppress(TypeError):  # of an array with several
            return operator.index(value)
    raise OptionError(f"{name} {value!r:.60}: a whole number is wanted")


def printable(text: str) -> str:
    """`text` on one line, its control characters spelt out: a file's name or contents may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_bytes(count: float) -> str:
    """Decimal units, three figures: 1.61 GB."""
    units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"]
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.3g} {units[0]}"


def format_figure(value: float) -> str:
    """Three figures, without powers of ten."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 0.001 else f"{value:.6f}"


def format_seconds(seconds: float) -> str:
    """A time to wait, in its two largest units: 3 h 20 min."""
    if seconds < 1:
        return "less than 1 s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s"
