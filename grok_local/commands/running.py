"""From a GGUF to text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from grok_local.commands.options import (
    Bundle,
    Json,
    ModelOption,
    bundled,
    complete_session,
    load_options,
    print_json,
    sampling_options,
    say,
    structure_options,
)
from grok_local.commands.prompts import decoded, input_bytes, lines_of, prompt_text, typed, unescaped
from grok_local.errors import ContextError, OptionError
from grok_local.library.built_in import BUILT_IN

if TYPE_CHECKING:
    from grok_local.placement.load_options import LoadOptions, LoadRequest
    from grok_local.runtime.text.model import Model
    from grok_local.runtime.text.session import Session
    from grok_local.views.progress import Show

__all__ = ["answer_options", "chat", "generate", "loaded", "opened", "requested", "routing", "shown_packing"]

MaxTokens = Annotated[
    Optional[int], typer.Option(help="At most this many tokens an answer; -1 is no limit.", min=-1, max=1 << 30)
]
Stop = Annotated[
    Optional[list[str]], typer.Option(help="End where this text would come, \\n being a newline; may be repeated.")
]


@bundled(sampling=sampling_options, structure=structure_options, loading=load_options)
def generate(
    prompt: Annotated[
        Optional[str], typer.Argument(help="The text to continue; - reads it from stdin.", metavar="PROMPT")
    ] = None,
    model: ModelOption = BUILT_IN,
    file: Annotated[
        Optional[Path], typer.Option("-f", "--file", help="Its text comes before the prompt.", metavar="FILE")
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="Names of control tokens in the prompt are these tokens.")
    ] = False,
    max_tokens: MaxTokens = 128,
    stop: Stop = None,
    sampling: Bundle = None,
    structure: Bundle = None,
    loading: Bundle = None,
    as_json: Json = False,
) -> None:
    """Continue a text; only the continuation is printed. A text that begins with - comes after -- .

    grok-local generate -m grok-1-q4_k "The answer to life, the universe and everything is"
    """
    from grok_local.views import conversation, speeds

    text = prompt_text(prompt, file)
    if not text:
        raise ContextError("the prompt is empty: there is nothing to continue")
    options = answer_options(sampling, structure, model, max_tokens=max_tokens, stop=stop)
    with loaded(model, loading) as running:
        reply = running.generate(text, special=special, **options)
        with conversation.interruptible(running):
            for piece in reply:
                if not as_json:
                    print(piece, end="", flush=True)
    if as_json:
        parsed = {"parsed": reply.parsed} if reply.is_whole and (structure or {}).get("json_schema") else {}
        print_json({"text": reply.text, "finish_reason": reply.finish_reason, **parsed, **reply.stats.described()})
    else:
        print()
        print(speeds.stats_line(reply), file=sys.stderr)
    if reply.finish_reason == "interrupted":
        raise KeyboardInterrupt


@bundled(sampling=sampling_options, loading=load_options)
def chat(
    model: ModelOption = BUILT_IN,
    system: Annotated[Optional[str], typer.Option(help="What the model is told first.")] = None,
    template: Annotated[
        Optional[str],
        typer.Option(help="What lays the conversation out.  [default: the model's own]", metavar="none|FILE"),
    ] = None,
    session: Annotated[
        Optional[str],
        typer.Option(help="Keep the conversation under this name, or go on with it.", autocompletion=complete_session),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing beside the answers and errors.")] = False,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    sampling: Bundle = None,
    loading: Bundle = None,
) -> None:
    """Have a conversation; /help lists what it understands. Without a terminal, every line of stdin is a question.

    grok-local chat -m grok-1-q4_k        without -m: the built-in model, which explains grok-local
    """
    from grok_local.library.sessions import session_folder
    from grok_local.views.conversation import Repl

    system = None if system is None else typed(system)
    options = {**_sampling(sampling, model), **_ending(max_tokens, stop)}
    folder = session_folder(session) if session is not None else None
    with ExitStack() as stack:
        running = stack.enter_context(loaded(model, {**(loading or {}), "template": template}, quiet=quiet))
        opened_session = stack.enter_context(kept(folder, running, quiet=quiet))
        lines = lines_of(sys.stdin.buffer)
        repl = Repl(
            running, name=model, system=system, options=options, lines=lines, session=opened_session, quiet=quiet
        )
        repl.run()


@contextmanager
def kept(folder: Path | None, model: Model, *, quiet: bool) -> Iterator[Session | None]:
    """The session in a folder, if there is to be one, with a line about what it goes on from."""
    if folder is None:
        yield None
        return
    from grok_local.runtime.text.session import Session

    with Session(folder, model) as session:
        problem = session.resume()
        if session.messages and not quiet:
            anew = f"; the model reads it anew: {problem}" if problem else ""
            say(f"note: session {folder.name} goes on after {len(session.messages)} messages{anew}")
        yield session


def routing(
    record: Annotated[Path, typer.Argument(help="What --trace-experts wrote.", metavar="FILE")],
    output: Annotated[
        Optional[Path], typer.Option("-o", "--output", help="Draw it there: a PNG, SVG or PDF.", metavar="PICTURE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which experts tokens were routed to. A heat map, and how many would be found in memory.

    grok-local generate -m grok-1-q4_k --trace-experts FILE "Once upon a time"; grok-local routing FILE
    """
    from grok_local.runtime.experts.routing import read_routing
    from grok_local.views import heat_map

    if output is not None and as_json:
        raise OptionError("--output and --json: give one of them")
    found = read_routing(record)
    if output:
        heat_map.draw_routing(found, output)
    elif as_json:
        print_json(heat_map.describe_routing(found))
    else:
        heat_map.print_routing(found)


