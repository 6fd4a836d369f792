"""What a process takes, measured so that nothing of whoever measures is counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["bytes_read", "forget_cached", "measured"]

# A child begins with its parent's high-water mark of memory, which exec does not reset: so the command is started by a
# process that is as small as Python gets, whatever the one is that wants to know.
_STARTER = """
import json, os, subprocess, sys, time
started = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([time.monotonic() - started, usage.ru_maxrss * unit, os.waitstatus_to_exitcode(status)]))
"""


def measured(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command. Raises CalledProcessError where it fails."""
    starter = [sys.executable, "-S", "-c", _STARTER, *command]
    done = subprocess.run(starter, stdout=subprocess.PIPE, check=True, env=env)
    seconds, peak, code = json.loads(done.stdout)
    if code:
        raise subprocess.CalledProcessError(code, list(command))
    return seconds, peak


def forget_cached(path: Path) -> None:
    """Have a file read from the disk again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read(pid: int | str = "self") -> int:
    """Bytes that a process has had read from disks."""
    line = re.search(r"^read_bytes: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    return int(line[1]) if line else 0
