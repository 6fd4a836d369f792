"""The command line: a table of commands, and `main`, which alone prints errors and exits."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, TextIO, cast

import typer

from grok_local.commands import batching, keeping, measuring, planning, quantizing, running, serving
from grok_local.commands.options import PromptCommand
from grok_local.errors import GrokLocalError
from grok_local.units import printable
from grok_local.views.terminal import wrapped

_INTERRUPTED = 130

app = typer.Typer(
    name="grok-local",
    help="Packs xAI's Grok-1 release into 4-bit GGUF, and runs it on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich for the help costs more than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from grok_local import __version__

        print(f"grok-local {__version__}")
        raise typer.Exit
    from grok_local.ggml.libraries import let_threads_rest

    let_threads_rest()  # before any command loads llama.cpp


app.command()(quantizing.quantize)
app.command()(quantizing.verify)
app.command()(quantizing.inspect)
app.command(cls=PromptCommand)(running.generate)
app.command()(running.chat)
app.command()(batching.batch)
app.command()(serving.serve)
app.command()(measuring.score)
app.command()(measuring.perplexity)
app.command()(running.routing)
app.command()(planning.plan)
app.command()(planning.bench)
app.command()(planning.doctor)
app.command()(planning.worker)
app.command()(keeping.demo)
app.command()(keeping.pull)
app.command("list")(keeping.list_)
app.command()(keeping.rm)
sessions = typer.Typer(help="Show, delete or export conversations that chat --session keeps.", no_args_is_help=True)
sessions.command("list")(keeping.list_sessions)
sessions.command("rm")(keeping.rm_sessions)
sessions.command("export")(keeping.export_session)
app.add_typer(sessions, name="sessions")


def main() -> None:
    """Run the command line. Known failures become a line each on stderr and the error's exit code."""
    _complete_streams()
    warnings.showwarning = _show_warning
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _give_up_stdout()
    except KeyboardInterrupt:  # before a command has begun
        code = _INTERRUPTED
    except OSError as error:
        _give_up_stdout()
        code = _fail([f"{error.filename or 'output'}: {error.strerror or error}"])
    sys.exit(code)


def _run() -> int | str | None:
    try:
        app(prog_name="grok-local")
    except GrokLocalError as error:
        return _fail(error.problems, error.exit_code)
    except SystemExit as leaving:
        return leaving.code
    return 0


def _fail(problems: Iterable[str], code: int = 1) -> int:
    for problem in problems:
        print(wrapped(f"error: {printable(problem)}", sys.stderr), file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Our own warnings are notes to the user; those of libraries are for whoever develops."""
    if category.__module__.startswith("grok_local."):
        print(wrapped(f"note: {printable(str(message))}", sys.stderr), file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, *place[:2]), end="", file=sys.stderr)


def _complete_streams() -> None:
    """A closed one is empty, or fails when it is written to, and none fails for a character it cannot show."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDONLY)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115  # for good
        getattr(sys, name).reconfigure(errors="replace")
    sys.stderr = cast("TextIO", _Forgiving(sys.stderr))


class _Forgiving:
    """A stream that may be lost: where progress and notes cannot be written, the work is done all the same."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _give_up_stdout() -> int:
    # Nobody can read it any more; the interpreter must not complain about that at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    main()
