"""The node in which a router's choice is computed: `ffn_moe_topk-LAYER` (llama-graph.cpp, build_moe_ffn)."""

from __future__ import annotations

__all__ = ["layer_of_choice"]

_CHOICE = b"ffn_moe_topk-"


def layer_of_choice(name: bytes) -> int | None:
    """The layer whose experts a node of that name chooses; None for any other node."""
    return int(name[len(_CHOICE) :]) if name.startswith(_CHOICE) else None
