"""What this process may use of the machine: memory, processors and their features.

Containers count: what a control group (version 1 or 2) or a resource limit denies is not there.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["core_count", "cpu_flags", "cpu_quota", "free_cores", "last_cache", "memory_limits"]

_CACHE_GUESS = 128 << 20  # bytes, where the system does not tell the size of its last cache


_LOOK = 0.1  # seconds in which other programs' work is watched


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


def free_cores(cores: int) -> int:
    """How many of `cores` other programs leave free just now, one at least. Takes a tenth of a second.

    A thread that shares its core holds all the others up, for milliseconds at every matrix product.
    """
    busy = float(psutil.cpu_percent(_LOOK)) / 100
    return max(cores - int(busy * cores + 0.5), 1)


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


def last_cache(*, root: Path = Path("/")) -> int:
    """Bytes of the processor's last cache, those of all its parts together."""
    parts: dict[str, int] = {}
    for folder in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3")):
        with suppress(OSError, ValueError):
            size = int((folder / "size").read_text().strip().removesuffix("K")) << 10
            parts[(folder / "shared_cpu_list").read_text()] = size
    return sum(parts.values()) or _CACHE_GUESS
