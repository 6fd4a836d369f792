"""How fast the disk is that a file is on, and what room a release needs on it."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from grok_local.files import DirectFile
from grok_local.machine.kept import keep, kept, kept_path
from grok_local.pages import Region

__all__ = ["RELEASE_SPACE", "disk_speed", "free_space", "nearest_folder"]

RELEASE_SPACE = 318_000_000_000 + 181_000_000_000  # bytes of Grok-1 as released, and of its 4-bit file

_SECONDS, _BYTES = 1.0, 1 << 30  # how long is read at most, and how much
_BLOCK, _THREADS = 8 << 20, 4
_WAY = "into huge pages"  # of measuring: what was measured in another way is of no use
_BELIEVED = 86_400.0  # seconds


def disk_speed(path: Path, *, measure: Callable[[Path], float] | None = None) -> float:
    """Bytes a second that the disk reads of this file, past the page cache and into memory as experts have it.

    That is remembered for a day by file system. It is 0.0 where that cannot be measured: there is no file, or it is too
    small.
    """
    try:
        mark = f"{path.stat().st_dev} {_WAY}"
    except OSError:
        return 0.0
    memory = kept_path("disks.json")
    with suppress(TypeError, ValueError):
        speed, when = map(float, kept(memory).get(mark, ()))
        if speed > 0 and 0 <= time.time() - when < _BELIEVED:
            return speed
    speed = (measure or read_speed)(path)
    if speed:
        keep(memory, mark, [speed, time.time()])
    return speed


def free_space(folder: Path) -> int:
    """Bytes free where the folder is, or would be. Raises OSError."""
    return shutil.disk_usage(nearest_folder(folder)).free


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there: on the disk where it would be made."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def read_speed(path: Path) -> float:
    """Bytes a second, of blocks all over the file, four at a time; 0.0 where it has too few of them to be timed."""
    try:
        with DirectFile(path) as file:
            blocks = file.status().st_size // _BLOCK
            return _speed(file, blocks) if blocks >= _THREADS else 0.0
    except OSError:
        return 0.0


def _speed(file: DirectFile, blocks: int) -> float:
    chosen = random.Random(0).sample(range(blocks), min(blocks, _BYTES // _BLOCK))
    start = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = [chosen[thread::_THREADS] for thread in range(_THREADS)]
        nbytes = sum(pool.map(lambda part: _read_blocks(file, part, until=start + _SECONDS), parts))
    return nbytes / (time.perf_counter() - start)


def _read_blocks(file: DirectFile, blocks: Sequence[int], *, until: float) -> int:
    """Bytes read; from the page cache nothing, if it can be avoided."""
    nbytes, buffer = 0, Region(0, _BLOCK, huge=True)
    with buffer.view(0, _BLOCK) as memory:
        for block in blocks:
            file.drop_cache(block * _BLOCK, _BLOCK)
            nbytes += file.read(memory, block * _BLOCK)
            if time.perf_counter() > until:
                break
    buffer.close()
    return nbytes
