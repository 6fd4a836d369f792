"""Which tokens llama.cpp's memory holds of each sequence.

That memory is a KV cache, or for a recurrent model a state that takes in one token after the other: such a model cannot
forget a sequence's end, so the sequence is forgotten whole.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from grok_local.errors import ModelError, OutputError
from grok_local.ggml import log
from grok_local.runtime.graph.rows import Row

__all__ = ["KVCache", "RowBatch"]


class KVCache:
    """The memory of a llama_context, and the ids of `sequences` sequences that are in it."""

    def __init__(self, context: Any, *, sequences: int) -> None:
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)
        self._ids: list[list[int]] = [[] for _ in range(sequences)]

    @property
    def sequences(self) -> list[list[int]]:
        """The tokens of all sequences, by position."""
        return self._ids

    def ids(self, sequence: int = 0) -> list[int]:
        """The tokens of a sequence, by position."""
        return self._ids[sequence]

    def copy(self, source: int, target: int, *, length: int) -> int:
        """Have `target` begin as the first `length` tokens of `source`. Returns how many it has then: none of a model
        that cannot forget a sequence's end.
        """
        self.truncate(target, 0)
        # All of it first: where each sequence has a buffer of its own, llama.cpp aborts at less.
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._ids[target] = list(self._ids[source])
        if length < len(self._ids[target]):
            self.truncate(target, length)
        return len(self._ids[target])

    def keep(self, ids: Sequence[int]) -> int:
        """Forget of sequence 0 what does not begin as `ids` do, and the last of them, whose logits are to be had.

        Returns how many of them remain.
        """
        length = min(_common_prefix(self._ids[0], ids), max(len(ids) - 1, 0))
        if length < len(self._ids[0]):
            self.truncate(0, length)
        return len(self._ids[0])

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence from position `length` on, and what an unfinished evaluation may have left there."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, length, -1):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            length = 0
        del self._ids[sequence][length:]

    def add(self, rows: Iterable[Row]) -> None:
        """The rows were evaluated."""
        for row in rows:
            self._ids[row.sequence].append(row.token)

    def roll_back(self, rows: Iterable[Row]) -> None:
        """The rows were not evaluated, or not all of them: each of their sequences is what it was before, or empty."""
        for sequence in {row.sequence for row in rows}:
            self.truncate(sequence, len(self._ids[sequence]))

    def save(self, path: Path) -> None:
        """Write sequence 0 to a file, as llama.cpp does. Raises OutputError."""
        ids = self._ids[0]
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if not llama_cpp.llama_state_seq_save_file(self._context, os.fsencode(path), 0, tokens, len(ids)):
            raise OutputError(f"{path}: llama.cpp cannot write its state there: {log.reason()}")

    def restore(self, path: Path, ids: Sequence[int]) -> None:
        """Have sequence 0 be what `save` wrote of `ids`. llama.cpp believes the file. Raises ModelError."""
        self.truncate(0, 0)
        tokens, count = (llama_cpp.llama_token * max(len(ids), 1))(), ctypes.c_size_t()
        name, found = os.fsencode(path), ctypes.byref(count)
        size = llama_cpp.llama_state_seq_load_file(self._context, name, 0, tokens, len(ids), found)
        self._ids[0] = list(ids)
        if not size or list(tokens[: count.value]) != self._ids[0]:
            self.truncate(0, 0)
            raise ModelError(f"{path}: llama.cpp cannot go on from it: {log.reason()}")


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class RowBatch:
    """llama.cpp's batch, with room for so many rows."""

    def __init__(self, size: int) -> None:
        self._batch = llama_cpp.llama_batch_init(size, 0, 1)

    def filled(self, rows: Sequence[Row]) -> Any:
        """The batch with these rows, valid until the next ones."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.output
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.sequence
        return batch

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_batch_free(self._batch)
