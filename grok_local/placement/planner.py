"""Makes a plan: a pure function of a model, a machine and wishes.

Every token reads the dense tensors and the KV cache, so devices get those first; whole layers of experts follow while
there is room; the rest stays in RAM, and what does not fit there is read from the disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from grok_local.errors import PlacementError
from grok_local.machine.facts import Device, Machine, Speeds
from grok_local.placement.balance import balanced
from grok_local.placement.plan import Override, Places, Plan, Share, are_pinned, units_of
from grok_local.placement.shape import EXPERTS, ModelShape, Role, Weight
from grok_local.placement.wishes import RAM, USUAL_BATCH, Wishes, cells_of, check_wishes, usual_batch, usual_context
from grok_local.units import format_bytes

__all__ = ["make_plan", "needs_speeds", "ram_reserve"]

_MARGIN = 512_000_000  # bytes of a device that stay free: its context, fragmentation
_BATCHES = (1024, 2048, 4096)
_ANSWER = 64  # tokens
_SPARSE_CONTEXT = 256  # tokens: the smallest context anybody is advised
_WORTH_REPACKING = 1_000_000_000  # bytes: smaller models are fast anyway, and should start at once


def ram_reserve(memory: int) -> int:
    """Bytes of RAM that are left to the system and to this process itself."""
    return int(min(max(0.05 * memory, 2e9), 8e9, 0.25 * memory))


def needs_speeds(model: ModelShape, wishes: Wishes) -> bool:
    """Whether the plan depends on how fast the machine's kernels are: only what may be rearranged in RAM does."""
    return wishes.repack == "on" or (wishes.repack == "auto" and model.nbytes >= _WORTH_REPACKING)


def make_plan(model: ModelShape, machine: Machine, wishes: Wishes | None = None) -> Plan:
    """Raises PlacementError, with the nearest plan that would work, and OptionError for wishes that make no sense."""
    wishes = wishes or Wishes()
    if wishes.sequences > 1 and wishes.separate is None:
        with suppress(PlacementError):
            plan = _Planner(model, machine, wishes, separate=True).plan()
            if wishes.reproducible or not plan.streamed:  # else all should share each reading of the weights
                return plan
    return _Planner(model, machine, wishes, separate=wishes.separate or wishes.reproducible).plan()


