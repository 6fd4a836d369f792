"""Models larger than memory: streaming their experts against mapping them, under a memory limit.

    python -m benchmarks.stream --folder FOLDER [--only shares fits together budget prompt giant]
                                [--against CHECKOUT]

A model of Grok-1's proportions with random weights (every width a quarter, 22 layers, 3.9 GB) is written to FOLDER.
Each run is a process of its own in a control group (version 1 or 2, where we may make one) whose memory is limited; it
evaluates random tokens one by one, so that each chooses its experts anew. The limit is a replay: the same reads into
the same memory, layer after layer, without computing anything. With --against, another checkout's program runs in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from samples.random_models import random_model

_LAYERS, _NARROWER = 22, 4
_HERE = Path(__file__).parents[1]
_PROCESS = 150_000_000  # bytes that Python and its libraries take beside the budget


# -- control groups ----------------------------------------------------------------------------------------------------


class Group:
    """A control group of our own with limited memory; `limit` in bytes, None to count only."""

    def __init__(self, limit: int | None) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        parts = [line.split(":", 2) for line in lines]
        first = next((path for _, names, path in parts if "memory" in names.split(",")), None)
        self._old = first is not None
        root = Path("/sys/fs/cgroup/memory" if self._old else "/sys/fs/cgroup")
        self.folder = root / (first or next(path for _, names, path in parts if not names)).strip("/") / "grok-local"
        self.folder.mkdir(exist_ok=True)
        if limit is not None:
            (self.folder / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(limit))

    def enter(self) -> None:
        """Put this process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def used(self) -> int:
        """Bytes charged: anonymous memory and page cache."""
        return int((self.folder / ("memory.usage_in_bytes" if self._old else "memory.current")).read_text())

    def remove(self) -> None:
        """When its processes have ended."""
        for _ in range(100):
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)


@contextmanager
def group(limit: int | None) -> Iterator[Group]:
    made = Group(limit)
    try:
        yield made
    finally:
        made.remove()


# -- what a child does -------------------------------------------------------------------------------------------------


