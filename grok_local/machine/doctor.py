"""Says what stands between this machine and the speed it could have, and for each thing the command that helps."""

from __future__ import annotations

import importlib.metadata
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from grok_local import folders
from grok_local.errors import GrokLocalError, ModelError
from grok_local.formats.gguf_file import Header, read_model
from grok_local.ggml.devices import backend_names, cpu_device, cpu_features, extra_buffer_types
from grok_local.machine import kernels
from grok_local.machine.disk import RELEASE_SPACE, disk_speed, free_space
from grok_local.machine.facts import Device, Say, Speeds
from grok_local.machine.limits import core_count, cpu_flags, cpu_quota, memory_limits
from grok_local.machine.rebuild import (
    GPU,
    GPU_OPTIONS,
    LLAMA,
    Installer,
    find_gpu,
    installed_by,
    pinned_version,
    rebuild_command,
)
from grok_local.machine.this_machine import local_devices
from grok_local.machine.trials import NOT_HELD, REPACK, RIGHT, Trial, run_items
from grok_local.units import format_bytes

__all__ = ["TOPICS", "Finding", "System", "examine"]

Status = Literal["ok", "note", "problem"]

_USUAL_TYPES = ("Q4_K", "Q8_0", "Q6_K", "F32")  # of a model packed with --type q4_k
_FEW_FILES = 1024
_ELSEWHERE = "export GROK_LOCAL_HOME=/another/disk/grok-local"

# What llama.cpp calls a feature of the processor, and what Linux calls it.
_FEATURES = {
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
    "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm",
    "SVE": "sve",
}


@dataclass(frozen=True)
class Finding:
    """One line about the machine, and one that helps, if there is something to do: a command or advice."""

    topic: str
    status: Status
    text: str
    remedy: str = ""


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version(LLAMA)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class System:
    """Where the doctor looks, by default at this machine. `root` has proc, sys and dev."""

    root: Path = Path("/")
    version: Callable[[], str | None] = _installed_version  # of llama-cpp-python
    installer: Callable[[], Installer] = installed_by
    backends: Callable[[], list[str]] = backend_names
    features: Callable[[], dict[str, str]] = cpu_features
    devices: Callable[[], list[Device]] = local_devices
    buffers: Callable[[], Iterable[str]] = extra_buffer_types
    trial: Trial = run_items


@dataclass(frozen=True)
class _Case:
    """What is examined: a system, with the eyes of a model's types."""

    model: Path | None
    types: tuple[str, ...]
    threads: int
    system: System
    say: Say | None

    @property
    def root(self) -> Path:
        return self.system.root

    def rebuild(self, options: str = "", *, clang: bool = False) -> str:
        """The command that builds llama.cpp anew."""
        try:
            backends = self.system.backends()
        except ModelError:
            backends = []
        return rebuild_command(options, backends=backends, installer=self.system.installer(), clang=clang)

    def with_clang(self) -> str:
        # GCC 12 builds AMX kernels that lose a part of the tile configuration; clang 14 builds none.
        return f"with clang 19 or newer installed: {self.rebuild(clang=True)}"


def examine(
    model: Path | None = None, *, threads: int | None = None, system: System | None = None, say: Say | None = None
) -> list[Finding]:
    """Everything that can be found out; `model` brings its own types and its own disk. Raises GGUFError for it.

    It measures for some seconds, the first time.
    """
    system = system or System()
    types = tuple(dict.fromkeys(tensor.type.name for header in _headers(model) for tensor in header.tensors))
    case = _Case(model, types or _USUAL_TYPES, threads or core_count(root=system.root), system, say)
    return [finding for topic, check in _CHECKS.items() for finding in _answers(topic, check, case)]


def _headers(model: Path | None) -> list[Header]:
    return read_model(model) if model else []


def _answers(topic: str, check: _Check, case: _Case) -> Iterator[Finding]:
    try:
        yield from (replace(finding, topic=topic) for finding in check(case))
    except (GrokLocalError, OSError) as error:
        yield Finding(topic, "problem", str(error))


def _ok(text: str) -> Finding:
    return Finding("", "ok", text)


def _note(text: str, remedy: str = "") -> Finding:
    return Finding("", "note", text, remedy)


