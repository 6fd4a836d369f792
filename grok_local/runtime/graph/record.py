"""A record of which experts each token is routed to, in a file of JSON lines.

The first line describes the model; each of the others is a token that was evaluated: its id, position and sequence, and
for each layer the experts, the likeliest first. Of a prompt, llama.cpp computes the last layer's experts only for the
last token: there it is null.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.errors import OutputError
from grok_local.ggml.tensors import read_ints
from grok_local.placement.shape import ModelShape
from grok_local.runtime.graph.router import choices_of, layer_of_choice
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending

__all__ = ["Recorder"]


class Recorder:
    """An observer that writes to `path` as tokens are evaluated. Raises OutputError if it exists or is not writable."""

    def __init__(self, path: Path, model: ModelShape) -> None:
        self._path = path
        self._layers = model.layers
        self._names = choices_of(range(model.layers))
        self._empty = True
        self._rows: Sequence[Row] = ()
        self._chosen: dict[int, npt.NDArray[np.int32]] = {}
        try:
            self._file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise OutputError(f"{path}: is there already: name another file for the record") from None
        except OSError as error:
            raise self._failed(error) from None
        facts = {"layers": model.layers, "experts": model.experts, "experts_used": model.experts_used}
        self._write([{"model": model.name, **facts}])

    def begin(self, rows: Sequence[Row]) -> None:
        """An evaluation of these tokens."""
        self._rows = rows
        self._chosen.clear()

    def names(self) -> frozenset[bytes]:
        """Every router's choice."""
        return self._names

    def wants(self, node: int, name: bytes) -> bool:
        """Every router's choice."""
        return layer_of_choice(name) is not None

    def see(self, node: int, name: bytes) -> None:
        """A router's choice, int32 [tokens, experts used]; in the last layer only for tokens with an output."""
        layer = layer_of_choice(name)
        if layer is not None:
            self._chosen[layer] = read_ints(node)

    def finish(self, ending: Ending) -> None:
        """Write what a complete evaluation chose. Raises OutputError."""
        if ending is not Ending.COMPLETE:
            return
        self._empty = False
        self._write(
            {"token": row.token, "position": row.position, "sequence": row.sequence, "experts": chosen}
            for row, chosen in zip(self._rows, self._choices(), strict=True)
        )

    def _choices(self) -> list[list[list[int] | None]]:
        """By row and layer."""
        experts: list[list[list[int] | None]] = [[None] * self._layers for _ in self._rows]
        outputs = [number for number, row in enumerate(self._rows) if row.output]
        for layer, ids in self._chosen.items():
            numbers = range(len(self._rows)) if len(ids) == len(self._rows) else outputs
            for number, chosen in zip(numbers, ids.tolist(), strict=False):
                experts[number][layer] = chosen
        return experts

    def close(self) -> None:
        """What was recorded stays; a file without a token does not."""
        with suppress(OSError):  # that it could not be written was said
            self._file.close()
        if self._empty:
            self._path.unlink(missing_ok=True)

    def _write(self, lines: Any) -> None:
        try:
            self._file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: the record of experts cannot be written ({error.strerror or error})")
