"""What is on this machine: the tour, downloads, lists, deletions."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from grok_local.commands.options import (
    TYPES,
    Json,
    Threads,
    complete_entry,
    complete_session,
    one_of,
    print_json,
    resumable,
    say,
)
from grok_local.errors import OptionError
from grok_local.units import printable

if TYPE_CHECKING:
    from grok_local.arrival.arriving import Wanted

__all__ = ["demo", "export_session", "list_", "list_sessions", "pull", "rm", "rm_sessions"]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Session = Annotated[str, typer.Argument(help="A session, as list shows them.", autocompletion=complete_session)]


def demo(
    pause: Annotated[bool, typer.Option(help="Wait for Enter after each part, where there is a terminal.")] = True,
) -> None:
    """Take a tour in under a minute. It packs the built-in model, verifies it and asks it three questions.

    grok-local demo
    """
    from grok_local.ggml import libraries
    from grok_local.tour import Tour

    libraries.exit_on_abort()
    Tour(pause=pause and sys.stdin.isatty() and sys.stdout.isatty()).run()


def pull(
    release: Annotated[str, typer.Argument(help="grok-1 or grok-2.", autocompletion=one_of("grok-1", "grok-2"))],
    to: Annotated[
        Optional[str],
        typer.Option(help="The folder for it.  [default: its name in the checkpoints folder]", metavar="<path>"),
    ] = None,
    tokenizer: Annotated[
        Optional[Path],
        typer.Option(help="Grok-1's tokenizer.model.  [default: fetched from the release's git repository]"),
    ] = None,
    quantize: Annotated[
        Optional[str],
        typer.Option(help="Pack each file as it arrives, to q4_k for example.", metavar="TYPE", autocompletion=TYPES),
    ] = None,
    discard: Annotated[
        bool, typer.Option("--discard", help="Delete each file once all that is in it is packed and on the disk.")
    ] = False,
    output: Annotated[
        Optional[Path],
        typer.Option("-o", "--output", help="The GGUF.  [default: named after folder and type, in the models folder]"),
    ] = None,
    threads: Threads = None,
    memory: Annotated[
        Optional[str], typer.Option(help="The process's peak memory while packing.  [default: 4G]", metavar="SIZE")
    ] = None,
    split_size: Annotated[Optional[str], typer.Option(help="Write parts of at most this size.", metavar="SIZE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how much of the disk it takes, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Download a release and check every file. Stopped, the same command goes on where it was.

    With --quantize it is packed while it comes, and with --discard it never lies on the disk as a whole.

    grok-local pull grok-2 --quantize q4_k --discard
    """
    from grok_local import folders

    if to == "":
        raise OptionError("--to names no folder")
    folder = Path(to) if to else folders.checkpoints_folder() / release
    if quantize is None:
        if discard or dry_run or force or any(given is not None for given in (output, threads, memory, split_size)):
            raise OptionError(
                "--discard, --dry-run, --output, --threads, --memory, --force and --split-size belong to "
                "--quantize TYPE"
            )
        _fetch(release, folder, tokenizer=tokenizer, as_json=as_json)
        return
    from grok_local.arrival.arriving import Wanted
    from grok_local.library.names import named_output
    from grok_local.quantize.convert import Limits

    target = named_output(output, quantize, folder)
    limits = Limits.parsed(target, threads=threads, memory="4G" if memory is None else memory, split_size=split_size)
    order = Wanted(release, folder, target, limits, type=quantize, discard=discard, tokenizer=tokenizer)
    _fetch_and_pack(order, force=force, dry_run=dry_run, as_json=as_json)


def _fetch(release: str, folder: Path, *, tokenizer: Path | None, as_json: bool) -> None:
    from grok_local.folders import checkpoints_folder
    from grok_local.hub.fetch import fetch_release
    from grok_local.views import progress

    with resumable(), progress.progress_view("pull", as_json=as_json) as show:
        report = fetch_release(release, folder, tokenizer=tokenizer, progress=show)
    if as_json:
        print_json({"event": "done", **asdict(report)})
        return
    print("\n".join(progress.fetch_summary(report)), file=sys.stderr)
    named = release if folder == checkpoints_folder() / release else shlex.quote(str(folder))
    print(f"next: grok-local quantize {named}", file=sys.stderr)


def _fetch_and_pack(order: Wanted, *, force: bool, dry_run: bool, as_json: bool) -> None:
    from grok_local.arrival.arriving import arrival
    from grok_local.views import progress

    with resumable(), progress.progress_view("pull", as_json=as_json) as show, arrival(order, show) as coming:
        for line in (*(f"note: {note}" for note in coming.notes), coming.room.described):
            say(line)
        if dry_run:
            if as_json:
                print_json({"event": "room", **coming.room.figures()})
            coming.room.check()
            return
        report = coming.pack(force=force)
    if as_json:
        print_json({"event": "done", **asdict(report), "fetched": coming.passage.received})
    else:
        print("\n".join(progress.quantize_summary(report)), file=sys.stderr)


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
