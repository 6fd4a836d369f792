"""What it costs, and what it changes, to compute Grok-2 as its release does.

    python -m benchmarks.routing --folder FOLDER [--only cost | layer | divergence]

`cost`: a model of Grok-2's proportions with random weights (every width a quarter, four layers) is written to FOLDER,
and decodes and reads prompts by llama.cpp's own graph and by the corrected one, in turns, at the beginning of a text
and beyond 1024 tokens; the difference is also told for each layer. Times are the process's own, of one thread, so that
other programs count little. `layer`: the same of one layer of the true width, and with two fifths of its experts held
and the others streamed, in seconds that passed. `divergence`: a small random Grok-2 is packed to
f32, and the distribution of the next token by llama.cpp's graph compared with the corrected one's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import grok_local
from grok_local.formats.gguf_file import read_model
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.graph.rows import Row
from samples.grok2_release import SMALL_2, Grok2Spec, write_release
from samples.random_models import random_model

_CONTEXT = 2048
_PLACES = ((1, 0), (64, 0), (1, 1100), (64, 1100))  # tokens, from which position
_BOTH: tuple[Any, Any] = ("llama.cpp", "release")


# -- cost --------------------------------------------------------------------------------------------------------------


def cost(folder: Path, rounds: int) -> None:
    """Print a line for each width of a step and place in a text."""
    path = random_model(folder / "grok-2-quarter.gguf", "grok-2", layers=4, narrower=4)
    _compare(path, rounds, layers=4, clock=time.process_time, stream="off")


def layer(folder: Path, rounds: int) -> None:
    """Print likewise of a layer as it is."""
    path = random_model(folder / "grok-2-layer.gguf", "grok-2", layers=1)
    _compare(path, rounds, layers=1, clock=time.process_time, stream="off")
    experts = sum(tensor.nbytes for tensor in read_model(path)[0].tensors if "_exps" in tensor.name)
    budget = path.stat().st_size - int(0.6 * experts) + 840_000_000  # buffers
    _compare(path, rounds, layers=1, clock=time.perf_counter, stream="on", memory=budget)


def _compare(path: Path, rounds: int, *, layers: int, clock: Callable[[], float], **wished: Any) -> None:
    with ExitStack() as stack:
        engines = {}
        for routing in _BOTH:
            wishes = Wishes(context=_CONTEXT, routing=routing, repack="off", gpu_layers=0, **wished)
            engine = LlamaEngine(LoadRequest(path, wishes, threads=1))
            engines[routing] = stack.enter_context(closing(engine))
        print("| tokens | from position | llama.cpp, ms | release, ms | ratio (quartiles) | a layer, microseconds |")
        print("|---|---|---|---|---|---|")
        for width, start in _PLACES:
            found = _times(
                engines, width, start=start, rounds=rounds if width == 1 else max(rounds // 20, 5), clock=clock
            )
            print(f"| {width} | {start} | {_figures(found, layers)} |", flush=True)


def _times(
    engines: dict[Any, LlamaEngine], width: int, *, start: int, rounds: int, clock: Callable[[], float]
) -> dict[Any, list[float]]:
    """Seconds of each; the two engines take turns, so that what else goes on here hits both."""
    vocabulary = engines["release"].vocabulary
    ids = np.random.default_rng(5).integers(1000, vocabulary, start + width).tolist()
    for engine in engines.values():
        engine.evaluate(ids)
    seconds: dict[Any, list[float]] = {routing: [] for routing in _BOTH}
    for turn in range(rounds):
        for routing in _BOTH if turn % 2 else reversed(_BOTH):
            began = _begun(engines[routing], start, clock)
            engines[routing].step(_rows(ids[start:], start))
            seconds[routing].append(clock() - began)
    return seconds


def _figures(seconds: dict[Any, list[float]], layers: int) -> str:
    """Medians."""
    old, new = (1e3 * statistics.median(seconds[routing]) for routing in _BOTH)
    low, ratio, high = statistics.quantiles([b / a for a, b in zip(*seconds.values(), strict=True)])
    each = 1e3 * (new - old) / layers
    return f"{old:.1f} | {new:.1f} | {ratio:.3f} ({low:.3f} to {high:.3f}) | {each:.0f}"


def _begun(engine: LlamaEngine, start: int, clock: Callable[[], float]) -> float:
    engine.forget(0, start=start)
    return clock()


def _rows(ids: Sequence[int], start: int) -> list[Row]:
    return [Row(token, start + at, 0, at == len(ids) - 1) for at, token in enumerate(ids)]


# -- divergence --------------------------------------------------------------------------------------------------------


def divergence(folder: Path) -> None:
    """Print a line for each small model."""
    print("| layers | router's logits | temperature from | positions | KL, nats | likeliest token the same | logits |")
    print("|---|---|---|---|---|---|---|")
    for layers, cap, length in ((2, 30.0, 1024), (4, 30.0, 1024), (4, 6.0, 1024), (4, 30.0, 64)):
        spec = replace(SMALL_2, layers=layers, experts=8, router_cap=cap, temperature_length=length)
        print(_divergence(folder / f"grok2-{layers}-{cap:g}-{length}", spec))


def _divergence(folder: Path, spec: Grok2Spec) -> str:
    path = folder.with_suffix(".gguf")
    if not path.exists():
        grok_local.quantize_checkpoint(write_release(folder, spec), path, type="f32")
    ids = np.random.default_rng(3).integers(128, spec.vocabulary, 400).tolist()
    logits = []
    for routing in _BOTH:
        with grok_local.load(path, context=512, threads=2, kv_type="f32", routing=routing) as model:
            logits.append(model.logits(ids).astype(np.float64))
    own, right = logits
    logs = [values - np.logaddexp.reduce(values, axis=1, keepdims=True) for values in (own, right)]
    kl = (np.exp(logs[1]) * (logs[1] - logs[0])).sum(1)
    same = (own.argmax(1) == right.argmax(1)).mean()
    distance = np.linalg.norm(own - right, axis=1) / np.linalg.norm(right, axis=1)
    return (
        f"| {spec.layers} | capped at {spec.router_cap:g} | {spec.temperature_length} | {len(ids)} | "
        f"{kl.mean():.3f} (median {np.median(kl):.3f}) | {same:.1%} | {np.median(distance):.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", choices=("cost", "layer", "divergence"))
    parser.add_argument("--rounds", type=int, default=100, help="decoded tokens of each kind")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "cost"):
        cost(args.folder, args.rounds)
    if args.only in (None, "layer"):
        layer(args.folder, args.rounds // 5)
    if args.only in (None, "divergence"):
        divergence(args.folder)


if __name__ == "__main__":
    main()
