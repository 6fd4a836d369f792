"""Worker processes for tests, on free ports of the loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from grok_local.errors import WorkerError
from grok_local.runtime.remote.probing import probe_worker

# One thread: ggml's threads spin while they wait, and tests share their processors.
PROGRAM = "import sys; from grok_local.runtime.remote.server import serve_worker; serve_worker(sys.argv[1], 1)"


class Worker:
    """A worker that runs `program` with its endpoint and `arguments`. A context manager."""

    def __init__(self, *, host: str = "127.0.0.1", program: str = PROGRAM, arguments: Sequence[str] = ()) -> None:
        self.endpoint = f"{host}:{free_port()}"
        command = [sys.executable, "-c", program, self.endpoint, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(self._serves)

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        try:
            return bool(probe_worker(self.endpoint))
        except WorkerError:
            return False

    def end(self, number: int = signal.SIGKILL) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=5)
        return self.process.returncode, output, errors

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
