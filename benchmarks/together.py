"""Many sequences together: how fast, against llama.cpp's own figure, and by which of the ways that were tried.

    python -m benchmarks.together --folder FOLDER [--batched-bench PATH] [--only widths ways forms]

The model has Grok-1's proportions, every width a quarter, and random weights (3.9 GB).

`widths`: tokens a second while 1, 4 and 16 sequences decode, and what llama-batched-bench of the same build gets, in
turn. `ways`: a job of 48 prompts at width 16 with one shared KV cache or a part for each sequence, prompts beside
answers or before them, weights rearranged, and reproducible. `forms`: what 16 grammars cost a step, with Grok-1's
vocabulary.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grok_local
from grok_local.machine.limits import core_count
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.scheduling.composing import Chunk, Composer, InParts, Running, Together
from grok_local.runtime.scheduling.generation import Generation, Request
from grok_local.runtime.scheduling.scheduler import Scheduler
from grok_local.runtime.text.structure import structure_of
from samples.checkpoints import REFERENCE, SMALL, write_checkpoint
from samples.random_models import random_model

WIDTHS = (1, 4, 16)
PROMPT, ANSWER = 64, 24


class PromptsFirst(Together):
    """The way that was not taken: a step has prompts or answers, never both."""

    def compose(self, running: Sequence[Running], *, room: int) -> list[Chunk]:
        prompts = [one for one in running if one.in_prompt]
        return super().compose(prompts or running, room=room)


@contextmanager
def engine(model: Path, **wishes: Any) -> Iterator[LlamaEngine]:
    loaded = LlamaEngine(LoadRequest(model, Wishes(experts_on="cpu", gpu_layers=0, **wishes), threads=core_count()))
    try:
        yield loaded
    finally:
        loaded.close()


def generation(
    rng: random.Random, *, vocabulary: int, prompt: int, answer: int, grammar: str | None = None
) -> Generation:
    ids = tuple(rng.randrange(vocabulary) for _ in range(prompt))
    return Generation(Request(ids, Sampling(temperature=1.0, seed=1), answer, grammar=grammar), prompt + answer)


def step(scheduler: Scheduler) -> bool:
    return scheduler.tick(wanted=lambda _: True, may_yield=lambda _: False)


def decoding(model: Path, width: int) -> float:
    """Tokens a second while `width` sequences decode, all of them."""
    with engine(model, context=PROMPT + ANSWER, sequences=width) as loaded:
        scheduler, rng = Scheduler(loaded, places=width, composer=InParts()), random.Random(1)
        some = [generation(rng, vocabulary=loaded.vocabulary, prompt=PROMPT, answer=ANSWER) for _ in range(width)]
        for one in some:
            scheduler.submit(one)
        while any(not one.tokens for one in some):
            step(scheduler)
        before, began = sum(len(one.tokens) for one in some), time.perf_counter()
        while step(scheduler):
            pass
        return (sum(len(one.tokens) for one in some) - before) / (time.perf_counter() - began)


def batched_bench(program: Path, model: Path, width: int) -> float:
    """llama-batched-bench's figure for the same."""
    command = [program, "-m", model, "-c", 4096, "-npp", PROMPT, "-ntg", ANSWER, "-npl", width]
    command += ["-t", core_count(), "--no-repack"]  # as ours, which leaves weights as they are unless told otherwise
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    row = re.search(rf"^\|\s*{PROMPT} \|\s*{ANSWER} \|\s*{width} \|(.*)\|$", done.stdout, re.MULTILINE)
    assert row, done.stdout
    return float(row[1].split("|")[4])


def widths(model: Path, program: Path | None, rounds: int) -> None:
    for width in WIDTHS:
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(decoding(model, width))
            if program:
                theirs.append(batched_bench(program, model, width))
        text = f"width {width}: {statistics.median(ours):.2f} tok/s {[round(value, 2) for value in ours]}"
        if theirs:
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            text += f"; llama-batched-bench {statistics.median(theirs):.2f}: {ratio:.3f} of it"
        print(text, flush=True)


