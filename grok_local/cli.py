"""The command line: one short function per command, no logic. `main` alone prints errors and exits."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from grok_local.errors import GrokLocalError, OptionError, VerifyError
from grok_local.units import printable

app = typer.Typer(
    name="grok-local",
    help="Packs xAI's Grok-1 release into 4-bit GGUF, and runs it on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich for the help costs more than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete_model(incomplete: str) -> list[str]:
    from grok_local import library

    return [name for name in library.model_names() if name.startswith(incomplete)]


def _complete_entry(incomplete: str) -> list[str]:
    from grok_local import inventory

    return [name for name in inventory.entry_names() if name.startswith(incomplete)]


ModelOption = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        help="A GGUF, a name in the models folder, or the built-in model.",
        metavar="MODEL",
        envvar="GROK_LOCAL_MODEL",
        autocompletion=_complete_model,
    ),
]
Context = Annotated[
    Optional[int], typer.Option(help="Tokens of context.  [default: the model's, at most 8192]", min=1, max=1 << 24)
]
Threads = Annotated[Optional[int], typer.Option(help="CPU threads.  [default: one per core]", min=1, max=512)]
KVType = Annotated[str, typer.Option(help="Type of the KV cache: f16, bf16 or f32.")]
GPULayers = Annotated[int, typer.Option(help="Layers to put on the GPU.", min=0, max=10_000)]
MaxTokens = Annotated[Optional[int], typer.Option(help="At most this many tokens an answer.", min=1, max=1 << 30)]
Stop = Annotated[Optional[list[str]], typer.Option(help="End where this text would come; may be repeated.")]
Temperature = Annotated[
    Optional[float],
    typer.Option(help="0 always takes the likeliest token.  [default: 0.7; of the built-in model 0]", min=0),
]
TopK = Annotated[int, typer.Option(help="Choose among this many tokens; 0 is off.", min=0, max=1 << 30)]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest with this much probability; 1 is off.", max=1)]
MinP = Annotated[float, typer.Option(help="Leave out tokens less likely than this much of the likeliest.", min=0)]
RepeatPenalty = Annotated[float, typer.Option(help="Above 1 makes the last 64 tokens less likely.")]
Seed = Annotated[Optional[int], typer.Option(help="The same seed gives the same answer.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from grok_local import __version__

        print(f"grok-local {__version__}")
        raise typer.Exit


@app.command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="The release's folder, its ckpt-0, or a name that was pulled.")],
    output: Annotated[
        Optional[Path],
        typer.Option("-o", "--output", help="The GGUF.  [default: grok-1-TYPE.gguf in the models folder]"),
    ] = None,
    type: Annotated[str, typer.Option(help="q4_k, q4_0, iq4_xs, mxfp4, q8_0 (nothing lost), bf16 or f32.")] = "q4_k",
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="tokenizer.model of the release.  [default: in or above the folder]")
    ] = None,
    threads: Threads = None,
    memory: Annotated[str, typer.Option(help="The process's peak memory; 1.5G is enough for Grok-1.")] = "4G",
    split_size: Annotated[Optional[str], typer.Option(help="Write parts of at most this size.", metavar="SIZE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Pack a checkpoint in Grok-1's release format into a GGUF.

    Killed or stopped, the same command goes on where it was.

    grok-local quantize ~/grok-1 --tokenizer ~/tokenizer.model
    """
    from grok_local import library, views
    from grok_local.quantize.convert import quantize_checkpoint

    source = library.resolve_checkpoint(checkpoint)
    target = library.default_output(type, source) if output is None else output
    if target.is_dir():
        target = target / library.default_output(type, source).name
    with _resumable(), views.progress_view("quantize", as_json=as_json) as show:
        report = quantize_checkpoint(
            source,
            target,
            type=type,
            tokenizer=tokenizer,
            threads=threads,
            memory=memory,
            split_size=split_size,
            force=force,
            progress=show,
        )
    if as_json:
        _print_json({"event": "done", **asdict(report)})
    else:
        print("\n".join(views.quantize_summary(report)), file=sys.stderr)