@dataclass(frozen=True)
class _Trial:
    """What placing is tried with: `copies` of experts from RAM get room on the devices, where prompts need them."""

    batch: int  # tokens evaluated at once
    streamed: bool = False
    copies: bool = True


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
    """The question; every method is a function of it and of its arguments.

    Where sequences have `separate` parts of the KV cache, a token is compared with its own part alone; in one cache for
    all it is compared with all of it, but prompts and answers can be evaluated together.
    """

    model: ModelShape
    machine: Machine
    wishes: Wishes
    separate: bool = False
    advise: bool = True  # whether an error looks for a context that would fit

    def plan(self) -> Plan:
        check_wishes(self.wishes, [device.name for device in self.machine.devices])
        placed = self._best(_Trial(usual_batch(self.context, self.wishes, separate=self.separate)))
        self._check_devices(placed.shares)
        if self._is_streamed(placed):
            placed = self._widened(placed)
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
            separate=self.separate,
            notes=tuple(self._notes(placed, disk=disk)),
        )

    def _best(self, trial: _Trial) -> _Placed:
        """Copies of experts need no room on the devices where none stay in RAM, or those there are streamed."""
        with suppress(PlacementError):
            placed = self._placed(replace(trial, copies=False))
            if trial.streamed or not (self.machine.devices and placed.ram.experts):
                return placed
        return self._placed(replace(trial, copies=True))

    def _placed(self, trial: _Trial) -> _Placed:
        rooms = [self._room(device, trial) for device in self.machine.devices]
        layers = self._place_layers(rooms)
        overrides = (*self.wishes.overrides, *self._place_experts(layers, rooms, trial))
        return _Placed(trial, layers, overrides, self._shares(layers, overrides, trial))

    # -- room ----------------------------------------------------------------------------------------------------------

    @cached_property
    def context(self) -> int:
        """Tokens of each sequence."""
        return usual_context(self.model, self.wishes)

    @property
    def _cells(self) -> int:
        return cells_of(self.context, self.wishes, separate=self.separate)

    @cached_property
    def budget(self) -> int:
        """Bytes of RAM that may be used. Raises PlacementError."""
        wished, machine = self.wishes.memory, self.machine
        if wished is None:
            return machine.available - ram_reserve(machine.memory)
        if wished > machine.memory:
            raise PlacementError(f"--memory {format_bytes(wished)}: there are {format_bytes(machine.memory)} of RAM")
        return wished

    def _room(self, device: Device, trial: _Trial) -> int:
        """Bytes of a device for weights and KV cache."""
        compute = self._compute(trial, attention=True, experts=True, output=True)
        # Where experts stay in RAM, llama.cpp copies them to a GPU to work on long prompts, a tensor at a time.
        copying = trial.copies and device.kind == "gpu" and not self.machine.unified
        staging = 2 * self.model.largest_expert_tensor if copying else 0
        free = min(device.free, self.budget) if self.machine.unified else device.free
        room = max(free - _MARGIN - compute - staging, 0)
        return room if device.most is None else min(room, max(device.most, 0))

    def _compute(self, trial: _Trial, *, attention: bool, experts: bool, output: bool) -> int:
        return self.model.compute_bytes(
            context=self.context if self.separate else self._cells,
            batch=min(trial.batch, self._cells),
            attention=attention,
            experts=experts,
            output=output,
        )

    # -- streaming -----------------------------------------------------------------------------------------------------

    def _is_streamed(self, placed: _Placed) -> bool:
        wished, disk = self.wishes.stream, self._disk(placed.ram)
        return placed.ram.experts > 0 and wished != "off" and (disk > 0 or wished == "on")

    def _widened(self, usual: _Placed) -> _Placed:
        """Placed for streaming, for as many tokens at once as pay off. Raises PlacementError.

        A wider batch of a prompt reads all experts fewer times, but its compute buffers take room from them. It must
        cost no layer on a device.
        """
        trial, disk = replace(usual.trial, streamed=True), self._disk(usual.ram)
        wider = [width for width in _BATCHES if trial.batch < width <= self._cells and disk and not self.wishes.batch]
        best, fewest = None, math.inf
        for width in (trial.batch, *wider):
            with suppress(PlacementError):
                placed = self._best(replace(trial, batch=width))
                nbytes = self._bytes_streamed(placed)
                if sum(placed.layers) >= sum(usual.layers) and nbytes < fewest:
                    best, fewest = placed, nbytes
        best = best or self._best(trial)
        self._require_floor(best.ram)
        return best

    def _bytes_streamed(self, placed: _Placed) -> float:
        """Bytes read for a prompt that fills the context, and for an answer, for which there is more room."""
        model, disk, ram = self.model, self._disk(placed.ram), placed.ram
        answer = _ANSWER * model.experts_used / max(model.experts, 1)
        alone = self._compute(replace(placed.trial, batch=1), attention=ram.kv > 0, experts=True, output=True)
        lent = 0 if are_pinned(self.machine.devices, placed.shares) else ram.compute - alone
        return -(-self.context // placed.trial.batch) * disk + answer * max(disk - lent, 0)

    def _require_floor(self, ram: Share) -> None:
        """One token's experts of one layer have to be in RAM together. Raises PlacementError."""
        if ram.experts - self._disk(ram) < self._floor():
            raise PlacementError(self._too_small(ram))

    def _floor(self) -> int:
        """Bytes of the experts that one token needs of a layer."""
        return self.model.experts_used * self._largest_expert()

    def _largest_expert(self) -> int:
        """Bytes of one expert, in the layer where they are largest."""
        layers = [self.model.layer_bytes(layer, Role.EXPERTS) for layer in range(self.model.layers)]
        return max(layers, default=0) // max(self.model.experts, 1)

    # -- layers --------------------------------------------------------------------------------------------------------

    @cached_property
    def _costs(self) -> list[int]:
        """Bytes on a device for each layer without its experts, KV cache included, and for the output."""
        model = self.model
        dense = [model.layer_bytes(layer, Role.DENSE) + self._kv(layer) for layer in range(model.layers)]
        return [*dense, model.output_bytes]

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
            raise PlacementError(
                f"--gpu-layers {wished}: the layers need {format_bytes(need)} and the devices have room for "
                f"{format_bytes(sum(rooms))}: {count} fit, say --gpu-layers {count} or leave it out"
            )

    # -- experts -------------------------------------------------------------------------------------------------------

    def _place_experts(self, layers: Sequence[int], rooms: Sequence[int], trial: _Trial) -> list[Override]:
        """Exceptions for the layers whose experts are not where the layer is."""
        units = units_of(self.model, self.machine.devices, layers)
        places = self._expert_places(units, self._rooms_left(layers, rooms, trial))
        groups: dict[str, list[int]] = {}
        for layer, place in enumerate(places):
            if place != units[layer] and self.model.layer_bytes(layer, Role.EXPERTS):
                groups.setdefault(place, []).append(layer)
        return [(rf"blk\.({'|'.join(map(str, group))})\.{EXPERTS}", place) for place, group in groups.items()]

    def _rooms_left(self, layers: Sequence[int], rooms: Sequence[int], trial: _Trial) -> dict[str, int]:
        """After the layers, and after what the user's overrides put on devices or take from them."""
        shares = {share.place: share for share in self._shares(layers, self.wishes.overrides, trial, experts=False)}
        named = zip((device.name for device in self.machine.devices), rooms, strict=True)
        return {name: room - shares[name].weights - shares[name].kv for name, room in named}

    def _expert_places(self, units: list[str], rooms: dict[str, int]) -> list[str]:
        """From the last layer back: beside the layer itself, else where most room is, else in RAM."""
        places, limit, placed = [RAM] * self.model.layers, self._expert_limit(), 0
        rooms = dict(rooms)
        for layer in reversed(range(self.model.layers)):
            need = self._free_expert_bytes(layer)
            own, widest = units[layer], max(rooms, key=lambda name: rooms[name], default=RAM)
            place = own if rooms.get(own, -1) >= need else widest
            if need and placed < limit and rooms.get(place, -1) >= need:
                places[layer] = place
                rooms[place] -= need
                placed += 1
        self._require_experts(placed, limit)
        return places

    def _free_expert_bytes(self, layer: int) -> int:
        """Bytes of a layer's experts that no override of the user's has placed."""
        patterns = [re.compile(pattern) for pattern, _ in self.wishes.overrides]
        experts = (w for w in self.model.weights if w.layer == layer and w.role is Role.EXPERTS)
        return sum(w.nbytes for w in experts if not any(p.search(w.name) for p in patterns))

    def _expert_limit(self) -> int:
        wished = self.wishes.experts_on
        return 0 if wished == "cpu" else wished if isinstance(wished, int) else self.model.layers

    def _require_experts(self, placed: int, limit: int) -> None:
        wished = self.wishes.experts_on
        having = sum(self._free_expert_bytes(layer) > 0 for layer in range(self.model.layers))
        if wished in (None, "cpu") or placed >= min(limit, having):
            return
        raise PlacementError(
            f"--experts-on {wished}: the devices have room for the experts of {placed} layers, each of "
            f"{format_bytes(self.model.layer_bytes(0, Role.EXPERTS))}: say --experts-on {placed}, or leave it out"
        )

    # -- what it takes -------------------------------------------------------------------------------------------------

    def _shares(
        self, layers: Sequence[int], overrides: Sequence[Override], trial: _Trial, *, experts: bool = True
    ) -> list[Share]:
        places = Places(self.model, self.machine.devices, layers, overrides)
        capacities = {device.name: device.free - _MARGIN for device in self.machine.devices} | {RAM: self.budget}
        sizes = {name: dict.fromkeys(Role, 0) for name in capacities}
        for weight in self.model.weights:
            if not (weight.tied and places.of(weight) == RAM) and (experts or weight.role is not Role.EXPERTS):
                sizes[places.of(weight)][weight.role] += weight.nbytes
        kv = dict.fromkeys(capacities, 0)
        for layer in range(self.model.layers):
            kv[places.of_layer(layer)] += self._kv(layer)
        shares = [self._share(name, size, sizes[name], kv[name], trial) for name, size in capacities.items()]
        taken = sum(share.used for share in shares[:-1]) if self.machine.unified else 0
        return [*shares[:-1], replace(shares[-1], capacity=shares[-1].capacity - taken)]

    def _share(self, name: str, capacity: int, sizes: dict[Role, int], kv: int, trial: _Trial) -> Share:
        dense = sizes[Role.DENSE] + sizes[Role.OUTPUT] + sizes[Role.INPUT]
        busy = name == RAM or dense + sizes[Role.EXPERTS] + kv > 0
        output = sizes[Role.OUTPUT] > 0 or name == RAM
        compute = self._compute(trial, attention=kv > 0, experts=sizes[Role.EXPERTS] > 0, output=output)
        return Share(name, capacity, dense, sizes[Role.EXPERTS], kv, compute if busy else 0)

    def _check_devices(self, shares: Sequence[Share]) -> None:
        over = [share for share in shares[:-1] if share.used > max(share.capacity, 0)]
        if over:
            raise PlacementError(
                f"{share.place} would hold {format_bytes(share.used)} and has room for "
                f"{format_bytes(max(share.capacity, 0))}: leave an --override out, or name another device"
                for share in over
            )

    def _disk(self, ram: Share) -> int:
        """Bytes of experts beyond RAM. Raises PlacementError where not even the rest fits."""
        over = ram.used - ram.capacity
        if over > ram.experts:
            raise PlacementError(self._too_small(ram))
        return max(over, 0)

    def _too_small(self, ram: Share) -> str:
        need = ram.used - ram.experts
        least = f" and {format_bytes(self._floor())} for those of a token in one layer" if ram.experts else ""
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

    # -- repacking -----------------------------------------------------------------------------------------------------

    def _repacked(self, placed: _Placed, *, disk: int) -> frozenset[str]:
        """What RAM holds rearranged: copies of what llama.cpp has a faster layout for, if everything fits."""
        if self.wishes.repack == "on" and placed.trial.streamed and not disk:
            raise PlacementError("--repack on: streamed experts stay as they are in the file: leave out one of the two")
        if self.wishes.repack == "on" and disk:
            raise PlacementError(
                f"--repack on: rearranged weights are copies in RAM, and {format_bytes(disk)} of the experts do not "
                "fit there: leave it out"
            )
        if disk or placed.trial.streamed:
            return frozenset()
        places = Places(self.model, self.machine.devices, placed.layers, placed.overrides)
        return frozenset(w.name for w in self.model.weights if places.of(w) == RAM and self._may_repack(w))

    @cached_property
    def _speeds(self) -> Speeds:
        """The kernels' as far as the plan may depend on them: what is measured besides must not change it."""
        return self.machine.speeds if needs_speeds(self.model, self.wishes) else Speeds()

    def _may_repack(self, weight: Weight) -> bool:
        if weight.role is Role.INPUT or weight.tied or weight.rows <= 1:
            return False
        gains = self._speeds.gains(weight.type, experts=weight.role is Role.EXPERTS)
        return self._speeds.can_repack(weight.type, weight.rows) and (gains or self.wishes.repack == "on")

    # -- what to say about it ------------------------------------------------------------------------------------------

    def _notes(self, placed: _Placed, *, disk: int) -> Iterator[str]:
        wishes, batch = self.wishes, placed.trial.batch
        trained = wishes.trained_context or self.model.trained_context
        if 0 < trained < self.context:
            yield (
                f"the model was trained on {trained} tokens of context, and this one has {self.context}: beyond, its "
                "answers may be nonsense"
            )
        if disk and placed.trial.streamed:
            at_once = f", for prompts {batch} tokens at a time" if batch > USUAL_BATCH else ""
            yield f"{format_bytes(disk)} of the experts do not fit in RAM: they are streamed, read as chosen{at_once}"
            over = self.model.experts * self._largest_expert() - (placed.ram.experts - disk)
            if over > 0:
                yield f"a prompt needs all experts of a layer at once, {format_bytes(over)} more than it may take"
        elif disk:
            yield f"{format_bytes(disk)} of the experts do not fit in RAM and are mapped: the system reads them"
        if self.machine.devices and wishes.gpu_layers is None and not sum(placed.layers):
            yield "no device has room for even one layer beside its compute buffer"
        for pattern, place in wishes.overrides:
            if not any(re.search(pattern, weight.name) for weight in self.model.weights):
                yield f"--override {pattern}={place} matches no tensor"
        if wishes.repack == "on" and not self._speeds.repacked:
            yield "this build of llama.cpp has no faster layout for these types that works here"
