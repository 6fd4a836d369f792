"""Tables, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from grok_local.units import format_bytes, printable

if TYPE_CHECKING:
    from grok_local.library.inventory import Entry
    from grok_local.library.sessions import Kept

__all__ = ["cell", "entries_table", "new_table", "output_width", "print_tables", "sessions_table"]

_PIPED = 200  # columns: nothing is broken there that a program may look for


def new_table(*titles: str, caption: str = "") -> Table:
    """An empty table with these columns; the caption, which may hold anything, stands before it."""
    title = cell(caption) if caption else None
    return Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")


def output_width() -> int:
    """Columns of stdout."""
    console = Console()
    return console.width if console.is_terminal else _PIPED


def print_tables(tables: Iterable[Table]) -> None:
    """On stdout, as wide as they need to be where that is no terminal."""
    console = Console(width=output_width())
    for table in tables:
        if table.title:  # in a table it would be broken at the table's width
            console.print(table.title, style="bold", highlight=False)
            table.title = None
        console.print(table)


def cell(text: str) -> str:
    """Text from a file, harmless to rich and to the terminal."""
    return escape_markup(printable(text))


def entries_table(entries: Iterable[Entry]) -> Table:
    """Models and checkpoints on this machine."""
    table = new_table("name", "kind", "type", "size", "source")
    for entry in entries:
        table.add_row(cell(entry.name), entry.kind, cell(entry.type), format_bytes(entry.bytes), cell(entry.source))
    return table


def sessions_table(sessions: Iterable[Kept]) -> Table:
    """Conversations that are kept."""
    table = new_table("session", "messages", "model", "size")
    for session in sessions:
        table.add_row(cell(session.name), str(session.messages), cell(session.model), format_bytes(session.bytes))
    return table
