"""Tells which release a folder holds, and opens it."""

from __future__ import annotations

from pathlib import Path

from grok_local.quantize.sources.checkpoint import Checkpoint
from grok_local.quantize.sources.grok1 import open_grok1
from grok_local.quantize.sources.sentencepiece import find_tokenizer, read_tokenizer
from grok_local.quantize.sources.vocabulary import Vocabulary

__all__ = ["open_checkpoint", "open_vocabulary"]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, by its files' headers alone. Raises CheckpointError listing every problem."""
    return open_grok1(path)


def open_vocabulary(folder: Path, given: Path | None, *, size: int | None) -> Vocabulary:
    """The vocabulary in the file `given`, or beside a checkpoint's tensors. It must have `size` pieces, None being any
    number. Raises TokenizerError.
    """
    return read_tokenizer(find_tokenizer(folder, given), size)
