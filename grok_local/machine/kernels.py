"""Measures this machine, once: llama.cpp's kernels, and the disk that a model is on.

A kernel may crash (those for rearranged weights do, in some builds and for types they lack), so each is tried in a
child process: `python -m grok_local.machine.kernels REQUEST` writes a line of JSON when it is ready, and one for every
item of the request. Where the lines end early, the item under way is to blame, and another child goes on after it.
What was found is kept in the cache folder under a mark of the library and the processor.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import math
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, NamedTuple

from gguf.constants import GGMLQuantizationType

from grok_local import folders
from grok_local.errors import GrokLocalError
from grok_local.ggml import products
from grok_local.ggml.devices import backend_devices, cpu_device, extra_buffer_types
from grok_local.ggml.libraries import library_path
from grok_local.machine.limits import REPACK_ROWS, Device, Speeds, cpu_flags, memory_limits

__all__ = ["NOT_HELD", "REPACK", "RIGHT", "Item", "Outcome", "disk_speed", "run_items", "speeds", "verdicts"]

Say = Callable[[str], None]

RIGHT, NOT_HELD = "right", "not held"
REPACK = "CPU_REPACK"

_METHOD = 2  # higher when what was measured before must not be used any more
_REFERENCE = "F32"  # its kernel does little but read
_CANARIES = ("Q4_0", "Q8_0")  # quick to pack, and AMX takes both
_ROWS = {REPACK: 65 * REPACK_ROWS}  # no multiple of what other buffer types or processors might ask for
_OTHER_ROWS = 544  # AMX takes multiples of 32
_ROUNDING = 0.02  # relative RMS error between two kernels that are right
_ITEM_SECONDS = 60.0
_UNDISTURBED = 0.9  # share of the processor's time that a measurement should get
_FLEETING_SECONDS = 3600.0  # how long one that did not is believed
# Threads that wait for each other soon sleep: with others at work, waiting would cost seven times the work.
_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "GOMP_SPINCOUNT": "5000"}
_SMALLEST_SET, _LARGEST_SET = 64 << 20, 1 << 30  # bytes of weights that a speed is measured with
_CACHE_GUESS = 128 << 20  # where the system does not tell the size of its last cache

_DISK_SECONDS, _DISK_BYTES = 1.0, 1 << 30
_DISK_BLOCK, _DISK_THREADS = 8 << 20, 4
_DISK_BELIEVED = 86_400.0  # seconds


_WHAT = {"device": "speed", "check": "check", "force": "check", "speed": "speed", "prompt": "speed with prompts"}


class Item(NamedTuple):
    """Something to try in a child: kind "check", "speed" (of decoding), "prompt" (many tokens at once), "device"
    (decoding on the GPU named as the buffer), or "force", a check that does not first ask ggml.
    """

    kind: str
    type: str
    buffer: str = ""  # plain memory

    def __str__(self) -> str:
        return f"{_WHAT[self.kind]} of {self.type}" + (f" in {self.buffer}" if self.buffer else "")


@dataclass(frozen=True)
class Outcome:
    """What came of an item: of a check the error, of a speed bytes a second; None where the buffer type lacks the type.

    After a `failure` nothing else counts. What is `fleeting` may be otherwise next time.
    """

    value: float | None = None
    failure: str = ""
    fleeting: bool = False

    @property
    def verdict(self) -> str:
        """Of a check: RIGHT, NOT_HELD, or what is wrong."""
        if self.failure or self.value is None:
            return self.failure or NOT_HELD
        return RIGHT if self.value <= _ROUNDING else f"wrong numbers (relative error {self.value:.2g})"


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


def speeds(types: Iterable[str], *, threads: int, say: Say | None = None) -> Speeds:
    """What the CPU's products with weights of these types (Q4_K, F32, ...) get through; measured where not known yet.

    Types that ggml's CPU cannot multiply are left out. `memory` is the highest speed seen, that of F32 usually: a
    lower bound, for no kernel only reads. `say` gets a line for each measurement.
    """
    names = _known(types)
    record = _knowledge(names, threads=threads, say=say)
    return Speeds(
        plain=_usable(record.plain, names),
        repacked=_usable(record.repacked, names),
        prompt_plain=_usable(record.prompt_plain, names),
        prompt_repacked=_usable(record.prompt_repacked, names),
        all_extra=_is_safe(record, names),
        memory=max([*record.plain.values(), *record.repacked.values()], default=0.0),
    )


def with_speeds(devices: Iterable[Device], types: Sequence[str], *, say: Say | None = None) -> list[Device]:
    """Local GPUs with the speed of their products with the first of `types`, where it can be measured; others as they
    are. Remembered like the CPU's.
    """
    path, name = folders.cache_folder() / "gpus.json", next(iter(_known(types)), "")
    found = []
    for device in devices:
        mark = f"{_mark(1)} {device.name} {device.description} {name}"
        speed = _read(path).get(mark)
        if not isinstance(speed, float) and name and device.kind != "worker":
            item = Item("device", name, device.name)
            speed = run_items([item], threads=1, say=say)[item].value or 0.0
            _keep(path, mark, speed)
        found.append(replace(device, speed=speed) if isinstance(speed, float) and speed > 0 else device)
    return found


def verdicts(types: Iterable[str], *, threads: int, say: Say | None = None) -> dict[tuple[str, str], str]:
    """RIGHT, NOT_HELD or what is wrong, by extra buffer type and type; measured where not known yet.

    A buffer type other than CPU_REPACK is given up at the first failure: the rest is not there.
    """
    record = _knowledge(_known(types), threads=threads, say=say)
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


def _knowledge(names: Sequence[str], *, threads: int, say: Say | None) -> _Record:
    path, mark = folders.cache_folder() / "speeds.json", _mark(threads)
    record = _remembered(_read(path).get(mark))
    missing = [name for name in dict.fromkeys((*names, _REFERENCE)) if name not in record.plain]
    if missing:
        _measure(missing, record, threads=threads, say=say)
        _keep(path, mark, asdict(record))
    return record


def _measure(names: Sequence[str], record: _Record, *, threads: int, say: Say | None) -> None:
    """Add what can be known about these types to the record."""
    checks = run_items(list(_checks(names, record)), threads=threads, say=say)
    for item, outcome in checks.items():
        record.verdicts.setdefault(item.buffer, {})[item.type] = outcome.verdict
    able = [name for name in names if record.verdicts.get(REPACK, {}).get(name) == RIGHT]
    timed = [*(Item("speed", name) for name in names), *(Item("speed", name, REPACK) for name in able)]
    timed += [Item("prompt", name, buffer) for name in able for buffer in ("", REPACK)]
    timings = run_items(timed, threads=threads, say=say)
    for item, outcome in timings.items():
        record.table(item)[item.type] = outcome.value or 0.0
    if not record.expires and any(outcome.fleeting for outcome in (*checks.values(), *timings.values())):
        record.expires = time.time() + _FLEETING_SECONDS


def _checks(names: Iterable[str], record: _Record) -> Iterator[Item]:
    for buffer in extra_buffer_types():
        known = record.verdicts.get(buffer, {})
        if not _is_broken(buffer, known.values()):
            wanted = dict.fromkeys((*(() if buffer == REPACK else _CANARIES), *names))
            yield from (Item("check", name, buffer) for name in wanted if name not in known)


def _is_broken(buffer: str, found: Iterable[str]) -> bool:
    """Whether the rest need not be tried. CPU_REPACK has kernels of its own for each type."""
    return buffer not in ("", REPACK) and any(text not in (RIGHT, NOT_HELD) for text in found)


def _mark(threads: int) -> str:
    """Of everything that what was measured depends on."""
    digest = hashlib.sha256()
    for name in ("ggml-base", "ggml-cpu"):
        digest.update(library_path(name).read_bytes())
    version = importlib.metadata.version("llama-cpp-python")
    facts = [_METHOD, version, cpu_device().description, sorted(cpu_flags()), threads]
    return hashlib.sha256(digest.digest() + json.dumps(facts).encode()).hexdigest()


def _working_set() -> int:
    """Bytes of weights that do not fit the processor's caches, nor crowd out what else is in memory."""
    wanted = min(_last_cache() * 3 // 2, _LARGEST_SET, memory_limits()[1] // 4)
    return max(wanted, _SMALLEST_SET)


def _last_cache(*, root: Path = Path("/")) -> int:
    """Bytes of the last cache, those of all its parts together."""
    parts: dict[str, int] = {}
    for folder in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3")):
        with suppress(OSError, ValueError):
            size = int((folder / "size").read_text().strip().removesuffix("K")) << 10
            parts[(folder / "shared_cpu_list").read_text()] = size
    return sum(parts.values()) or _CACHE_GUESS


# -- the parent's side -------------------------------------------------------------------------------------------------


def run_items(
    items: Sequence[Item], *, threads: int, timeout: float = _ITEM_SECONDS, say: Say | None = None
) -> dict[Item, Outcome]:
    """Try each in a child. One that crashes or takes more than `timeout` seconds is a failure; the rest goes on."""
    request = {"threads": threads, "size": _working_set()}
    outcomes: dict[Item, Outcome] = {}
    while left := [item for item in items if item not in outcomes and not _is_given_up(item, outcomes)]:
        outcomes.update(zip(left, list(_from_child({**request, "items": left}, timeout, say)), strict=False))
    return outcomes


def _is_given_up(item: Item, outcomes: Mapping[Item, Outcome]) -> bool:
    return item.kind != "device" and _is_broken(
        item.buffer, (done.verdict for tried, done in outcomes.items() if tried.buffer == item.buffer)
    )


def _from_child(request: dict[str, Any], timeout: float, say: Say | None) -> Iterator[Outcome]:
    """The items' outcomes in their order, as far as one child gets: the last may be what became of it."""
    with tempfile.TemporaryFile() as errors, _child(request, errors) as child:
        try:
            yield from _outcomes(child, request["items"], errors, timeout, say)
        finally:
            child.kill()


def _outcomes(
    child: subprocess.Popen[bytes], items: Sequence[Item], errors: IO[bytes], timeout: float, say: Say | None
) -> Iterator[Outcome]:
    if not (greeting := _line(child, timeout)):
        yield from [_failure(child, errors, greeting, timeout)] * len(items)
        return
    for item in items:
        if say:
            say(f"measuring this machine, once: {item}")
        answer = _line(child, timeout)
        yield Outcome(**json.loads(answer)) if answer else _failure(child, errors, answer, timeout)
        if not answer:
            return


def _child(request: dict[str, Any], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "grok_local.machine.kernels", json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        bufsize=0,  # what is buffered, wait() does not see
        cwd=Path(__file__).parents[2],  # -m looks there first: not where the user is
        env={**os.environ, **_ENVIRONMENT},
    )


def _line(child: subprocess.Popen[bytes], timeout: float) -> bytes | None:
    """The child's next line: empty if it is gone, None if the time is over."""
    assert child.stdout
    if not wait([child.stdout.fileno()], timeout):
        return None
    line = child.stdout.readline()
    return line if line.endswith(b"\n") else b""


def _failure(child: subprocess.Popen[bytes], errors: IO[bytes], line: bytes | None, timeout: float) -> Outcome:
    """What became of a child that answered with no line."""
    if line is None:
        return Outcome(failure=f"not finished after {timeout:g} s", fleeting=True)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout)
    child.kill()
    code = child.wait()
    errors.seek(0)
    words = errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    if code >= 0:
        return Outcome(failure=f"failed ({words or f'exit code {code}'})", fleeting=True)
    name = signal.Signals(-code).name
    cause = f"{name}, {words.rpartition('/')[2]}" if name == "SIGABRT" and words else name
    return Outcome(failure=f"crashed ({cause})", fleeting=name in ("SIGKILL", "SIGTERM", "SIGINT"))


