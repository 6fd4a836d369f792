"""Grok-2's forward pass in numpy, straight from the release's files: an independent answer to what a model computes.

Written from the facts of SGLang's grok.py; shares nothing with the package but the size of a head. `Routing` tells the
release's way of weighing experts from llama.cpp's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from grok_local.models.release import HEAD_SIZE
from samples.layers import Floats, gelu, normed, rotated, softmax

__all__ = ["ReferenceGrok2", "Routing"]

_TYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


class Routing(Enum):
    """How the experts' shares come about, and whether attention gets colder along a text."""

    RELEASE = "the router's logits soft-capped, the two shares as they are, a temperature beyond 1024 tokens"
    LLAMA_CPP = "no cap, the two shares made to add up to one, no temperature"


class ReferenceGrok2:
    """`forward` gives logits and the experts each token was routed to."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self._weights = _load(folder)

    def forward(self, ids: list[int], routing: Routing) -> tuple[Floats, npt.NDArray[np.intp]]:
        """Logits float32 [tokens, vocabulary] and routes [layers, tokens, 2] for one sequence."""
        config, weights = self.config, self._weights
        h = weights["model.embed_tokens.weight"][ids] * np.float32(config["embedding_multiplier_scale"])
        routes = []
        for layer in range(config["num_hidden_layers"]):
            start = f"model.layers.{layer}."
            inside = {name[len(start) :]: value for name, value in weights.items() if name.startswith(start)}
            attended = self._attention(inside, self._norm(h, inside["pre_attn_norm.weight"]), routing)
            h = h + self._norm(attended, inside["post_attn_norm.weight"])
            z = self._norm(h, inside["pre_moe_norm.weight"])
            mixed, chosen = self._experts(inside, z, routing)
            dense = _feed_forward(z, *(inside[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
            h = h + self._norm((dense + mixed) / np.float32(1.41421356), inside["post_moe_norm.weight"])
            routes.append(chosen)
        out = self._norm(h, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
        cap = np.float32(config["final_logit_softcapping"])
        return cap * np.tanh(out * np.float32(config["output_multiplier_scale"]) / cap), np.stack(routes)

    def _norm(self, x: Floats, gain: Floats) -> Floats:
        return normed(x, gain, self.config["rms_norm_eps"])

    def _attention(self, weights: dict[str, Floats], x: Floats, routing: Routing) -> Floats:
        tokens = len(x)
        query, key, value = (
            (x @ weights[f"self_attn.{name}_proj.weight"].T).reshape(tokens, -1, HEAD_SIZE) for name in "qkv"
        )
        query, key = (rotated(heads, self.config["rope_theta"]) for heads in (query, key))
        group = query.shape[1] // key.shape[1]
        scores = np.einsum("qhd,khd->hqk", query, key.repeat(group, 1)) * np.float32(HEAD_SIZE**-0.5)
        cap = np.float32(self.config["attn_logit_softcapping"])
        scores = cap * np.tanh(scores / cap)
        if routing is Routing.RELEASE:
            scores = scores * self._temperature(tokens)[None, :, None]
        scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
        mixed = np.einsum("hqk,khd->qhd", softmax(scores), value.repeat(group, 1))
        out: Floats = mixed.reshape(tokens, -1) @ weights["self_attn.o_proj.weight"].T
        return out

    def _temperature(self, tokens: int) -> Floats:
        """What the scores of each query are multiplied with, by its position from 0."""
        length = self.config["attn_temperature_len"]
        positions = np.arange(tokens)
        factors = np.log2(np.maximum(positions, 1)) / np.log2(length)
        return np.where(positions > length, factors, 1).astype(np.float32)

    def _experts(self, weights: dict[str, Floats], x: Floats, routing: Routing) -> tuple[Floats, npt.NDArray[np.intp]]:
        logits = x @ weights["block_sparse_moe.gate.weight"].T
        if routing is Routing.RELEASE:
            cap = np.float32(self.config["router_logit_softcapping"])
            logits = cap * np.tanh(logits / cap)
        shares = softmax(logits)
        chosen = np.argsort(-shares, -1)[:, : self.config["num_experts_per_tok"]]
        kept = np.take_along_axis(shares, chosen, -1)
        if routing is Routing.LLAMA_CPP:
            kept = kept / kept.sum(-1, keepdims=True)
        out = np.zeros_like(x)
        for token, rank in np.ndindex(chosen.shape):
            names = (f"block_sparse_moe.experts.{chosen[token, rank]}.{matrix}.weight" for matrix in ("w1", "w3", "w2"))
            out[token] += kept[token, rank] * _feed_forward(x[token], *(weights[name] for name in names))
        return out, chosen


def _feed_forward(x: Floats, gate: Floats, up: Floats, down: Floats) -> Floats:
    out: Floats = (gelu(x @ gate.T) * (x @ up.T)) @ down.T
    return out


def _load(folder: Path) -> dict[str, Floats]:
    """Every tensor whole, in float32: the ranks' parts of experts put together, of w2 by columns and else by rows."""
    parts: dict[str, list[Floats]] = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = (8 + length + offset for offset in entry["data_offsets"])
                values = np.frombuffer(data[first:last], _TYPES[entry["dtype"]]).reshape(entry["shape"])
                parts[name].append(values.astype(np.float32))
    return {name: np.concatenate(found, 1 if ".w2." in name else 0) for name, found in parts.items()}
