"""Makes a plan: a pure function of a model, a machine and wishes.

Every token reads the dense tensors and the KV cache, so devices get those first; whole layers of experts follow while
there is room; the rest stays in RAM, and what does not fit there is read from the disk.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from grok_local.errors import PlacementError
from grok_local.machine.facts import Machine
from grok_local.placement.forecast import forecast
from grok_local.placement.plan import Override, Places, Plan, Share, are_pinned, is_slow, units_of
from grok_local.placement.shape import EXPERTS, ModelShape, Role
from grok_local.placement.shares import Setting, check_devices, is_shared, ram_budget, rooms, shares_of, widest_batch
from grok_local.placement.sizes.balance import balanced
from grok_local.placement.sizes.compute import compute_bytes
from grok_local.placement.sizes.fixed import bytes_by_place, fixed_places, free_bytes
from grok_local.placement.sizes.refusals import check_taken, kept_in_ram, largest_refused, takes, why_refused
from grok_local.placement.sizes.repacking import check_repacking, needs_speeds, repackable
from grok_local.placement.wishes import (
    ALL_LAYERS,
    RAM,
    Wishes,
    cells_of,
    check_wishes,
    names_devices,
    usual_batch,
    usual_context,
)
from grok_local.units import format_bytes

__all__ = ["make_plan"]

_BATCHES = (1024, 2048, 4096)
_ANSWER = 64  # tokens
_KEPT_LAYERS = 0.9  # of those on devices, however wide a batch is
_SPARSE_CONTEXT = 256  # tokens: the smallest context anybody is advised


def make_plan(model: ModelShape, machine: Machine, wishes: Wishes | None = None) -> Plan:
    """Raises PlacementError, with the nearest plan that would work, and OptionError for wishes that make no sense.

    Several sequences have separate parts of the KV cache, or a token would be compared with everybody's; but where
    experts are streamed they share one, so that prompts and answers share each reading of the weights.
    """
    wishes = wishes or Wishes()
    if wishes.sequences == 1 or wishes.separate is not None:
        return _without_slow(model, machine, wishes)
    with suppress(PlacementError):
        plan = _without_slow(model, machine, replace(wishes, separate=True))
        if wishes.reproducible or not plan.streamed:
            return plan
    return _without_slow(model, machine, replace(wishes, separate=wishes.reproducible))


def _without_slow(model: ModelShape, machine: Machine, wishes: Wishes) -> Plan:
    """The plan in which a device that is known to be slower than RAM gets nothing that it would slow down."""
    plan = _without_idle(model, machine, wishes)
    slow = [s.place for d, s in zip(machine.devices, plan.shares, strict=False) if s.used and is_slow(d, plan)]
    if not slow or names_devices(wishes) or not needs_speeds(model, wishes):
        return plan
    devices = tuple(replace(device, most=0) if device.name in slow else device for device in machine.devices)
    with suppress(PlacementError):
        spared = _without_idle(model, replace(machine, devices=devices), wishes)
        return spared if forecast(spared).speed > forecast(plan).speed else plan
    return plan


def _without_idle(model: ModelShape, machine: Machine, wishes: Wishes) -> Plan:
    """The plan in which a device that gets nothing has no say in how many tokens are evaluated at once."""
    plan = _Planner(model, machine, wishes).plan()
    shares = zip(machine.devices, plan.shares, strict=False)
    idle = frozenset(device.name for device, share in shares if device.largest and not share.used)
    with suppress(PlacementError):
        return _Planner(model, machine, wishes, idle).plan() if idle else plan
    return plan


@dataclass(frozen=True)
class _Trial:
    """What placing is tried with. `copies` get room on the device that takes over from RAM: 1 for experts, 2 also for
    the output and the KV cache. On devices that are `unused` nothing fits. Of a memory shared with RAM
    `reserved` bytes are RAM's.
    """

    batch: int  # tokens evaluated at once
    streamed: bool = False
    copies: int = 0
    unused: frozenset[str] = frozenset()
    reserved: int = 0


@dataclass(frozen=True)
class _Placed:
    """What came of a trial. `shares` are the devices', then RAM's, whose experts may be more than there is room for."""

    trial: _Trial
    layers: list[int]  # by device
    overrides: tuple[Override, ...]
    shares: list[Share]

    @property
    def ram(self) -> Share:
        return self.shares[-1]


@dataclass(frozen=True)
class _Planner:
    """The question; every method is a function of it and of its arguments."""

    model: ModelShape
    machine: Machine
    wishes: Wishes
    idle: frozenset[str] = frozenset()  # devices that get nothing
    advise: bool = True  # whether an error looks for a context that would fit

    def plan(self) -> Plan:
        check_wishes(self.wishes, [device.name for device in self.machine.devices])
        check_taken(self.model, self.machine.devices, self.wishes.overrides)
        devices = [device for device in self.machine.devices if device.name not in self.idle]
        widest = widest_batch(self.model, devices, self.wishes, self.context)
        placed = self._best(_Trial(min(usual_batch(self.context, self.wishes), widest), unused=self.idle))
        check_devices(placed.shares)
        if self._is_streamed(placed):
            placed = self._widened(placed, min(widest, self._cells))
        disk, streamed = self._disk(placed.ram), placed.trial.streamed
        ram = replace(placed.ram, experts=placed.ram.experts - disk)
        return Plan(
            model=self.model,
            machine=self.machine,
            wishes=self.wishes,
            context=self.context,
            layers=tuple(placed.layers),
            overrides=placed.overrides,
            repacked=self._repacked(placed, disk=disk),
            shares=(*placed.shares[:-1], ram),
            disk=disk,
            batch=placed.trial.batch,
            streamed=streamed,
        )

    def _best(self, trial: _Trial) -> _Placed:
        """Copies of what stays in RAM need room on a device only where something does, and is not streamed."""
        errors: list[PlacementError] = []
        for copies in (0, 1, 2):
            try:
                placed = self._placed(replace(trial, copies=copies))
            except PlacementError as error:
                errors.append(error)
                continue
            if trial.streamed or copies in (2, self._copied(placed)):
                return placed
        # What fits is said as if nothing but experts was copied, unless layers stay in RAM.
        raise errors[-1 if self.wishes.gpu_layers is not None else len(errors) // 2]

    def _copied(self, placed: _Placed) -> int:
        """What is copied from RAM: 0 nothing, 1 experts, 2 more."""
        if not self.machine.devices:
            return 0
        whole = sum(placed.layers) == self.model.layers + 1
        return 2 if not whole or self._kept or self.wishes.overrides else 1 if placed.ram.experts else 0

    def _placed(self, trial: _Trial) -> _Placed:
        room = self._rooms(trial)
        layers = self._place_layers(room)
        overrides = (*self.wishes.overrides, *self._kept, *self._place_experts(layers, room))
        shares = self._shares(layers, overrides, trial)
        empty = frozenset(share.place for share in shares[:-1] if not share.used)
        if trial.copies and not empty <= trial.unused and len(empty) < len(room):
            return self._placed(replace(trial, unused=empty | trial.unused))  # another one takes over from RAM
        if trial != (smaller := self._giving_back(trial, shares)):
            return self._placed(smaller)
        return _Placed(trial, layers, overrides, shares)

    @cached_property
    def _kept(self) -> tuple[Override, ...]:
        """What a device does not take stays in RAM; of experts each device is asked."""
        names = "|".join(map(re.escape, kept_in_ram(self.model, self.machine.devices)))
        return ((f"^({names})$", RAM),) if names else ()

    @cached_property
    def _fixed(self) -> dict[str, str]:
        """The place of each tensor that is not for the plan to decide."""
        return fixed_places(self.model, (*self.wishes.overrides, *self._kept))

    # -- room ----------------------------------------------------------------------------------------------------------

    @cached_property
    def context(self) -> int:
        """Tokens of each sequence."""
        return usual_context(self.model, self.wishes)

    @property
    def _cells(self) -> int:
        return cells_of(self.context, self.wishes)

    def _rooms(self, trial: _Trial) -> list[int]:
        """Bytes of each device for what the plan decides on."""
        whole = rooms(self._setting(trial), copies=trial.copies, unused=trial.unused, reserved=trial.reserved)
        taken = bytes_by_place(self.model, self._fixed)
        return [max(room - taken[device.name], 0) for room, device in zip(whole, self.machine.devices, strict=True)]

    def _giving_back(self, trial: _Trial, shares: Sequence[Share]) -> _Trial:
        """The same, or where devices took what RAM needs of a memory that they share, with that reserved. Of experts
        RAM needs few, of layers as much as a device: where no experts are left, the devices get nothing.
        """
        sharing = frozenset(device.name for device in self.machine.devices if is_shared(self.machine, device))
        taking, ram = [share for share in shares[:-1] if share.used and share.place in sharing], shares[-1]
        floor = ram.used - ram.experts + min(ram.experts, self.model.least_experts)
        if not taking or floor <= ram.capacity:
            return trial
        if floor > trial.reserved and any(share.experts for share in taking):
            return replace(trial, reserved=floor)
        return replace(trial, unused=trial.unused | sharing)

    # -- streaming -----------------------------------------------------------------------------------------------------

    def _is_streamed(self, placed: _Placed) -> bool:
        wished, disk = self.wishes.stream, self._disk(placed.ram)
        return placed.ram.experts > 0 and wished != "off" and (disk > 0 or wished == "on")

    def _widened(self, usual: _Placed, most: int) -> _Placed:
        """Placed for streaming, for as many tokens at once as pay off, `most` at most. Raises PlacementError.

        A wider batch of a prompt reads all experts fewer times, but its compute buffers take room from them, and on a
        device from layers, most of which stay there.
        """
        trial, disk = replace(usual.trial, streamed=True, unused=self.idle, reserved=0), self._disk(usual.ram)
        wider = [width for width in _BATCHES if trial.batch < width <= most and disk and not self.wishes.batch]
        best, fewest = None, math.inf
        for width in (trial.batch, *wider):
            with suppress(PlacementError):
                placed = self._best(replace(trial, batch=width))
                check_devices(placed.shares)
                nbytes = self._bytes_streamed(placed)
                if sum(placed.layers) >= _KEPT_LAYERS * sum(usual.layers) and nbytes < fewest:
                    best, fewest = placed, nbytes
        best = best or self._best(trial)
        check_devices(best.shares)
        self._require_floor(best.ram)
        return best

    def _bytes_streamed(self, placed: _Placed) -> float:
        """Bytes read for a prompt that fills the context, and for an answer, for which there is more room."""
        model, disk, ram = self.model, self._disk(placed.ram), placed.ram
        answer = _ANSWER * model.experts_used / max(model.experts, 1)
        setting = self._setting(replace(placed.trial, batch=1))
        alone = compute_bytes(model, context=setting.attended, batch=setting.tokens, attention=ram.kv > 0)
        lent = 0 if are_pinned(self.machine.devices, placed.shares) else ram.compute - alone
        return -(-self.context // placed.trial.batch) * disk + answer * max(disk - lent, 0)

    def _require_floor(self, ram: Share) -> None:
        """One token's experts of one layer have to be in RAM together. Raises PlacementError."""
        if ram.experts - self._disk(ram) < self.model.least_experts:
            raise PlacementError(self._too_small(ram))

    # -- layers --------------------------------------------------------------------------------------------------------

    @cached_property
    def _costs(self) -> list[int]:
        """Bytes on a device for each layer without its experts, KV cache included, and for the output."""
        *layers, output = free_bytes(self.model, self._fixed, Role.DENSE, Role.OUTPUT)
        return [size + self._kv(layer) for layer, size in enumerate(layers)] + [output]

    def _kv(self, layer: int) -> int:
        return self.model.kv_bytes(layer, context=self._cells, kv_type=self.wishes.kv_type)

    def _place_layers(self, rooms: Sequence[int]) -> list[int]:
        """How many layers each device gets: as many as wished for, or as many as fit; in proportion to its room."""
        costs, wished = self._costs, self.wishes.gpu_layers
        most = len(costs) if self.machine.devices else 0
        if wished is not None:
            most = min(wished, most)
        for count in range(most, 0, -1):
            split = balanced(costs[len(costs) - count :], rooms)
            if split:
                self._require_layers(count, most, rooms)
                return split
        self._require_layers(0, most, rooms)
        return [0] * len(self.machine.devices)

    def _require_layers(self, count: int, most: int, rooms: Sequence[int]) -> None:
        wished = self.wishes.gpu_layers
        if wished is not None and count < most:
            need = sum(self._costs[-most:])
            shown = "all" if wished >= ALL_LAYERS else wished
            raise PlacementError(
                f"--gpu-layers {shown}: the layers need {format_bytes(need)} and the devices have room for "
                f"{format_bytes(sum(rooms))}: {count} fit, say --gpu-layers {count} or leave it out"
            )

    # -- experts -------------------------------------------------------------------------------------------------------

    def _place_experts(self, layers: Sequence[int], rooms: Sequence[int]) -> list[Override]:
        """Exceptions for the layers whose experts are not where the layer is."""
        units, taken = units_of(self.model, self.machine.devices, layers), Counter[str]()
        for unit, cost in zip(units, self._costs, strict=True):
            taken[unit] += cost
        left = {d.name: room - taken[d.name] for d, room in zip(self.machine.devices, rooms, strict=True)}
        places = self._expert_places(units, left)
        groups: dict[str, list[int]] = {}
        for layer, place in enumerate(places):
            if place != units[layer] and self.model.layer_bytes(layer, Role.EXPERTS):
                groups.setdefault(place, []).append(layer)
        return [(rf"blk\.({'|'.join(map(str, group))})\.{EXPERTS}", place) for place, group in groups.items()]

    def _expert_places(self, units: list[str], rooms: dict[str, int]) -> list[str]:
        """From the last layer back: beside the layer itself, else where most room is, else in RAM."""
        places, limit, placed = [RAM] * self.model.layers, self._expert_limit(), 0
        rooms = dict(rooms)
        for layer in reversed(range(self.model.layers)):
            need = self._expert_costs[layer]
            taking = {name: room for name, room in rooms.items() if self._takes_experts(name, layer)}
            own, widest = units[layer], max(taking, key=lambda name: taking[name], default=RAM)
            place = own if taking.get(own, -1) >= need else widest
            if need and placed < limit and taking.get(place, -1) >= need:
                places[layer] = place
                rooms[place] -= need
                placed += 1
        self._require_experts(placed, limit)
        return places

    def _takes_experts(self, name: str, layer: int) -> bool:
        device = next(device for device in self.machine.devices if device.name == name)
        experts = [w for w in self.model.weights if w.layer == layer and w.role is Role.EXPERTS]
        return all(takes(device, weight) for weight in experts)

    @cached_property
    def _expert_costs(self) -> list[int]:
        """Bytes of each layer's experts that nothing has placed."""
        return free_bytes(self.model, self._fixed, Role.EXPERTS)[:-1]

    def _expert_limit(self) -> int:
        wished = self.wishes.experts_on
        return 0 if wished == "cpu" else wished if isinstance(wished, int) else self.model.layers

    def _require_experts(self, placed: int, limit: int) -> None:
        wished = self.wishes.experts_on
        having = sum(cost > 0 for cost in self._expert_costs)
        if wished in (None, "cpu") or placed >= min(limit, having):
            return
        refused = largest_refused(self.model, self.machine.devices, Role.EXPERTS)
        if refused and not placed:
            why = why_refused(self.machine.devices, refused)
            raise PlacementError(f"--experts-on {wished}: {why}: leave it out")
        raise PlacementError(
            f"--experts-on {wished}: the devices have room for the experts of {placed} layers, each of "
            f"{format_bytes(self.model.layer_bytes(0, Role.EXPERTS))}: say --experts-on {placed}, or leave it out"
        )

    # -- what it takes -------------------------------------------------------------------------------------------------

    def _shares(self, layers: Sequence[int], overrides: Sequence[Override], trial: _Trial) -> list[Share]:
        return shares_of(self._setting(trial), Places(self.model, self.machine.devices, layers, overrides))

    def _setting(self, trial: _Trial) -> Setting:
        budget = ram_budget(self.machine, self.wishes)
        return Setting(self.model, self.machine, self.wishes, self.context, budget, trial.batch, trial.streamed)

    def _disk(self, ram: Share) -> int:
        """Bytes of experts beyond RAM. Raises PlacementError where not even the rest fits."""
        over = ram.used - ram.capacity
        if over > ram.experts:
            raise PlacementError(self._too_small(ram))
        return max(over, 0)

    def _too_small(self, ram: Share) -> str:
        need = ram.used - ram.experts
        least = (
            f" and {format_bytes(self.model.least_experts)} for those of a token in one layer" if ram.experts else ""
        )
        text = (
            f"{self.model.name} needs {format_bytes(need)} of RAM beside its experts{least}, with {self.context} "
            f"tokens of context; {format_bytes(max(ram.capacity, 0))} can be used"
        )
        smaller = self.context // 2
        while self.advise and smaller >= _SPARSE_CONTEXT:
            with suppress(PlacementError):
                replace(self, wishes=replace(self.wishes, context=smaller), advise=False).plan()
                return f"{text}: --context {smaller} would fit"
            smaller //= 2
        return f"{text}, and no smaller context fits either"

    def _repacked(self, placed: _Placed, *, disk: int) -> frozenset[str]:
        """What RAM holds rearranged, if everything fits."""
        check_repacking(self.wishes, streamed=placed.trial.streamed, disk=disk)
        if disk or placed.trial.streamed:
            return frozenset()
        places = Places(self.model, self.machine.devices, placed.layers, placed.overrides)
        in_ram = [weight for weight in self.model.weights if places.of(weight) == RAM]
        return repackable(self.model, self.wishes, self.machine.speeds, in_ram=in_ram)
