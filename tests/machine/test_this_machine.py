"""This machine, put together: its devices, and what of it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from grok_local.ggml.devices import Abilities, BackendDevice, DeviceKind, cpu_device
from grok_local.machine.facts import Device, Speeds
from grok_local.machine.limits import core_count, memory_limits
from grok_local.machine.this_machine import local_devices, this_machine
from grok_local.machine.trials import Item, Outcome


def known(name: str, backend: str, kind: DeviceKind, id: str | None = None) -> BackendDevice:
    return BackendDevice(name, "described", backend, kind, free=1, total=2, handle=0, id=id)


def able(_: BackendDevice) -> Abilities:
    return Abilities(largest=1 << 32, lacks=frozenset({"TQ1_0"}), offloads=False)


def test_devices_are_what_is_no_processor_and_no_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [
        known("CPU", "CPU", DeviceKind.CPU),
        known("CUDA0", "CUDA", DeviceKind.GPU),
        known("Vulkan0", "Vulkan", DeviceKind.INTEGRATED),
        known("RPC0", "RPC", DeviceKind.GPU),
        known("MTL0", "MTL", DeviceKind.GPU),
        known("BLAS", "BLAS", DeviceKind.ACCELERATOR),
    ]
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    kinds = [(device.name, device.kind) for device in local_devices(lambda: devices, ask=able)]
    assert kinds == [("CUDA0", "gpu")]  # integrated ones count where there is no other
    kinds = [(device.name, device.kind) for device in local_devices(lambda: [*devices[:1], *devices[2:]], ask=able)]
    assert kinds == [("MTL0", "integrated")]  # which Vulkan sees too
    kinds = [(device.name, device.kind) for device in local_devices(lambda: devices[2:4], ask=able)]
    assert kinds == [("Vulkan0", "integrated")]


GPU, INTEGRATED = DeviceKind.GPU, DeviceKind.INTEGRATED


@pytest.mark.parametrize(
    ("devices", "names"),
    [
        # One card that two backends see.
        ([known("CUDA0", "CUDA", GPU, "0000:01:00.0"), known("Vulkan0", "Vulkan", GPU, "0000:01:00.0")], ["CUDA0"]),
        # Two alike, of which each backend sees both; a third that only one of them knows.
        (
            [
                known("CUDA0", "CUDA", GPU, "0000:01:00.0"),
                known("CUDA1", "CUDA", GPU, "0000:02:00.0"),
                known("Vulkan0", "Vulkan", GPU, "0000:02:00.0"),
                known("Vulkan1", "Vulkan", GPU, "0000:01:00.0"),
                known("Vulkan2", "Vulkan", GPU, "0000:03:00.0"),
            ],
            ["CUDA0", "CUDA1", "Vulkan2"],
        ),
        # Nobody knows whether these are the same.
        ([known("CUDA0", "CUDA", GPU), known("Vulkan0", "Vulkan", GPU)], ["CUDA0", "Vulkan0"]),
        # An APU, whose backends do not all say where it is.
        ([known("ROCm0", "ROCm", INTEGRATED, "0000:c1:00.0"), known("Vulkan0", "Vulkan", INTEGRATED)], ["ROCm0"]),
        (
            [known("Vulkan0", "Vulkan", INTEGRATED), known("Vulkan1", "Vulkan", INTEGRATED)],
            ["Vulkan0", "Vulkan1"],
        ),
    ],
)
def test_a_gpu_that_several_backends_see_is_one(devices: list[BackendDevice], names: list[str]) -> None:
    assert [device.name for device in local_devices(lambda: devices, ask=able)] == names


def test_what_the_processor_says_of_itself() -> None:
    cpu = cpu_device()
    assert (cpu.name, cpu.backend, cpu.kind, cpu.id) == ("CPU", "CPU", DeviceKind.CPU, None)
    assert cpu.description
    assert 0 < cpu.free <= cpu.total == psutil.virtual_memory().total


def test_it_is_put_together(tmp_path: Path) -> None:
    asked: list[tuple[Item, int]] = []

    def trial(items: Sequence[Item], *, threads: int, **_: Any) -> dict[Item, Outcome]:
        asked.extend((item, threads) for item in items)
        return {item: Outcome(7.0) for item in items}

    worker = Device("RPC0", "box:50052", "worker", 2, 1, endpoint="box:50052")
    gpu = known("CUDA0", "CUDA", DeviceKind.GPU)
    machine = this_machine(
        ["Q4_K"], threads=3, disk=tmp_path / "none", workers=[worker], trial=trial, devices=lambda: [gpu], ask=able
    )
    assert (Item("speed", "Q4_K"), 3) in asked
    assert (Item("device", "Q4_K", "CUDA0"), 1) in asked
    assert machine.speeds.plain == {"Q4_K": 7.0}
    lacks = frozenset({"TQ1_0"})
    found = Device("CUDA0", "described", "gpu", 2, 1, 7.0, largest=1 << 32, lacks=lacks, offloads=False)
    assert machine.devices == (found, worker)
    assert (machine.unified, machine.disk_speed) == (False, 0.0)
    assert machine.cores == core_count()
    assert machine.memory == memory_limits()[0]


def test_without_types_nothing_is_measured() -> None:
    def trial(*_: Any, **__: Any) -> dict[Item, Outcome]:
        raise AssertionError("something was measured")

    machine = this_machine(trial=trial, devices=lambda: [known("CUDA0", "CUDA", DeviceKind.GPU)], ask=able)
    assert machine.speeds == Speeds()
    assert [device.speed for device in machine.devices] == [0.0]
