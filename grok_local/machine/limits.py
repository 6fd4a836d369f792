"""What a plan needs to know of a machine: memory, devices, and how fast each of them feeds the matrix products.

Containers count: what a control group (version 1 or 2) or a resource limit denies is not there.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from grok_local.ggml.devices import BackendDevice, DeviceKind, backend_devices

__all__ = [
    "REPACK_ROWS",
    "Device",
    "Machine",
    "Speeds",
    "assembled",
    "core_count",
    "cpu_flags",
    "cpu_quota",
    "local_devices",
    "memory_limits",
    "this_machine",
]

REPACK_ROWS = 8  # llama.cpp interleaves so many; kernels.py tests with an odd multiple of it

_PROMPT_SHARE = 3  # tokens of prompts for each that is generated: long prompts are what hurts

Kind = Literal["gpu", "integrated", "worker"]


@dataclass(frozen=True)
class Speeds:
    """Bytes of weights a second that the CPU's matrix products get through, all threads together, by GGML type name.

    `plain` is for weights as they lie in the file, `repacked` for llama.cpp's rearranged copies. A type is in
    `repacked` only if a child process survived it and computed the right numbers. `all_extra`: llama.cpp may choose
    its rearranged buffer types itself (on processors with AMX that is what crashes in some builds). The `prompt_`
    speeds are with many tokens at once, as if each read its weights, for experts of the types that may be repacked.
    """

    plain: Mapping[str, float] = field(default_factory=dict)
    repacked: Mapping[str, float] = field(default_factory=dict)
    all_extra: bool = False
    memory: float = 0.0  # bytes a second, all threads reading; the limit of decoding
    prompt_plain: Mapping[str, float] = field(default_factory=dict)
    prompt_repacked: Mapping[str, float] = field(default_factory=dict)

    def gains(self, type: str, *, experts: bool) -> bool:
        """Whether repacking makes it faster: decoding, and with experts a token decoded and some of a prompt together,
        since llama.cpp takes the tokens of a prompt through repacked experts one by one.
        """
        if self.repacked.get(type, 0.0) <= self.plain.get(type, 0.0):
            return False
        before, after = self.prompt_plain.get(type), self.prompt_repacked.get(type)
        if not (experts and before and after):
            return True
        return 1 / self.repacked[type] + _PROMPT_SHARE / after < 1 / self.plain[type] + _PROMPT_SHARE / before

    def can_repack(self, type: str, rows: int) -> bool:
        """Whether CPU_REPACK may be given a matrix of that many rows (ne[1]); others crash it."""
        return type in self.repacked and rows % REPACK_ROWS == 0


@dataclass(frozen=True)
class Device:
    """A place for weights other than the machine's own RAM. Sizes in bytes."""

    name: str  # llama.cpp's: CUDA0, MTL0, RPC0
    description: str
    kind: Kind
    total: int
    free: int
    speed: float = 0.0  # bytes of weights a second; 0: not known
    endpoint: str = ""  # of a worker: HOST:PORT
    most: int | None = None  # weights and KV cache it may get, where more turned out not to fit


@dataclass(frozen=True)
class Machine:
    """A machine, this one or a described one. Sizes in bytes, speeds in bytes a second, 0 where unknown."""

    memory: int  # RAM that this process may use at all; a container's limit counts
    available: int  # of it, what is not used by others
    cores: int
    speeds: Speeds
    disk_speed: float = 0.0
    devices: tuple[Device, ...] = ()
    unified: bool = False  # the devices' memory is the RAM


def this_machine(
    types: Iterable[str],
    *,
    threads: int | None = None,
    model: Path | None = None,
    workers: Sequence[Device] = (),
    say: Callable[[str], None] | None = None,
) -> Machine:
    """Everything about this machine; `types` are those whose speed matters (none: nothing is measured), `model` a file
    on the disk that does.

    The first time it measures for some seconds; `say` is told so, and what.
    """
    from grok_local.machine import kernels  # which needs Speeds

    names = tuple(types)
    known = kernels.speeds(names, threads=threads or core_count(), say=say) if names else Speeds()
    devices = kernels.with_speeds(local_devices(), names, say=say)
    return assembled(known, [*devices, *workers], disk_speed=kernels.disk_speed(model) if model else 0.0)


