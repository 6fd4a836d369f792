"""Looks on while llama.cpp computes: which experts its routers choose.

llama.cpp asks before each node of its graph whether we want to see it, and shows it when it is computed. The router's
choice is the node `ffn_moe_topk-LAYER` (llama-graph.cpp, build_moe_ffn).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError
from grok_local.ggml import tensors as ggml_tensors
from grok_local.runtime.experts.reader import Ticket
from grok_local.runtime.graph.record import Recorder
from grok_local.runtime.graph.rows import Row

__all__ = ["ExpertStats", "Interrupted", "RouterTap"]

_TOPK = b"ffn_moe_topk-"
_LOOK = 0.05  # seconds after which a waiting thread looks whether it is interrupted


@dataclass
class ExpertStats:
    """Counted since loading. A hit is an expert, chosen in a layer for one or more tokens, that was in memory."""

    bytes_read: int = 0
    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0  # in which nothing was computed, because an expert was being read
    seconds: float = 0.0  # evaluating, waiting included

    @property
    def hit_rate(self) -> float:
        """Of the experts chosen, those that were in memory."""
        chosen = self.hits + self.misses
        return self.hits / chosen if chosen else 0.0

    @property
    def compute_seconds(self) -> float:
        """What was not waiting."""
        return self.seconds - self.wait_seconds

    def since(self, before: ExpertStats) -> ExpertStats:
        """What came after `before` was counted."""
        return ExpertStats(**{name: value - getattr(before, name) for name, value in vars(self).items()})

    def described(self, tokens: int) -> dict[str, float]:
        """For people and programs: of so many tokens."""
        return {
            "bytes_read": self.bytes_read,
            "bytes_read_per_token": round(self.bytes_read / max(tokens, 1)),
            "hit_rate": round(self.hit_rate, 4),
            "wait_seconds": round(self.wait_seconds, 6),
            "compute_seconds": round(self.compute_seconds, 6),
        }

    def __add__(self, other: ExpertStats) -> ExpertStats:
        return ExpertStats(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def copy(self) -> ExpertStats:
        """As it is now."""
        return replace(self)


_LOST = (
    "an exception broke into the evaluation from outside (a signal's?): what it computed is worth nothing; do it again"
)


class Interrupted(ModelError):  # noqa: N818  # nothing went wrong
    """Something was waited for when the user had enough: nothing is wrong, but what was computed is worth nothing."""


class RouterTap:
    """Has a record kept, if that is wished, of what the routers choose; ExpertStreamer does more.

    The engine calls `attach` when the model is loaded, `begin` and `finish` around an evaluation, `close` when the
    model is freed. `interrupted` is asked while it waits.
    """

    def __init__(self, *, interrupted: Callable[[], bool], recorder: Recorder | None = None) -> None:
        self.stats = ExpertStats()
        self.error: BaseException | None = None
        self._interrupted = interrupted
        self._recorder = recorder
        self._started = 0.0
        self._to_show: bytes | None = None  # the node that was asked for
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    @property
    def is_whole(self) -> bool:
        """Whether one evaluation is all that it has to look on at."""
        return False

    def attach(self) -> None:
        """Get ready for the first evaluation."""

    def close(self) -> None:
        """Let go of everything."""
        if self._recorder is not None:
            self._recorder.close()

    def should_abort(self) -> bool:
        """Whether what is being computed is of no use."""
        return self.error is not None

    def begin(self, rows: Sequence[Row]) -> None:
        """Before an evaluation."""
        self.error = self._to_show = None
        if self._recorder is not None:
            self._recorder.begin(rows)
        self._started = time.monotonic()

    def finish(self, *, complete: bool) -> None:
        """After it; not complete if it was interrupted. Raises what went wrong meanwhile."""
        self.stats.seconds += time.monotonic() - self._started
        if self.error is None and self._to_show is not None and complete:
            self.error = ModelError(_LOST)
        if self.error is not None and (complete or not isinstance(self.error, Interrupted)):
            raise self.error
        if self._recorder is not None and complete:
            self._recorder.commit()

    def _on_node(self, node: int, ask: bool, _: Any) -> bool:
        # An exception would get lost in C, and wrong numbers come out.
        try:
            if self.error is None:
                return self._ask(node) if ask else self._show(node)
        except BaseException as error:
            self.error = error
        return ask  # stop after this node, and then for good

    def _ask(self, node: int) -> bool:
        # A signal's exception at the very start of a callback nobody can catch; but it is noticed.
        if self._to_show is not None:
            raise ModelError(_LOST)
        name = ggml_tensors.tensor_name(node)
        if self._asked(node, name):
            self._to_show = name
        return self._to_show is not None

    def _show(self, node: int) -> bool:
        name = ggml_tensors.tensor_name(node)
        if name.startswith(_TOPK):
            layer, ids = int(name[len(_TOPK) :]), ggml_tensors.read_ints(node)
            if self._recorder is not None:
                self._recorder.choose(layer, ids)
            self._choose(layer, ids)
        self._to_show = None
        return True  # interrupts are left to llama.cpp's own callback: it takes what ends here for complete

    def _asked(self, node: int, name: bytes) -> bool:
        """Whether to show this node when it is computed."""
        return name.startswith(_TOPK) and self._wants(int(name[len(_TOPK) :]))

    def _wait(self, ticket: Ticket) -> None:
        """Until it is done; the time counts as waiting. Raises what went wrong, and Interrupted."""
        if not ticket.done:
            started = time.monotonic()
            while not (ticket.wait(_LOOK) or self._interrupted()):
                pass
            self.stats.wait_seconds += time.monotonic() - started
        if ticket.error is not None:
            raise ticket.error
        if not ticket.done:
            raise Interrupted("interrupted")

    def _wants(self, layer: int) -> bool:
        """Whether the layer's choice is of interest."""
        return self._recorder is not None

    def _choose(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """The layer's router has chosen; int32 [tokens, experts used]."""
