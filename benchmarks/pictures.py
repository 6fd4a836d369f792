"""Draws the documents' pictures from the program's own output: python -m benchmarks.pictures

A chat, a plan and a record of routing, as a terminal of 80 columns shows them.
"""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parents[1] / "docs"
PROGRAM = [sys.executable, "-m", "grok_local"]
PLAN = "plan --like grok-1 --ram 128G --vram 24G --ram-speed 80G --vram-speed 900G --disk-speed 7G"
QUESTIONS = ("What is an expert?", "How much memory does Grok-1 need?", "And with 64 GB?", "Who painted the Mona Lisa?")


def main() -> None:
    draw(f"$ grok-local {PLAN}\n" + shown(PLAN.split()), DOCS / "plan.svg", title="grok-local plan")
    draw("$ scripts/run chat\n" + talked(), DOCS / "session.svg", title="grok-local chat")
    with tempfile.TemporaryDirectory() as folder:
        record = f"{folder}/routing.jsonl"
        text = (
            "An expert is one of the parallel networks in a layer, and the router chooses two of them for every token."
        )
        subprocess.run([*PROGRAM, "generate", "--trace-experts", record, text], check=True, capture_output=True)
        subprocess.run([*PROGRAM, "routing", record, "-o", DOCS / "routing.svg"], check=True)


def draw(output: str, path: Path, *, title: str) -> None:
    """ANSI text -> SVG."""
    console = Console(record=True, width=80, file=Path(os.devnull).open("w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi(output.rstrip()))
    console.save_svg(str(path), title=title)


def shown(arguments: list[str]) -> str:
    """What a command prints on a terminal."""
    return _in_terminal(arguments, [])


def talked() -> str:
    """A chat's screen: each question behind its prompt, without what an editor sends to move the cursor."""
    subprocess.run([*PROGRAM, "generate", "Hi"], check=True, capture_output=True)  # packs it, once
    questions = [f"{question}\r" for question in QUESTIONS]
    screen = _in_terminal(["chat"], [*questions, "/exit\r"], TERM="dumb")
    return re.sub(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]", "", screen)


def _in_terminal(arguments: list[str], lines: list[str], **env: str) -> str:
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "50", "TERM": "xterm-256color", **env}
    process = subprocess.Popen([*PROGRAM, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output = _read(master, quiet=6.0)  # the start takes longest
    for line in lines:
        os.write(master, line.encode())
        output += _read(master, quiet=2.0)
    output += _read(master, quiet=1.0)
    process.wait(60)
    os.close(master)
    return output.decode(errors="replace").replace("\r\n", "\n")


def _read(descriptor: int, *, quiet: float) -> bytes:
    """What comes until nothing has come for so many seconds."""
    data, until = b"", time.monotonic() + quiet
    while time.monotonic() < until:
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                data += os.read(descriptor, 1 << 16)
            except OSError:  # the program has ended
                return data
            until = time.monotonic() + quiet
    return data


if __name__ == "__main__":
    main()
