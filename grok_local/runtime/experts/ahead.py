"""Where experts cannot have memory of our own: the chosen ones are read into the page cache before they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.formats.gguf_file import Header
from grok_local.runtime.experts.reader import Reader
from grok_local.runtime.experts.weights import dense_tensors, expert_slices
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import RouterTap

__all__ = ["ReadAhead"]


class ReadAhead(RouterTap):
    """llama.cpp's mapped weights as they are; `names` are the tensors that RAM holds.

    What stays is the system's choice, and what it had already it does not tell: hits are not counted, and bytes are
    those that were asked for.
    """

    def __init__(self, headers: Sequence[Header], names: Sequence[str], **tap: Any) -> None:
        super().__init__(**tap)
        self._slices = expert_slices(headers, names)
        self._dense = dense_tensors(headers, names)
        self._reader = Reader([header.path for header in headers])

    def attach(self) -> None:
        """Have the dense tensors read, which every token needs."""
        for ticket in [self._reader.read_ahead(file, t.offset, t.offset + t.nbytes) for file, t in self._dense]:
            self._wait(ticket)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
        super().close()

    def begin(self, rows: Sequence[Row]) -> None:
        """Raises ModelError if the file is no longer what it was."""
        self._reader.check()
        super().begin(rows)

    def finish(self, *, complete: bool) -> None:
        """Raises what went wrong meanwhile, or if the file has changed."""
        if self.error is None:
            self._reader.check()
        super().finish(complete=complete)

    def _wants(self, layer: int) -> bool:
        return layer in self._slices or super()._wants(layer)

    def _choose(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        tickets = []
        for expert in map(int, np.unique(ids)):
            for part in self._slices.get(layer, ()):
                start = part.offset + expert * part.stride
                tickets.append(self._reader.read_ahead(part.file, start, start + part.stride))
                self.stats.bytes_read += part.stride
        for ticket in tickets:
            self._wait(ticket)
