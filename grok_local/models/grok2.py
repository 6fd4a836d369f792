"""Grok-2, as xAI released it in August 2025 (huggingface.co/xai-org/grok-2; SGLang's grok.py runs it).

Beside its experts each layer has a dense feed-forward network, and the output matrix is not the embedding's. What is
here is what planning needs: shapes and constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grok_local.models.grok1 import HEAD_SIZE, Kind

__all__ = ["RELEASE", "Dimensions", "tensors"]


@dataclass(frozen=True)
class Dimensions:
    """Sizes of the release; a matrix of shape (out, in) is as GGUF stores it."""

    layers: int = 64
    width: int = 8192
    dense_width: int = 32768
    expert_width: int = 16384
    experts: int = 8
    experts_used: int = 2
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 131072
    context: int = 131072


RELEASE = Dimensions()


def tensors(dims: Dimensions = RELEASE) -> Iterator[tuple[str, Kind, tuple[int, ...]]]:
    """Every tensor's GGUF name, kind and shape, outermost dimension first."""
    yield "token_embd.weight", Kind.EMBEDDING, (dims.vocabulary, dims.width)
    yield "output.weight", Kind.EMBEDDING, (dims.vocabulary, dims.width)
    yield "output_norm.weight", Kind.NORM, (dims.width,)
    for layer in range(dims.layers):
        for name, kind, shape in _layer(dims):
            yield f"blk.{layer}.{name}.weight", kind, shape


def _layer(dims: Dimensions) -> list[tuple[str, Kind, tuple[int, ...]]]:
    width, ff, moe, experts = dims.width, dims.dense_width, dims.expert_width, dims.experts
    kv = dims.kv_heads * HEAD_SIZE
    return [
        ("attn_k", Kind.ATTENTION, (kv, width)),
        ("attn_q", Kind.ATTENTION, (dims.heads * HEAD_SIZE, width)),
        ("attn_v", Kind.ATTENTION, (kv, width)),
        ("attn_output", Kind.ATTENTION, (width, dims.heads * HEAD_SIZE)),
        ("ffn_gate", Kind.EXPERTS, (ff, width)),
        ("ffn_up", Kind.EXPERTS, (ff, width)),
        ("ffn_down", Kind.EXPERTS, (width, ff)),
        ("ffn_gate_exps", Kind.EXPERTS, (experts, moe, width)),
        ("ffn_up_exps", Kind.EXPERTS, (experts, moe, width)),
        ("ffn_down_exps", Kind.EXPERTS, (experts, width, moe)),
        ("ffn_gate_inp", Kind.ROUTER, (experts, width)),
        *((name, Kind.NORM, (width,)) for name in ("attn_norm", "attn_output_norm", "ffn_norm", "post_ffw_norm")),
    ]
