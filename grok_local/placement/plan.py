"""A plan: which weights go to which device, what that takes there, and what is left over.

llama.cpp assigns layers in one run per device, the output after the last layer, which is why a plan is a number of
layers for each device and a list of exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from grok_local.machine.facts import Device, Machine
from grok_local.placement.shape import ModelShape, Role, Weight
from grok_local.placement.wishes import RAM, Wishes, cells_of

__all__ = ["Override", "Places", "Plan", "Share", "are_pinned", "units_of"]

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
    separate: bool  # each sequence has a part of the KV cache to itself
    notes: tuple[str, ...] = ()

    @property
    def gpu_layers(self) -> int:
        """llama.cpp's n_gpu_layers: the output and so many of the last layers."""
        return sum(self.layers)

    @property
    def cells(self) -> int:
        """Tokens that the KV cache has room for, of all sequences together."""
        return cells_of(self.context, self.wishes, separate=self.separate)

    @property
    def attended(self) -> int:
        """Cells of the KV cache that a token may be compared with: its sequence's, or in one shared cache all."""
        return self.context if self.separate else self.cells

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
        compute = self.model.compute_bytes(
            context=self.attended, batch=width, attention=ram.kv > 0, experts=True, output=True
        )
        return min(ram.experts + max(ram.compute - compute, 0), ram.experts + self.disk)

    def place_of(self, weight: Weight) -> str:
        """The device that holds a tensor, or RAM."""
        return self._places.of(weight)

    @cached_property
    def _places(self) -> Places:
        return Places(self.model, self.machine.devices, self.layers, self.overrides)

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


def are_pinned(devices: Sequence[Device], shares: Sequence[Share]) -> bool:
    """Whether RAM's buffers for what is computed are a GPU driver's, which keeps all of their pages."""
    return any(share.used and device.kind != "worker" for device, share in zip(devices, shares, strict=False))


def units_of(model: ModelShape, devices: Sequence[Device], layers: Sequence[int]) -> list[str]:
    """The place of each layer and, last, of the output: RAM first, then the devices in order."""
    names = [device.name for device, count in zip(devices, layers, strict=True) for _ in range(count)]
    return [RAM] * (model.layers + 1 - len(names)) + names
