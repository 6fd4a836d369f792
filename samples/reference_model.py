"""Grok-1's forward pass in numpy, straight from the release's files: an independent answer to what a model computes.

Written from xAI's model.py; shares nothing with the package but the list of leaves.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.models import grok1, release
from samples.checkpoints import QuantizedWeight8bit
from samples.layers import Floats, gelu, normed, rotated, softmax

__all__ = ["ReferenceModel"]

_EPSILON = grok1.CONSTANTS.norm_epsilon


class ReferenceModel:
    """`forward` gives logits and the experts each token was routed to."""

    def __init__(self, folder: Path, dims: release.Dimensions) -> None:
        self.dims = dims
        leaves = list(grok1.leaves(dims))
        self._weights = {leaf.gguf_name: _load(folder / "ckpt-0" / leaf.file_name) for leaf in leaves}

    def forward(self, ids: list[int]) -> tuple[Floats, npt.NDArray[np.intp]]:
        """Logits float32 [tokens, vocabulary] and routes [layers, tokens, 2] for one sequence."""
        embedding = self._weights["token_embd.weight"]
        h = embedding[ids] * np.float32(grok1.CONSTANTS.embedding_scale)
        routes = []
        for layer in range(self.dims.layers):
            weights = {
                name.split(".")[2]: value for name, value in self._weights.items() if name.startswith(f"blk.{layer}.")
            }
            attended = self._attention(weights, normed(h, weights["attn_norm"], _EPSILON))
            h = h + normed(attended, weights["attn_output_norm"], _EPSILON)
            mixed, chosen = _experts(weights, normed(h, weights["ffn_norm"], _EPSILON))
            h = h + normed(mixed, weights["layer_output_norm"], _EPSILON)
            routes.append(chosen)
        h = normed(h, self._weights["output_norm.weight"], _EPSILON)
        return h @ embedding.T * np.float32(grok1.CONSTANTS.logit_scale), np.stack(routes)

    def _attention(self, weights: dict[str, Floats], x: Floats) -> Floats:
        tokens, group = len(x), self.dims.heads // self.dims.kv_heads
        query = rotated(
            (x @ weights["attn_q"]).reshape(tokens, self.dims.heads, release.HEAD_SIZE), grok1.CONSTANTS.rope_base
        )
        key = rotated(
            (x @ weights["attn_k"]).reshape(tokens, self.dims.kv_heads, release.HEAD_SIZE), grok1.CONSTANTS.rope_base
        )
        value = (x @ weights["attn_v"]).reshape(tokens, self.dims.kv_heads, release.HEAD_SIZE)
        key, value = key.repeat(group, 1), value.repeat(group, 1)
        scores = np.einsum("qhd,khd->hqk", query, key) * grok1.CONSTANTS.attention_scale
        capped = grok1.CONSTANTS.attention_softcap * np.tanh(scores / grok1.CONSTANTS.attention_softcap)
        capped = np.where(np.tril(np.ones((tokens, tokens), bool)), capped, -1e30)
        mixed = np.einsum("hqk,khd->qhd", softmax(capped), value)
        out: Floats = mixed.reshape(tokens, -1) @ weights["attn_output"]
        return out


def _experts(weights: dict[str, Floats], x: Floats) -> tuple[Floats, npt.NDArray[np.intp]]:
    shares = softmax(x @ weights["ffn_gate_inp"])
    chosen = np.argsort(-shares, -1)[:, : grok1.CONSTANTS.experts_used]
    out = np.zeros_like(x)
    for expert in range(shares.shape[-1]):
        tokens = np.flatnonzero((chosen == expert).any(-1))
        inside = x[tokens]
        hidden = gelu(inside @ weights["ffn_gate_exps"][expert]) * (inside @ weights["ffn_up_exps"][expert])
        out[tokens] += hidden @ weights["ffn_down_exps"][expert] * shares[tokens, expert, None]
    return out, chosen


def _load(path: Path) -> Floats:
    with path.open("rb") as file:
        value = _Unpickler(file).load()
    if not isinstance(value, QuantizedWeight8bit):
        return np.asarray(value, np.float32)
    scales = value.scales.astype(np.float32)
    rows = value.weight.shape[-2] // scales.shape[-2]
    weight: Floats = value.weight.astype(np.float32) * scales.repeat(rows, -2)
    return weight


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return QuantizedWeight8bit if name == "QuantizedWeight8bit" else super().find_class(module, name)
