"""Answers a batch's tasks on places that nobody who waits needs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from grok_local.runtime.text.batch import Result, result_of
from grok_local.serve.engine_loop import BACKGROUND, Answer, EngineLoop

if TYPE_CHECKING:
    from grok_local.runtime.text.batch import Prepared, Watch

__all__ = ["Background"]


class Background:
    """Runs the tasks of one batch, in a thread of its caller's. Any thread may cancel it."""

    def __init__(self, engine: EngineLoop) -> None:
        self._engine = engine
        self.is_cancelled = False
        self._flying: dict[asyncio.Task[None], Answer] = {}

    def run(self, tasks: Iterable[Prepared | Result], *, size: int, watch: Watch = lambda _: None) -> Iterator[Result]:
        """Results as they come, up to the end or until it is cancelled. Raises what the model died of."""
        ready, events = iter(tasks), asyncio.new_event_loop()
        try:
            while not self.is_cancelled and self._engine.is_alive:
                known = [*events.run_until_complete(self._begun(ready)), *events.run_until_complete(self._ended())]
                if not known and not self._flying:
                    return
                for result in known:
                    if result.finish_reason == "interrupted":
                        return
                    yield result
        finally:
            self.cancel()
            events.run_until_complete(self._left())
            events.close()

    def cancel(self) -> None:
        """End with the step under way."""
        self.is_cancelled = True
        for answer in list(self._flying.values()):
            self._engine.cancel(answer)

    async def _begun(self, ready: Iterator[Prepared | Result]) -> list[Result]:
        """Fill up what is on its way; some are results already."""
        known = []
        for task in islice(ready, 2 * self._engine.places - len(self._flying)):
            if isinstance(task, Result):
                known.append(task)
            else:
                answer = self._engine.submit([task], rank=BACKGROUND)
                self._flying[asyncio.ensure_future(answer.ended())] = answer
        return known

    async def _ended(self) -> list[Result]:
        """Of those that end next."""
        if not self._flying:
            return []
        done, _ = await asyncio.wait(self._flying, return_when=asyncio.FIRST_COMPLETED)
        over = [self._flying.pop(one) for one in done]
        return [result_of(answer.tasks[0], answer.generations[0]) for answer in over]

    async def _left(self) -> None:
        """Nobody waits for the rest."""
        for one in self._flying:
            one.cancel()
        await asyncio.gather(*self._flying, return_exceptions=True)
