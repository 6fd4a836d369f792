"""How fast a layer of a release's true width is packed, and in how much memory.

    python -m benchmarks.quantize [--release grok-1] [--folder DIR] [--types q4_k q4_0] [--rounds 3]
                                  [--llama-quantize FILE]

Three ways over the same weights, in turn. One layer of Grok-1 is 6144 wide, with 8 experts of 32768: 4.9 billion
weights, about 5 GB. One of Grok-2 is 8192 wide, with 8 experts of 16384 and a dense network of 32768: 4.2 billion, 8.4
GB.
  ours     grok-local quantize --memory 1.5G, a process of its own: everything, start-up, hashing and fsync included;
  kernel   ggml_quantize_chunk alone, 128 rows a call from a reused float32 buffer, each tensor at its own type;
  llama    llama.cpp's way: a bf16 GGUF first, then its llama-quantize.
Prints a Markdown table; the ratios are ours / kernel of the same round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from grok_local.ggml import quants
from grok_local.models import grok1, release
from grok_local.quantize.layout.pieces import Piece, PlannedTensor, piece_rows, plan_tensors
from grok_local.quantize.packing.blocks import Workspace, weights_of
from grok_local.quantize.packing.slabs import read_slab, slab_bytes
from grok_local.quantize.recipe import recipe_named
from grok_local.quantize.sources.recognise import open_checkpoint
from samples.checkpoints import REFERENCE, QuantizedWeight8bit, dump
from samples.grok2_release import Grok2Spec, write_release
from samples.processes import measured

DIMENSIONS = release.Dimensions(layers=1, width=6144, expert_width=32768, experts=8, kv_width=1024, vocabulary=2048)
THREADS = os.cpu_count() or 1


GROK_2 = Grok2Spec(layers=1, width=8192, expert_width=16384, dense_width=32768, kv_width=1024, experts=8)


def make_layer(folder: Path, name: str) -> None:
    """The layer of a release; skipped if it is there."""
    if name == "grok-1":
        _make_grok1(folder)
    elif not (folder / "tokenizer.tok.json").exists():  # which is written last
        write_release(folder, GROK_2)


def _make_grok1(folder: Path) -> None:
    """The layer, with int8 weights spread as the release's are."""
    target = folder / "ckpt-0"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(REFERENCE / "small-tokenizer.model", folder / "tokenizer.model")
    rng = np.random.default_rng(1)
    tile = np.clip(np.rint(rng.standard_normal(1 << 24, dtype=np.float32) * 36), -127, 127).astype(np.int8)
    for leaf in grok1.leaves(DIMENSIONS):
        path = target / leaf.file_name
        if not path.exists():
            path.write_bytes(dump(_leaf_value(rng, leaf, tile)))


def _leaf_value(rng: np.random.Generator, leaf: grok1.Leaf, tile: Any) -> Any:
    if leaf.kind not in (release.Kind.EXPERTS, release.Kind.ATTENTION):
        return rng.standard_normal(leaf.shape, dtype=np.float32) * np.float32(0.02)
    size = int(np.prod(leaf.shape))
    # Prime-sized repeats, so that no two rows or experts are alike.
    weight = np.resize(tile[: 16_777_213 - int(rng.integers(1000))], size).reshape(leaf.shape)
    groups = 8 if leaf.path.endswith(("linear_1/w", "multi_head_attention/linear/w")) else 1
    scales = rng.uniform(2e-4, 4e-4, (*leaf.shape[:-2], groups, leaf.shape[-1])).astype(ml_dtypes.bfloat16)
    return QuantizedWeight8bit(weight, scales)


