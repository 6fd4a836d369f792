"""Tensors that a device does not take: it has no products for their type, or they are too large for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from grok_local.errors import PlacementError
from grok_local.machine.facts import Device
from grok_local.placement.shape import ModelShape, Role, Weight
from grok_local.units import format_bytes

__all__ = ["check_taken", "kept_in_ram", "largest_refused", "takes", "why_refused"]


def takes(device: Device, weight: Weight) -> bool:
    """Whether the tensor can be on the device."""
    return device.takes(weight.type, weight.nbytes)


def why_refused(devices: Sequence[Device], weight: Weight) -> str:
    """In words, of the device that takes most."""
    device = max(devices, key=lambda device: device.largest or 0)
    if weight.type in device.lacks:
        return f"{device.name} has no products for {weight.type}"
    most = format_bytes(device.largest or 0)
    return f"{device.name} takes tensors of at most {most}, and {weight.name} has {format_bytes(weight.nbytes)}"


def largest_refused(model: ModelShape, devices: Sequence[Device], role: Role) -> Weight | None:
    """The largest tensor of that role that none of the devices takes."""
    refused = [w for w in model.weights if w.role is role and not any(takes(device, w) for device in devices)]
    return max(refused, key=lambda weight: weight.nbytes, default=None)


def kept_in_ram(model: ModelShape, devices: Sequence[Device]) -> list[str]:
    """Names of what is no expert's and not taken by every device: it goes to none of them."""
    dense = [weight for weight in model.weights if weight.role in (Role.DENSE, Role.OUTPUT)]
    return [weight.name for weight in dense if not all(takes(device, weight) for device in devices)]


def check_taken(model: ModelShape, devices: Sequence[Device], overrides: Sequence[tuple[str, str]]) -> None:
    """Raises PlacementError where an override gives a device what it does not take: llama.cpp would abort."""
    for pattern, place in overrides:
        for device in (device for device in devices if device.name == place):
            found = [w for w in model.weights if re.search(pattern, w.name) and not takes(device, w)]
            if found:
                raise PlacementError(f"--override {pattern}={place}: {why_refused([device], found[0])}: leave it out")
