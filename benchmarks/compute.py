"""What is planned to be computed with against what llama.cpp would allocate, for models of full size on many machines.

    python -m benchmarks.compute [--range]

Where llama.cpp knows a GPU it stands for those that are described, whatever it is: nothing is allocated. With --range
it says that it takes tensors below 4 GiB, as most Vulkan drivers do; else any. Two GPUs need one that is there twice.
Mesa's device in software has buffers of at most 2 GB: it has to be told of larger ones, or what is computed is split.

    GGML_VK_VISIBLE_DEVICES=0,0 GGML_VK_FORCE_MAX_ALLOCATION_SIZE=1000000000000 python -m benchmarks.compute
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grok_local.errors import PlacementError
from grok_local.formats.gguf_file import read_model
from grok_local.ggml.devices import BackendDevice, DeviceKind, backend_devices
from grok_local.machine.facts import Device, Machine, Speeds
from grok_local.placement.plan import Plan
from grok_local.placement.planner import make_plan
from grok_local.placement.shape import ModelShape
from grok_local.placement.wishes import Wishes
from samples.accounts import Account, account_of, taking
from samples.giants import write_giant

_RAM = (64, 128, 192, 400)  # GB
_GPUS = ((), (12,), (24,), (48,), (24, 24), (100, 100))  # GB
_CONTEXTS = (2048, 8192, 32768, 131072)
_RANGE = (1 << 32) - 1  # bytes


@dataclass(frozen=True)
class Case:
    """A model on a machine."""

    release: str
    machine: Machine
    wishes: Wishes

    def __str__(self) -> str:
        gpus = " + ".join(f"{device.free / 1e9:.0f}" for device in self.machine.devices)
        several = f", {self.wishes.sequences} sequences" if self.wishes.sequences > 1 else ""
        return f"{self.release}, {self.machine.memory / 1e9:.0f} GB, GPUs {gpus or '-'}, {self.wishes.context}{several}"


def cases(gpus: Sequence[BackendDevice], largest: int | None) -> Iterator[Case]:
    """Each release on each machine with each context, and some with 16 sequences."""
    for release in ("grok-1", "grok-2"):
        for ram in _RAM:
            for sizes in (sizes for sizes in _GPUS if len(sizes) <= len(gpus)):
                devices = [Device(g.name, "", "gpu", s * 10**9, s * 10**9) for g, s in zip(gpus, sizes, strict=False)]
                described = tuple(replace(device, largest=largest) for device in devices)
                machine = Machine(ram * 10**9, ram * 10**9, 16, Speeds(), 7e9, described)
                yield from (Case(release, machine, Wishes(context=context)) for context in _CONTEXTS)
                yield Case(release, machine, Wishes(context=2048, sequences=16))


def accounts(found: Sequence[Case], folder: Path) -> Iterator[tuple[Case, Plan, Account]]:
    """Of all that can be planned."""
    for case in found:
        path = folder / f"{case.release}.gguf"
        shape = ModelShape.from_headers(read_model(path if path.exists() else write_giant(path, case.release)))
        try:
            plan = make_plan(shape, case.machine, case.wishes)
        except PlacementError:
            continue
        yield case, plan, account_of(path, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--range", action="store_true")
    args = parser.parse_args()
    gpus = [device for device in backend_devices() if device.kind is DeviceKind.GPU]
    largest = _RANGE if args.range else None
    ratios: list[float] = []
    with tempfile.TemporaryDirectory() as folder, taking(gpus, largest):
        for case, plan, account in accounts(list(cases(gpus, largest)), Path(folder)):
            for place, planned, held in account:
                ratios.append(planned / held)
                if not held <= planned <= 1.3 * held:
                    print(f"{case}: {place} {planned / 1e6:.0f} MB planned, {held / 1e6:.0f} held, batch {plan.batch}")
    under = sum(ratio < 1 for ratio in ratios)
    over = sum(ratio > 1.3 for ratio in ratios)
    print(
        f"{len(ratios)} buffers: {min(ratios):.3f} to {max(ratios):.3f} of what is held; {under} under, {over} over 1.3"
    )


if __name__ == "__main__":
    main()
