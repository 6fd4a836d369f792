"""Speed of grok-local bench against llama.cpp's llama-bench, and of the plan's prediction against what is measured.

    python -m benchmarks.placement --folder FOLDER --llama-bench FILE [--library FOLDER]

Models of Grok-1's true width with random weights are written to FOLDER. Both programs run in turn, `--rounds` times,
with the same threads, context, batch and repacking. --library is a folder with a copy of the package llama_cpp whose
libraries are those llama-bench was built with; without it the installed ones are used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from samples.random_models import random_model

_PROMPT, _TOKENS = 512, 64


def ours(model: Path, *, repack: str, library: Path | None, repeats: int) -> dict[str, Any]:
    """What `grok-local bench --json` prints."""
    path = [str(library)] if library else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    sizes = ["--prompt", str(_PROMPT), "--tokens", str(_TOKENS), "--context", str(_PROMPT), "--repeats", str(repeats)]
    command = [sys.executable, "-m", "grok_local", "bench", "-m", str(model), *sizes, "--repack", repack, "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
    return found


def theirs(model: Path, program: Path, *, repack: str, repeats: int) -> tuple[float, float]:
    """llama-bench's mean tokens a second for the prompt and for generation."""
    options = ["-p", str(_PROMPT), "-n", str(_TOKENS), "-r", str(repeats), "-b", "512", "-ub", "512", "-o", "json"]
    command = [str(program), "-m", str(model), *options, "--repack", "1" if repack == "on" else "0"]
    rows = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    speeds = {("prompt" if row["n_prompt"] else "generation"): float(row["avg_ts"]) for row in rows}
    return speeds["prompt"], speeds["generation"]


def compare(model: Path, args: argparse.Namespace, *, repack: str) -> None:
    """A row for the prompt and one for generation."""
    rounds = []
    for _ in range(args.rounds):
        report = ours(model, repack=repack, library=args.library, repeats=args.repeats)
        rounds.append((report, theirs(model, args.llama_bench, repack=repack, repeats=args.repeats)))
    for number, name in enumerate(("prompt", "generation")):
        mine = [report[name]["mean"] for report, _ in rounds]
        other = [speeds[number] for _, speeds in rounds]
        ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
        row = f"{statistics.median(mine):.2f} | {statistics.median(other):.2f} | {ratio:.3f}"
        print(f"| {model.stem} | {repack} | {name} | {row} |", flush=True)


def predict(model: Path, args: argparse.Namespace, *, repack: str) -> None:
    """A row of predicted against measured decoding."""
    reports = [ours(model, repack=repack, library=None, repeats=args.repeats) for _ in range(args.rounds)]
    measured = statistics.median(report["generation"]["mean"] for report in reports)
    first = reports[0]
    size = f"{first['nbytes'] / 1e9:.2f} GB | {first['bytes_per_token'] / 1e9:.2f} GB"
    speeds = f"{first['predicted']:.2f} | {measured:.2f} | {first['predicted'] / measured:.2f} | {first['limit']:.2f}"
    print(f"| {model.stem} | {repack} | {size} | {speeds} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "grok-local-benchmark")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 3, 6])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.llama_bench:
        print("| model | repack | | grok-local | llama-bench | ratio |\n|---|---|---|---|---|---|")
        for kind in ("q4_k", "q4_0"):
            model = random_model(args.folder / f"grok-1-{kind}-1-layer.gguf", type=kind)
            for repack in ("off", "on"):
                compare(model, args, repack=repack)
    print(
        "\n| model | repack | size | a token reads | predicted | measured | ratio | memory's limit |\n"
        + "|---" * 8
        + "|"
    )
    for layers in args.layers:
        model = random_model(args.folder / f"grok-1-q4_k-{layers}-layers.gguf", layers=layers)
        for repack in ("off", "auto"):
            predict(model, args, repack=repack)


if __name__ == "__main__":
    main()
