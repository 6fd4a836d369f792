"""Which weights RAM holds rearranged: copies of what llama.cpp has a faster layout for."""

from __future__ import annotations

from collections.abc import Iterable

from grok_local.errors import PlacementError
from grok_local.machine.facts import Speeds
from grok_local.placement.shape import ModelShape, Role, Weight
from grok_local.placement.wishes import Wishes
from grok_local.units import format_bytes

__all__ = ["check_repacking", "needs_speeds", "repackable"]

_WORTH_MEASURING = 1_000_000_000  # bytes: smaller models are fast anyway, and should start at once


def needs_speeds(model: ModelShape, wishes: Wishes) -> bool:
    """Whether the plan depends on how fast the machine is: a small model's does not."""
    return wishes.repack == "on" or model.nbytes >= _WORTH_MEASURING


def check_repacking(wishes: Wishes, *, streamed: bool, disk: int) -> None:
    """Raises PlacementError where it is wished for, and `disk` bytes of experts do not fit in RAM or are streamed."""
    if wishes.repack == "on" and streamed and not disk:
        raise PlacementError("--repack on: streamed experts stay as they are in the file: leave out one of the two")
    if wishes.repack == "on" and disk:
        raise PlacementError(
            f"--repack on: rearranged weights are copies in RAM, and {format_bytes(disk)} of the experts do not "
            "fit there: leave it out"
        )


def repackable(model: ModelShape, wishes: Wishes, speeds: Speeds, *, in_ram: Iterable[Weight]) -> frozenset[str]:
    """Names of the weights that are rearranged where these are in RAM, and everything fits."""
    if wishes.repack == "off" or not needs_speeds(model, wishes):
        return frozenset()  # what is measured besides must not change the plan
    return frozenset(weight.name for weight in in_ram if _may_repack(weight, wishes, speeds))


def _may_repack(weight: Weight, wishes: Wishes, speeds: Speeds) -> bool:
    if weight.role is Role.INPUT or weight.tied or weight.rows <= 1:
        return False
    gains = speeds.gains(weight.type, experts=weight.role is Role.EXPERTS)
    return speeds.can_repack(weight.type, weight.rows) and (gains or wishes.repack == "on")
