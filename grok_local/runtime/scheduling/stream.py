"""From token bytes to text that can be shown: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

__all__ = ["TextStream"]


class TextStream:
    """Decodes UTF-8 piece by piece and ends at the first stop string.

    `push` and `flush` return text that is safe to show: what might still become a stop string is held back. With
    `strip`, white space at the very start is left out.
    """

    def __init__(self, stop: Sequence[str] = (), *, strip: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = [text for text in stop if text]
        self._held = ""
        self._strip = strip
        self.matched: str | None = None  # the stop string that came

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.matched is not None

    def push(self, data: bytes) -> str:
        """Add a token's bytes. After a stop string, `stopped` is true and nothing more comes."""
        return self._release(self._decoder.decode(data), final=False)

    def flush(self) -> str:
        """The rest, when no more tokens come; without a character of which only some bytes came."""
        return self._release("", final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            keep, self.matched = min(ends)
        else:
            keep = len(text) if final else len(text) - self._undecided(text)
        self._held = text[keep:]
        shown = text[:keep].lstrip() if self._strip else text[:keep]
        self._strip = self._strip and not shown
        return shown

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string starts with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0
        )