def ours(checkpoint: Path, output: Path, kind: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a whole run."""
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "grok_local", "quantize", str(checkpoint), "-o", str(output), "--type", kind]
    return measured([*command, "--memory", "1.5G", "--threads", str(THREADS)], env=_environment())


def _environment() -> dict[str, str]:
    # As a user has it: modules compiled once, not at every start.
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def kernel(checkpoint: Path, kind: str) -> float:
    """Seconds that packing takes when the float32 weights are there already."""
    tensors = [t for t in plan_tensors(open_checkpoint(checkpoint), recipe_named(kind)) if t.rows > 1]
    sources = {tensor.name: _first_rows(tensor) for tensor in tensors}
    local = threading.local()

    def run(work: tuple[PlannedTensor, int]) -> None:
        tensor, rows = work
        rows_in = sources[tensor.name][:rows]
        if getattr(local, "size", None) != rows_in.shape:
            local.size, local.floats = rows_in.shape, rows_in.copy()
            local.out = np.empty(rows * tensor.row_bytes * 2, np.uint8)
        quants.quantize_rows(tensor.type, local.floats, local.out[: rows * tensor.row_bytes])

    calls = [
        (tensor, min(128, tensor.rows)) for tensor in tensors for _ in range(tensor.experts * -(-tensor.rows // 128))
    ]
    started = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, calls, chunksize=16))
    return time.monotonic() - started


def _first_rows(tensor: PlannedTensor) -> Any:
    piece = Piece(0, tensor, 0, 0, min(piece_rows(tensor.width), tensor.rows))
    slab = read_slab([piece], np.empty(slab_bytes(tensor, piece.rows), np.uint8))
    rows = np.concatenate([rows.copy() for _, rows in weights_of(piece, slab, Workspace())])
    return rows[:128]


def llama(checkpoint: Path, folder: Path, kind: str, program: Path) -> tuple[float, float, int, int]:
    """Seconds to bf16, seconds to pack, peak resident bytes, bytes of disk at the peak."""
    middle, output = folder / "middle-bf16.gguf", folder / "llama.gguf"
    to_bf16, _ = ours(checkpoint, middle, "bf16")
    options = ["--tensor-type", "attn=q8_0", "--token-embedding-type", "q6_k"]
    seconds, peak = measured([str(program), *options, str(middle), str(output), kind.upper(), str(THREADS)])
    disk = middle.stat().st_size + output.stat().st_size
    middle.unlink()
    output.unlink()
    return to_bf16, seconds, peak, disk


def files_of(folder: Path) -> set[Path]:
    return {path for tensor in open_checkpoint(folder).tensors for path in tensor.paths}


def warm_caches(folder: Path) -> None:
    """Read the checkpoint once."""
    buffer = bytearray(1 << 24)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_caches(folder: Path) -> None:
    """Forget the checkpoint's pages."""
    os.sync()
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _row(name: str, rounds: list[tuple[float, int, float]], cold: float) -> str:
    seconds, alone = statistics.median(r[0] for r in rounds), statistics.median(r[2] for r in rounds)
    ratio = statistics.median(r[0] / r[2] for r in rounds)
    peak = max(r[1] for r in rounds)
    return f"| {name} | {seconds:.1f} s | {alone:.1f} s | {ratio:.2f} x | {cold:.1f} s | {peak / 1e9:.2f} GB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", choices=["grok-1", "grok-2"], default="grok-1")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--types", nargs="+", default=["q4_k", "q4_0"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-quantize", type=Path)
    args = parser.parse_args()
    args.folder = args.folder or Path(tempfile.gettempdir()) / f"grok-local-benchmark-{args.release}"
    make_layer(args.folder, args.release)
    output = args.folder / "ours.gguf"
    print(f"{THREADS} threads\n\n| type | ours, warm | kernel alone | ratio | ours, cold | peak memory |")
    print("|---|---|---|---|---|---|")
    for kind in args.types:
        warm_caches(args.folder)
        rounds = [(*ours(args.folder, output, kind), kernel(args.folder, kind)) for _ in range(args.rounds)]
        drop_caches(args.folder)
        print(_row(kind, rounds, ours(args.folder, output, kind)[0]), flush=True)
    if args.llama_quantize:
        print("\n| llama.cpp's way | to bf16 | llama-quantize | peak memory | peak disk |\n|---|---|---|---|---|")
        for kind in args.types:
            to_bf16, seconds, peak, disk = llama(args.folder, args.folder, kind, args.llama_quantize)
            print(
                f"| {kind} | {to_bf16:.1f} s | {seconds:.1f} s | {peak / 1e9:.1f} GB | {disk / 1e9:.1f} GB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
