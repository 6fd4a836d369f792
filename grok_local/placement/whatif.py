"""Machines that are described and not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grok_local.errors import OptionError
from grok_local.machine.limits import Device, Machine, Speeds
from grok_local.units import parse_size

__all__ = ["imagined"]


def imagined(
    machine: Machine,
    *,
    types: Sequence[str],
    ram: str | None = None,
    vram: str | None = None,
    ram_speed: str | None = None,
    vram_speed: str | None = None,
    disk_speed: str | None = None,
) -> Machine:
    """`machine` with what is given in place of its own; sizes as in "128G", several GPUs as in "24G,24G", speeds in
    bytes a second. `ram_speed` is what the products with weights get through. Raises OptionError.
    """
    workers = tuple(device for device in machine.devices if device.kind == "worker")
    if ram is not None:
        memory = _positive("--ram", ram)
        machine = replace(machine, memory=memory, available=memory, unified=machine.unified and vram is None)
    if vram is not None:
        speed = 0 if vram_speed is None else _positive("--vram-speed", vram_speed)
        machine = replace(machine, devices=(*_gpus(vram, speed), *workers), unified=False)
    elif vram_speed is not None:
        machine = replace(machine, devices=tuple(_faster(machine.devices, _positive("--vram-speed", vram_speed))))
    if ram_speed is not None:
        speed = _positive("--ram-speed", ram_speed)
        machine = replace(machine, speeds=Speeds(plain=dict.fromkeys(types, float(speed)), memory=float(speed)))
    if disk_speed is not None:
        machine = replace(machine, disk_speed=float(_positive("--disk-speed", disk_speed)))
    return machine


def _gpus(vram: str, speed: int) -> list[Device]:
    sizes = [_positive("--vram", size) for size in vram.split(",") if size.strip() not in ("", "0")]
    return [Device(f"GPU{i}", "described", "gpu", size, size, float(speed)) for i, size in enumerate(sizes)]


def _faster(devices: Sequence[Device], speed: int) -> list[Device]:
    return [replace(device, speed=float(speed)) for device in devices]


def _positive(name: str, text: str) -> int:
    size = parse_size(text.removesuffix("/s"))
    if size <= 0:
        raise OptionError(f"{name} {text}: must be more than 0")
    return size
