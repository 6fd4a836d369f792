"""What is on this machine: the tour, downloads, lists, deletions."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from grok_local.commands.options import Json, complete_entry, complete_session, print_json, resumable
from grok_local.errors import OptionError
from grok_local.units import printable

__all__ = ["demo", "export_session", "list_", "list_sessions", "pull", "rm", "rm_sessions"]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Session = Annotated[str, typer.Argument(help="A session, as list shows them.", autocompletion=complete_session)]


def demo(
    pause: Annotated[bool, typer.Option(help="Wait for Enter after each part, where there is a terminal.")] = True,
) -> None:
    """Take a tour in under a minute. It packs the built-in model, verifies it and asks it three questions.

    grok-local demo
    """
    from grok_local.commands.tour import Tour
    from grok_local.ggml import libraries

    libraries.exit_on_abort()
    Tour(pause=pause and sys.stdin.isatty() and sys.stdout.isatty()).run()


def pull(
    release: Annotated[str, typer.Argument(help="grok-1.")],
    to: Annotated[
        Optional[Path], typer.Option(help="The folder for it.  [default: its name in the checkpoints folder]")
    ] = None,
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="tokenizer.model.  [default: fetched from the release's git repository]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download the release and check every file. Stopped, the same command goes on where it was.

    grok-local pull grok-1 --to /data/grok-1
    """
    from grok_local import folders
    from grok_local.hub.fetch import fetch_release
    from grok_local.views import progress

    if to == Path():
        raise OptionError("--to names no folder")
    folder = to or folders.checkpoints_folder() / release
    with resumable(), progress.progress_view("pull", as_json=as_json) as show:
        report = fetch_release(release, folder, tokenizer=tokenizer, progress=show)
    if as_json:
        print_json({"event": "done", **asdict(report)})
    else:
        print("\n".join(progress.fetch_summary(report)), file=sys.stderr)
        print(f"next: grok-local quantize {release if to is None else shlex.quote(str(folder))}", file=sys.stderr)


def list_(as_json: Json = False) -> None:
    """Show the models and checkpoints on this machine.

    grok-local list
    """
    from grok_local import folders
    from grok_local.library import inventory
    from grok_local.views import tables

    found = inventory.entries()
    if as_json:
        print_json([asdict(entry) for entry in found])
    else:
        tables.print_tables([tables.entries_table(found)])
        print(f"in {folders.home()}", file=sys.stderr)


def rm(
    names: Annotated[
        list[str], typer.Argument(help="Models or checkpoints, as list shows them.", autocompletion=complete_entry)
    ],
    yes: Yes = False,
) -> None:
    """Delete models or checkpoints from grok-local's folders.

    grok-local rm grok-1-q4_0
    """
    from grok_local.library import inventory
    from grok_local.units import format_bytes

    for entry in [inventory.entry_named(name) for name in names]:
        if not yes and not _agreed(f"delete {entry.kind} {printable(entry.name)} ({format_bytes(entry.bytes)})?"):
            print(f"{printable(entry.name)}: kept", file=sys.stderr)
            continue
        inventory.remove(entry)
        print(f"{printable(entry.name)}: deleted, {format_bytes(entry.bytes)}", file=sys.stderr)


def list_sessions(as_json: Json = False) -> None:
    """Show the conversations that chat --session has kept.

    grok-local sessions list
    """
    from grok_local.library.sessions import kept_sessions
    from grok_local.views import tables

    found = list(kept_sessions())
    if as_json:
        print_json([asdict(session) for session in found])
    else:
        tables.print_tables([tables.sessions_table(found)])


def rm_sessions(
    names: Annotated[list[str], typer.Argument(help="Sessions, as list shows them.", autocompletion=complete_session)],
    yes: Yes = False,
) -> None:
    """Delete conversations that were kept.

    grok-local sessions rm holiday
    """
    from grok_local.library.sessions import kept_session, remove_session

    for folder in [kept_session(name) for name in names]:
        if not yes and not _agreed(f"delete session {folder.name}?"):
            print(f"{folder.name}: kept", file=sys.stderr)
            continue
        remove_session(folder)
        print(f"{folder.name}: deleted", file=sys.stderr)


def export_session(name: Session) -> None:
    """Print a conversation as JSON, {"model", "messages"}, as chat interfaces take it.

    grok-local sessions export holiday
    """
    from grok_local.library.sessions import kept_session
    from grok_local.runtime.text.session import read_conversation

    found = read_conversation(kept_session(name))
    system = [{"role": "system", "content": found["system"]}] if found.get("system") else []
    print_json({"model": found.get("model"), "messages": [*system, *found.get("messages", [])]})


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise OptionError(f"{question} Nobody is there to ask: say so with --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
