"""What is said where a device is used: ours, and none of what backends have to say of themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from grok_local.ggml.devices import BackendDevice
from tests.conftest import Run


def test_looking_at_the_machine_says_nothing(device: BackendDevice) -> None:
    """As plan, doctor and worker do."""
    program = "from grok_local.machine.this_machine import this_machine; print(this_machine().devices[0].name)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{device.name}\n", "")


def test_an_answer_is_all_there_is(packed_as: Callable[[str], Path], run: Run) -> None:
    done = run("generate", "-m", packed_as("q4_k"), "--context", 64, "--max-tokens", 2, "one two")
    assert done.returncode == 0
    assert "ggml" not in done.stderr
