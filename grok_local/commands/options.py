"""Options that several commands take, and how a command takes many of them as one."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional, TextIO, get_type_hints

import typer
from typer.core import TyperCommand

from grok_local.units import printable
from grok_local.views.terminal import wrapped

__all__ = [
    "TYPES",
    "Bundle",
    "Json",
    "ModelOption",
    "Parallel",
    "PromptCommand",
    "Reproducible",
    "Threads",
    "bundled",
    "complete_entry",
    "complete_model",
    "complete_session",
    "load_options",
    "one_of",
    "print_json",
    "resumable",
    "sampling_options",
    "say",
    "structure_options",
]

Bundle = Optional[dict[str, Any]]


def complete_model(incomplete: str) -> list[str]:
    """Names of models, for the shell."""
    from grok_local.library import names

    return [name for name in names.model_names() if name.startswith(incomplete)]


def complete_session(incomplete: str) -> list[str]:
    """Names of sessions, for the shell."""
    from grok_local.library import sessions

    return [name for name in sessions.session_names() if name.startswith(incomplete)]


def complete_entry(incomplete: str) -> list[str]:
    """Names of models and checkpoints, for the shell."""
    from grok_local.library import inventory

    return [name for name in inventory.entry_names() if name.startswith(incomplete)]


ModelOption = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        help="A GGUF, a name in the models folder, or the built-in model.",
        metavar="MODEL",
        envvar="GROK_LOCAL_MODEL",
        autocompletion=complete_model,
    ),
]
Threads = Annotated[Optional[int], typer.Option(help="CPU threads.  [default: one per free core]", min=1, max=512)]
Parallel = Annotated[
    Optional[int],
    typer.Option(help="Sequences that go together.  [default: as many as are fastest here]", min=1, max=256),
]
Reproducible = Annotated[
    bool, typer.Option("--reproducible", help="The bits of a result depend on what was asked alone; on the CPU.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def one_of(*values: str) -> Any:
    """Completes these in the shell."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def sampling_options(
    temperature: Annotated[
        Optional[float],
        typer.Option(help="0 always takes the likeliest token.  [default: 0.7; of the built-in model 0]", min=0),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Choose among this many tokens; 0 is off.", min=-1, max=1 << 30)] = 40,
    top_p: Annotated[
        float, typer.Option(help="Choose among the likeliest with this much probability; 1 is off.", max=1)
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Leave out tokens less likely than this much of the likeliest.", min=0)
    ] = 0.05,
    repeat_penalty: Annotated[float, typer.Option(help="Above 1 makes the last 64 tokens less likely.")] = 1.0,
    seed: Annotated[Optional[int], typer.Option(help="The same seed gives the same answer.", min=-1)] = None,
) -> None:
    """How the next token is chosen."""


def structure_options(
    json_schema: Annotated[
        Optional[Path], typer.Option(help="The answer is JSON that fits the schema in this file.", metavar="FILE")
    ] = None,
    regex: Annotated[Optional[str], typer.Option(help="The answer matches it, from start to end.")] = None,
    choice: Annotated[
        Optional[list[str]], typer.Option(help="The answer is one of these; may be repeated.", metavar="TEXT")
    ] = None,
    grammar: Annotated[
        Optional[Path], typer.Option(help="The answer follows the GBNF grammar in this file.", metavar="FILE")
    ] = None,
) -> None:
    """What form an answer has."""


TYPES = one_of("q4_k", "q4_0", "iq4_xs", "mxfp4", "q8_0", "bf16", "f32")
_KV_TYPES = one_of("f16", "bf16", "f32")
_SWITCH = one_of("auto", "on", "off")