def assembled(speeds: Speeds, devices: Iterable[Device], *, disk_speed: float = 0.0) -> Machine:
    """This machine's memory and cores now, with what else is known of it."""
    (total, available), found = memory_limits(), tuple(devices)
    unified = any(device.kind == "integrated" for device in found)
    return Machine(total, available, core_count(), speeds, disk_speed, found, unified)


def local_devices() -> list[Device]:
    """The GPUs llama.cpp knows, registered workers among them. An integrated one counts only where there is no other,
    as llama.cpp has it: it is no faster than the processor whose memory it shares.
    """
    found = [
        Device(found.name, found.description, _kind(found), found.total, found.free)
        for found in backend_devices()
        if found.kind in (DeviceKind.GPU, DeviceKind.INTEGRATED)
    ]
    discrete = any(device.kind == "gpu" for device in found)
    return [device for device in found if not (discrete and device.kind == "integrated")]


def _kind(device: BackendDevice) -> Kind:
    if device.backend == "RPC":
        return "worker"
    apple = device.backend == "MTL" and platform.machine() == "arm64"  # Metal reports a GPU there too
    return "integrated" if apple or device.kind is DeviceKind.INTEGRATED else "gpu"


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_limits(*, root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of RAM this process may use at all, and of them what is available now. `root` has proc and sys."""
    ram = psutil.virtual_memory()
    limits = [(ram.total, ram.available), *_group_memory(root), *_address_space()]
    return min(limit for limit, _ in limits), max(min(available for _, available in limits), 0)


def _address_space() -> Iterator[tuple[int, int]]:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit, limit - psutil.Process().memory_info().vms  # mapped files count here


def _group_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and what is left of it, of every control group this process is in; the file cache can be given back."""
    for folder in _groups("", root):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
        yield from _left(limits, _number(folder / "memory.current"), _cached(folder, "active_file", "inactive_file"))
    for folder in _groups("memory", root):
        cached = _cached(folder, "total_active_file", "total_inactive_file")
        yield from _left([_number(folder / "memory.limit_in_bytes")], _number(folder / "memory.usage_in_bytes"), cached)


def _left(limits: Iterable[int | None], used: int | None, cached: int) -> Iterator[tuple[int, int]]:
    for limit in limits:
        if limit is not None:
            yield limit, limit - max((used or 0) - cached, 0)


def _cached(folder: Path, *names: str) -> int:
    pairs = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE))
    return sum(int(pairs.get(name, 0)) for name in names)


# -- control groups ----------------------------------------------------------------------------------------------------


def _groups(controller: str, root: Path) -> list[Path]:
    """The folders of this process's control groups for a controller of version 1, or of version 2 ("").

    From its own up to the root, which inside a container is often the only one that is there.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", ".", "..")]
            base = _mount(controllers, controller, root / "sys/fs/cgroup")
            return [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return []


def _mount(controllers: str, controller: str, folder: Path) -> Path:
    """Where a hierarchy is mounted: /sys/fs/cgroup itself is version 2's, unless version 1 is there."""
    candidates = [folder / controllers, folder / controller] if controller else [folder / "unified", folder]
    return next((path for path in candidates if path.is_dir()), folder)


def cpu_quota(*, root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control groups allow, or None."""
    pairs = [_text(folder / "cpu.max").split() for folder in _groups("", root)]
    pairs += [
        [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for folder in _groups("cpu", root)
    ]
    quotas = [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and all(map(_is_count, pair))]
    return min(quotas, default=None)


def _is_count(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,18}", text)) and int(text) > 0


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", for no file, and for nonsense."""
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# -- processor ---------------------------------------------------------------------------------------------------------


def core_count(*, root: Path = Path("/")) -> int:
    """Physical cores this process may use: within its affinity and its control groups' quota. At least 1."""
    cores = _allowed_cores(root) or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = cpu_quota(root=root)
    return max(min(cores, int(quota)), 1) if quota else cores


def _allowed_cores(root: Path) -> int:
    """0 where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    folder = root / "sys/devices/system/cpu"
    siblings = [_text(folder / f"cpu{cpu}/topology/thread_siblings_list") for cpu in os.sched_getaffinity(0)]
    return len(set(siblings)) if all(siblings) else 0


def cpu_flags(*, root: Path = Path("/")) -> frozenset[str]:
    """The processor's features as Linux names them: avx2, amx_tile, asimddp; empty elsewhere."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()