def _problem(text: str, remedy: str = "") -> Finding:
    return Finding("", "problem", text, remedy)


# -- how llama.cpp is built --------------------------------------------------------------------------------------------


def _check_version(case: _Case) -> Iterator[Finding]:
    pinned, installed = pinned_version(), case.system.version()
    if installed is None:
        yield _problem(f"{LLAMA} is not installed", case.rebuild())
    elif pinned and installed != pinned:
        yield _problem(f"{LLAMA} {installed} is installed, {pinned} is needed", case.rebuild())
    else:
        yield _ok(f"{LLAMA} {installed}")


def _check_backends(case: _Case) -> Iterator[Finding]:
    names = case.system.backends()
    yield _ok(f"compiled in: {', '.join(sorted(names))}")
    if "RPC" not in names:
        yield _note("without RPC no workers can be used", case.rebuild())


def _check_features(case: _Case) -> Iterator[Finding]:
    built, flags = case.system.features(), cpu_flags(root=case.root)
    used = [name for name in _FEATURES if name in built]
    foreign = [name for name in used if _FEATURES[name] not in flags] if flags else []
    unused = [name for name, flag in _FEATURES.items() if flag in flags and name not in built]
    if foreign:
        yield _problem(f"built for another processor: this one has no {', '.join(foreign)}", case.rebuild())
    if "AMX_INT8" in unused:
        unused.remove("AMX_INT8")
        yield _note("built without AMX_INT8, which this processor has", case.with_clang())
    if unused:
        yield _problem(f"built without {', '.join(unused)}, which this processor has", case.rebuild())
    if not foreign and not unused:
        yield _ok(f"{cpu_device().description}: {', '.join(used) or 'no special instructions known'}")


# -- GPUs --------------------------------------------------------------------------------------------------------------


def _check_gpus(case: _Case) -> Iterator[Finding]:
    devices = case.system.devices()
    for device in devices:
        room = f"{format_bytes(device.free)} of {format_bytes(device.total)} free"
        yield _ok(f"{device.name}: {device.description}, {room}")
    found = find_gpu(case.root)
    if not devices:
        yield _unused(case, *found) if found else _ok("none found: the processor does everything")


def _unused(case: _Case, gpu: GPU, text: str) -> Finding:
    """Of a GPU that llama.cpp does not offer."""
    if gpu.backend in case.system.backends():
        driver = "the driver, and CUDA_VISIBLE_DEVICES" if gpu.backend == "CUDA" else "the driver, and its permissions"
        return _problem(f"{gpu.maker} ({text}): {gpu.backend} is compiled in and sees none", f"check {driver}")
    command = case.rebuild(GPU_OPTIONS[gpu.backend])
    return _problem(f"{gpu.maker} ({text}): {gpu.backend} is not compiled in", f"with {gpu.needs} installed: {command}")


# -- kernels -----------------------------------------------------------------------------------------------------------


def _check_layouts(case: _Case) -> Iterator[Finding]:
    verdicts = kernels.verdicts(
        case.types, threads=case.threads, say=case.say, trial=case.system.trial, buffers=case.system.buffers()
    )
    for buffer in dict.fromkeys(buffer for buffer, _ in verdicts):
        by_type = {name: text for (of, name), text in verdicts.items() if of == buffer}
        wrong = [f"{name} {text}" for name, text in by_type.items() if text not in (RIGHT, NOT_HELD)]
        right = [name for name in case.types if by_type.get(name) == RIGHT]
        if wrong:
            yield _problem(f"{buffer}: {', '.join(wrong)}; not used", case.with_clang() if buffer == "AMX" else "")
        if not wrong or (right and buffer == REPACK):
            yield _ok(
                f"{buffer}: {'right for ' + ', '.join(right) if right else 'has none of ' + ', '.join(case.types)}"
            )


def _check_speeds(case: _Case) -> Iterator[Finding]:
    known = kernels.speeds(
        case.types, threads=case.threads, say=case.say, trial=case.system.trial, buffers=case.system.buffers()
    )
    if not known.plain:
        yield _problem("no kernel could be measured")
        return
    yield _ok(f"{format_bytes(known.memory)}/s read from memory by {case.threads} threads")
    for name in case.types:
        yield _speed(name, known)


