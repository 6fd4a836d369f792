"""The CLI reference is the CLI's own help; `python -m tests.test_documents` writes it anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from grok_local.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def commands(table: typer.Typer, *above: str) -> Iterator[tuple[str, ...]]:
    """What comes after the program's name to have each help, in the order of the table."""
    yield above
    for command in table.registered_commands:
        assert command.callback
        yield (*above, command.name or command.callback.__name__)
    for group in table.registered_groups:
        assert group.typer_instance
        yield from commands(group.typer_instance, *above, group.name or "")


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
    parts += [f"## {' '.join(('grok-local', *command))}\n\n```\n{_help(*command)}\n```" for command in commands(app)]
    return "\n\n".join(parts) + "\n"


def test_the_reference_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "run: python -m tests.test_documents"


if __name__ == "__main__":
    PAGE.write_text(reference())
