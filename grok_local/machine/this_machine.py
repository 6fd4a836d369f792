"""The machine this process runs on, put together from what is read off the system and what is measured."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from grok_local.ggml.devices import Abilities, BackendDevice, DeviceKind, abilities_of, backend_devices, own_gpus
from grok_local.machine.disk import disk_speed
from grok_local.machine.facts import Device, DeviceClass, Machine, Say, Speeds
from grok_local.machine.kernels import speeds, with_speeds
from grok_local.machine.limits import core_count, memory_limits
from grok_local.machine.trials import Trial, run_items

__all__ = ["local_devices", "this_machine"]

Ask: TypeAlias = Callable[[BackendDevice], Abilities]


def this_machine(
    types: Iterable[str] = (),
    *,
    threads: int | None = None,
    disk: Path | None = None,
    workers: Sequence[Device] = (),
    say: Say | None = None,
    trial: Trial = run_items,
    devices: Callable[[], Sequence[BackendDevice]] = backend_devices,
    ask: Ask = abilities_of,
) -> Machine:
    """This machine's memory, cores and devices as they are now, and `workers`, the devices of other machines.

    `types` are the GGML types whose kernels' speed matters: with none, nothing is measured and no speed is known.
    `disk` is a file on the disk whose speed matters. The first time it measures for some seconds, and tells `say` what.
    """
    names, cores = tuple(types), core_count()
    own, kernels = local_devices(devices, ask=ask), Speeds()
    if names:
        kernels = speeds(names, threads=threads or cores, say=say, trial=trial)
        own = with_speeds(own, names, say=say, trial=trial)
    total, available = memory_limits()
    return Machine(
        memory=total,
        available=available,
        cores=cores,
        speeds=kernels,
        disk_speed=disk_speed(disk) if disk else 0.0,
        devices=(*own, *workers),
        unified=any(device.kind == "integrated" for device in own),
    )


def local_devices(
    devices: Callable[[], Sequence[BackendDevice]] = backend_devices, *, ask: Ask = abilities_of
) -> list[Device]:
    """The GPUs of this machine that llama.cpp would use, and what each says when we `ask` what it can do."""
    gpus = [_described(device, ask(device)) for device in own_gpus(devices())]
    discrete = any(device.kind == "gpu" for device in gpus)
    return [device for device in gpus if not (discrete and device.kind == "integrated")]


def _described(device: BackendDevice, able: Abilities) -> Device:
    return Device(
        device.name,
        device.description,
        _class_of(device),
        device.total,
        device.free,
        largest=able.largest,
        piece=able.piece,
        lacks=able.lacks,
        offloads=able.offloads,
    )


def _class_of(device: BackendDevice) -> DeviceClass:
    apple = device.backend == "MTL" and platform.machine() == "arm64"  # Metal reports a GPU there too
    return "integrated" if apple or device.kind is DeviceKind.INTEGRATED else "gpu"
