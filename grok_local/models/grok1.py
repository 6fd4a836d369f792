"""Grok-1, as xAI released it in March 2024 (github.com/xai-org/grok-1, model.py and run.py).

The release is one pickle per leaf of the haiku parameter tree, `tensor00000_000` upwards: the embedding, the final
norm, then twelve leaves per layer. Layers come in the *string* order of `decoder_layer_N/`: 0, 1, 10, 11, ..., 2, 20,
... Every matrix is stored [in, out]; GGUF rows are [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grok_local.models.release import HEAD_SIZE, Dimensions, Kind, Target

__all__ = ["CONSTANTS", "LEAVES_PER_LAYER", "RELEASE", "Leaf", "leaves"]

LEAVES_PER_LAYER = 12
_PUBLISHED = Dimensions(64, 6144, expert_width=32768, experts=8, kv_width=1024, vocabulary=131072)


@dataclass(frozen=True)
class Constants:
    """Numbers of run.py that no tensor's shape tells."""

    context: int = 8192
    experts_used: int = 2
    norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    embedding_scale: float = 78.38367176906169
    logit_scale: float = 0.5773502691896257
    attention_scale: float = 0.08838834764831845
    attention_softcap: float = 30.0


CONSTANTS = Constants()


@dataclass(frozen=True)
class Grok1:
    """The release's facts."""

    name: str = "grok-1"
    title: str = "Grok-1"
    license: str = "apache-2.0"
    url: str = "https://github.com/xai-org/grok-1"
    hub: str = "xai-org/grok-1"
    published: Dimensions = _PUBLISHED

    def targets(self, dims: Dimensions) -> Iterator[Target]:
        """In the order of the release's files."""
        return (leaf.target for leaf in leaves(dims))

    def metadata(self, dims: Dimensions) -> dict[str, int | float]:
        """The graph's numbers: sizes, and the constants of run.py."""
        return {
            "block_count": dims.layers,
            "context_length": CONSTANTS.context,
            "embedding_length": dims.width,
            "feed_forward_length": dims.expert_width,
            "vocab_size": dims.vocabulary,
            "attention.head_count": dims.heads,
            "attention.head_count_kv": dims.kv_heads,
            "attention.key_length": HEAD_SIZE,
            "attention.value_length": HEAD_SIZE,
            "rope.dimension_count": HEAD_SIZE,
            "rope.freq_base": CONSTANTS.rope_base,
            "attention.layer_norm_rms_epsilon": CONSTANTS.norm_epsilon,
            "expert_count": dims.experts,
            "expert_used_count": CONSTANTS.experts_used,
            "embedding_scale": CONSTANTS.embedding_scale,
            "logit_scale": CONSTANTS.logit_scale,
            "attention.output_scale": CONSTANTS.attention_scale,
            "attn_logit_softcapping": CONSTANTS.attention_softcap,
        }


RELEASE = Grok1()


@dataclass(frozen=True)
class Leaf:
    """One file of the release: where it stands in the tree and what it becomes in the GGUF."""

    index: int
    path: str
    gguf_name: str
    kind: Kind
    layer: int | None
    shape: tuple[int, ...]

    @property
    def file_name(self) -> str:
        return f"tensor{self.index:05d}_000"

    @property
    def transposed(self) -> bool:
        """Whether it is stored [in, out], where a GGUF has [out, in]."""
        return self.kind not in (Kind.EMBEDDING, Kind.NORM)

    @property
    def target(self) -> Target:
        """What it becomes."""
        *outer, rows, columns = (1, *self.shape)
        shape = (*outer, columns, rows)[1:] if self.transposed else self.shape
        return Target(self.gguf_name, self.kind, self.layer, shape)


def leaves(dims: Dimensions) -> Iterator[Leaf]:
    """All leaves in the release's order, with the shapes `dims` asks for."""
    yield Leaf(
        0,
        "language_model/in_out_embed/embeddings",
        "token_embd.weight",
        Kind.EMBEDDING,
        None,
        (dims.vocabulary, dims.width),
    )
    yield Leaf(1, "language_model/rms_norm/scale", "output_norm.weight", Kind.NORM, None, (dims.width,))
    for rank, layer in enumerate(sorted(range(dims.layers), key=lambda n: f"decoder_layer_{n}/")):
        for slot, (path, name, kind, shape) in enumerate(_layer(dims)):
            yield Leaf(
                index=2 + LEAVES_PER_LAYER * rank + slot,
                path=f"transformer/decoder_layer_{layer}/{path}",
                gguf_name=f"blk.{layer}.{name}.weight",
                kind=kind,
                layer=layer,
                shape=shape,
            )


def _layer(dims: Dimensions) -> list[tuple[str, str, Kind, tuple[int, ...]]]:
    width, kv, ff, experts = dims.width, dims.kv_width, dims.expert_width, dims.experts
    return [
        ("moe/linear/w", "ffn_gate_exps", Kind.EXPERTS, (experts, width, ff)),
        ("moe/linear_1/w", "ffn_down_exps", Kind.EXPERTS, (experts, ff, width)),
        ("moe/linear_v/w", "ffn_up_exps", Kind.EXPERTS, (experts, width, ff)),
        ("multi_head_attention/key/w", "attn_k", Kind.ATTENTION, (width, kv)),
        ("multi_head_attention/linear/w", "attn_output", Kind.ATTENTION, (width, width)),
        ("multi_head_attention/query/w", "attn_q", Kind.ATTENTION, (width, width)),
        ("multi_head_attention/value/w", "attn_v", Kind.ATTENTION, (width, kv)),
        ("rms_norm/scale", "attn_norm", Kind.NORM, (width,)),
        ("rms_norm_1/scale", "attn_output_norm", Kind.NORM, (width,)),
        ("rms_norm_2/scale", "ffn_norm", Kind.NORM, (width,)),
        ("rms_norm_3/scale", "layer_output_norm", Kind.NORM, (width,)),
        ("router/w", "ffn_gate_inp", Kind.ROUTER, (width, experts)),
    ]
