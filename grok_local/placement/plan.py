"""A plan: which weights go to which device, what that takes there, and what is left over.

llama.cpp assigns layers in one run per device, the output after the last layer, which is why a plan is a number of
layers for each device and a list of exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from grok_local.machine.facts import Device, Machine
from grok_local.placement.shape import ModelShape, Role, Weight
from grok_local.placement.sizes.compute import compute_bytes
from grok_local.placement.wishes import RAM, USUAL_BATCH, Wishes, attended_by, cells_of, usual_batch
from grok_local.units import format_bytes

__all__ = ["Override", "Places", "Plan", "Share", "are_pinned", "is_slow", "patterns_of", "units_of"]

Override: TypeAlias = tuple[str, str]  # (regular expression for tensor names, place)


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
    context: int  # tokens of each sequence
    layers: tuple[int, ...]  # by device
    overrides: tuple[Override, ...]  # the first that matches holds
    repacked: frozenset[str]  # names of the tensors that RAM holds rearranged
    shares: tuple[Share, ...]  # the devices', then RAM's
    disk: int  # bytes of experts that RAM has no room for
    batch: int  # tokens evaluated at once
    streamed: bool  # experts are read by us as they are chosen, RAM's share of them being what is held

    @property
    def gpu_layers(self) -> int:
        """llama.cpp's n_gpu_layers: the output and so many of the last layers."""
        return sum(self.layers)

    @property
    def trained_context(self) -> int:
        """Tokens the model was trained on, as is known best; 0 where nobody knows."""
        return self.wishes.trained_context or self.model.trained_context

    @property
    def cells(self) -> int:
        """Tokens that the KV cache has room for, of all sequences together."""
        return cells_of(self.context, self.wishes)

    @property
    def attended(self) -> int:
        """Cells of the KV cache that a token may be compared with."""
        return attended_by(self.context, self.wishes)

    @property
    def ram(self) -> Share:
        """RAM's share."""
        return self.shares[-1]

    def room_for_experts(self, tokens: int) -> int:
        """Bytes of RAM that streamed experts may take while so many tokens are evaluated at once.

        Beside few tokens, the buffers for what a wide batch computes leave room.
        """
        ram = self.ram
        if not self.disk or are_pinned(self.machine.devices, self.shares):
            return ram.experts
        width = min(tokens, self.batch, self.cells)
        compute = compute_bytes(self.model, context=self.attended, batch=width, attention=ram.kv > 0)
        return min(ram.experts + max(ram.compute - compute, 0), ram.experts + self.disk)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it."""
        return tuple(_notes(self))

    def place_of(self, weight: Weight) -> str:
        """The device that holds a tensor, or RAM."""
        return self._places.of(weight)

    @cached_property
    def _places(self) -> Places:
        return Places(self.model, self.machine.devices, self.layers, self.overrides)

    @property
    def exceptions(self) -> dict[str, list[str]]:
        """By place, the tensors that are not where their layer is.

        The user's expressions are matched here: std::regex means something else by some, and others overflow its stack.
        """
        usual = replace(self, overrides=())
        found: dict[str, list[str]] = {}
        for weight in self.model.weights:
            place = self.place_of(weight)
            if place != usual.place_of(weight):
                found.setdefault(place, []).append(weight.name)
        return found

    @cached_property
    def expert_layers(self) -> dict[str, int]:
        """How many layers' experts each place holds, whole layers only."""
        counts = dict.fromkeys((*(device.name for device in self.machine.devices), RAM), 0)
        for layer in range(self.model.layers):
            found = {self.place_of(w) for w in self.model.weights if w.layer == layer and w.role is Role.EXPERTS}
            if len(found) == 1:
                counts[found.pop()] += 1
        return counts


