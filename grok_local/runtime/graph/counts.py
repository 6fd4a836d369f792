"""How often each expert was chosen, as it grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grok_local.ggml.tensors import read_ints
from grok_local.placement.shape import ModelShape
from grok_local.runtime.graph.router import choices_of, layer_of_choice
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending

__all__ = ["RoutingCounts"]


class RoutingCounts:
    """An observer that counts the tokens of complete evaluations: `counts` is int64 [layers, experts]."""

    def __init__(self, model: ModelShape) -> None:
        self.counts = np.zeros((model.layers, model.experts), np.int64)
        self._names = choices_of(range(model.layers))
        self._fresh = np.zeros_like(self.counts)

    def begin(self, rows: Sequence[Row]) -> None:
        """An evaluation begins."""
        self._fresh[:] = 0

    def names(self) -> frozenset[bytes]:
        """Every router's choice."""
        return self._names

    def wants(self, node: int, name: bytes) -> bool:
        """Every router's choice."""
        return layer_of_choice(name) is not None

    def see(self, node: int, name: bytes) -> None:
        """A router's choice, int32 [tokens, experts used]."""
        layer = layer_of_choice(name)
        if layer is not None:
            self._fresh[layer] += np.bincount(read_ints(node).ravel(), minlength=self.counts.shape[1])

    def finish(self, ending: Ending) -> None:
        """What is complete counts."""
        if ending is Ending.COMPLETE:
            self.counts += self._fresh

    def close(self) -> None:
        """Nothing is held."""
