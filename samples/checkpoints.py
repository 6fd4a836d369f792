"""Writes small random checkpoints in the exact on-disk format of the Grok-1 release.

    python -m samples.checkpoints OUT [--layers 12] [--tokenizer FILE]

OUT/ckpt-0/tensor00000_000 and so on: pickles (protocol 4) named as numpy 1 named its modules, int8 weights with
bfloat16 scales in the release's grouping, layers in string order. The numbers come from numpy's PCG64, drawn tensor
by tensor in the release's order, so a spec always gives the same checkpoint: `tests/reference/logits.npz` belongs to
`Spec()`.
"""

from __future__ import annotations

import argparse
import io
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from grok_local.models import grok1, release

REFERENCE = Path(__file__).parents[1] / "tests" / "reference"


@dataclass(frozen=True)
class Spec:
    """Sizes of a checkpoint; the defaults are those the golden logits were computed for."""

    seed: int = 1
    width: int = 512
    expert_width: int = 256
    kv_width: int = 256
    layers: int = 12
    vocabulary: int = 2048
    experts: int = 8
    groups: int = 2

    def dimensions(self) -> release.Dimensions:
        return release.Dimensions(
            self.layers, self.width, self.expert_width, self.experts, self.kv_width, self.vocabulary
        )


SMALL = Spec(layers=2, width=256, expert_width=256, kv_width=128)


class QuantizedWeight8bit:
    """Stands in for the release's class, which was pickled from a script."""

    def __init__(self, weight: npt.NDArray[Any], scales: npt.NDArray[Any]) -> None:
        self.weight = weight
        self.scales = scales


def write_checkpoint(folder: Path, spec: Spec, tokenizer: Path | None = None) -> Path:
    """Write the checkpoint of `spec` to folder/ckpt-0, and `tokenizer` beside it. Returns `folder`."""
    target = folder / "ckpt-0"
    target.mkdir(parents=True, exist_ok=True)
    for leaf, value in tensors(spec):
        (target / leaf.file_name).write_bytes(dump(value))
    if tokenizer:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def tensors(spec: Spec) -> Iterator[tuple[grok1.Leaf, Any]]:
    """Every leaf with its value, in the release's order, one at a time."""
    rng = np.random.default_rng(spec.seed)
    for leaf in grok1.leaves(spec.dimensions()):
        yield leaf, _value(rng, leaf, spec.groups if _is_grouped(leaf) else 1)


def _is_grouped(leaf: grok1.Leaf) -> bool:
    # The release's eight-way sharding left a scale per shard where the rows were split.
    return leaf.path.endswith(("moe/linear_1/w", "multi_head_attention/linear/w"))


def _value(rng: np.random.Generator, leaf: grok1.Leaf, groups: int) -> Any:
    shape = leaf.shape
    if leaf.kind in (release.Kind.EXPERTS, release.Kind.ATTENTION):
        drawn = np.rint(rng.standard_normal(shape, dtype=np.float32) * 36)
        weight = np.clip(drawn, -127, 127).astype(np.int8)
        scales = rng.uniform(0.7, 1.4, size=(*shape[:-2], groups, shape[-1])).astype(np.float32)
        scales = scales / (36 * np.sqrt(shape[-2])) * 1.5
        return QuantizedWeight8bit(weight, scales.astype(ml_dtypes.bfloat16))
    if leaf.kind is release.Kind.NORM:
        return rng.uniform(0.5, 1.5, size=shape).astype(np.float32)
    drawn = rng.standard_normal(shape, dtype=np.float32)
    if leaf.kind is release.Kind.ROUTER:
        return (drawn / np.sqrt(shape[0]) * 2).astype(np.float32)
    return (drawn * (1.0 / 78.38)).astype(np.float32)


# The pickler in C cannot be told other names.
_Pickler: Any = pickle._Pickler


class _ReleasePickler(_Pickler):  # type: ignore[misc]
    """Writes the names the release has: numpy 1's modules, and the weight class as part of a script."""

    names: ClassVar = {
        QuantizedWeight8bit: ("__main__", "QuantizedWeight8bit"),
        np.zeros(1).__reduce__()[0]: ("numpy.core.multiarray", "_reconstruct"),
    }

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module, name = self.names.get(obj, (obj.__module__, name or obj.__qualname__))
        self.save(module)
        self.save(name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


def dump(value: Any) -> bytes:
    """Pickle a leaf as the release did, protocol 4."""
    buffer = io.BytesIO()
    _ReleasePickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=Spec.layers)
    parser.add_argument("--tokenizer", type=Path, default=REFERENCE / "small-tokenizer.model")
    args = parser.parse_args()
    write_checkpoint(args.out, Spec(layers=args.layers), args.tokenizer)


if __name__ == "__main__":
    main()
