"""Where experts cannot have memory of our own: the chosen ones are read into the page cache before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from grok_local.formats.gguf_file import Header
from grok_local.ggml.tensors import read_ints
from grok_local.runtime.experts.reader import Reader
from grok_local.runtime.experts.waiting import ExpertStats, Waiting
from grok_local.runtime.experts.weights import dense_tensors, expert_tensors
from grok_local.runtime.graph.router import choices_of, layer_of_choice
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending

__all__ = ["ReadAhead"]

_NOTE = "experts cannot have memory of their own here: they are read ahead into the system's file cache"


class ReadAhead:
    """An observer that leaves llama.cpp's mapped weights as they are; `names` are the tensors that RAM holds.

    What stays is the system's choice, and what it had already it does not tell: hits are not counted, and bytes are
    those that were asked for.
    """

    is_whole = False  # it looks on at every evaluation
    notes = (_NOTE,)

    def __init__(self, headers: Sequence[Header], names: Sequence[str], *, interrupted: Callable[[], bool]) -> None:
        self._experts = expert_tensors(headers, names)
        self._names = choices_of(self._experts)
        self._dense = dense_tensors(headers, names)
        self._reader = Reader([header.path for header in headers])
        self._waiting = Waiting(interrupted)

    @property
    def stats(self) -> ExpertStats:
        """What was read and waited for since loading."""
        return self._waiting.stats

    def attach(self) -> None:
        """Have the dense tensors read, which every token needs."""
        for ticket in [self._reader.read_ahead(file, t.offset, t.offset + t.nbytes) for file, t in self._dense]:
            self._waiting.wait_for(ticket)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def begin(self, rows: Sequence[Row]) -> None:
        """Raises ModelError if the file is no longer what it was."""
        self._reader.check()
        self._waiting.begin()

    def names(self) -> frozenset[bytes]:
        """The choices of the layers that are in RAM."""
        return self._names

    def wants(self, node: int, name: bytes) -> bool:
        """The choices of the layers that are in RAM."""
        return layer_of_choice(name) in self._experts

    def see(self, node: int, name: bytes) -> None:
        """Read the experts that a router has chosen; int32 [tokens, experts used]."""
        layer, tickets = layer_of_choice(name), []
        for expert in map(int, np.unique(read_ints(node))):
            for weight in self._experts.get(-1 if layer is None else layer, ()):
                tickets.append(weight.read_ahead(self._reader, expert))
                self.stats.bytes_read += weight.stride
        for ticket in tickets:
            self._waiting.wait_for(ticket)

    def finish(self, ending: Ending) -> None:
        """Raises ModelError if the file has changed meanwhile."""
        self._waiting.finish()
        if ending is not Ending.FAILED:
            self._reader.check()