def child(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load the model, evaluate tokens, and say how long each evaluation took."""
    from grok_local.ggml.libraries import let_threads_rest

    let_threads_rest()
    from grok_local.placement.load_options import LoadRequest
    from grok_local.placement.wishes import Wishes
    from grok_local.runtime.engine.llama import LlamaEngine

    rng = random.Random(1)
    count, sequences = options.pop("tokens"), options.get("sequences", 1)
    prompt = options.pop("prompt", 0)
    if "trace_experts" in options:
        options["trace_experts"] = Path(options["trace_experts"])
    wishes = Wishes(repack="off", **options)
    started = time.perf_counter()
    engine = LlamaEngine(LoadRequest(model, wishes, threads=2))
    loaded = time.perf_counter() - started
    steps: list[Callable[[], object]]
    if prompt:
        ids = [rng.randrange(engine.vocabulary) for _ in range(prompt)]
        steps = [lambda: engine.evaluate(ids)]
    else:
        texts = [[rng.randrange(engine.vocabulary) for _ in range(sequences)] for _ in range(count)]
        steps = [_step(engine, tokens) for tokens in texts]
    seconds, read, began = [], [], time.process_time()
    for step in steps:
        before, start = _bytes(engine), time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        read.append(_bytes(engine) - before)
    used = time.process_time() - began
    plan = engine.placement.plan
    engine.close()
    return {"loaded": loaded, "seconds": seconds, "read": read, "batch": plan.batch, "processor": used / len(steps)}


def replayed(model: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Read what streaming would, choice by choice as recorded, and say how long each token took, and was to take."""
    from grok_local.formats import gguf_file
    from grok_local.machine.disk import read_speed
    from grok_local.machine.this_machine import this_machine
    from grok_local.placement.forecast import forecast
    from grok_local.placement.planner import make_plan
    from grok_local.placement.shape import ModelShape
    from grok_local.placement.wishes import Wishes
    from grok_local.runtime.experts.routing import read_routing
    from grok_local.runtime.experts.streamer import ExpertStreamer
    from grok_local.runtime.graph.rows import Row
    from grok_local.runtime.graph.tap import Ending

    headers = gguf_file.read_model(model)
    shape = ModelShape.from_headers(headers)
    trace, tokens = Path(options.pop("trace")), options.pop("tokens")
    machine = replace(this_machine(shape.types, threads=2), disk_speed=read_speed(model))
    plan = make_plan(shape, machine, Wishes(repack="off", **options))
    names = [weight.name for weight in shape.weights]
    streamer = ExpertStreamer(
        headers, names, used=shape.experts_used, room=plan.room_for_experts, interrupted=lambda: False
    )
    seconds, read = [], []
    for token in read_routing(trace).experts[:tokens]:
        start, before = time.perf_counter(), streamer.stats.bytes_read
        streamer.begin([Row(0, 0, 0, True)])
        for layer, chosen in enumerate(token):
            streamer.choose(layer, chosen[None])
            streamer.settle(layer)
        streamer.finish(Ending.COMPLETE)
        seconds.append(time.perf_counter() - start)
        read.append(streamer.stats.bytes_read - before)
    streamer.close()
    found = forecast(plan)
    return {"seconds": seconds, "read": read, "predicted": found.seconds, "disk": machine.disk_speed}


def _step(engine: Any, tokens: Sequence[int]) -> Callable[[], object]:
    return lambda: engine.evaluate_together({number: [token] for number, token in enumerate(tokens)})


def _bytes(engine: Any) -> int:
    stats = engine.expert_stats()
    return int(stats.bytes_read) if stats else 0


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(
    model: Path, *, limit: int | None, tokens: int, checkout: Path = _HERE, work: str = "child", **options: Any
) -> dict[str, Any]:
    """Run a child under a limit, and watch what is charged to it. What is cached of the file already would not be."""
    with model.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with group(limit) as own:
        request = json.dumps({"tokens": tokens, "context": 1024, **options})
        command = [sys.executable, "-m", "benchmarks.stream", f"--{work}", str(model), request]
        env = {**os.environ, "PYTHONPATH": str(checkout)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=own.enter, cwd=checkout, env=env)  # noqa: PLW1509
        most = 0
        while process.poll() is None:
            most = max(most, own.used())
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(process.communicate()[0])
    usual = found["seconds"][len(found["seconds"]) // 4 :]  # the first ones fill the memory
    found["median"] = statistics.median(usual)
    found["read_median"] = statistics.median(found["read"][len(found["read"]) // 4 :])
    return found | {"most": most}


def resident(model: Path, tokens: int) -> dict[str, Any]:
    return measure(model, limit=None, tokens=tokens, stream="off")


def shares(model: Path, limits: Sequence[int], *, tokens: int, rounds: int, against: Path | None) -> None:
    """Under limits of so many percent of the file, in turn with mapping; medians of the rounds' medians."""
    whole = statistics.median(resident(model, tokens)["median"] for _ in range(rounds))
    trace = recorded(model, tokens)
    print(f"resident: {1 / whole:.2f} tok/s\n")
    names = (
        "limit | mapped | before | streamed | to mapped | to before | replay | of the replay | predicted | read a token"
    )
    print(f"| {names} | processor | charged of the limit |\n" + "|---" * 12 + "|")
    for percent in limits:
        limit = model.stat().st_size * percent // 100
        common: dict[str, Any] = {"limit": limit, "tokens": tokens}
        ours = {**common, "memory": limit - _PROCESS, "stream": "on"}
        rows = []
        for _ in range(rounds):
            mapped = measure(model, **(common | {"tokens": tokens // 3}), stream="off")["median"]
            before = measure(model, **ours, checkout=against)["median"] if against else math.nan
            now = measure(model, **ours)
            replay = measure(model, **ours, work="replay", trace=str(trace))
            speeds = [1 / mapped, 1 / before, 1 / now["median"], mapped / now["median"], before / now["median"]]
            speeds += [1 / replay["median"], replay["median"] / now["median"], now["median"] / replay["predicted"]]
            rows.append([*speeds, now["read_median"] / 1e6, now["processor"], now["most"] / limit])
        found = [statistics.median(column) for column in zip(*rows, strict=True)]
        figures = " | ".join(f"{figure:.2f}" for figure in found[:8])
        print(f"| {percent} % | {figures} | {found[8]:.0f} MB | {found[9]:.2f} s | {found[10]:.2f} |", flush=True)


def recorded(model: Path, tokens: int) -> Path:
    """Which experts the tokens choose that every child evaluates."""
    path = model.with_name(f"{model.stem}-{tokens}.jsonl")
    if not path.exists():
        measure(model, limit=None, tokens=tokens, stream="off", trace_experts=str(path))
    return path


def fits(model: Path, tokens: int, rounds: int) -> None:
    """Everything in memory: streamed against mapped, in turn."""
    pairs = []
    for _ in range(rounds):
        mapped = measure(model, limit=None, tokens=tokens, stream="off")
        streamed = measure(model, limit=None, tokens=tokens, stream="on")
        pairs.append((mapped["median"], streamed["median"]))
    ratio = statistics.median(a / b for a, b in pairs)
    plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{model.stem}, everything fits: mapped {1 / plain:.2f} tok/s, streamed {1 / ours:.2f}, ratio {ratio:.3f}")


def together(model: Path, tokens: int, rounds: int) -> None:
    """Sixteen sequences at once, under the 40 % limit, against one."""
    limit = model.stat().st_size * 40 // 100
    one, many = [], []
    for _ in range(rounds):
        common: dict[str, Any] = {"limit": limit, "stream": "on", "memory": limit - _PROCESS, "batch": 64}
        one.append(measure(model, tokens=2 * tokens, **common)["median"])
        many.append(measure(model, tokens=tokens, sequences=16, **common)["median"])
    ratio = statistics.median(16 * a / b for a, b in zip(one, many, strict=True))
    total = 16 / statistics.median(many)
    print(f"16 sequences: {total:.2f} tok/s in all, one {1 / statistics.median(one):.2f}: {ratio:.2f} times")


def budget(model: Path, tokens: int) -> None:
    """What is charged without any limit, from the start of the process to its end."""
    for share in (20, 40, 80):
        memory = model.stat().st_size * share // 100 - _PROCESS
        most = measure(model, limit=None, tokens=tokens, stream="on", memory=memory)["most"]
        print(f"--memory {memory / 1e6:.0f} MB: at most {most / 1e6:.0f} MB charged, {(most - memory) / 1e6:.0f} more")


def prompt(model: Path, length: int) -> None:
    """A long prompt under the 40 % limit: mapped, streamed 512 tokens at once, and as wide as the plan has it."""
    limit = model.stat().st_size * 40 // 100
    common: dict[str, Any] = {"limit": limit, "tokens": 1, "context": length, "prompt": length}
    mapped = measure(model, stream="off", **common)
    narrow = measure(model, stream="on", memory=limit - _PROCESS, batch=512, **common)
    wide = measure(model, stream="on", memory=limit - _PROCESS, **common)
    for name, found in (("mapped", mapped), ("streamed", narrow), ("streamed", wide)):
        seconds = found["seconds"][0]
        read = f"{sum(found['read']) / 1e9:.1f} GB read" if sum(found["read"]) else "not counted"
        print(
            f"| {length} tokens, {name}, {found['batch']} at once | {seconds:.1f} s | {length / seconds:.1f} | {read} |"
        )


def giant(folder: Path) -> None:
    """Grok-1's full size, with a hole in the file in place of the weights: whatever else there is to it is real."""
    from samples.giants import write_giant

    model, memory = folder / "grok-1-hole.gguf", 18_000_000_000
    if not model.exists():
        write_giant(model, "grok-1")
    found = measure(model, limit=None, tokens=8, stream="on", memory=memory)
    print(f"{model.stat().st_size / 1e9:.0f} GB in {memory / 1e9:.0f}: loaded in {found['loaded']:.1f} s, ", end="")
    print(
        f"{found['median']:.1f} s a token, {found['read_median'] / 1e9:.1f} GB each, {found['most'] / 1e9:.1f} charged"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "grok-local-benchmark")
    parser.add_argument("--only", nargs="*", default=["shares", "fits", "together", "budget", "prompt", "giant"])
    parser.add_argument("--limits", type=int, nargs="*", default=[20, 40, 60, 80], help="percent of the file")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, compared with this one")
    parser.add_argument("--replay", nargs=2, metavar=("MODEL", "JSON"), help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for work, given in ((child, args.child), (replayed, args.replay)):
        if given:
            print(json.dumps(work(Path(given[0]), json.loads(given[1]))))
            return
    args.folder.mkdir(parents=True, exist_ok=True)
    model = random_model(args.folder / "grok-1-quarter.gguf", layers=_LAYERS, narrower=_NARROWER)
    for name in args.only:
        if name == "shares":
            shares(model, args.limits, tokens=args.tokens, rounds=args.rounds, against=args.against)
        elif name in ("fits", "together"):
            {"fits": fits, "together": together}[name](model, args.tokens, args.rounds)
        elif name == "giant":
            giant(args.folder)
        elif name == "budget":
            budget(model, args.tokens)
        else:
            prompt(model, args.prompt)


if __name__ == "__main__":
    main()
