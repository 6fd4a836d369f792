"""The examples of docs/serve.md: run against a server, and checked as far as this machine can."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from grok_local.cli import app
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


def test_the_unit(tmp_path: Path) -> None:
    (unit,) = re.findall(r"```ini\n(.*?)```", TEXT, re.DOTALL)
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    _check_command(shlex.split(command)[1:])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not here")
    file = tmp_path / "grok-local.service"
    file.write_text(unit.replace("/opt/grok-local/bin/grok-local", sys.executable))
    ended = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_container() -> None:
    (text,) = re.findall(r"```dockerfile\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.partition(" ") for line in text.splitlines() if line]
    assert {word for word, _, _ in lines} <= {"FROM", "RUN", "ENV", "COPY", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}
    given = {word: rest for word, _, rest in lines}
    _check_command([*json.loads(given["ENTRYPOINT"]), *json.loads(given["CMD"])][1:])
    for word, _, rest in lines:
        if word == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)


def _check_command(arguments: list[str]) -> None:
    """Whether the command line takes them."""
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    assert name == "serve"
    group.commands[name].make_context(name, rest)
