"""Trained parameters -> a checkpoint as the release is: int8 with bfloat16 scales, one pickle per leaf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from grok_local.models import grok1, release
from samples.checkpoints import QuantizedWeight8bit, dump
from training import network

__all__ = ["LEAF_NAMES", "Floats", "export"]

_GROUPS = 8  # scales along the rows of what the release's eight-way sharding split by rows

LEAF_NAMES = {
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "output",
    "ffn_gate_inp": "router",
    "ffn_gate_exps": "gate",
    "ffn_up_exps": "up",
    "ffn_down_exps": "down",
    "attn_norm": "attention_norm",
    "attn_output_norm": "attention_output_norm",
    "ffn_norm": "expert_norm",
    "layer_output_norm": "expert_output_norm",
}

Floats = npt.NDArray[np.float32]


def export(params: network.Parameters, dims: release.Dimensions, folder: Path) -> None:
    """Write the leaves to folder/ckpt-0."""
    target = folder / "ckpt-0"
    target.mkdir(parents=True, exist_ok=True)
    for leaf in grok1.leaves(dims):
        (target / leaf.file_name).write_bytes(dump(_value(params, leaf)))


def _value(params: network.Parameters, leaf: grok1.Leaf) -> Any:
    if leaf.kind is release.Kind.EMBEDDING:
        embedding: Floats = np.asarray(network.unit_embedding(params), np.float32)
        return _short(embedding / np.float32(grok1.CONSTANTS.embedding_scale))
    if leaf.layer is None:
        return np.asarray(network.final_gain(params), np.float32)
    value = np.asarray(params["layers"][LEAF_NAMES[leaf.gguf_name.split(".")[2]]][leaf.layer], np.float32)
    if leaf.kind in (release.Kind.NORM, release.Kind.ROUTER):
        return value
    grouped = leaf.path.endswith(("moe/linear_1/w", "multi_head_attention/linear/w"))
    return quantized(value, groups=_GROUPS if grouped else 1)


def quantized(value: Floats, *, groups: int) -> QuantizedWeight8bit:
    """int8 [..., in, out] with a bfloat16 scale per group of rows and column."""
    *lead, rows, columns = value.shape
    split = value.reshape(*lead, groups, rows // groups, columns)
    largest = np.abs(split).max(-2)
    # The scale is rounded first, so that no weight is rounded by a scale it will not be multiplied with.
    scales = (np.maximum(largest, 1e-8) / 127).astype(ml_dtypes.bfloat16)
    weight = np.rint(split / scales.astype(np.float32)[..., None, :])
    return QuantizedWeight8bit(np.clip(weight, -127, 127).astype(np.int8).reshape(value.shape), scales)


def _short(value: Floats) -> Floats:
    # float32 as in the release, with the low half of each number zero: half of it then vanishes in the wheel.
    return value.astype(ml_dtypes.bfloat16).astype(np.float32)
