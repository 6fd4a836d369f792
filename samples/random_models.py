"""Models of true width and few layers, or of true proportions, with random weights, for measuring speed.

    python -m samples.random_models OUT --release grok-1 --type q4_k --layers 3

Weights are packed from random numbers once and repeated; the router is random throughout, so that tokens spread over
the experts.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from grok_local.formats.gguf_file import Tensor
from grok_local.ggml import quants
from grok_local.quantize.outline import outline
from samples.giants import write_header

__all__ = ["random_model"]

_ALIGNMENT = 4096
_ROWS = 256


def random_model(
    path: Path, release: str = "grok-1", *, type: str = "q4_k", layers: int = 1, narrower: int = 1
) -> Path:
    """Write it, unless it is there."""
    header = outline(release, type=type, layers=layers, narrower=narrower)
    if path.exists() and path.stat().st_size > header.size:
        return path
    unfinished = path.with_suffix(".partial")
    write_header(unfinished, header, alignment=_ALIGNMENT)
    rng = np.random.default_rng(1)
    with unfinished.open("r+b") as file:
        file.seek(0, 2)
        for tensor in header.tensors:
            _pad(file)
            _write_tensor(file, tensor, rng)
        _pad(file)
    unfinished.rename(path)
    return path


def _write_tensor(file: BinaryIO, tensor: Tensor, rng: np.random.Generator) -> None:
    if "norm" in tensor.name:
        # Attention to random keys is the context's mean: strong, it would have all tokens choose the same experts.
        gain = 0.1 if "attn_output_norm" in tensor.name else 1.0
        file.write(np.full(tensor.shape, gain, np.float32).tobytes())
    elif "ffn_gate_inp" in tensor.name:
        file.write(rng.standard_normal(tensor.shape, dtype=np.float32).tobytes())
    else:
        block = _packed(tensor, rng)
        whole, rest = divmod(tensor.nbytes, block.nbytes)
        for _ in range(whole):
            file.write(block)
        file.write(block[:rest])


def _packed(tensor: Tensor, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    width = tensor.shape[-1]
    rows = min(_ROWS, math.prod(tensor.shape[:-1]))
    out = np.empty(rows * quants.bytes_per_row(tensor.type, width), np.uint8)
    quants.quantize_rows(tensor.type, rng.standard_normal((rows, width), dtype=np.float32) / math.sqrt(width), out)
    return out


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--release", default="grok-1")
    parser.add_argument("--type", default="q4_k")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--narrower", type=int, default=1, help="divide every width by this")
    args = parser.parse_args()
    print(random_model(args.out, args.release, type=args.type, layers=args.layers, narrower=args.narrower))


if __name__ == "__main__":
    main()