class Places:
    """Where each tensor goes, given the layers on each device and the exceptions."""

    def __init__(
        self,
        model: ModelShape,
        devices: Sequence[Device],
        layers: Sequence[int],
        overrides: Sequence[Override],
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


def patterns_of(names: Iterable[str]) -> Iterator[str]:
    """Regular expressions that match these tensors, and no other."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        groups.setdefault(found[2] if found else name, []).append(found[1] if found else "")
    for rest, layers in groups.items():
        prefix = rf"blk\.({'|'.join(layers)})\." if layers != [""] else ""
        yield f"^{prefix}{re.escape(rest)}$"


def are_pinned(devices: Sequence[Device], shares: Sequence[Share]) -> bool:
    """Whether RAM's buffers for what is computed are a GPU driver's, which keeps all of their pages."""
    return any(share.used and device.kind != "worker" for device, share in zip(devices, shares, strict=False))


def units_of(model: ModelShape, devices: Sequence[Device], layers: Sequence[int]) -> list[str]:
    """The place of each layer and, last, of the output: RAM first, then the devices in order."""
    names = [device.name for device, count in zip(devices, layers, strict=True) for _ in range(count)]
    return [RAM] * (model.layers + 1 - len(names)) + names


# -- what to say about it ----------------------------------------------------------------------------------------------


def _notes(plan: Plan) -> Iterator[str]:
    trained = plan.trained_context
    if 0 < trained < plan.context:
        yield (
            f"the model was trained on {trained} tokens of context, and this one has {plan.context}: beyond, its "
            "answers may be nonsense"
        )
    yield from _notes_on_disk(plan)
    yield from _notes_on_devices(plan)
    for pattern, place in plan.wishes.overrides:
        if not any(re.search(pattern, weight.name) for weight in plan.model.weights):
            yield f"--override {pattern}={place} matches no tensor"
    if plan.wishes.repack == "on" and not plan.machine.speeds.repacked:
        yield "this build of llama.cpp has no faster layout for these types that works here"


def _notes_on_disk(plan: Plan) -> Iterator[str]:
    size = format_bytes(plan.disk)
    if plan.disk and plan.streamed:
        at_once = f", for prompts {plan.batch} tokens at a time" if plan.batch > USUAL_BATCH else ""
        yield f"{size} of the experts do not fit in RAM: they are streamed, read as chosen{at_once}"
        over = plan.model.experts * plan.model.largest_expert - plan.ram.experts
        if over > 0:
            yield f"a prompt needs all experts of a layer at once, {format_bytes(over)} more than it may take"
    elif plan.disk:
        yield f"{size} of the experts do not fit in RAM and are mapped: the system reads them"


def _notes_on_devices(plan: Plan) -> Iterator[str]:
    slow = [device.name for device in plan.machine.devices if device.most == 0 and is_slow(device, plan)]
    for name in slow:
        yield f"{name} is slower than RAM and gets nothing; --gpu-layers says how much it shall have all the same"
    devices = [device for device in plan.machine.devices if device.name not in slow]
    if devices and plan.wishes.gpu_layers is None and not plan.gpu_layers:
        yield "no device has room for even one layer beside its compute buffer"
    for device, share in zip(plan.machine.devices, plan.shares, strict=False):
        if share.used and (refused := _refused_experts(plan, device)):
            yield f"{device.name} does not take {refused}: they stay in RAM"
    if plan.batch < usual_batch(plan.context, plan.wishes):
        shares = list(zip(plan.machine.devices, plan.shares, strict=False))
        used = [d.largest for d, share in shares if d.largest and share.used]
        largest = min(used or [d.largest for d, _ in shares if d.largest])
        yield f"prompts are taken {plan.batch} tokens at a time: no more fit tensors of {format_bytes(largest)}"


def is_slow(device: Device, plan: Plan) -> bool:
    """Whether a device is known to be slower than RAM with the model's weights."""
    speeds = plan.machine.speeds
    ram = max((speeds.plain.get(kind, 0.0) for kind in plan.model.types[:1]), default=0.0) or speeds.memory
    return 0 < device.speed < ram


def _refused_experts(plan: Plan, device: Device) -> str:
    refused = [w for w in plan.model.weights if w.role is Role.EXPERTS and not device.takes(w.type, w.nbytes)]
    return f"experts of {format_bytes(max(w.nbytes for w in refused))} a tensor" if refused else ""
