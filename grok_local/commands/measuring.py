"""How likely texts are, by line and as perplexity."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional, TextIO

import typer

from grok_local.commands.options import Bundle, Json, ModelOption, bundled, load_options, print_json
from grok_local.commands.prompts import decoded, input_bytes
from grok_local.commands.running import loaded
from grok_local.errors import LinesFailed, OptionError, OutputError
from grok_local.files import written_whole
from grok_local.library.built_in import BUILT_IN

__all__ = ["perplexity", "score"]


@bundled(loading=load_options)
def score(
    file: Annotated[
        Path,
        typer.Argument(
            help='A text a line, or JSON: {"text"}, {"prompt", "continuation"} or {"prompt", "choices"}; - is stdin.',
            metavar="IN",
        ),
    ],
    model: ModelOption = BUILT_IN,
    output: Annotated[
        Optional[Path], typer.Option("-o", "--output", help="Where the results go.  [default: stdout]")
    ] = None,
    loading: Bundle = None,
) -> None:
    """Say how likely texts are: the log-probability of every token, a JSON object a line.

    grok-local score -m grok-1-q4_k questions.jsonl -o scores.jsonl
    """
    from grok_local.runtime.jobs.lines import read_lines
    from grok_local.runtime.jobs.score_lines import FIELDS, scored

    lines = read_lines(decoded(input_bytes(file), str(file)), known=FIELDS, as_text=file.suffix == ".txt")
    if not lines:
        raise OptionError(f"{file}: has no line that is not blank")
    failed = 0
    with loaded(model, loading) as running, _writing(output) as out:
        for line in lines:
            result = scored(running, line)
            failed += "error" in result
            print_json(result, out)
    if failed:
        raise LinesFailed(f"{failed} of {len(lines)} lines could not be scored: their results say why")


@bundled(loading=load_options)
def perplexity(
    file: Annotated[Path, typer.Argument(help="A text; - is stdin.", metavar="FILE")],
    model: ModelOption = BUILT_IN,
    window: Annotated[int, typer.Option(help="Tokens read at once, of which the second half counts.", min=4)] = 512,
    kl_base: Annotated[
        Optional[str],
        typer.Option(help="Compare its distributions with those of this model, loaded beside it.", metavar="MODEL"),
    ] = None,
    loading: Bundle = None,
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts a text, as llama-perplexity does; lower is better.

    grok-local perplexity -m grok-1-q4_k wiki.txt --kl-base grok-1-q4_0
    """
    from grok_local.runtime.text.scoring import divergence
    from grok_local.runtime.text.scoring import perplexity as measured
    from grok_local.views.scores import describe_perplexity, print_perplexity

    text = decoded(input_bytes(file), str(file))
    with ExitStack() as stack:
        running = stack.enter_context(loaded(model, _with_context(loading, window)))
        base = stack.enter_context(loaded(kl_base, _with_context(loading, window))) if kl_base is not None else None
        ids = running.tokenize(text)
        if base and base.tokenize(text) != ids:
            raise OptionError(f"{kl_base} has another vocabulary than {model}: their distributions cannot be compared")
        engine = stack.enter_context(running.alone())
        found = measured(engine, ids, window=window, done=_told)
        apart = divergence(engine, base.engine, ids, window=window, done=_told) if base else None
    if as_json:
        print_json(describe_perplexity(found, apart))
    else:
        print_perplexity(found, apart)


@contextmanager
def _writing(output: Path | None) -> Iterator[TextIO]:
    """Stdout, or a file that has its name only when all is in it."""
    if output is None:
        yield sys.stdout
        return
    if str(output) in ("", "."):
        raise OptionError("-o: name a file")
    try:
        with written_whole(output) as file:
            yield file
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from None


def _with_context(loading: Bundle, window: int) -> dict[str, Any]:
    """Room for a window, where nobody asks for more."""
    given = dict(loading or {})
    return given | {"context": given["context"] if given.get("context") is not None else max(window, 256)}


def _told(number: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{number} of {count} windows ", end="\n" if number == count else "", file=sys.stderr, flush=True)