def loaded(model: str, options: Bundle, *, quiet: bool = False) -> AbstractContextManager[Model]:
    """The model, with what had to be said about its placement on stderr."""
    return opened(requested(model, options), quiet=quiet)


def requested(model: str, options: Bundle) -> LoadRequest:
    """How it is to be loaded. Raises GGUFError, OptionError."""
    from grok_local.library.names import model_request

    return model_request(model, cast("LoadOptions", options or {}), packing=shown_packing)


@contextmanager
def opened(request: LoadRequest, *, quiet: bool = False) -> Iterator[Model]:
    """Likewise, as it was asked for."""
    from grok_local.ggml.libraries import exit_on_abort, exit_on_bus_error
    from grok_local.runtime.text.model import load_model

    exit_on_abort()
    exit_on_bus_error()
    with load_model(request, say=say) as running:
        for note in () if quiet else _notes(running):
            say(f"note: {note}")
        yield running


def _notes(running: Model) -> Iterator[str]:
    from grok_local.ggml.devices import backend_names
    from grok_local.machine.rebuild import unused_gpu

    yield from running.placement.notes
    if not running.placement.plan.machine.devices and (line := unused_gpu(backend_names())):
        yield line


@contextmanager
def shown_packing() -> Iterator[Show]:
    """Shows how the built-in model is packed, the first time."""
    from grok_local.views.progress import progress_view

    say("the built-in model is packed to 4 bits, once")
    with progress_view("pack", as_json=False) as show:
        yield show


def answer_options(
    sampling: Bundle, structure: Bundle, model: str, *, max_tokens: int | None, stop: list[str] | None
) -> dict[str, Any]:
    """What `Model.generate` is told. Raises OptionError."""
    return {**_sampling(sampling, model), **_ending(max_tokens, stop), **_structure(structure)}


def _structure(options: Bundle) -> dict[str, Any]:
    """What `Model.generate` is told of the answer's form; files are read. Raises OptionError."""
    given = dict(options or {})
    schema, grammar = (given.pop(name, None) for name in ("json_schema", "grammar"))
    texts = {"schema": schema, "grammar": grammar}
    return given | {name: decoded(input_bytes(file), str(file)) for name, file in texts.items() if file}


def _sampling(options: Bundle, model: str) -> dict[str, Any]:
    """What was given; the temperature by default what suits the model."""
    from grok_local.library.names import manner_of

    given = dict(options or {})
    if given["temperature"] is None:
        given["temperature"] = manner_of(model).temperature
    return given


def _ending(max_tokens: int | None, stop: list[str] | None) -> dict[str, Any]:
    return {"max_tokens": max_tokens, "stop": [unescaped(text) for text in stop or ()]}