def _speed(name: str, known: Speeds) -> Finding:
    plain, repacked = known.plain.get(name), known.repacked.get(name)
    if not plain:
        return _problem(f"{name}: no kernel here")
    return _ok(f"{name}: {format_bytes(plain)}/s" + (f", rearranged {format_bytes(repacked)}/s" if repacked else ""))


# -- the machine -------------------------------------------------------------------------------------------------------


def _check_cores(case: _Case) -> Iterator[Finding]:
    cores, quota = core_count(root=case.root), cpu_quota(root=case.root)
    physical = psutil.cpu_count(logical=False) or cores
    if quota and quota < physical:
        yield _note(f"{quota:g} processors' time of {physical} cores", "give the container more processors")
    elif cores < physical:
        yield _note(f"{cores} of {physical} cores may be used", "start without taskset, or widen the cpuset")
    else:
        yield _ok(f"{cores} physical")


def _check_memory(case: _Case) -> Iterator[Finding]:
    (total, available), ram = memory_limits(root=case.root), psutil.virtual_memory().total
    free = f"{format_bytes(available)} of {format_bytes(total)} available"
    if total < ram:
        yield _note(
            f"{free}; a limit keeps the rest of {format_bytes(ram)}", "raise the container's limit or ulimit -v"
        )
    else:
        yield _ok(free)


def _check_swap(_: _Case) -> Iterator[Finding]:
    swap = psutil.swap_memory()
    used = f"{format_bytes(swap.used)} of {format_bytes(swap.total)} in use"
    if swap.used > swap.total // 10:
        yield _note(used, "close what is not needed: what is swapped out answers at the disk's speed")
    else:
        yield _ok(used if swap.total else "none")


def _check_locking(_: _Case) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    allowed = "no limit" if limit == resource.RLIM_INFINITY else f"at most {format_bytes(limit)}"
    yield _ok(f"{allowed}; nothing is locked: what is mapped may be read again from the disk")


def _check_pages(case: _Case) -> Iterator[Finding]:
    try:
        text = (case.root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return
    found = re.search(r"\[(\w+)\]", text)
    setting = found[1] if found else "unknown"
    if setting == "always":
        yield _ok("always")
    else:
        command = "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield _note(f"{setting}: rearranged weights lie in small pages", command)


def _check_files(_: _Case) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        yield _ok("any number may be open")
    elif limit < _FEW_FILES:
        yield _note(f"at most {limit} open: few for a model in many parts", f"ulimit -n {4 * _FEW_FILES}")
    else:
        yield _ok(f"at most {limit} open")


def _check_disk(case: _Case) -> Iterator[Finding]:
    folder = case.model.parent if case.model else folders.models_folder()
    home = folders.home()
    if home.exists() and not home.is_dir():
        yield _problem(f"{home}: is no folder, so nothing can be kept there", _ELSEWHERE)
        return
    files = [case.model] if case.model else [path for path in folder.glob("*.gguf") if path.is_file()]
    speed = max((disk_speed(path) for path in sorted(files, key=_size)[-1:]), default=0.0)
    reads = f"reads {format_bytes(speed)}/s" if speed else "no model here that is large enough to time its reading"
    free = free_space(folder)
    text = f"{format_bytes(free)} free in {folder}; {reads}"
    if case.model is None and free < RELEASE_SPACE:
        yield _note(f"{text}; Grok-1 and its 4-bit file take {format_bytes(RELEASE_SPACE)}", _ELSEWHERE)
    else:
        yield _ok(text)


def _size(path: Path) -> int:
    return path.stat().st_size


_Check = Callable[[_Case], Iterator[Finding]]
_CHECKS: dict[str, _Check] = {
    "llama.cpp": _check_version,
    "backends": _check_backends,
    "GPU": _check_gpus,
    "processor": _check_features,
    "cores": _check_cores,
    "layouts": _check_layouts,
    "speed": _check_speeds,
    "memory": _check_memory,
    "swap": _check_swap,
    "locked memory": _check_locking,
    "huge pages": _check_pages,
    "files": _check_files,
    "disk": _check_disk,
}
TOPICS = tuple(_CHECKS)
