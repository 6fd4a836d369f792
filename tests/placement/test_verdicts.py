"""What `plan` says first of machines people have: golden texts, one a line, for both releases.

python -m tests.placement.test_verdicts     writes them anew, to be read before they are committed
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grok_local.errors import PlacementError
from grok_local.machine.facts import Device, Machine, Speeds
from grok_local.placement.forecast import forecast
from grok_local.placement.planner import make_plan
from grok_local.placement.shape import ModelShape
from grok_local.quantize.outline import outline
from grok_local.views.plans import verdict

GOLDEN = Path(__file__).parents[1] / "reference" / "verdicts.txt"
G = 1_000_000_000

# RAM, its bandwidth, GPUs, their bandwidth, disk; in GB and GB/s.
MACHINES: dict[str, tuple[int, int, tuple[int, ...], int, float]] = {
    "laptop, 16 GB": (16, 60, (), 0, 3),
    "laptop, 32 GB": (32, 80, (), 0, 5),
    "desktop, 64 GB": (64, 80, (), 0, 7),
    "desktop, 64 GB, 24 GB GPU": (64, 80, (24,), 900, 7),
    "desktop, 128 GB": (128, 80, (), 0, 7),
    "desktop, 128 GB, 24 GB GPU": (128, 80, (24,), 900, 7),
    "workstation, 192 GB": (192, 200, (), 0, 7),
    "workstation, 256 GB, 24 GB GPU": (256, 300, (24,), 900, 12),
    "workstation, 256 GB, 2 x 48 GB GPUs": (256, 300, (48, 48), 900, 12),
    "server, 768 GB": (768, 400, (), 0, 7),
    "server, 512 GB, 4 x 80 GB GPUs": (512, 300, (80, 80, 80, 80), 3000, 7),
    "desktop, 128 GB, hard disk": (128, 80, (), 0, 0.2),
}


def verdicts() -> Iterator[str]:
    for release in ("grok-1", "grok-2"):
        shape = ModelShape.from_headers([outline(release, type="q4_k")])
        for name, machine in MACHINES.items():
            yield f"{release}, {name}: {said(shape, described(shape, *machine))}"


def said(shape: ModelShape, machine: Machine) -> str:
    try:
        plan = make_plan(shape, machine)
    except PlacementError as error:
        return f"error: {error}"
    return verdict(plan, forecast(plan))


def described(
    shape: ModelShape, ram: int, ram_speed: int, gpus: tuple[int, ...], gpu_speed: int, disk: float
) -> Machine:
    speed = float(ram_speed * G)
    devices = tuple(
        Device(f"GPU{i}", "described", "gpu", size * G, size * G, float(gpu_speed * G)) for i, size in enumerate(gpus)
    )
    return Machine(
        memory=ram * G,
        available=ram * G,
        cores=8,
        devices=devices,
        speeds=Speeds(plain=dict.fromkeys(shape.types, speed), memory=speed),
        disk_speed=disk * G,
    )


def test_the_verdicts() -> None:
    assert list(verdicts()) == GOLDEN.read_text().splitlines()


def test_more_ram_is_never_worse() -> None:
    shape = ModelShape.from_headers([outline("grok-1", type="q4_k")])
    sizes = (48, 64, 96, 128, 192, 256, 512)
    speeds = [forecast(make_plan(shape, described(shape, ram, 80, (), 0, 7))).speed for ram in sizes]
    assert speeds == sorted(speeds)


if __name__ == "__main__":
    GOLDEN.write_text("".join(f"{line}\n" for line in verdicts()))