@app.command()
def verify(
    gguf: Annotated[
        str,
        typer.Argument(help="The GGUF, or any part of one, or a model's name.", autocompletion=_complete_model),
    ],
    against: Annotated[
        Optional[Path], typer.Option(help="Pack this checkpoint again and compare every byte.", metavar="CHECKPOINT")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a GGUF's structure and hashes, or compare it with its checkpoint.

    grok-local verify grok-1-q4_k.gguf --against ~/grok-1
    """
    from grok_local import library, views
    from grok_local.quantize.verify import verify as check

    with views.progress_view("verify", as_json=False) as show:
        source = against and library.resolve_checkpoint(against)
        report = check(library.resolve_model(gguf), source, progress=show)
    if as_json:
        _print_json(asdict(report))
    else:
        views.print_tables([views.verify_table(report)])
    if report.problems:
        raise VerifyError(report.problems)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A GGUF, or a checkpoint's folder.")],
    as_json: Json = False,
) -> None:
    """Show what is in a GGUF or in a checkpoint, without reading any weights.

    grok-local inspect ~/grok-1
    """
    from grok_local import library, views

    source = library.resolve_checkpoint(path)
    if source.is_dir():
        from grok_local.quantize.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(source)
        described, tables = views.describe_checkpoint(checkpoint), views.checkpoint_tables(checkpoint)
    else:
        from grok_local import gguf_file

        headers = gguf_file.read_model(library.resolve_model(str(path)))
        described, tables = views.describe_gguf(headers), views.gguf_tables(headers)
    if as_json:
        _print_json(described)
    else:
        views.print_tables(tables)


@app.command()
def generate(
    prompt: Annotated[Optional[str], typer.Argument(help="The text to continue; - reads it from stdin.")] = None,
    model: ModelOption = "tiny",
    max_tokens: MaxTokens = 128,
    stop: Stop = None,
    temperature: Temperature = None,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    kv_type: KVType = "f16",
    gpu_layers: GPULayers = 0,
    as_json: Json = False,
) -> None:
    """Continue a text; only the continuation is printed.

    grok-local generate -m grok-1-q4_k "The answer to life, the universe and everything is"
    """
    from grok_local import repl

    text = _prompt_text(prompt)
    sampling = _sampling(_or_default(temperature, model), top_k, top_p, min_p, repeat_penalty, seed)
    with _loaded(model, context=context, threads=threads, kv_type=kv_type, gpu_layers=gpu_layers) as loaded:
        reply = loaded.generate(text, max_tokens=max_tokens, stop=stop or (), **sampling)
        with repl.interruptible(loaded):
            for piece in reply:
                if not as_json:
                    print(piece, end="", flush=True)
    if as_json:
        _print_json({"text": reply.text, "finish_reason": reply.finish_reason, **asdict(reply.stats)})
    else:
        print()
        print(repl.stats_line(reply), file=sys.stderr)
    if reply.finish_reason == "interrupted":
        raise KeyboardInterrupt


@app.command()
def chat(
    model: ModelOption = "tiny",
    system: Annotated[Optional[str], typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    temperature: Temperature = None,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repeat_penalty: RepeatPenalty = 1.0,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    kv_type: KVType = "f16",
    gpu_layers: GPULayers = 0,
) -> None:
    """Have a conversation; /help lists what it understands. Without a terminal, every line of stdin is a question.

    grok-local chat -m grok-1-q4_k        without -m: the built-in model, which explains grok-local
    """
    from grok_local.repl import Repl

    options: dict[str, Any] = _sampling(_or_default(temperature, model), top_k, top_p, min_p, repeat_penalty, seed)
    options |= {"max_tokens": max_tokens, "stop": stop or ()}
    with _loaded(model, context=context, threads=threads, kv_type=kv_type, gpu_layers=gpu_layers) as loaded:
        Repl(loaded, name=model, system=system, options=options).run()


@app.command()
def demo(
    pause: Annotated[bool, typer.Option(help="Wait for Enter after each part, where there is a terminal.")] = True,
) -> None:
    """A tour in under a minute: pack the built-in model, verify it, ask it three questions.

    grok-local demo
    """
    from grok_local import ggml
    from grok_local.demo import Tour

    ggml.exit_on_abort()
    Tour(pause=pause and sys.stdin.isatty() and sys.stdout.isatty()).run()


@app.command()
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
    from grok_local import folders, views
    from grok_local.hub.release import fetch_release

    if to == Path():
        raise OptionError("--to names no folder")
    folder = to or folders.checkpoints_folder() / release
    with _resumable(), views.progress_view("pull", as_json=as_json) as show:
        report = fetch_release(release, folder, tokenizer=tokenizer, progress=show)
    if as_json:
        _print_json({"event": "done", **asdict(report)})
    else:
        print("\n".join(views.fetch_summary(report)), file=sys.stderr)
        print(f"next: grok-local quantize {release if to is None else shlex.quote(str(folder))}", file=sys.stderr)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Show the models and checkpoints on this machine.

    grok-local list
    """
    from grok_local import folders, inventory, views

    found = inventory.entries()
    if as_json:
        _print_json([asdict(entry) for entry in found])
    else:
        views.print_tables([views.entries_table(found)])
        print(f"in {folders.home()}", file=sys.stderr)


@app.command()
def rm(
    names: Annotated[
        list[str], typer.Argument(help="Models or checkpoints, as list shows them.", autocompletion=_complete_entry)
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete models or checkpoints from grok-local's folders.

    grok-local rm grok-1-q4_0
    """
    from grok_local import inventory
    from grok_local.units import format_bytes

    for entry in [inventory.entry_named(name) for name in names]:
        if not yes and not _agreed(f"delete {entry.kind} {printable(entry.name)} ({format_bytes(entry.bytes)})?"):
            print(f"{printable(entry.name)}: kept", file=sys.stderr)
            continue
        inventory.remove(entry)
        print(f"{printable(entry.name)}: deleted, {format_bytes(entry.bytes)}", file=sys.stderr)


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        raise


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise OptionError(f"{question} Nobody is there to ask: say so with --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def _loaded(model: str, **options: Any) -> Iterator[Any]:
    from grok_local import ggml, library

    ggml.exit_on_abort()
    if not library.is_packed(model):
        from grok_local import views

        print("the built-in model is packed to 4 bits, once", file=sys.stderr)
        with views.progress_view("pack", as_json=False) as show:
            library.resolve_model(model, progress=show)
    with library.load(model, **options) as loaded:
        yield loaded


def _or_default(temperature: float | None, model: str) -> float:
    """What was given; else what suits the model: the built-in one knows one answer to each question."""
    from grok_local.library import BUILT_IN

    if temperature is not None:
        return temperature
    return 0.0 if model == BUILT_IN else 0.7


def _sampling(
    temperature: float, top_k: int, top_p: float, min_p: float, repeat_penalty: float, seed: int | None
) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "seed": seed,
    }


def _prompt_text(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        raise OptionError("no prompt: give the text to continue, or - to read it from stdin")
    return sys.stdin.read()


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def main() -> None:
    """Run the command line. Known failures become a line each on stderr and the error's exit code."""
    _complete_streams()
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _give_up_stdout()
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
        print(f"error: {printable(problem)}", file=sys.stderr)
    return code


def _complete_streams() -> None:
    """Closed ones become empty ones, and none fails for a character it cannot show."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # for good
        getattr(sys, name).reconfigure(errors="replace")


def _give_up_stdout() -> int:
    # Nobody can read it any more; the interpreter must not complain about that at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    main()
