"""What a record of routing says: how often each expert is chosen, and how many choices would be found in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.errors import OptionError
from grok_local.files import whole_lines
from grok_local.runtime.experts.residency import Residency

__all__ = ["Routing", "read_routing"]

_MOST_EXPERTS = 1 << 14  # of a layer
_MOST_PAIRS = 1 << 20  # of a layer and an expert


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
        with path.open("rb") as file:
            facts = json.loads(file.readline())
            layers, count, used = (_number(facts[key]) for key in ("layers", "experts", "experts_used"))
            if layers * max(count, used) > _MOST_PAIRS or count > _MOST_EXPERTS:
                raise ValueError(facts)
            lines = (line for line in whole_lines(file) if line.strip())
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
