"""What packing needs of a tokenizer, whatever its file looks like, and where that file is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gguf import GGUFWriter

from grok_local.errors import TokenizerError

__all__ = ["TokenizerKind", "Vocabulary"]


class Vocabulary(Protocol):
    """The pieces of a tokenizer by id."""

    @property
    def size(self) -> int:
        """The number of pieces."""

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the vocabulary's keys."""


@dataclass(frozen=True)
class TokenizerKind:
    """A kind of tokenizer: its file's name, where that can be had, and what reads it.

    `read` takes the file and the number of pieces it must have, None being any number, and raises TokenizerError.
    """

    file_name: str
    where: str
    read: Callable[[Path, int | None], Vocabulary]

    def places(self, folder: Path) -> tuple[Path, Path]:
        """Where its file may lie: in the checkpoint's folder, or the one above."""
        return folder / self.file_name, folder.absolute().parent / self.file_name

    def find(self, folder: Path, given: Path | None) -> Path:
        """The file `given`, or the first of `places` that is there. Raises TokenizerError."""
        if given is not None:
            if not given.is_file():
                raise TokenizerError(f"{given}: no such tokenizer file")
            return given
        for place in self.places(folder):
            if place.is_file():
                return place
        raise TokenizerError(f"{folder}: no {self.file_name} in it or the folder above: {self.where}")