def job(model: Path, *, composer: Composer, **wishes: Any) -> float:
    """Seconds that 48 prompts of 32 to 160 tokens and answers of 8 to 24 take, 16 together."""
    rng = random.Random(2)
    with engine(model, context=184, sequences=16, **wishes) as loaded:
        scheduler = Scheduler(loaded, places=16, composer=composer)
        for _ in range(48):
            size, answer = rng.randrange(32, 160), rng.randrange(8, 25)
            scheduler.submit(generation(rng, vocabulary=loaded.vocabulary, prompt=size, answer=answer))
        began = time.perf_counter()
        while step(scheduler):
            pass
        return time.perf_counter() - began


def reproducible(model: Path, *, strictly: bool) -> float:
    """Seconds that the same job takes through `Model.batch`."""
    rng = random.Random(2)
    with grok_local.load(model, context=184, parallel=16, reproducible=strictly, placement="cpu") as loaded:
        tasks = []
        for _ in range(48):
            size, answer = rng.randrange(32, 160), rng.randrange(8, 25)
            tasks.append({"prompt": [rng.randrange(1000) for _ in range(size)], "max_tokens": answer})
        began = time.perf_counter()
        for result in loaded.batch(tasks, parallel=16, reproducible=strictly):
            assert result.error is None, result.error
        return time.perf_counter() - began


def ways(model: Path, rounds: int) -> None:
    tried = {
        "shared cache, prompts beside answers": partial(job, model, composer=Together(), separate=False),
        "shared cache, prompts first": partial(job, model, composer=PromptsFirst(), separate=False),
        "a part each, prompts and answers in turns": partial(job, model, composer=InParts()),
        "a part each, in turns, rearranged": partial(job, model, composer=InParts(), repack="on"),
        "through Model.batch": partial(reproducible, model, strictly=False),
        "through Model.batch, reproducible": partial(reproducible, model, strictly=True),
    }
    found: dict[str, list[float]] = {name: [] for name in tried}
    for _ in range(rounds):
        for name, run in tried.items():
            try:
                found[name].append(run())
            except grok_local.GrokLocalError as error:
                print(f"{name}: {error}")
    for name, seconds in found.items():
        if seconds:
            print(f"{name}: {statistics.median(seconds):.1f} s {[round(value, 1) for value in seconds]}", flush=True)


def forms(folder: Path) -> None:
    """What 16 grammars add to a step, on a small model with Grok-1's 131,072 tokens."""
    path = folder / "vocabulary.gguf"
    if not path.exists():
        tokenizer = REFERENCE / "grok-1-tokenizer.model"
        checkpoint = write_checkpoint(folder / "vocabulary", replace(SMALL, vocabulary=131072), tokenizer)
        grok_local.quantize_checkpoint(checkpoint, path)
    structure = structure_of({"regex": "[a-z ]{200,}"})
    assert structure
    seconds = {}
    for name, grammar in (("free", None), ("held to a form", structure.grammar)) * 2:
        with engine(path, context=256, sequences=16) as loaded:
            scheduler, rng = Scheduler(loaded, places=16), random.Random(3)
            some = [generation(rng, vocabulary=1000, prompt=8, answer=100, grammar=grammar) for _ in range(16)]
            for one in some:
                scheduler.submit(one)
            step(scheduler)
            began = time.perf_counter()
            for _ in range(50):
                step(scheduler)
            seconds[name] = (time.perf_counter() - began) / 50
    print({name: f"{1000 * value:.1f} ms a step" for name, value in seconds.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--batched-bench", type=Path, help="llama.cpp's program, compiled against the same library")
    parser.add_argument("--only", nargs="+", choices=("widths", "ways", "forms"), default=("widths", "ways", "forms"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model = random_model(args.folder / "grok-1-quarter.gguf", layers=22, narrower=4)
    if "widths" in args.only:
        widths(model, args.batched_bench, args.rounds)
    if "ways" in args.only:
        ways(model, args.rounds)
    if "forms" in args.only:
        forms(args.folder)


if __name__ == "__main__":
    main()
