"""What packing needs of a tokenizer, whatever its file looks like."""

from __future__ import annotations

from typing import Protocol

from gguf import GGUFWriter

__all__ = ["Vocabulary"]


class Vocabulary(Protocol):
    """The pieces of a tokenizer by id."""

    @property
    def size(self) -> int:
        """The number of pieces."""

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the vocabulary's keys."""
