"""Grok-2, as xAI released it in August 2025 (huggingface.co/xai-org/grok-2; SGLang's grok.py runs it).

Beside its experts each layer has a dense feed-forward network, and the output matrix is not the embedding's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grok_local.models.release import HEAD_SIZE, Dimensions, Kind, Target

__all__ = ["RELEASE"]


_PUBLISHED = Dimensions(64, 8192, expert_width=16384, experts=8, kv_width=1024, vocabulary=131072, dense_width=32768)


@dataclass(frozen=True)
class Grok2:
    """The release's facts."""

    name: str = "grok-2"
    title: str = "Grok-2"
    license: str = "grok-2-community"
    url: str = "https://huggingface.co/xai-org/grok-2"
    hub: str = "xai-org/grok-2"
    published: Dimensions = _PUBLISHED

    def targets(self, dims: Dimensions) -> Iterator[Target]:
        """The embedding, the output, then layer by layer."""
        yield Target("token_embd.weight", Kind.EMBEDDING, None, (dims.vocabulary, dims.width))
        yield Target("output.weight", Kind.OUTPUT, None, (dims.vocabulary, dims.width))
        yield Target("output_norm.weight", Kind.NORM, None, (dims.width,))
        for layer in range(dims.layers):
            for name, kind, shape in _layer(dims):
                yield Target(f"blk.{layer}.{name}.weight", kind, layer, shape)

    def metadata(self, dims: Dimensions) -> dict[str, int | float]:
        """The graph's numbers, by config.json and SGLang; rope.freq_base is the scaled base already, so no YaRN."""
        return {
            "block_count": dims.layers,
            "context_length": 131072,
            "embedding_length": dims.width,
            "feed_forward_length": dims.dense_width,
            "expert_feed_forward_length": dims.expert_width,
            "vocab_size": dims.vocabulary,
            "attention.head_count": dims.heads,
            "attention.head_count_kv": dims.kv_heads,
            "attention.key_length": HEAD_SIZE,
            "attention.value_length": HEAD_SIZE,
            "rope.dimension_count": HEAD_SIZE,
            "rope.freq_base": 208533496.0,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "expert_count": dims.experts,
            "expert_used_count": 2,
            "embedding_scale": 90.50966799187809,
            "logit_scale": 0.5,
            "attention.output_scale": 0.08838834764831845,
            "attn_logit_softcapping": 30.0,
            "final_logit_softcapping": 50.0,
        }


RELEASE = Grok2()


def _layer(dims: Dimensions) -> list[tuple[str, Kind, tuple[int, ...]]]:
    width, ff, moe, experts, kv = dims.width, dims.dense_width, dims.expert_width, dims.experts, dims.kv_width
    return [
        ("attn_k", Kind.ATTENTION, (kv, width)),
        ("attn_q", Kind.ATTENTION, (width, width)),
        ("attn_v", Kind.ATTENTION, (kv, width)),
        ("attn_output", Kind.ATTENTION, (width, width)),
        ("ffn_gate", Kind.DENSE, (ff, width)),
        ("ffn_up", Kind.DENSE, (ff, width)),
        ("ffn_down", Kind.DENSE, (width, ff)),
        ("ffn_gate_exps", Kind.EXPERTS, (experts, moe, width)),
        ("ffn_up_exps", Kind.EXPERTS, (experts, moe, width)),
        ("ffn_down_exps", Kind.EXPERTS, (experts, width, moe)),
        ("ffn_gate_inp", Kind.ROUTER, (experts, width)),
        *((name, Kind.NORM, (width,)) for name in ("attn_norm", "attn_output_norm", "ffn_norm", "post_ffw_norm")),
    ]
