"""Tables, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from grok_local.units import format_bytes, printable

if TYPE_CHECKING:
    from grok_local.library.inventory import Entry

__all__ = ["cell", "entries_table", "print_tables"]


def print_tables(tables: Iterable[Table]) -> None:
    """On stdout, as wide as they need to be where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in tables:
        console.print(table)


def cell(text: str) -> str:
    """Text from a file, harmless to rich and to the terminal."""
    return escape_markup(printable(text))


def entries_table(entries: Iterable[Entry]) -> Table:
    """Models and checkpoints on this machine."""
    table = Table("name", "kind", "type", "size", "source")
    for entry in entries:
        table.add_row(cell(entry.name), entry.kind, cell(entry.type), format_bytes(entry.bytes), cell(entry.source))
    return table
