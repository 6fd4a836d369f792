"""The nodes in which a router computes (llama-graph.cpp, build_moe_ffn), and the release's arithmetic in their place.

`ffn_moe_logits-LAYER` are the router's logits, from which the softmax over all experts and the choice `ffn_moe_topk`
follow. The shares of the chosen are then divided by their sum, which is first clamped in `ffn_moe_weights_sum_clamped`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from grok_local.errors import ModelError
from grok_local.ggml.tensors import read_floats, set_clamp, write_floats
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending

__all__ = ["ReleaseGates", "choices_of", "layer_of_choice", "not_in_the_graph"]

_CHOICE = b"ffn_moe_topk-"


def layer_of_choice(name: bytes) -> int | None:
    """The layer whose experts a node of that name chooses; None for any other node."""
    return int(name[len(_CHOICE) :]) if name.startswith(_CHOICE) else None


def choices_of(layers: Iterable[int]) -> frozenset[bytes]:
    """The names of the nodes in which these layers choose experts."""
    return frozenset(_CHOICE + b"%d" % layer for layer in layers)


def not_in_the_graph(names: set[bytes]) -> ModelError:
    """Nodes that were to be corrected did not come."""
    return ModelError(
        f"llama.cpp computed without a node {min(names).decode()}, so its graph cannot be corrected to compute as the "
        "release does: load the model with --routing llama.cpp"
    )


class ReleaseGates:
    """An observer that gives the routers of all `layers` the release's gates: softmax(cap * tanh(logits / cap)), of
    which the chosen are taken as they are (`grok.py` and `router.py` of SGLang).

    The cap is put on the logits where they are computed: it needs them all, and the order of experts stays. The sum
    that the shares are divided by is clamped to one, which costs nothing.
    """

    def __init__(self, *, layers: int, cap: float) -> None:
        self._cap = np.float32(cap)
        self._logits = frozenset(b"ffn_moe_logits-%d" % layer for layer in range(layers))
        self._sums = frozenset(b"ffn_moe_weights_sum_clamped-%d" % layer for layer in range(layers))
        self._all = self._logits | self._sums
        self._missing: set[bytes] = set()

    def names(self) -> frozenset[bytes]:
        """Those that are to be corrected."""
        return self._all

    def begin(self, rows: Sequence[Row]) -> None:
        """All is to be corrected."""
        self._missing = set(self._all)

    def wants(self, node: int, name: bytes) -> bool:
        """The logits. A sum is dealt with before it is computed."""
        if name in self._sums:
            set_clamp(node, low=1, high=1)
            self._missing.discard(name)
        return name in self._logits

    def see(self, node: int, name: bytes) -> None:
        """Cap the logits, float32 [tokens, experts]."""
        write_floats(node, self._cap * np.tanh(read_floats(node) / self._cap))
        self._missing.discard(name)

    def finish(self, ending: Ending) -> None:
        """Raises ModelError if a layer was computed without."""
        if ending is Ending.COMPLETE and self._missing:
            raise not_in_the_graph(self._missing)

    def close(self) -> None:
        """Nothing is held."""
