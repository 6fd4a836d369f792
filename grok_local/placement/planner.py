"""The plan: which weights go to which device, what that takes there, and how fast it will be.

Every token reads the dense tensors and the KV cache, so devices get those first; whole layers of experts follow while
there is room; the rest stays in RAM, and what does not fit there is read from the disk. llama.cpp assigns layers in
one run per device, the output after the last layer, which is why a plan is a number of layers for each device and a
list of exceptions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from grok_local.errors import PlacementError
from grok_local.machine.limits import Device, Machine
from grok_local.placement.shape import EXPERTS, ModelShape, Role, Weight
from grok_local.placement.wishes import RAM, Wishes, check_wishes
from grok_local.units import format_bytes

__all__ = ["RAM", "Plan", "Share", "Wishes", "make_plan", "ram_reserve"]

_MARGIN = 512_000_000  # bytes of a device that stay free: its context, fragmentation
_BATCH = 512  # llama.cpp's own
_BATCHES = (1024, 2048, 4096)
_ANSWER = 64  # tokens
_STEPS = 512  # of the share of each device that is tried
_SPARSE_CONTEXT = 256  # tokens: the smallest context anybody is advised


@dataclass(frozen=True)
class Share:
    """What a place holds, in bytes, of `capacity` that may be used."""

    place: str
    capacity: int
    dense: int = 0
    experts: int = 0
    kv: int = 0
    compute: int = 0

    @property
    def weights(self) -> int:
        return self.dense + self.experts

    @property
    def used(self) -> int:
        return self.weights + self.kv + self.compute


@dataclass(frozen=True)
class Plan:
    """The decision and its consequences. `layers` counts those on each device, the output being one more at the end."""

    model: ModelShape
    machine: Machine
    wishes: Wishes
    context: int
    layers: tuple[int, ...]  # by device
    overrides: tuple[tuple[str, str], ...]  # (regular expression, place): the first that matches holds
    repacked: frozenset[str]  # names of the tensors that RAM holds rearranged
    shares: tuple[Share, ...]  # the devices', then RAM's
    disk: int  # bytes of experts that RAM has no room for
    batch: int  # tokens evaluated at once
    streamed: bool  # experts are read by us as they are chosen, RAM's share of them being what is held
    notes: tuple[str, ...] = ()

    @property
    def gpu_layers(self) -> int:
        """llama.cpp's n_gpu_layers: the output and so many of the last layers."""
        return sum(self.layers)

    @property
    def ram(self) -> Share:
        """RAM's share."""
        return self.shares[-1]

    def place_of(self, weight: Weight) -> str:
        """The device that holds a tensor, or RAM."""
        return self._places.of(weight)

    @cached_property
    def _places(self) -> _Places:
        return _Places(self.model, self.machine.devices, self.layers, self.overrides)

    @cached_property
    def expert_layers(self) -> dict[str, int]:
        """How many layers' experts each place holds, whole layers only."""
        counts = dict.fromkeys((*(device.name for device in self.machine.devices), RAM), 0)
        for layer in range(self.model.layers):
            found = {self.place_of(w) for w in self.model.weights if w.layer == layer and w.role is Role.EXPERTS}
            if len(found) == 1:
                counts[found.pop()] += 1
        return counts


def ram_reserve(memory: int) -> int:
    """Bytes of RAM that are left to the system and to this process itself."""
    return int(min(max(0.05 * memory, 2e9), 8e9, 0.25 * memory))


def make_plan(model: ModelShape, machine: Machine, wishes: Wishes | None = None) -> Plan:
    """Raises PlacementError, with the nearest plan that would work, and OptionError for wishes that make no sense."""
    return _Planner(model, machine, wishes or Wishes()).plan()


class _Places:
    """Where each tensor goes, given the layers on each device and the exceptions."""

    def __init__(
        self,
        model: ModelShape,
        devices: Sequence[Device],
        layers: Sequence[int],
        overrides: Sequence[tuple[str, str]],
    ) -> None:
        self._units = units_of(model, devices, layers)
        self._overrides = [(re.compile(pattern), place) for pattern, place in overrides]

    def of(self, weight: Weight) -> str:
        """The place of a tensor."""
        for pattern, place in self._overrides:
            if pattern.search(weight.name):
                return place
        if weight.role is Role.INPUT:
            return RAM
        return self._units[-1 if weight.layer is None else weight.layer]

    def of_layer(self, layer: int) -> str:
        """The place of a layer's attention and KV cache."""
        return self._units[layer]


def units_of(model: ModelShape, devices: Sequence[Device], layers: Sequence[int]) -> list[str]:
    """The place of each layer and, last, of the output: RAM first, then the devices in order."""
    names = [device.name for device, count in zip(devices, layers, strict=True) for _ in range(count)]
    return [RAM] * (model.layers + 1 - len(names)) + names