# -- the child's side --------------------------------------------------------------------------------------------------


def _serve(request: dict[str, Any]) -> None:
    _leave_no_core()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever C libraries print is no answer
    extra_buffer_types()
    print("ready", file=answers, flush=True)
    for item in request["items"]:
        outcome = _try(Item(*item), threads=request["threads"], size=request["size"])
        print(json.dumps(asdict(outcome)), file=answers, flush=True)


def _leave_no_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: else a crash reporter would see a bug in Python


def _try(item: Item, *, threads: int, size: int) -> Outcome:
    kind = GGMLQuantizationType[item.type]
    try:
        if item.kind == "device":
            device = next(device for device in backend_devices() if device.name == item.buffer)
            return Outcome(products.device_speed(kind, device=device, size=min(size, device.free // 4)))
        buffer = {"": None, **extra_buffer_types()}[item.buffer]
        if item.kind == "speed":
            timing = products.decode_speed(kind, threads=threads, size=size, buffer=buffer)
            return Outcome(timing.speed, fleeting=timing.share < _UNDISTURBED) if timing else Outcome()
        if item.kind == "prompt":
            timing = products.prompt_speed(kind, threads=threads, buffer=buffer)
            return Outcome(timing.speed, fleeting=timing.share < _UNDISTURBED) if timing else Outcome()
        rows, force = _ROWS.get(item.buffer, _OTHER_ROWS), item.kind == "force"
        error = products.largest_error(kind, rows=rows, buffer=buffer, threads=threads, force=force)
    except (GrokLocalError, MemoryError) as problem:
        return Outcome(failure=f"failed ({problem or 'out of memory'})", fleeting=True)
    return Outcome(error)


# -- the disk ----------------------------------------------------------------------------------------------------------


def disk_speed(path: Path) -> float:
    """Bytes a second that the disk reads of this file, past the page cache; remembered for a day by file system.

    0.0 if it cannot be measured: no file, or one too small.
    """
    try:
        found = path.stat()
    except OSError:
        return 0.0
    memory, mark = folders.cache_folder() / "disks.json", str(found.st_dev)
    with suppress(TypeError, ValueError):
        speed, when = map(float, _read(memory).get(mark, ()))
        if speed > 0 and 0 <= time.time() - when < _DISK_BELIEVED:
            return speed
    speed = _read_speed(path, found.st_size // _DISK_BLOCK)
    if speed:
        _keep(memory, mark, [speed, time.time()])
    return speed


def _read_speed(path: Path, blocks: int) -> float:
    if blocks < _DISK_THREADS:
        return 0.0
    chosen = random.Random(0).sample(range(blocks), min(blocks, _DISK_BYTES // _DISK_BLOCK))
    start = time.perf_counter()

    def read(thread: int) -> int:
        return _read_blocks(path, chosen[thread::_DISK_THREADS], until=start + _DISK_SECONDS)

    with ThreadPoolExecutor(_DISK_THREADS) as pool:
        nbytes = sum(pool.map(read, range(_DISK_THREADS)))
    return nbytes / (time.perf_counter() - start)


def _read_blocks(path: Path, blocks: Sequence[int], *, until: float) -> int:
    """Bytes read; from the page cache nothing, if it can be avoided."""
    for flags in (getattr(os, "O_DIRECT", 0), 0):  # not every file system has it
        with suppress(OSError), mmap.mmap(-1, _DISK_BLOCK) as buffer:  # aligned, as O_DIRECT wants it
            return sum(_read_with(path, flags, blocks, buffer, until))
    return 0


def _read_with(path: Path, flags: int, blocks: Sequence[int], buffer: mmap.mmap, until: float) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        if hasattr(fcntl, "F_NOCACHE"):  # macOS has this instead
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        for block in blocks:
            if not flags and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, block * _DISK_BLOCK, _DISK_BLOCK, os.POSIX_FADV_DONTNEED)
            yield os.preadv(fd, [buffer], block * _DISK_BLOCK)
            if time.perf_counter() > until:
                return
    finally:
        os.close(fd)


# -- what is remembered ------------------------------------------------------------------------------------------------


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


def _read(path: Path) -> dict[str, Any]:
    """What was kept; nothing, if the file is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads(path.read_bytes())
        return data if isinstance(data, dict) else {}
    return {}


def _keep(path: Path, mark: str, value: Any) -> None:
    """Add to the file what is worth measuring again where it cannot be written; others may do so at the same time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump({**_read(path), mark: value}, file)
        Path(file.name).replace(path)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