def load_options(
    context: Annotated[
        Optional[int],
        typer.Option(help="Tokens; 0 is all it was trained on.  [default: that, at most 8192]", min=0),
    ] = None,
    threads: Threads = None,
    kv_type: Annotated[
        str, typer.Option(help="Type of the KV cache: f16, bf16, f32.", autocompletion=_KV_TYPES)
    ] = "f16",
    memory: Annotated[
        Optional[str],
        typer.Option(help="What it may take of RAM.  [default: what is free, less a reserve]", metavar="SIZE"),
    ] = None,
    gpu_layers: Annotated[
        Optional[str],
        typer.Option(help="Last layers on devices, the output as one.  [default: all that fit]", metavar="N|all"),
    ] = None,
    experts_on: Annotated[
        Optional[str],
        typer.Option(help="cpu, gpu, or of how many layers the experts go to devices.", metavar="cpu|gpu|N"),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],
        typer.Option(
            "--override", help="Tensors whose name matches go there; may be repeated.", metavar="PATTERN=DEVICE"
        ),
    ] = None,
    repack: Annotated[
        str,
        typer.Option(help="Weights rearranged in RAM, which is faster.", metavar="auto|on|off", autocompletion=_SWITCH),
    ] = "auto",
    stream: Annotated[
        str,
        typer.Option(
            help="Experts read as they are chosen: where they do not fit.",
            metavar="auto|on|off",
            autocompletion=_SWITCH,
        ),
    ] = "auto",
    trace_experts: Annotated[
        Optional[str],
        typer.Option(help="Record there which experts each token goes to.", metavar="FILE"),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            help="Whose gates and attention Grok-2 has; Grok-1's are the same.",
            metavar="release|llama.cpp",
            autocompletion=one_of("release", "llama.cpp"),
        ),
    ] = "release",
    workers: Annotated[
        Optional[list[str]],
        typer.Option("--worker", help="A machine that runs grok-local worker; may be repeated.", metavar="HOST:PORT"),
    ] = None,
) -> None:
    """How a model is loaded and where its weights go."""


class PromptCommand(TyperCommand):
    """A command with a prompt, which may begin with a dash: a word with a blank in it is no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, self._with_prompt_last(args))
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # Typer does not show its class
                error.message += " (a prompt that begins with a dash comes after -- )"  # type: ignore[attr-defined]
            raise

    def _with_prompt_last(self, args: list[str]) -> list[str]:
        takes_value = {name for p in self.params if not getattr(p, "is_flag", False) for name in p.opts}
        options: list[str] = []
        prompts: list[str] = []
        rest: list[str] = []
        for index, word in enumerate(args):
            if word == "--":
                rest = args[index + 1 :]
                break
            is_value = index > 0 and args[index - 1] in takes_value
            (prompts if not is_value and _is_prompt(word) else options).append(word)
        return [*options, "--", *prompts, *rest] if prompts or rest else options


def _is_prompt(word: str) -> bool:
    """Whether a word with a dash before it is text: `--stop=a b` is an option, `- a b` is none."""
    return word.startswith("-") and re.match(r"-*[^\s=]*\s", word) is not None


def bundled(**groups: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace each parameter named in `groups` by that function's parameters; the command gets them as a dict."""
    names = {bundle: list(inspect.signature(group).parameters) for bundle, group in groups.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            for bundle, own in names.items():
                given[bundle] = {name: given.pop(name) for name in own}
            command(**given)

        parameters = list(_expanded(command, groups))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer looks at
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _expanded(command: Callable[..., None], groups: dict[str, Callable[..., None]]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            yield from _expanded(groups[name], {})
        else:
            yield parameter.replace(annotation=hints[name])


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        raise


def say(text: str) -> None:
    """On stderr, where everything goes that is not data."""
    print(wrapped(printable(text), sys.stderr), file=sys.stderr)


def print_json(value: Any, file: TextIO | None = None) -> None:
    """On stdout, or to a file, in one line."""
    out, text = file or sys.stdout, json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(out.encoding or "ascii")
    except UnicodeEncodeError:  # a locale without the character, or a file's name that is no UTF-8
        text = json.dumps(value, default=str)
    print(text, file=out, flush=True)
