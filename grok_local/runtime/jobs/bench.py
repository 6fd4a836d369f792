"""Measures a loaded model: how fast it reads prompts and generates, against what the plan predicts and what the memory
could do.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from grok_local.errors import ContextError
from grok_local.machine.facts import Machine
from grok_local.placement.forecast import forecast, limit
from grok_local.runtime.text.model import Model

__all__ = ["BenchReport", "bench"]


@dataclass(frozen=True)
class Measurement:
    """Tokens a second, of each repetition of `tokens` tokens."""

    tokens: int
    speeds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Tokens a second."""
        return statistics.fmean(self.speeds)

    @property
    def spread(self) -> float:
        """Standard deviation of the repetitions."""
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else 0.0


@dataclass(frozen=True)
class BenchReport:
    """`predicted` and `limit` are for generation, tokens a second; with the limit each
    byte that a token reads comes as fast as the place where it lies can give it; 0 where that is not known.
    """

    model: str
    nbytes: int
    bytes_per_token: int
    threads: int
    repacked_tensors: int
    prompt: Measurement
    generation: Measurement
    predicted: float
    limit: float
    experts: dict[str, float] | None = None  # while generating: what streaming read and waited for

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        found = asdict(self)
        for name, measured in (("prompt", self.prompt), ("generation", self.generation)):
            found[name] |= {"mean": measured.mean, "stdev": measured.spread}
        return found


def bench(
    model: Model, machine: Machine, *, prompt: int, tokens: int, repeats: int, say: Callable[[str], None] | None = None
) -> BenchReport:
    """Random tokens, as llama-bench has them: `prompt` at once from an empty context, then `tokens` one by one from an
    empty context, each `repeats` times after one run to warm up. `machine` has the speeds that the prediction needs.

    Raises ContextError.
    """
    if max(prompt, tokens) > model.context_size:
        raise ContextError(f"{max(prompt, tokens)} tokens do not fit the context of {model.context_size}")
    plan = replace(model.placement.plan, machine=machine)
    read = _repeated("prompt", lambda: _read(model, prompt), prompt, repeats=repeats, say=say)
    before = model.engine.expert_stats()
    generated = _repeated("generation", lambda: _generate(model, tokens), tokens, repeats=repeats, say=say)
    after = model.engine.expert_stats()
    return BenchReport(
        model=plan.model.name,
        nbytes=plan.model.nbytes,
        bytes_per_token=plan.model.read_per_token,
        threads=model.engine.threads,
        repacked_tensors=len(plan.repacked),
        prompt=read,
        generation=generated,
        predicted=forecast(plan).speed,
        limit=limit(plan),
        experts=after.since(before).described(tokens * (repeats + 1)) if before and after else None,
    )


def _repeated(
    name: str, run: Callable[[], None], tokens: int, *, repeats: int, say: Callable[[str], None] | None
) -> Measurement:
    found: list[float] = []
    for number in range(repeats + 1):
        if say:
            say(f"{name}: {'warming up' if number == 0 else f'{number} of {repeats}'}")
        started = time.perf_counter()
        run()
        found.append(tokens / (time.perf_counter() - started))
    return Measurement(tokens, tuple(found[1:]))


def _read(model: Model, count: int) -> None:
    engine = model.engine
    cached = engine.cached[0]
    first = (cached[0] + 1) % engine.vocabulary if cached else 0  # another than last time: nothing cached
    engine.evaluate([first, *(random.randrange(engine.vocabulary) for _ in range(count - 1))])


def _generate(model: Model, count: int) -> None:
    engine = model.engine
    _read(model, 1)
    for _ in range(count - 1):
        engine.extend([random.randrange(engine.vocabulary)])
