"""The thread that computes: whatever happens in it, nobody waits for ever, and it says that it has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import grok_local
from grok_local.errors import GrokLocalError, ModelError, RefusedError
from grok_local.runtime.scheduling.generation import Generation
from grok_local.runtime.text.batch import Prepared
from grok_local.runtime.text.model import Model
from grok_local.serve.engine_loop import Answer, EngineLoop
from grok_local.serve.figures import Figures


class Watched(Figures):
    """Has something done in the engine's thread, while the figures are being made."""

    def __init__(self, act: Callable[[], Any], *, once: bool = False) -> None:
        super().__init__(per_token=1.0, per_prompt_token=0.1)
        self._act, self._once = act, once

    def look(self, live: Iterable[Generation]) -> None:
        for _ in (self,) if self._once else live:
            self._act()
        super().look(live)


def prepared(model: Model, **options: Any) -> Prepared:
    task = model.tasks({}).prepare(0, {"prompt": "Once", "max_tokens": 5, "temperature": 0, **options})
    assert isinstance(task, Prepared)
    return task


def running(model: Model, act: Callable[[], Any]) -> EngineLoop:
    return EngineLoop(model, places=1, most_waiting=64, figures=Watched(act))


def test_what_comes_in_the_middle_of_a_step_disturbs_nobody(model: Model) -> None:
    some, task = list[Answer](), prepared(model)

    async def submit() -> None:
        if len(some) < 4:
            some.append(loop.submit([task]))

    async def all_of_them() -> list[list[Any]]:
        events = asyncio.get_running_loop()
        loop.figures = Watched(lambda: asyncio.run_coroutine_threadsafe(submit(), events).result(10))
        await submit()
        while len(some) < 4:
            await asyncio.sleep(0.01)
        return [await asyncio.wait_for(answer.results(), 20) for answer in some]

    with running(model, lambda: None) as loop:
        results = asyncio.run(all_of_them())
    assert {len(result.tokens) for (result,) in results} == {5}
    assert loop.failure is None


def test_whoever_asks_on_at_once_misses_no_step(packed: Path) -> None:
    steps = list[float]()

    async def asks_four_times(loop: EngineLoop) -> None:
        for _ in range(4):
            await asyncio.wait_for(loop.submit([task]).results(), 20)

    async def two(loop: EngineLoop) -> None:
        await asyncio.gather(asks_four_times(loop), asks_four_times(loop))

    def slowly() -> None:
        steps.append(time.monotonic())
        time.sleep(0.3)

    with grok_local.load(packed, context=64, parallel=2) as model:
        task = prepared(model, max_tokens=2)
        with EngineLoop(model, places=2, most_waiting=64, figures=Watched(slowly, once=True)) as loop:
            asyncio.run(two(loop))
    assert len(steps) <= 11  # 8, and one more for each answer without the moment's wait


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_our_own_is_told_to_all_who_wait(model: Model, stream: bool) -> None:
    async def both(loop: EngineLoop) -> list[GrokLocalError]:
        answers = [loop.submit([prepared(model)], is_streamed=stream) for _ in range(2)]
        return [await asyncio.wait_for(_failed(answer), 20) for answer in answers]

    async def refused(loop: EngineLoop) -> None:
        with pytest.raises(RefusedError):
            loop.submit([prepared(model)])

    with running(model, lambda: 1 // 0) as loop:
        failures = asyncio.run(both(loop))
        assert all(isinstance(error, ModelError) and "the log has more" in str(error) for error in failures)
        assert loop.failure is failures[0]
        assert not loop.is_alive
        asyncio.run(refused(loop))


async def _failed(answer: Answer) -> GrokLocalError:
    """What an answer died of, when whoever reads it hears of it."""
    try:
        async for _ in answer.increments(1.0):
            pass
        await answer.results()
    except GrokLocalError as error:
        return error
    raise AssertionError(answer.generations)
