"""What a command takes, measured so that nothing of whoever measures is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

__all__ = ["measured"]

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
