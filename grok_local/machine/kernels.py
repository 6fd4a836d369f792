"""How fast llama.cpp's kernels are on this machine, and which of them may be used.

That is measured once, then remembered under a mark of the library and the processor.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from grok_local.ggml import products
from grok_local.ggml.devices import cpu_device, extra_buffer_types
from grok_local.ggml.libraries import backend_libraries, library_path
from grok_local.machine.facts import Device, Say, Speeds
from grok_local.machine.kept import keep, kept, kept_path
from grok_local.machine.limits import cpu_flags
from grok_local.machine.trials import NOT_HELD, REPACK, RIGHT, Item, Outcome, Trial, is_broken, run_items

__all__ = ["speeds", "verdicts", "with_speeds"]

_METHOD = 2  # higher when what was measured before must not be used any more
_REFERENCE = "F32"  # its kernel does little but read
_CANARIES = ("Q4_0", "Q8_0")  # quick to pack, and AMX takes both
_FLEETING_SECONDS = 3600.0  # how long a measurement that was disturbed is believed


@dataclass
class _Record:
    """What is known about the kernels. A speed of 0: that kernel cannot be used."""

    plain: dict[str, float] = field(default_factory=dict)
    repacked: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)  # by buffer type, by type
    prompt_plain: dict[str, float] = field(default_factory=dict)  # of what may be repacked
    prompt_repacked: dict[str, float] = field(default_factory=dict)
    expires: float = 0.0  # Unix time; 0: never

    def table(self, item: Item) -> dict[str, float]:
        """Where the speed of an item belongs."""
        if item.kind == "prompt":
            return self.prompt_repacked if item.buffer else self.prompt_plain
        return self.repacked if item.buffer else self.plain


def speeds(
    types: Iterable[str],
    *,
    threads: int,
    say: Say | None = None,
    trial: Trial = run_items,
    buffers: Iterable[str] | None = None,
) -> Speeds:
    """What the CPU's products with weights of these types (Q4_K, F32, ...) get through; measured where not known yet.

    Types that ggml's CPU cannot multiply are left out. `memory` is the highest speed seen, that of F32 usually: a
    lower bound, for no kernel only reads. `say` gets a line for each measurement. `buffers` are the extra buffer types
    that are tried, by default all that this build has.
    """
    names = _known(types)
    record = _knowledge(names, _Source(threads, say, trial, _names_of(buffers)))
    return Speeds(
        plain=_usable(record.plain, names),
        repacked=_usable(record.repacked, names),
        prompt_plain=_usable(record.prompt_plain, names),
        prompt_repacked=_usable(record.prompt_repacked, names),
        all_extra=_is_safe(record, names),
        memory=max([*record.plain.values(), *record.repacked.values()], default=0.0),
    )


def with_speeds(
    devices: Iterable[Device],
    types: Sequence[str],
    *,
    say: Say | None = None,
    trial: Trial = run_items,
    libraries: Iterable[Path] | None = None,
) -> list[Device]:
    """Local GPUs with the speed of their products with the first of `types`, where it can be measured; others as they
    are. Remembered like the CPU's, for as long as the backends' `libraries` stay, by default those installed.
    """
    name = next(iter(_known(types)), "")
    if not name:
        return list(devices)
    built = _built(backend_libraries() if libraries is None else libraries)
    return [
        device if device.kind == "worker" else replace(device, speed=_device_speed(device, name, built, say, trial))
        for device in devices
    ]


def _built(libraries: Iterable[Path]) -> str:
    """Of these files. A GPU's are too large to be read each time."""
    stats = [(path.name, path.stat()) for path in libraries]
    return json.dumps(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def _device_speed(device: Device, type: str, built: str, say: Say | None, trial: Trial) -> float:
    """Bytes a second, 0 where it cannot be measured. What may be otherwise next time is not remembered."""
    path, mark = kept_path("gpus.json"), f"{_mark(1)} {built} {device.name} {device.description} {type}"
    known = kept(path).get(mark)
    if isinstance(known, float) and math.isfinite(known) and known >= 0:
        return known
    item = Item("device", type, device.name)
    outcome = trial([item], threads=1, say=say)[item]
    speed = outcome.value or 0.0
    if not outcome.fleeting:
        keep(path, mark, speed)
    return speed


def verdicts(
    types: Iterable[str],
    *,
    threads: int,
    say: Say | None = None,
    trial: Trial = run_items,
    buffers: Iterable[str] | None = None,
) -> dict[tuple[str, str], str]:
    """RIGHT, NOT_HELD or what is wrong, by extra buffer type and type; measured where not known yet.

    A buffer type other than CPU_REPACK is given up at the first failure: the rest is not there.
    """
    record = _knowledge(_known(types), _Source(threads, say, trial, _names_of(buffers)))
    return {(buffer, name): text for buffer, by_type in record.verdicts.items() for name, text in by_type.items()}


def _known(types: Iterable[str]) -> list[str]:
    known = GGMLQuantizationType.__members__
    return [name for name in dict.fromkeys(types) if name in known and products.can_multiply(known[name])]


def _usable(table: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    return {name: table[name] for name in names if table.get(name)}


def _is_safe(record: _Record, names: Sequence[str]) -> bool:
    """Whether each extra buffer type gets each type right or leaves it alone, and one does not leave all alone."""
    texts = {by_type.get(name, "not tried") for by_type in record.verdicts.values() for name in names}
    return RIGHT in texts and texts <= {RIGHT, NOT_HELD}


# -- measuring kernels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where what is not known yet comes from."""

    threads: int
    say: Say | None
    trial: Trial
    buffers: tuple[str, ...]

    def outcomes(self, items: Sequence[Item]) -> Mapping[Item, Outcome]:
        """What came of each of the items."""
        return self.trial(items, threads=self.threads, say=self.say)


def _names_of(buffers: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(extra_buffer_types() if buffers is None else buffers)


def _knowledge(names: Sequence[str], source: _Source) -> _Record:
    path, mark = kept_path("speeds.json"), _mark(source.threads)
    record = _remembered(kept(path).get(mark))
    missing = [name for name in dict.fromkeys((*names, _REFERENCE)) if name not in record.plain]
    if missing:
        _measure(missing, record, source)
        keep(path, mark, asdict(record))
    return record


def _measure(names: Sequence[str], record: _Record, source: _Source) -> None:
    """Add what can be known about these types to the record."""
    checks = source.outcomes(list(_checks(names, record, source.buffers)))
    for item, outcome in checks.items():
        record.verdicts.setdefault(item.buffer, {})[item.type] = outcome.verdict
    able = [name for name in names if record.verdicts.get(REPACK, {}).get(name) == RIGHT]
    timed = [*(Item("speed", name) for name in names), *(Item("speed", name, REPACK) for name in able)]
    timed += [Item("prompt", name, buffer) for name in able for buffer in ("", REPACK)]
    timings = source.outcomes(timed)
    for item, outcome in timings.items():
        record.table(item)[item.type] = outcome.value or 0.0
    if not record.expires and any(outcome.fleeting for outcome in (*checks.values(), *timings.values())):
        record.expires = time.time() + _FLEETING_SECONDS


def _checks(names: Iterable[str], record: _Record, buffers: Iterable[str]) -> Iterator[Item]:
    for buffer in buffers:
        known = record.verdicts.get(buffer, {})
        if not is_broken(buffer, known.values()):
            wanted = dict.fromkeys((*(() if buffer == REPACK else _CANARIES), *names))
            yield from (Item("check", name, buffer) for name in wanted if name not in known)


def _mark(threads: int) -> str:
    """Of everything that what was measured depends on."""
    digest = hashlib.sha256()
    for name in ("ggml-base", "ggml-cpu"):
        digest.update(library_path(name).read_bytes())
    version = importlib.metadata.version("llama-cpp-python")
    facts = [_METHOD, version, cpu_device().description, sorted(cpu_flags()), threads]
    return hashlib.sha256(digest.digest() + json.dumps(facts).encode()).hexdigest()


def _remembered(data: Any) -> _Record:
    """The record in `data`; an empty one if it is damaged or too old."""
    try:
        verdicts = {str(name): {str(k): str(v) for k, v in by.items()} for name, by in data["verdicts"].items()}
        tables = {name: _table(data[name]) for name in ("plain", "repacked", "prompt_plain", "prompt_repacked")}
        record = _Record(**tables, verdicts=verdicts, expires=float(data["expires"]))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return _Record()
    return _Record() if 0 < record.expires < time.time() else record


def _table(data: Any) -> dict[str, float]:
    table = {str(name): float(speed) for name, speed in data.items()}
    if not all(math.isfinite(speed) and speed >= 0 for speed in table.values()):
        raise ValueError("no speed")
    return table
