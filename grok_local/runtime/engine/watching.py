"""Which observers a plan needs, and what the engine needs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from grok_local.errors import ModelError
from grok_local.formats.gguf_file import Header
from grok_local.ggml.tensors import layout_is_known
from grok_local.pages import can_reserve
from grok_local.placement.plan import Plan
from grok_local.placement.wishes import RAM, Wishes
from grok_local.runtime.experts.ahead import ReadAhead
from grok_local.runtime.experts.streamer import ExpertStreamer
from grok_local.runtime.experts.waiting import ExpertStats
from grok_local.runtime.graph.counts import RoutingCounts
from grok_local.runtime.graph.deviations import deviations_of
from grok_local.runtime.graph.record import Recorder
from grok_local.runtime.graph.router import ReleaseGates
from grok_local.runtime.graph.tap import Observer, Tap
from grok_local.runtime.graph.temperature import AttentionTemperature

__all__ = ["Watch", "notes_on_routing", "watch_for"]


@dataclass(frozen=True)
class Watch:
    """The observers of a plan on their tap; `experts` is the one that brings experts to memory, if any does."""

    tap: Tap
    experts: ExpertStreamer | ReadAhead | None
    recorder: Recorder | None
    corrections: tuple[Observer, ...] = ()
    notes: tuple[str, ...] = ()
    counts: RoutingCounts | None = None

    def attach(self) -> None:
        """llama.cpp has loaded the model. Raises ModelError."""
        if self.experts:
            self.experts.attach()

    @property
    def only_once(self) -> bool:
        """Whether nobody needs to look on after one evaluation."""
        looks_on = self.recorder or self.counts or self.corrections
        return not looks_on and self.experts is not None and self.experts.is_whole

    def routing_counts(self) -> list[list[int]] | None:
        """How often each expert of each layer was chosen; None where that is not counted."""
        found: list[list[int]] | None = self.counts.counts.tolist() if self.counts else None
        return found

    def expert_stats(self) -> ExpertStats | None:
        """What was read and waited for so far; None where no experts are streamed."""
        return self.experts.stats.copy() if self.experts else None


def watch_for(plan: Plan, headers: Sequence[Header], *, interrupted: Callable[[], bool]) -> Watch | None:
    """What has to look on while the plan is computed, None where nobody has to. Raises ModelError, OutputError."""
    trace, corrections = plan.wishes.trace_experts, tuple(_corrections(headers, plan.wishes))
    counts = RoutingCounts(plan.model) if plan.wishes.count_experts else None
    if not (plan.streamed or trace or counts or corrections):
        return None
    recorder = Recorder(trace, plan.model) if trace else None
    try:
        experts = _expert_observer(plan, headers, interrupted=interrupted) if plan.streamed else None
    except BaseException:
        if recorder:
            recorder.close()
        raise
    observers = [observer for observer in (*corrections, experts, recorder, counts) if observer is not None]
    return Watch(Tap(observers), experts, recorder, corrections, experts.notes if experts else (), counts)


def notes_on_routing(headers: Sequence[Header], wishes: Wishes) -> list[str]:
    """What is to be known of a model that llama.cpp alone computes otherwise than its release does."""
    deviations = deviations_of(headers)
    if deviations is None:
        return []
    return [deviations.corrected if _is_corrected(wishes) else deviations.left]


def _is_corrected(wishes: Wishes) -> bool:
    return wishes.routing == "release" and layout_is_known()


def _corrections(headers: Sequence[Header], wishes: Wishes) -> Iterator[Observer]:
    """What has a model computed as its release does."""
    deviations = deviations_of(headers)
    if deviations is not None and _is_corrected(wishes):
        yield ReleaseGates(layers=deviations.layers, cap=deviations.router_cap)
        if deviations.temperature_length:
            length, cap = deviations.temperature_length, deviations.score_cap
            yield AttentionTemperature(layers=deviations.layers, length=length, cap=cap)


def _expert_observer(
    plan: Plan, headers: Sequence[Header], *, interrupted: Callable[[], bool]
) -> ExpertStreamer | ReadAhead:
    names = [weight.name for weight in plan.model.weights if plan.place_of(weight) == RAM]
    if not (can_reserve() and layout_is_known()):
        return ReadAhead(headers, names, interrupted=interrupted)
    try:
        used = plan.model.experts_used
        return ExpertStreamer(headers, names, used=used, room=plan.room_for_experts, interrupted=interrupted)
    except OSError as error:
        raise ModelError(f"no memory can be reserved for the experts ({error.strerror or error})") from None
