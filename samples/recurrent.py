"""Writes a small random Mamba: its memory is a state and no KV cache, so it cannot forget a part of what it read."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from grok_local.quantize.sources.sentencepiece import read_tokenizer
from samples.checkpoints import REFERENCE

__all__ = ["write_recurrent"]

_WIDTH, _INNER, _STATE, _STEPS = 64, 128, 8, 4


def write_recurrent(path: Path, *, layers: int = 4) -> Path:
    """Write it with the small tokenizer's vocabulary."""
    writer, rng = gguf.GGUFWriter(path, "mamba"), np.random.default_rng(1)
    vocabulary = read_tokenizer(REFERENCE / "small-tokenizer.model", None)
    vocabulary.add_to(writer)
    _describe(writer, layers)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, 0.2 * rng.standard_normal(shape, np.float32))

    add("token_embd.weight", len(vocabulary.pieces), _WIDTH)
    add("output.weight", len(vocabulary.pieces), _WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(_WIDTH, np.float32))
    for block in (f"blk.{layer}" for layer in range(layers)):
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(_WIDTH, np.float32))
        add(f"{block}.ssm_in.weight", 2 * _INNER, _WIDTH)
        add(f"{block}.ssm_conv1d.weight", _INNER, 4)
        add(f"{block}.ssm_conv1d.bias", _INNER)
        add(f"{block}.ssm_x.weight", _STEPS + 2 * _STATE, _INNER)
        add(f"{block}.ssm_dt.weight", _INNER, _STEPS)
        add(f"{block}.ssm_dt.bias", _INNER)
        decay = -np.arange(1, _STATE + 1, dtype=np.float32) / 50
        writer.add_tensor(f"{block}.ssm_a", np.tile(decay, (_INNER, 1)))
        writer.add_tensor(f"{block}.ssm_d", np.ones(_INNER, np.float32))
        add(f"{block}.ssm_out.weight", _WIDTH, _INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: gguf.GGUFWriter, layers: int) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(_INNER)
    writer.add_ssm_state_size(_STATE)
    writer.add_ssm_time_step_rank(_STEPS)
    writer.add_layer_norm_rms_eps(1e-5)
