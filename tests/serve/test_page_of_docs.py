"""The examples of docs/serve.md, run against a server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import Running

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs(trained_server: Running, number: int) -> None:
    program = PROGRAMS[number].replace("http://127.0.0.1:8080", trained_server.url)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_commands(trained_server: Running, number: int) -> None:
    command = COMMANDS[number].replace("http://127.0.0.1:8080", trained_server.url)
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert '"error"' not in ended.stdout
    assert ended.stdout.startswith(("{", "data: {"))
