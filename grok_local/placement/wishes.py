"""What a user asks of the plan."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grok_local.errors import OptionError, PlacementError
from grok_local.placement.shape import KV_WIDTHS, ModelShape

__all__ = [
    "ALL_LAYERS",
    "RAM",
    "USUAL_BATCH",
    "Wishes",
    "attended_by",
    "cells_of",
    "check_wishes",
    "may_use_devices",
    "names_devices",
    "usual_batch",
    "usual_context",
]

RAM = "RAM"
ALL_LAYERS = 10_000  # more than any model has
_CONTEXT = 8192  # tokens, where nobody asks for more
USUAL_BATCH = 512  # tokens at once, as in llama.cpp
_FULL_BATCH_CELLS, _LEAST_BATCH = 8192, 64  # with more cells a batch is smaller, but no smaller than this
_PADDING = 256  # tokens
_LONGEST_PATTERN = 1000  # characters


@dataclass(frozen=True)
class Wishes:
    """What the user asks for; None leaves it to the plan, and a context of 0 is all the model was trained on.

    `experts_on`: "cpu", "gpu", or of how many layers the experts go to devices. `overrides`: (regular expression for
    tensor names, place). `memory`: bytes of RAM. `batch`: tokens evaluated at once. `sequences`: how many may be
    evaluated together, each with that context. `trace_experts`: where a record of them is kept; `count_experts`: how
    often each is chosen is counted. `routing`: whose arithmetic a model has where llama.cpp's is not its release's.
    `trained_context`: tokens the model was trained on, where that is known better than its file says. With
    `reproducible`, the numbers of a sequence do not depend on what goes on beside it. `separate`: each sequence has a
    part of the KV cache to itself; None leaves it to the plan.
    """

    context: int | None = None
    kv_type: str = "f16"
    batch: int | None = None
    sequences: int = 1
    reproducible: bool = False
    separate: bool | None = None
    gpu_layers: int | None = None
    experts_on: Literal["cpu", "gpu"] | int | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    repack: Literal["auto", "on", "off"] = "auto"
    stream: Literal["auto", "on", "off"] = "auto"
    memory: int | None = None
    trace_experts: Path | None = None
    count_experts: bool = False
    routing: Literal["release", "llama.cpp"] = "release"
    trained_context: int | None = None


def usual_context(model: ModelShape, wishes: Wishes) -> int:
    """Tokens of a sequence: as wished for, or as the model was trained on, but not very many unless they are."""
    trained = wishes.trained_context or model.trained_context or _CONTEXT
    usual = max(min(_CONTEXT, trained), 1)
    return trained if wishes.context == 0 else wishes.context or usual


def cells_of(context: int, wishes: Wishes) -> int:
    """Tokens that the KV cache has room for, of all sequences together. llama.cpp pads each part of it."""
    return (-(-context // _PADDING) * _PADDING if wishes.separate else context) * wishes.sequences


def attended_by(context: int, wishes: Wishes) -> int:
    """Cells that a token is compared with: its sequence's, or in one cache for all everybody's."""
    return context if wishes.separate else cells_of(context, wishes)


def usual_batch(context: int, wishes: Wishes) -> int:
    """Tokens evaluated at once: fewer where many sequences share a long cache, for all of which each has scores."""
    if wishes.batch or wishes.sequences == 1:
        return wishes.batch or USUAL_BATCH
    attended = attended_by(context, wishes)
    fitting = max(USUAL_BATCH * _FULL_BATCH_CELLS // max(attended, 1), 1)
    return max(min(USUAL_BATCH, 1 << fitting.bit_length() - 1), _LEAST_BATCH, wishes.sequences)


def names_devices(wishes: Wishes) -> bool:
    """Whether the user says what goes to devices."""
    placed = any(place != RAM for _, place in wishes.overrides)
    return placed or wishes.gpu_layers is not None or wishes.experts_on not in (None, "cpu")


def may_use_devices(wishes: Wishes) -> bool:
    """Whether anything may go to devices."""
    return bool(wishes.gpu_layers != 0 or wishes.experts_on not in ("cpu", 0) or wishes.overrides)


def check_wishes(wishes: Wishes, devices: Sequence[str]) -> None:
    """Raises OptionError for what nobody can have, PlacementError for what this machine has not."""
    if wishes.kv_type not in KV_WIDTHS:
        raise OptionError(f"KV cache type {wishes.kv_type!r}: choose one of {', '.join(KV_WIDTHS)}")
    if isinstance(wishes.experts_on, str) and wishes.experts_on not in ("cpu", "gpu"):
        raise OptionError(f"--experts-on {wishes.experts_on}: cpu, gpu, or a number of layers")
    for pattern, place in wishes.overrides:
        _check_override(pattern, place, [RAM, *devices])
    if not devices and (wishes.gpu_layers or wishes.experts_on not in (None, "cpu", 0)):
        raise PlacementError("there is no GPU that llama.cpp knows, and no worker: grok-local doctor tells why")


def _check_override(pattern: str, place: str, names: Sequence[str]) -> None:
    shown = f"--override {pattern[:60]}={place}"
    if len(pattern) > _LONGEST_PATTERN:
        raise OptionError(f"{shown}: longer than {_LONGEST_PATTERN} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of sets that would mean something else one day
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise OptionError(f"{shown}: no regular expression that can be used ({error})") from None
    if place not in names:
        raise OptionError(f"{shown}: no such place; there are {', '.join(names)}")
