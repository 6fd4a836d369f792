"""What if: machines that are described and not measured, more RAM, more sequences together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from grok_local.errors import OptionError, PlacementError
from grok_local.machine.facts import Device, Machine, Speeds
from grok_local.placement.forecast import Forecast, forecast
from grok_local.placement.plan import Plan
from grok_local.placement.planner import make_plan
from grok_local.placement.shares import is_shared
from grok_local.units import parse_size

__all__ = ["Width", "described", "enough_ram", "spare_of", "widest", "with_less", "with_smaller"]

_WIDTHS = (1, 2, 4, 8, 16)  # sequences: beyond, every expert is read in each step anyway
_SPARE, _SPARE_OF_WORKER, _MOST_SPARE = 32, 4, 512_000_000  # shares of a device that ran out of memory, and bytes
_RAM_SIZES = tuple(int(gigabytes * 1e9) for gigabytes in (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536))


@dataclass(frozen=True)
class WhatIf:
    """What a machine is supposed to have in place of its own; None leaves it as it is.

    Sizes in bytes, speeds in bytes a second; `ram_speed` is what products with weights in RAM get through.
    """

    ram: int | None = None
    gpus: tuple[int, ...] | None = None
    ram_speed: int | None = None
    vram_speed: int | None = None
    disk_speed: int | None = None

    def applied_to(self, machine: Machine, *, types: Sequence[str]) -> Machine:
        """The machine with these instead; `types` are the GGML types whose speed `ram_speed` is."""
        if self.ram is not None:
            machine = _with_ram(machine, self.ram)
        if self.gpus is not None:
            workers = tuple(device for device in machine.devices if device.kind == "worker")
            machine = replace(machine, devices=(*self._devices(self.gpus), *workers), unified=False)
        elif self.vram_speed is not None:
            machine = replace(machine, devices=tuple(replace(d, speed=float(self.vram_speed)) for d in machine.devices))
        if self.ram_speed is not None:
            speed = float(self.ram_speed)
            machine = replace(machine, speeds=Speeds(plain=dict.fromkeys(types, speed), memory=speed))
        if self.disk_speed is not None:
            machine = replace(machine, disk_speed=float(self.disk_speed))
        return machine

    def assumptions(self) -> list[str]:
        """What is taken over from this machine although another is described."""
        if self.ram is None or self.ram_speed is not None:
            return []
        return ["RAM is as fast as this machine's: --ram-speed says how fast the other's is"]

    def _devices(self, sizes: Sequence[int]) -> list[Device]:
        speed = float(self.vram_speed or 0)
        return [Device(f"GPU{i}", "described", "gpu", size, size, speed) for i, size in enumerate(sizes)]


def described(
    *,
    ram: str | None = None,
    vram: str | None = None,
    ram_speed: str | None = None,
    vram_speed: str | None = None,
    disk_speed: str | None = None,
) -> WhatIf:
    """What users write: sizes as in "128G", several GPUs as in "24G,24G" ("0": none), speeds as in "60G" or "60G/s".
    Raises OptionError.
    """
    sizes = None if vram is None else [size for size in vram.split(",") if size.strip() not in ("", "0")]
    return WhatIf(
        ram=_positive("--ram", ram),
        gpus=None if sizes is None else tuple(_positive("--vram", size) or 0 for size in sizes),
        ram_speed=_positive("--ram-speed", ram_speed),
        vram_speed=_positive("--vram-speed", vram_speed),
        disk_speed=_positive("--disk-speed", disk_speed),
    )


def _positive(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    size = parse_size(text.removesuffix("/s"))
    if size <= 0:
        raise OptionError(f"{name} {text}: must be more than 0")
    return size


@dataclass(frozen=True)
class Width:
    """How many sequences go together best, by the plan for so many, and what is predicted for them and for one."""

    sequences: int
    plan: Plan
    together: Forecast
    alone: Forecast


def widest(plan: Plan, *, most: int | None = None) -> Width:
    """The number of sequences, at most `most`, that gives most tokens a second: more of them read the weights less
    often, and their KV cache leaves less room to experts.
    """
    found = [Width(1, plan, forecast(plan), forecast(plan))]
    for count in _WIDTHS[1:]:
        with suppress(PlacementError):
            wider = make_plan(plan.model, plan.machine, replace(plan.wishes, sequences=count))
            if count <= (most or count):
                found.append(Width(count, wider, forecast(wider, together=count), found[0].alone))
    return max(found, key=lambda width: width.together.speed)


def enough_ram(plan: Plan) -> tuple[int, Forecast] | None:
    """The least RAM of those machines come with in which nothing of the model stays on the disk, and what that gives.

    None where nothing does now, or no such machine would do.
    """
    for size in _RAM_SIZES if plan.disk else ():
        if size > plan.machine.memory:
            wishes = replace(plan.wishes, memory=None, stream="auto")
            with suppress(PlacementError):
                larger = make_plan(plan.model, _with_ram(plan.machine, size), wishes)
                if not larger.disk:
                    return size, forecast(larger)
    return None


def _with_ram(machine: Machine, size: int) -> Machine:
    """The machine with so much RAM, all of it free; of it devices that share it have as large a part as they had."""
    devices = tuple(_grown(d, size / machine.memory) if is_shared(machine, d) else d for d in machine.devices)
    return replace(machine, memory=size, available=size, devices=devices)


def _grown(device: Device, times: float) -> Device:
    total, most = int(device.total * times), None if device.most is None else int(device.most * times)
    return replace(device, total=total, free=total, most=most)


def with_less(plan: Plan, place: str, most: int) -> Plan:
    """The plan for the same where a device has `most` bytes and no more. Raises PlacementError."""
    return _with_devices(plan, [replace(d, most=max(most, 0)) if d.name == place else d for d in plan.machine.devices])


def spare_of(plan: Plan, place: str, having: int) -> int:
    """Bytes of what a device has that drivers, and what they stage, may need: nobody knows how much.

    A worker that has given its last byte crashes, and the machine is somebody else's too.
    """
    worker = any(device.name == place and device.kind == "worker" for device in plan.machine.devices)
    return having // _SPARE_OF_WORKER if worker else min(having // _SPARE, _MOST_SPARE)


def with_smaller(plan: Plan, place: str) -> Plan:
    """The plan for the same where a device does not take the largest tensors it was to have. Raises PlacementError."""
    largest = max(weight.nbytes for weight in plan.model.weights if plan.place_of(weight) == place) - 1
    return _with_devices(plan, [replace(d, largest=largest) if d.name == place else d for d in plan.machine.devices])


def _with_devices(plan: Plan, devices: Sequence[Device]) -> Plan:
    return make_plan(plan.model, replace(plan.machine, devices=tuple(devices)), plan.wishes)
