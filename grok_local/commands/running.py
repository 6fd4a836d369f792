"""From a GGUF to text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from grok_local.commands.options import (
    Bundle,
    Json,
    ModelOption,
    bundled,
    load_options,
    print_json,
    sampling_options,
    say,
)
from grok_local.errors import OptionError
from grok_local.library.built_in import BUILT_IN

if TYPE_CHECKING:
    from grok_local.placement.load_options import LoadOptions
    from grok_local.runtime.text.model import Model
    from grok_local.views.progress import Show

__all__ = ["chat", "generate", "loaded", "routing"]

MaxTokens = Annotated[Optional[int], typer.Option(help="At most this many tokens an answer.", min=1, max=1 << 30)]
Stop = Annotated[Optional[list[str]], typer.Option(help="End where this text would come; may be repeated.")]


@bundled(sampling=sampling_options, loading=load_options)
def generate(
    prompt: Annotated[Optional[str], typer.Argument(help="The text to continue; - reads it from stdin.")] = None,
    model: ModelOption = BUILT_IN,
    max_tokens: MaxTokens = 128,
    stop: Stop = None,
    sampling: Bundle = None,
    loading: Bundle = None,
    as_json: Json = False,
) -> None:
    """Continue a text; only the continuation is printed.

    grok-local generate -m grok-1-q4_k "The answer to life, the universe and everything is"
    """
    from grok_local.views import conversation

    text = _prompt_text(prompt)
    with loaded(model, loading) as running:
        reply = running.generate(text, max_tokens=max_tokens, stop=stop or (), **_sampling(sampling, model))
        with conversation.interruptible(running):
            for piece in reply:
                if not as_json:
                    print(piece, end="", flush=True)
    if as_json:
        print_json({"text": reply.text, "finish_reason": reply.finish_reason, **reply.stats.described()})
    else:
        print()
        print(conversation.stats_line(reply), file=sys.stderr)
    if reply.finish_reason == "interrupted":
        raise KeyboardInterrupt


@bundled(sampling=sampling_options, loading=load_options)
def chat(
    model: ModelOption = BUILT_IN,
    system: Annotated[Optional[str], typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    sampling: Bundle = None,
    loading: Bundle = None,
) -> None:
    """Have a conversation; /help lists what it understands. Without a terminal, every line of stdin is a question.

    grok-local chat -m grok-1-q4_k        without -m: the built-in model, which explains grok-local
    """
    from grok_local.views.conversation import Repl

    options = {**_sampling(sampling, model), "max_tokens": max_tokens, "stop": stop or ()}
    with loaded(model, loading) as running:
        Repl(running, name=model, system=system, options=options).run()


def routing(
    record: Annotated[Path, typer.Argument(help="What --trace-experts wrote.", metavar="FILE")],
    output: Annotated[
        Optional[Path], typer.Option("-o", "--output", help="Draw it there: a PNG, SVG or PDF.", metavar="PICTURE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which experts tokens were routed to: a heat map, and how many would be found in memory.

    grok-local generate -m grok-1-q4_k --trace-experts FILE "Once upon a time"; grok-local routing FILE
    """
    from grok_local.runtime.experts.routing import read_routing
    from grok_local.views import heat_map

    found = read_routing(record)
    if output:
        heat_map.draw_routing(found, output)
    elif as_json:
        print_json(heat_map.describe_routing(found))
    else:
        heat_map.print_routing(found)


@contextmanager
def loaded(model: str, options: Bundle) -> Iterator[Model]:
    """The model, with what had to be said about its placement on stderr."""
    from grok_local.ggml.libraries import exit_on_abort
    from grok_local.library.names import model_request
    from grok_local.runtime.text.model import load_model

    exit_on_abort()
    request = model_request(model, cast("LoadOptions", options or {}), packing=_shown_packing)
    with load_model(request, say=say) as running:
        for note in running.placement.notes:
            say(f"note: {note}")
        yield running


@contextmanager
def _shown_packing() -> Iterator[Show]:
    from grok_local.views.progress import progress_view

    say("the built-in model is packed to 4 bits, once")
    with progress_view("pack", as_json=False) as show:
        yield show


def _sampling(options: Bundle, model: str) -> dict[str, Any]:
    """What was given; the temperature by default what suits the model."""
    from grok_local.library.names import manner_of

    given = dict(options or {})
    if given["temperature"] is None:
        given["temperature"] = manner_of(model).temperature
    return given


def _prompt_text(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        raise OptionError("no prompt: give the text to continue, or - to read it from stdin")
    return sys.stdin.read()
