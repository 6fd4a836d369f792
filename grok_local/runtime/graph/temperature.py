"""Attention that gets sharper along a text, as the release's does and llama.cpp's does not.

SGLang multiplies the scores of a query, after they are capped softly, with log2(position) / log2(length) where its
position, from 0, is beyond that length (layers/attention/triton_ops, `xai_temperature_len`). In llama.cpp's graph
(build_attn_mha) the last thing that happens to Grok's scores before the softmax is that they are scaled back to the
cap, in `kq_scaled-LAYER`: there each query gets a factor of its own. Scaling the query itself would not do, because the
cap comes between.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError
from grok_local.ggml.tensors import RowFactors, read_ints, set_scale, sources, tensor_name
from grok_local.runtime.graph.router import not_in_the_graph
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending

__all__ = ["AttentionTemperature"]

_POSITIONED = b"Qcur-0"  # the first layer's queries, which are rotated by their positions
_POSITIONS = b"inp_pos"


class AttentionTemperature:
    """An observer that changes nodes before they are computed, and is shown none: nothing waits for it.

    Positions are read from the graph, because llama.cpp may evaluate the rows of a step in another order, or in parts.
    """

    def __init__(self, *, layers: int, length: int, cap: float) -> None:
        self._length, self._cap = length, cap
        self._scores = frozenset(b"kq_scaled-%d" % layer for layer in range(layers))
        self._names = self._scores | {_POSITIONED}
        self._missing: set[bytes] = set()
        self._factors: npt.NDArray[np.float32] | None = None  # by token
        self._are_equal = False
        self._row_factors = RowFactors()

    def begin(self, rows: Sequence[Row]) -> None:
        """Nothing is known of the graph."""
        self._missing, self._factors = set(self._scores), None

    def names(self) -> frozenset[bytes]:
        """The scores, and where the positions come from."""
        return self._names

    def wants(self, node: int, name: bytes) -> bool:
        """Nothing; but scores are dealt with."""
        if name == _POSITIONED:
            self._look_for_positions(node)
        elif name in self._scores:
            self._missing.discard(name)
            self._sharpen(node)
        return False

    def see(self, node: int, name: bytes) -> None:
        """It is never shown one."""

    def finish(self, ending: Ending) -> None:
        """Raises ModelError if a layer was computed without."""
        if ending is Ending.COMPLETE and self._missing:
            raise not_in_the_graph(self._missing)

    def close(self) -> None:
        """Let the memory of the factors go."""
        self._row_factors.close()

    def _look_for_positions(self, node: int) -> None:
        for source in sources(node):
            if _POSITIONS in tensor_name(source):  # a device has a copy, whose name has the device's before it
                positions = read_ints(source).reshape(-1)
                self._factors = self._factors_at(positions)
                self._are_equal = bool((self._factors == self._factors[:1]).all())

    def _factors_at(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        factors = np.log2(np.maximum(positions, 1)) / np.log2(self._length)
        return (self._cap * np.where(positions > self._length, factors, 1)).astype(np.float32)

    def _sharpen(self, node: int) -> None:
        """A node of a graph that is computed again was changed already, and needs the factors of now.

        One factor for all tokens, as of a single one, costs nothing; llama.cpp takes longer to multiply with many.
        """
        if self._factors is None:
            raise not_in_the_graph({_POSITIONED})
        if self._are_equal and not self._row_factors.holds(node):
            set_scale(node, self._factors[0])
        elif not self._row_factors.put(node, self._factors):
            raise ModelError(
                "llama.cpp's attention has other rows than tokens: load the model with --routing llama.cpp"
            )
