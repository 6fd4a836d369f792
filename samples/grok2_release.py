"""Writes small random checkpoints in the file layout of the Grok-2 release.

    python -m samples.grok2_release OUT [--layers 2] [--width 256]

OUT/pytorch_model-00000-TP-common.safetensors and so on: bfloat16, a file for each tensor of a layer with those of all
layers, each expert's matrices cut into eight files; config.json and tokenizer.tok.json. A spec always gives the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from grok_local.models import grok2
from grok_local.models.grok2 import NamedTensor
from grok_local.models.release import HEAD_SIZE, Dimensions, Kind
from samples import byte_pairs
from samples.checkpoints import REFERENCE

__all__ = ["SMALL_2", "Grok2Spec", "config", "safetensors_header", "values", "write_release", "write_safetensors"]

_DTYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8"}
_TRAINED_ON = REFERENCE / "tokenization.jsonl"


@dataclass(frozen=True)
class Grok2Spec:
    """Sizes of a checkpoint."""

    seed: int = 1
    width: int = 256
    expert_width: int = 256
    dense_width: int = 512
    kv_width: int = 128
    layers: int = 2
    vocabulary: int = 640
    experts: int = 4
    ranks: int = 8
    router_cap: float = 30.0
    temperature_length: int = 1024

    def dimensions(self) -> Dimensions:
        return Dimensions(
            self.layers,
            self.width,
            self.expert_width,
            self.experts,
            self.kv_width,
            self.vocabulary,
            dense_width=self.dense_width,
        )


SMALL_2 = Grok2Spec()


def write_release(folder: Path, spec: Grok2Spec) -> Path:
    """Write the checkpoint of `spec`, with config and tokenizer. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbered = itertools.groupby(_by_file(spec), lambda tensor: tensor.file)
    for _, tensors in numbered:
        _write_files(folder, list(tensors), spec)
    (folder / "config.json").write_text(json.dumps(config(spec)), encoding="utf-8")
    texts = [json.loads(line)["text"] for line in _TRAINED_ON.read_text("utf-8").splitlines()[:100]]
    ranks = byte_pairs.train(texts, min(spec.vocabulary, SMALL_2.vocabulary) - 16)
    byte_pairs.write_tokenizer(folder / "tokenizer.tok.json", ranks, spec.vocabulary)
    return folder


def config(spec: Grok2Spec) -> dict[str, Any]:
    """config.json as the release has it, but for the sizes."""
    return {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "git",
        "torch_dtype": "bfloat16",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.width // HEAD_SIZE,
        "num_key_value_heads": spec.kv_width // HEAD_SIZE,
        "head_dim": HEAD_SIZE,
        "intermediate_size": spec.dense_width,
        "moe_intermediate_size": spec.expert_width,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": 2,
        "residual_moe": True,
        "rms_norm_eps": 1e-5,
        "embedding_multiplier_scale": 90.50966799187809,
        "output_multiplier_scale": 0.5,
        "attn_logit_softcapping": 30.0,
        "router_logit_softcapping": spec.router_cap,
        "final_logit_softcapping": 50,
        "attn_temperature_len": spec.temperature_length,
        "sliding_window_size": -1,
        "global_attn_every_n": 1,
        "max_position_embeddings": 131072,
        "rope_theta": 208533496,
        "rope_type": "original",
        "original_max_position_embeddings": 8192,
        "scaling_factor": 16.0,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8,
        "beta_slow": 1,
    }


def values(tensor: NamedTensor, spec: Grok2Spec) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The whole matrices of a tensor, in bfloat16, by the release's names."""
    shape = tensor.target.shape[1:] if tensor.target.kind is Kind.EXPERTS else tensor.target.shape
    for number, name in enumerate(tensor.names):
        rng = np.random.default_rng([spec.seed, tensor.file, tensor.target.layer or 0, number])
        yield name, _drawn(rng, tensor.target.kind, shape).astype(ml_dtypes.bfloat16)


def _drawn(rng: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if kind is Kind.NORM:
        return rng.uniform(0.5, 1.5, size=shape).astype(np.float32)
    drawn = rng.standard_normal(shape, dtype=np.float32)
    scale = {Kind.EMBEDDING: 1 / 90.5, Kind.OUTPUT: 4 / np.sqrt(shape[-1])}
    return drawn * np.float32(scale.get(kind, 1.5 / np.sqrt(shape[-1])))


def _by_file(spec: Grok2Spec) -> list[NamedTensor]:
    return sorted(grok2.named_tensors(spec.dimensions()), key=lambda tensor: tensor.file)


def _write_files(folder: Path, tensors: list[NamedTensor], spec: Grok2Spec) -> None:
    """Write the file of these tensors, or those of all ranks, a matrix after the other."""
    axis = tensors[0].axis
    paths = [folder / tensors[0].file_name(rank) for rank in (range(spec.ranks) if axis is not None else [None])]
    shapes = {name: _cut(tensor.target.shape[-2:], axis, spec.ranks) for tensor in tensors for name in tensor.names}
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for file in files:
            file.write(safetensors_header({name: ("BF16", shape) for name, shape in shapes.items()}))
        for tensor in tensors:
            for _, value in values(tensor, spec):
                for file, part in zip(files, np.split(value, len(files), axis or 0), strict=True):
                    file.write(part.tobytes())


def _cut(shape: tuple[int, ...], axis: int | None, ranks: int) -> tuple[int, ...]:
    return tuple(size // ranks if number == axis else size for number, size in enumerate(shape))


def write_safetensors(path: Path, tensors: dict[str, npt.NDArray[Any]]) -> Path:
    """Write arrays of any type under these names."""
    header = safetensors_header({name: (_DTYPES[value.dtype.name], value.shape) for name, value in tensors.items()})
    path.write_bytes(header + b"".join(value.tobytes() for value in tensors.values()))
    return path


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file with tensors of these types and shapes, one behind the other."""
    sizes, entries, offset = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1}, {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * sizes[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name in ("layers", "width", "expert_width", "dense_width", "kv_width", "vocabulary", "experts"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(SMALL_2, name))
    args = vars(parser.parse_args())
    write_release(args.pop("out"), Grok2Spec(**args))


if __name__ == "__main__":
    main()
