"""A record of which experts each token was routed to, in a file of JSON lines, and what it says.

The first line describes the model; each of the others is a token that was evaluated: its id, position and sequence, and
for each layer the experts, the likeliest first. Of a prompt, llama.cpp computes the last layer's experts only for the
last token: there it is null.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.errors import OptionError, OutputError
from grok_local.placement.shape import ModelShape
from grok_local.runtime.graph.rows import Row

__all__ = ["Recorder", "Routing", "read_routing"]

_MOST_EXPERTS = 1 << 14  # of a layer
_MOST_PAIRS = 1 << 20  # of a layer and an expert


class Recorder:
    """Writes to `path` as tokens are evaluated. Raises OutputError if it exists, or cannot be written."""

    def __init__(self, path: Path, model: ModelShape) -> None:
        self._path = path
        self._layers = model.layers
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

    def choose(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """int32 [tokens, experts used]: what a layer's router chose; in the last layer, for those with an output."""
        self._chosen[layer] = ids

    def commit(self) -> None:
        """The evaluation is complete. Raises OutputError."""
        self._empty = False
        experts: list[list[list[int] | None]] = [[None] * self._layers for _ in self._rows]
        outputs = [number for number, row in enumerate(self._rows) if row.output]
        for layer, ids in self._chosen.items():
            numbers = range(len(self._rows)) if len(ids) == len(self._rows) else outputs
            for number, chosen in zip(numbers, ids.tolist(), strict=False):
                experts[number][layer] = chosen
        self._write(
            {"token": row.token, "position": row.position, "sequence": row.sequence, "experts": chosen}
            for row, chosen in zip(self._rows, experts, strict=True)
        )

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


@dataclass(frozen=True)
class Routing:
    """A record, read back. `experts` is int16 [tokens, layers, experts used], -1 where nothing was computed."""

    model: str
    count: int  # experts of a layer
    experts: npt.NDArray[np.int16]

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """float64 [layers, experts]: of a layer's choices, those that fell on each expert."""
        return _shares(self.experts, self.count)

    @property
    def repeats(self) -> float:
        """Of the experts chosen for a token, those that the token before had chosen in the same layer."""
        now, before = self.experts[1:], self.experts[:-1]
        known = (now >= 0) & (before[..., :1] >= 0)
        again = (now[..., :, None] == before[..., None, :]).any(-1) & known
        return float(again.sum() / max(known.sum(), 1))

    def hit_rate(self, held: int) -> float:
        """Of the choices in the record's second half, those that are in memory when streaming holds so many experts of
        each layer.
        """
        from grok_local.runtime.experts.residency import Residency  # whose package needs this module

        tokens, layers, used = self.experts.shape
        residency = Residency([1] * layers, experts=self.count, used=used, budget=held * layers + used)
        hits = 0
        for number, layer in np.ndindex(tokens, layers):
            wanted = [expert for expert in self.experts[number, layer].tolist() if expert >= 0]
            residency.count(layer, dict.fromkeys(wanted, 1), tokens=1)
            _, missing = residency.request(layer, wanted)
            hits += (len(wanted) - len(missing)) * (number >= tokens // 2)
        return hits / max(int((self.experts[tokens // 2 :] >= 0).sum()), 1)

    def pinned_rate(self, held: int) -> float:
        """The same, if those always stayed that each layer's first half has most often."""
        half = len(self.experts) // 2
        hottest = np.argsort(-_shares(self.experts[:half], self.count), 1, kind="stable")[:, :held]
        found = (self.experts[half:, :, :, None] == hottest[None, :, None, :]).any(-1)
        return float(found.sum() / max(int((self.experts[half:] >= 0).sum()), 1))


def _shares(experts: npt.NDArray[np.int16], count: int) -> npt.NDArray[np.float64]:
    counts = np.stack([(experts == expert).sum((0, 2)) for expert in range(count)], 1)
    shares: npt.NDArray[np.float64] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def read_routing(path: Path) -> Routing:
    """Read a record. Raises OptionError if it is none."""
    try:
        with path.open(encoding="utf-8") as file:
            facts = json.loads(file.readline())
            layers, count, used = (_number(facts[key]) for key in ("layers", "experts", "experts_used"))
            if layers * max(count, used) > _MOST_PAIRS or count > _MOST_EXPERTS:
                raise ValueError(facts)
            # A last line without an end was cut off with the program that wrote it.
            lines = (line for line in file if line.endswith("\n") and line.strip())
            rows = [_experts(json.loads(line)["experts"], layers, count, used) for line in lines]
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise OptionError(f"{path}: is no record of experts, which --trace-experts writes") from None
    experts = np.array(rows, np.int16).reshape(len(rows), layers, used)
    return Routing(str(facts.get("model", "")), count, experts)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(value)
    return value


def _experts(value: Any, layers: int, count: int, used: int) -> list[list[int]]:
    rows = [[-1] * used if row is None else [int(expert) for expert in row] for row in value]
    if len(rows) != layers or any(len(row) != used or not all(-1 <= e < count for e in row) for row in rows):
        raise ValueError(value)
    return rows
