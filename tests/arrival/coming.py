"""What the tests of arrival share: the hub with either release, what is ordered of it, and what must come of that."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from grok_local.arrival.arriving import Wanted, arrival
from grok_local.arrival.lots import Lot
from grok_local.arrival.room import disk_used
from grok_local.files import journal_of, partial_of
from grok_local.quantize.convert import Limits, QuantizeReport
from tests.conftest import TOKENIZER
from tests.hub.hub_server import Hub

RELEASES = ["grok-1", "grok-2"]
Expected = Callable[[str], bytes]


def release_of(hub: Hub) -> str:
    return hub.repository.rpartition("/")[2]


def ordered(hub: Hub, folder: Path, *, discard: bool = True, split_size: int | None = None, **options: Any) -> Wanted:
    """The release into folder/release, packed to folder/x.gguf."""
    output = folder / "x.gguf"
    limits = Limits.parsed(output, threads=2, memory="4G", split_size=split_size)
    tokenizer = TOKENIZER if release_of(hub) == "grok-1" else None
    given = {"tokenizer": tokenizer, **options}
    return Wanted(release_of(hub), folder / "release", output, limits, discard=discard, **given)


def pack(order: Wanted, **options: Any) -> QuantizeReport:
    with arrival(order) as coming:
        return coming.pack(**options)


def command(order: Wanted, *more: object) -> list[str]:
    """The same as a process of its own."""
    where = ["--to", order.folder, "-o", order.output, "--threads", 2]
    tokenizer = ["--tokenizer", order.tokenizer] if order.tokenizer else []
    discard = ["--discard"] if order.discard else []
    arguments = ["pull", order.release, "--quantize", order.type, *where, *tokenizer, *discard, *more]
    return [sys.executable, "-m", "grok_local", *map(str, arguments)]


def tensors_in(folder: Path) -> list[Path]:
    """The release's files that are there."""
    return [*folder.glob("release/ckpt-0/*"), *folder.glob("release/*.safetensors")]


def is_tensor(path: str) -> bool:
    return path.startswith("ckpt-0/") or path.endswith(".safetensors")


def asked_for(hub: Hub, start: int = 0) -> set[str]:
    """The paths of tensors' files that were asked for since the request `start`, other than for parts of them."""
    marker = "/resolve/"
    return {
        path.partition(marker)[2].partition("/")[2]
        for _, path, span in hub.requests[start:]
        if marker in path and (not span or span.endswith("-"))
    }


def packed_and_safe(order: Wanted) -> set[str]:
    """Which of the release's files an unfinished run needs no more: all that is made of them is there, by the journal
    and by the bytes themselves.
    """
    journal = journal_of(order.output)
    if not journal.exists():
        return set()
    lines = [json.loads(line) for line in journal.read_bytes().split(b"\n")[1:-1]]
    hashes = {line["piece"]: line["sha256"] for line in lines}
    data = partial_of(order.output).read_bytes()
    with arrival(order) as coming:
        lots = coming.ordered.lots
    safe = [lot for lot in lots if _is_there(lot, hashes, data)]
    return {str(path.relative_to(order.folder)) for lot in safe for path in lot.files}


def _is_there(lot: Lot, hashes: dict[int, str], data: bytes) -> bool:
    return all(
        hashes.get(piece.index) == hashlib.sha256(data[piece.offset : piece.offset + piece.nbytes]).hexdigest()
        for piece in lot.pieces
    )


class DiskWatch:
    """Looks all the time at what a folder takes of the disk. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.peak, self._folder, self._done = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            with suppress(FileNotFoundError):  # a folder went while it was looked through
                self.peak = max(self.peak, disk_used(path for path in self._folder.rglob("*") if path.is_file()))

    def __enter__(self) -> DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


# Starts grok-local many times without importing everything each time; it says a process's number, then how it ended.
_STARTER = """
import json, os, sys
import huggingface_hub.hf_api, httpx2
from grok_local import cli
from grok_local.arrival import arriving
from grok_local.views import progress
for line in sys.stdin:
    process = os.fork()
    if not process:
        os.dup2(2, 1)
        sys.stdin = open(os.devnull)
        sys.argv = json.loads(line)
        try:
            cli.main()
        except SystemExit as leaving:
            os._exit(leaving.code or 0)
        finally:
            os._exit(99)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Starter:
    """Runs one command after the other, and kills it when it is told to. A context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _STARTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )

    def run(self, order: Wanted, *, until: Callable[[], bool]) -> int:
        """Returns how it ended: -9 where it was killed, which it is when `until` says so."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(command(order)[2:]).encode() + b"\n")
        number = int(self._process.stdout.readline())
        while not (ended := select.select([self._process.stdout], [], [], 0.002)[0]) and not until():
            pass
        if not ended:
            os.kill(number, signal.SIGKILL)
        return int(self._process.stdout.readline())

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
