"""Grok-2, as xAI released it in August 2025 (huggingface.co/xai-org/grok-2; SGLang's grok.py runs it).

Beside its experts each layer has a dense feed-forward network, and the output matrix is not the embedding's. The
release is bfloat16 in safetensors, cut for eight GPUs: what every GPU has lies in files `-TP-common`, and of each
expert's matrix an eighth in each of the files `-TP-000` to `-TP-007`, all under one name. Every matrix is stored
[out, in], as a GGUF has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grok_local.models.release import HEAD_SIZE, Dimensions, Kind, Target

__all__ = ["RELEASE", "Grok2", "Hyperparameters", "NamedTensor", "named_tensors"]

_PUBLISHED = Dimensions(64, 8192, expert_width=16384, experts=8, kv_width=1024, vocabulary=131072, dense_width=32768)


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of config.json that no tensor's shape tells, under the names they have there, and as published."""

    max_position_embeddings: int = 131072
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = 208533496.0  # the scaled base already, as rope_type "original" means: there is no YaRN
    embedding_multiplier_scale: float = 90.50966799187809
    output_multiplier_scale: float = 0.5
    attn_output_multiplier: float = 0.08838834764831845  # of the release's config absent: then one over sqrt(head size)
    attn_logit_softcapping: float = 30.0
    final_logit_softcapping: float = 50.0
    router_logit_softcapping: float = 30.0
    attn_temperature_len: int = 1024


@dataclass(frozen=True)
class Grok2:
    """The release's facts. Checkpoints in its format may have `hyperparameters` of their own."""

    name: str = "grok-2"
    title: str = "Grok-2"
    license: str = "grok-2-community"
    url: str = "https://huggingface.co/xai-org/grok-2"
    hub: str = "xai-org/grok-2"
    published: Dimensions = _PUBLISHED
    hyperparameters: Hyperparameters = Hyperparameters()

    def targets(self, dims: Dimensions) -> Iterator[Target]:
        """The embedding, the output, then layer by layer."""
        return (tensor.target for tensor in named_tensors(dims))

    def metadata(self, dims: Dimensions) -> dict[str, int | float]:
        """The graph's numbers, by config.json and SGLang.

        llama.cpp reads the last two and has no use for them; whoever corrects its graph does.
        """
        numbers = self.hyperparameters
        return {
            "block_count": dims.layers,
            "context_length": numbers.max_position_embeddings,
            "embedding_length": dims.width,
            "feed_forward_length": dims.dense_width,
            "expert_feed_forward_length": dims.expert_width,
            "vocab_size": dims.vocabulary,
            "attention.head_count": dims.heads,
            "attention.head_count_kv": dims.kv_heads,
            "attention.key_length": HEAD_SIZE,
            "attention.value_length": HEAD_SIZE,
            "rope.dimension_count": HEAD_SIZE,
            "rope.freq_base": numbers.rope_theta,
            "attention.layer_norm_rms_epsilon": numbers.rms_norm_eps,
            "expert_count": dims.experts,
            "expert_used_count": numbers.num_experts_per_tok,
            "embedding_scale": numbers.embedding_multiplier_scale,
            "logit_scale": numbers.output_multiplier_scale,
            "attention.output_scale": numbers.attn_output_multiplier,
            "attn_logit_softcapping": numbers.attn_logit_softcapping,
            "final_logit_softcapping": numbers.final_logit_softcapping,
            "router_logit_softcapping": numbers.router_logit_softcapping,
            "attention.temperature_length": numbers.attn_temperature_len,
        }


RELEASE = Grok2()


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of the GGUF, and what the release has of it.

    `names` has one name, or one for each expert. `file` is the number of its files, and `axis` the one along which
    those of the GPUs' ranks are put together; None where all GPUs have the whole.
    """

    target: Target
    names: tuple[str, ...]
    file: int
    axis: int | None = None

    def file_name(self, rank: int | None = None) -> str:
        """Of the file that has the part of a rank, or what is common to all."""
        return f"pytorch_model-{self.file:05d}-TP-{'common' if rank is None else f'{rank:03d}'}.safetensors"

    @property
    def title(self) -> str:
        """Its name, or what its experts' names have in common."""
        return self.names[0] if len(self.names) == 1 else self.names[0].replace(".experts.0.", ".experts.*.")


def named_tensors(dims: Dimensions) -> Iterator[NamedTensor]:
    """All tensors with the shapes `dims` asks for."""
    vocabulary = (dims.vocabulary, dims.width)
    yield NamedTensor(Target("token_embd.weight", Kind.EMBEDDING, None, vocabulary), ("model.embed_tokens.weight",), 0)
    yield NamedTensor(Target("output.weight", Kind.OUTPUT, None, vocabulary), ("lm_head.weight",), 1)
    yield NamedTensor(Target("output_norm.weight", Kind.NORM, None, (dims.width,)), ("model.norm.weight",), 2)
    for layer in range(dims.layers):
        for role, kind, shape, file, path in _everywhere(dims):
            target = Target(f"blk.{layer}.{role}.weight", kind, layer, shape)
            yield NamedTensor(target, (f"model.layers.{layer}.{path}.weight",), file)
        for role, shape, file, matrix, axis in _of_experts(dims):
            target = Target(f"blk.{layer}.{role}.weight", Kind.EXPERTS, layer, (dims.experts, *shape))
            path = f"model.layers.{layer}.block_sparse_moe.experts"
            names = tuple(f"{path}.{expert}.{matrix}.weight" for expert in range(dims.experts))
            yield NamedTensor(target, names, file, axis)


def _everywhere(dims: Dimensions) -> list[tuple[str, Kind, tuple[int, ...], int, str]]:
    width, ff, kv = dims.width, dims.dense_width, dims.kv_width
    return [
        ("attn_k", Kind.ATTENTION, (kv, width), 9, "self_attn.k_proj"),
        ("attn_q", Kind.ATTENTION, (width, width), 11, "self_attn.q_proj"),
        ("attn_v", Kind.ATTENTION, (kv, width), 12, "self_attn.v_proj"),
        ("attn_output", Kind.ATTENTION, (width, width), 10, "self_attn.o_proj"),
        ("ffn_gate", Kind.DENSE, (ff, width), 3, "mlp.gate_proj"),
        ("ffn_up", Kind.DENSE, (ff, width), 5, "mlp.up_proj"),
        ("ffn_down", Kind.DENSE, (width, ff), 4, "mlp.down_proj"),
        ("ffn_gate_inp", Kind.ROUTER, (dims.experts, width), 17, "block_sparse_moe.gate"),
        ("attn_norm", Kind.NORM, (width,), 13, "pre_attn_norm"),
        ("attn_output_norm", Kind.NORM, (width,), 14, "post_attn_norm"),
        ("ffn_norm", Kind.NORM, (width,), 15, "pre_moe_norm"),
        ("post_ffw_norm", Kind.NORM, (width,), 16, "post_moe_norm"),
    ]


def _of_experts(dims: Dimensions) -> list[tuple[str, tuple[int, int], int, str, int]]:
    """A rank has some of an expert's hidden units: rows of what leads into them, columns of what leads out."""
    width, hidden = dims.width, dims.expert_width
    return [
        ("ffn_gate_exps", (hidden, width), 6, "w1", 0),
        ("ffn_up_exps", (hidden, width), 8, "w3", 0),
        ("ffn_down_exps", (width, hidden), 7, "w2", 1),
    ]
