"""llama.cpp's memory for what it computes: wide batches touch all of it, and single tokens next to none."""

from __future__ import annotations

from grok_local.ggml.tensors import compute_buffer
from grok_local.pages import release_pages

__all__ = ["Scratch"]

_NARROW = 16  # tokens; what fewer of them take less is not worth evicting an expert for


class Scratch:
    """Knows what evaluations have left there, and gives it back before a narrower one: nobody reads it again."""

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
