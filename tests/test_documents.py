"""The CLI reference is the CLI's own help; `python -m tests.test_documents` writes it anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
COMMANDS = (
    "quantize",
    "verify",
    "inspect",
    "generate",
    "chat",
    "batch",
    "routing",
    "plan",
    "bench",
    "doctor",
    "worker",
    "demo",
    "pull",
    "list",
    "rm",
)


def _help(*arguments: str) -> str:
    command = [sys.executable, "-m", "grok_local", *arguments, "--help"]
    env = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    return text.strip()


def reference() -> str:
    """The page's text."""
    parts = [
        "# Command-line reference",
        "Written by `python -m tests.test_documents` from the program's own help.",
    ]
    commands: list[tuple[str, ...]] = [(), *((name,) for name in COMMANDS)]
    parts += [f"## {' '.join(('grok-local', *command))}\n\n```\n{_help(*command)}\n```" for command in commands]
    return "\n\n".join(parts) + "\n"


def test_the_reference_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "run: python -m tests.test_documents"


if __name__ == "__main__":
    PAGE.write_text(reference())
