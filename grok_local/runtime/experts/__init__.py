"""Experts larger than memory: which are held, how they are read, and how llama.cpp is made to wait for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grok_local.errors import ModelError
from grok_local.formats.gguf_file import Header
from grok_local.ggml.tensors import layout_is_known
from grok_local.placement.plan import Plan
from grok_local.placement.wishes import RAM
from grok_local.runtime.experts.ahead import ReadAhead
from grok_local.runtime.experts.memory import can_reserve
from grok_local.runtime.experts.streamer import ExpertStreamer
from grok_local.runtime.graph.record import Recorder
from grok_local.runtime.graph.tap import ExpertStats, RouterTap

__all__ = ["ExpertStats", "RouterTap", "new_tap"]


def new_tap(
    plan: Plan, headers: Sequence[Header], *, interrupted: Callable[[], bool]
) -> tuple[RouterTap | None, list[str]]:
    """What looks on while the plan is computed, None where nobody has to, and what to tell the user about it.

    Raises ModelError, OutputError.
    """
    trace = plan.wishes.trace_experts
    if not (plan.streamed or trace):
        return None, []
    recorder = Recorder(trace, plan.model) if trace else None
    if not plan.streamed:
        return RouterTap(interrupted=interrupted, recorder=recorder), []
    names = [weight.name for weight in plan.model.weights if plan.place_of(weight) == RAM]
    if not (can_reserve() and layout_is_known()):
        note = "experts cannot have memory of their own here: they are read ahead into the system's file cache"
        return ReadAhead(headers, names, interrupted=interrupted, recorder=recorder), [note]
    try:
        streamer = ExpertStreamer(
            headers,
            names,
            used=plan.model.experts_used,
            budget=plan.ram.experts,
            interrupted=interrupted,
            recorder=recorder,
        )
    except BaseException as error:
        if recorder:
            recorder.close()
        if not isinstance(error, OSError):
            raise
        raise ModelError(f"no memory can be reserved for the experts ({error.strerror or error})") from None
    return streamer, []
