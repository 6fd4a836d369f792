"""Tries llama.cpp's kernels in child processes.

A kernel may crash (those for rearranged weights do, in some builds and for types they lack). A child, `python -m
grok_local.machine.trials REQUEST`, writes a line of JSON when it is ready, and one for every item of the request. Where
the lines end early, the item under way is to blame, and another child goes on after it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from gguf.constants import GGMLQuantizationType

from grok_local.errors import GrokLocalError
from grok_local.folders import scratch_folder
from grok_local.ggml import products
from grok_local.ggml.devices import backend_devices, extra_buffer_types
from grok_local.machine.facts import REPACK_ROWS, Say
from grok_local.machine.limits import last_cache, memory_limits

__all__ = ["NOT_HELD", "REPACK", "RIGHT", "Item", "Outcome", "Trial", "is_broken", "run_items", "working_set"]

RIGHT, NOT_HELD = "right", "not held"
REPACK = "CPU_REPACK"

_ROWS = {REPACK: 65 * REPACK_ROWS}  # no multiple of what other buffer types or processors might ask for
_OTHER_ROWS = 544  # AMX takes multiples of 32
_ROUNDING = 0.02  # relative RMS error between two kernels that are right
_ITEM_SECONDS = 60.0
_UNDISTURBED = 0.9  # share of the processor's time that a measurement should get
# Threads that wait for each other soon sleep: with others at work, waiting would cost seven times the work.
_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "GOMP_SPINCOUNT": "5000"}
_SMALLEST_SET, _LARGEST_SET = 64 << 20, 1 << 30  # bytes of weights that a speed is measured with

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


class Trial(Protocol):
    """Tries items and says what came of them, as `run_items` does."""

    def __call__(self, items: Sequence[Item], *, threads: int, say: Say | None = None) -> Mapping[Item, Outcome]: ...


def is_broken(buffer: str, found: Iterable[str]) -> bool:
    """Whether the rest need not be tried. CPU_REPACK has kernels of its own for each type."""
    return buffer not in ("", REPACK) and any(text not in (RIGHT, NOT_HELD) for text in found)


def working_set() -> int:
    """Bytes of weights that do not fit the processor's caches, nor crowd out what else is in memory."""
    wanted = min(last_cache() * 3 // 2, _LARGEST_SET, memory_limits()[1] // 4)
    return max(wanted, _SMALLEST_SET)


# -- the parent's side -------------------------------------------------------------------------------------------------


def run_items(
    items: Sequence[Item],
    *,
    threads: int,
    timeout: float = _ITEM_SECONDS,
    size: int | None = None,
    say: Say | None = None,
) -> dict[Item, Outcome]:
    """Try each in a child. One that crashes or takes more than `timeout` seconds is a failure; the rest goes on. Speeds
    are measured with `size` bytes of weights, by default more than the caches hold.
    """
    request = {"threads": threads, "size": size or working_set()}
    outcomes: dict[Item, Outcome] = {}
    while left := [item for item in items if item not in outcomes and not _is_given_up(item, outcomes)]:
        outcomes.update(zip(left, list(_from_child({**request, "items": left}, timeout, say)), strict=False))
    return outcomes


def _is_given_up(item: Item, outcomes: Mapping[Item, Outcome]) -> bool:
    return item.kind != "device" and is_broken(
        item.buffer, (done.verdict for tried, done in outcomes.items() if tried.buffer == item.buffer)
    )


def _from_child(request: dict[str, Any], timeout: float, say: Say | None) -> Iterator[Outcome]:
    """The items' outcomes in their order, as far as one child gets: the last may be what became of it."""
    with tempfile.TemporaryFile(dir=scratch_folder()) as errors, _child(request, errors) as child:
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
        [sys.executable, "-m", "grok_local.machine.trials", json.dumps(request)],
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


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
