"""An engine that takes its time, as large models do on small machines."""

from __future__ import annotations

import time
from collections.abc import Sequence

from grok_local.placement.load_options import LoadRequest
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.graph.rows import Draw, Drawn, Row

__all__ = ["SlowEngine"]


class SlowEngine(LlamaEngine):
    """Every step takes `seconds` more."""

    def __init__(self, request: LoadRequest, *, seconds: float = 0.0) -> None:
        super().__init__(request)
        self.seconds = seconds
        self.steps = 0

    def step(self, rows: Sequence[Row], draws: Sequence[Draw] = ()) -> list[Drawn] | None:
        self.steps += 1
        time.sleep(self.seconds)
        return super().step(rows, draws)