class _Planner:
    def __init__(self, model: ModelShape, machine: Machine, wishes: Wishes, *, advise: bool = True) -> None:
        self._model, self._machine, self._wishes, self._advise = model, machine, wishes, advise
        self._context = wishes.context or max(min(8192, model.trained_context or 8192), 1)
        self._devices = machine.devices
        self._batch = self._wishes.batch or _BATCH
        self._streamed = False
        check_wishes(self._wishes, [device.name for device in self._devices])
        self._budget = self._ram_budget()
        self._rooms = [0] * len(self._devices)

    def plan(self) -> Plan:
        layers, overrides, shares = self._best()
        self._check_devices(shares)
        disk = self._disk(shares[-1])
        self._streamed = self._is_streamed(disk, shares[-1])
        if self._streamed:
            layers, overrides, shares = self._widened(sum(layers), disk)
            disk = self._disk(shares[-1])
        repacked = self._repacked(layers, overrides, disk=disk)
        return Plan(
            self._model,
            self._machine,
            self._wishes,
            self._context,
            tuple(layers),
            overrides,
            repacked,
            (*shares[:-1], replace(shares[-1], experts=shares[-1].experts - disk)),
            disk,
            self._batch,
            self._streamed,
            tuple(self._notes(disk, layers, held=shares[-1].experts - disk)),
        )

    def _best(self) -> tuple[list[int], tuple[tuple[str, str], ...], list[Share]]:
        """Copies of experts need no room on the devices where none stay in RAM, or those there are streamed."""
        with suppress(PlacementError):
            found = self._placed(copies=False)
            if self._streamed or not (self._devices and found[2][-1].experts):
                return found
        return self._placed(copies=True)

    def _placed(self, *, copies: bool) -> tuple[list[int], tuple[tuple[str, str], ...], list[Share]]:
        """Layers by device, exceptions, shares; with room for copies of experts from RAM, or without."""
        self._rooms = [self._room(device, copies=copies) for device in self._devices]
        layers = self._place_layers()
        overrides = (*self._wishes.overrides, *self._place_experts(layers))
        return layers, overrides, self._shares(layers, overrides)

    # -- room ----------------------------------------------------------------------------------------------------------

    def _room(self, device: Device, *, copies: bool) -> int:
        """Bytes for weights and KV cache."""
        compute = self._compute(attention=True, experts=True, output=True)
        # Where experts stay in RAM, llama.cpp copies them to a GPU to work on long prompts, a tensor at a time.
        copying = copies and device.kind == "gpu" and not self._machine.unified
        staging = 2 * self._model.largest_expert_tensor if copying else 0
        free = min(device.free, self._budget) if self._machine.unified else device.free
        room = max(free - _MARGIN - compute - staging, 0)
        return room if device.most is None else min(room, max(device.most, 0))

    def _compute(self, *, attention: bool, experts: bool, output: bool) -> int:
        batch = min(self._batch, self._context)
        return self._model.compute_bytes(
            context=self._context, batch=batch, attention=attention, experts=experts, output=output
        )

    def _ram_budget(self) -> int:
        machine = self._machine
        if self._wishes.memory is not None:
            if self._wishes.memory > machine.memory:
                raise PlacementError(
                    f"--memory {format_bytes(self._wishes.memory)}: there are {format_bytes(machine.memory)} of RAM"
                )
            return self._wishes.memory
        return machine.available - ram_reserve(machine.memory)

    # -- streaming -----------------------------------------------------------------------------------------------------

    def _is_streamed(self, disk: int, ram: Share) -> bool:
        wished = self._wishes.stream
        return ram.experts > 0 and wished != "off" and (disk > 0 or wished == "on")

    def _widened(self, device_layers: int, disk: int) -> tuple[list[int], tuple[tuple[str, str], ...], list[Share]]:
        """Placed for as many tokens at once as pay off: each such batch of a prompt reads all experts once, but its
        compute buffers take room from them. It must cost no layer on a device. Raises PlacementError.
        """
        usual = best = self._batch
        wider = [width for width in _BATCHES if usual < width <= self._context and disk and not self._wishes.batch]
        found, fewest = None, math.inf
        for self._batch in (usual, *wider):
            with suppress(PlacementError):
                placed = self._best()
                nbytes = self._bytes_streamed(self._disk(placed[2][-1]))
                if sum(placed[0]) >= device_layers and nbytes < fewest:
                    best, found, fewest = self._batch, placed, nbytes
        self._batch = best
        placed = found or self._best()
        self._require_floor(placed[2][-1])
        return placed

    def _bytes_streamed(self, disk: int) -> float:
        """Bytes read for a prompt that fills the context, and for an answer."""
        model = self._model
        sweeps = -(-self._context // self._batch) + _ANSWER * model.experts_used / max(model.experts, 1)
        return sweeps * disk

    def _require_floor(self, ram: Share) -> None:
        """One token's experts of one layer have to be in RAM together. Raises PlacementError."""
        if ram.experts - self._disk(ram) < self._floor():
            raise PlacementError(self._too_small(ram))

    def _floor(self) -> int:
        """Bytes of the experts that one token needs of a layer."""
        return self._model.experts_used * self._largest_expert()

    def _largest_expert(self) -> int:
        """Bytes of one expert, in the layer where they are largest."""
        layers = [self._model.layer_bytes(layer, Role.EXPERTS) for layer in range(self._model.layers)]
        return max(layers, default=0) // max(self._model.experts, 1)

    # -- layers --------------------------------------------------------------------------------------------------------

    def _costs(self) -> list[int]:
        """Bytes on a device for each layer without its experts, KV cache included, and for the output."""
        model = self._model
        kv = [self._kv(layer) for layer in range(model.layers)]
        dense = [model.layer_bytes(layer, Role.DENSE) + kv[layer] for layer in range(model.layers)]
        return [*dense, model.output_bytes]

    def _kv(self, layer: int) -> int:
        return self._model.kv_bytes(layer, context=self._context, kv_type=self._wishes.kv_type)

    def _place_layers(self) -> list[int]:
        """How many layers each device gets: as many as wished for, or as many as fit; in proportion to its room."""
        costs = self._costs()
        wished = self._wishes.gpu_layers
        most = len(costs) if self._devices else 0
        if wished is not None:
            most = min(wished, most)
        for count in range(most, 0, -1):
            found = _balanced(costs[len(costs) - count :], self._rooms)
            if found:
                self._require_layers(wished, count, most)
                return found
        self._require_layers(wished, 0, most)
        return [0] * len(self._devices)

    def _require_layers(self, wished: int | None, count: int, most: int) -> None:
        if wished is not None and count < most:
            need = sum(self._costs()[-most:])
            raise PlacementError(
                f"--gpu-layers {wished}: the layers need {format_bytes(need)} and the devices have room for "
                f"{format_bytes(sum(self._rooms))}: {count} fit, say --gpu-layers {count} or leave it out"
            )

    # -- experts -------------------------------------------------------------------------------------------------------

    def _place_experts(self, layers: Sequence[int]) -> list[tuple[str, str]]:
        """Exceptions for the layers whose experts are not where the layer is."""
        units = units_of(self._model, self._devices, layers)
        places = self._expert_places(units, self._rooms_left(layers))
        groups: dict[str, list[int]] = {}
        for layer, place in enumerate(places):
            if place != units[layer] and self._model.layer_bytes(layer, Role.EXPERTS):
                groups.setdefault(place, []).append(layer)
        return [(rf"blk\.({'|'.join(map(str, found))})\.{EXPERTS}", place) for place, found in groups.items()]

    def _rooms_left(self, layers: Sequence[int]) -> dict[str, int]:
        """After the layers, and after what the user's overrides put on devices or take from them."""
        share = {share.place: share for share in self._shares(layers, self._wishes.overrides, experts=False)}
        rooms = dict(zip((device.name for device in self._devices), self._rooms, strict=True))
        return {name: room - share[name].weights - share[name].kv for name, room in rooms.items()}

    def _expert_places(self, units: list[str], rooms: dict[str, int]) -> list[str]:
        """From the last layer back: beside the layer itself, else where most room is, else in RAM."""
        places = [RAM] * self._model.layers
        limit = self._expert_limit()
        placed = 0
        for layer in reversed(range(self._model.layers)):
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
        patterns = [re.compile(pattern) for pattern, _ in self._wishes.overrides]
        experts = (w for w in self._model.weights if w.layer == layer and w.role is Role.EXPERTS)
        return sum(w.nbytes for w in experts if not any(p.search(w.name) for p in patterns))

    def _expert_limit(self) -> int:
        wished = self._wishes.experts_on
        return 0 if wished == "cpu" else wished if isinstance(wished, int) else self._model.layers

    def _require_experts(self, placed: int, limit: int) -> None:
        wished = self._wishes.experts_on
        having = sum(self._free_expert_bytes(layer) > 0 for layer in range(self._model.layers))
        if wished in (None, "cpu") or placed >= min(limit, having):
            return
        raise PlacementError(
            f"--experts-on {wished}: the devices have room for the experts of {placed} layers, each of "
            f"{format_bytes(self._model.layer_bytes(0, Role.EXPERTS))}: say --experts-on {placed}, or leave it out"
        )

    # -- what it takes -------------------------------------------------------------------------------------------------

    def _shares(
        self, layers: Sequence[int], overrides: Sequence[tuple[str, str]], *, experts: bool = True
    ) -> list[Share]:
        places = _Places(self._model, self._devices, layers, overrides)
        named = {device.name: device.free - _MARGIN for device in self._devices} | {RAM: self._budget}
        found = {name: dict.fromkeys(Role, 0) for name in named}
        for weight in self._model.weights:
            if not (weight.tied and places.of(weight) == RAM) and (experts or weight.role is not Role.EXPERTS):
                found[places.of(weight)][weight.role] += weight.nbytes
        kv = dict.fromkeys(named, 0)
        for layer in range(self._model.layers):
            kv[places.of_layer(layer)] += self._kv(layer)
        shares = [self._share(name, capacity, found[name], kv[name]) for name, capacity in named.items()]
        taken = sum(share.used for share in shares[:-1]) if self._machine.unified else 0
        return [*shares[:-1], replace(shares[-1], capacity=shares[-1].capacity - taken)]

    def _share(self, name: str, capacity: int, sizes: dict[Role, int], kv: int) -> Share:
        dense = sizes[Role.DENSE] + sizes[Role.OUTPUT] + sizes[Role.INPUT]
        busy = name == RAM or dense + sizes[Role.EXPERTS] + kv > 0
        compute = self._compute(
            attention=kv > 0, experts=sizes[Role.EXPERTS] > 0, output=sizes[Role.OUTPUT] > 0 or name == RAM
        )
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
            f"{self._model.name} needs {format_bytes(need)} of RAM beside its experts{least}, with {self._context} "
            f"tokens of context; {format_bytes(max(ram.capacity, 0))} can be used"
        )
        smaller = self._context // 2
        while self._advise and smaller >= _SPARSE_CONTEXT:
            with suppress(PlacementError):
                _Planner(self._model, self._machine, replace(self._wishes, context=smaller), advise=False).plan()
                return f"{text}: --context {smaller} would fit"
            smaller //= 2
        return f"{text}, and no smaller context fits either"

    def _repacked(self, layers: Sequence[int], overrides: Sequence[tuple[str, str]], *, disk: int) -> frozenset[str]:
        """What RAM holds rearranged: copies of what llama.cpp has a faster layout for, if everything fits."""
        if self._wishes.repack == "off":
            return frozenset()
        if self._streamed and not disk and self._wishes.repack == "on":
            raise PlacementError("--repack on: streamed experts stay as they are in the file: leave out one of the two")
        places = _Places(self._model, self._devices, layers, overrides)
        able = frozenset(
            weight.name
            for weight in self._model.weights
            if places.of(weight) == RAM
            and weight.role is not Role.INPUT
            and not weight.tied
            and weight.rows > 1
            and self._may_repack(weight)
        )
        if disk and self._wishes.repack == "on":
            raise PlacementError(
                f"--repack on: rearranged weights are copies in RAM, and {format_bytes(disk)} of the experts do not "
                "fit there: leave it out"
            )
        return frozenset() if disk or self._streamed else able

    def _may_repack(self, weight: Weight) -> bool:
        speeds = self._machine.speeds
        gains = speeds.gains(weight.type, experts=weight.role is Role.EXPERTS)
        return speeds.can_repack(weight.type, weight.rows) and (gains or self._wishes.repack == "on")

    def _notes(self, disk: int, layers: Sequence[int], *, held: int) -> Iterator[str]:
        if disk and self._streamed:
            at_once = f", for prompts {self._batch} tokens at a time" if self._batch > _BATCH else ""
            yield f"{format_bytes(disk)} of the experts do not fit in RAM: they are streamed, read as chosen{at_once}"
            over = self._model.experts * self._largest_expert() - held
            if over > 0:
                yield f"a prompt needs all experts of a layer at once, {format_bytes(over)} more than it may take"
        elif disk:
            yield f"{format_bytes(disk)} of the experts do not fit in RAM and are mapped: the system reads them"
        if self._devices and self._wishes.gpu_layers is None and not sum(layers):
            yield "no device has room for even one layer beside its compute buffer"
        for pattern, place in self._wishes.overrides:
            if not any(re.search(pattern, weight.name) for weight in self._model.weights):
                yield f"--override {pattern}={place} matches no tensor"
        if self._wishes.repack == "on" and not self._machine.speeds.repacked:
            yield "this build of llama.cpp has no faster layout for these types that works here"


def _balanced(costs: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """Split `costs` into runs, one a room, that fill the rooms in equal proportion; None if they do not fit."""
    for step in range(1, _STEPS + 1):
        counts = _filled(costs, [room * step // _STEPS for room in rooms])
        if sum(counts) == len(costs):
            return counts
    return None


def _filled(costs: Sequence[int], limits: Sequence[int]) -> list[int]:
    counts, at = [], 0
    for limit in limits:
        used, first = 0, at
        while at < len(costs) and used + costs[at] <= limit:
            used += costs[at]
            at += 1
        counts.append(at - first)
    return counts
