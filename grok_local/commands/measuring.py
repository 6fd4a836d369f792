"""How likely texts are, by line and as perplexity."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from grok_local.commands.options import (
    Bundle,
    Json,
    ModelOption,
    bundled,
    load_options,
    print_json,
    resumable,
    say,
)
from grok_local.commands.prompts import decoded, input_bytes, input_lines, require_apart
from grok_local.commands.running import opened, requested
from grok_local.errors import ContextError, LinesFailed, OptionError, OutputError
from grok_local.library.built_in import BUILT_IN

if TYPE_CHECKING:
    from grok_local.placement.load_options import LoadRequest
    from grok_local.runtime.jobs.ledger import Ledger
    from grok_local.runtime.jobs.lines import Line

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
        Optional[Path],
        typer.Option("-o", "--output", help="Where results go; a stopped run goes on from there.  [default: stdout]"),
    ] = None,
    loading: Bundle = None,
) -> None:
    """Say how likely texts are: the log-probability of every token, a JSON object a line. Stopped, the same command
    goes on.

    grok-local score -m grok-1-q4_k questions.jsonl -o scores.jsonl
    """
    from grok_local.runtime.jobs.lines import read_lines
    from grok_local.runtime.jobs.score_lines import FIELDS

    require_apart(file, output)
    lines = read_lines(input_lines(file), known=FIELDS, as_text=file.suffix == ".txt")
    if not lines:
        raise OptionError(f"{file}: has no line that is not blank")
    request = requested(model, loading)
    if output is None or (output.exists() and not output.is_file()):
        with _printing(output) as write:
            failed = _scored(request, lines, write)
    else:
        failed = _scored_into(output, request, lines)
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

    text, options = decoded(input_bytes(file), str(file)), _with_context(loading, window)
    if kl_base == "":
        raise OptionError("--kl-base names no model: its value is empty")
    request = requested(model, options)
    other = None if kl_base is None else requested(kl_base, options | {"trace_experts": None})
    ids = _tokens(request, text, window=window, name=str(file))
    with ExitStack() as stack:
        running = stack.enter_context(opened(request))
        base = stack.enter_context(opened(other)) if other else None
        if base and base.tokenize(text) != ids:
            raise OptionError(f"{kl_base} has another vocabulary than {model}: their distributions cannot be compared")
        engine = stack.enter_context(running.alone())
        found = measured(engine, ids, window=window, done=_told)
        apart = divergence(engine, base.engine, ids, window=window, done=_told) if base else None
    if as_json:
        print_json(describe_perplexity(found, apart))
    else:
        print_perplexity(found, apart)


def _scored(request: LoadRequest, lines: Sequence[Line], write: Callable[[Mapping[str, Any]], None]) -> int:
    """Score lines, and write each result as soon as it is there. Returns how many failed."""
    from grok_local.runtime.jobs.score_lines import scored

    failed = 0
    with opened(request) as running:
        for line in lines:
            result = scored(running, line)
            failed += "error" in result
            write(result)
    return failed


def _scored_into(output: Path, request: LoadRequest, lines: Sequence[Line]) -> int:
    """Likewise, those that have no result in a file yet. Returns how many failed, those of earlier runs among them."""
    with _ledger(output, request, lines) as ledger, resumable():
        done, missing = ledger.done, [line for line in lines if line.key not in ledger.done]
        if done:
            say(f"note: {len(done)} of {len(lines)} lines have their results already")
        failed = _scored(request, missing, ledger.write) if missing else 0
        if done and missing:
            ledger.sort({line.key: number for number, line in enumerate(lines)})
    return failed + sum(done.values())


def _ledger(output: Path, request: LoadRequest, lines: Sequence[Line]) -> Ledger:
    """The output, with what an earlier run has done. Raises OptionError where that was another job."""
    from grok_local.formats.gguf_file import read_model
    from grok_local.placement.shape import ModelShape
    from grok_local.placement.wishes import usual_context
    from grok_local.runtime.jobs.batch_job import loaded_with
    from grok_local.runtime.jobs.batch_lines import id_of
    from grok_local.runtime.jobs.ledger import Ledger

    headers = read_model(request.path)
    context = usual_context(ModelShape.from_headers(headers), request.wishes)
    made_with = {"task": "score", **loaded_with(headers, request, context=context)}
    hashes = {line.key: line.digest for line in lines}
    return Ledger(output, made_with, hashes, key=id_of)


@contextmanager
def _printing(output: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """To stdout, or to a pipe or a device."""
    if output is None:
        yield print_json
        return
    try:
        with output.open("w", encoding="utf-8") as file:
            yield lambda result: print_json(result, file)
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from None


def _with_context(loading: Bundle, window: int) -> dict[str, Any]:
    """Room for a window, where nobody asks for more."""
    given = dict(loading or {})
    return given | {"context": given["context"] if given.get("context") is not None else max(window, 256)}


def _tokens(request: LoadRequest, text: str, *, window: int, name: str) -> list[int]:
    """The text's, which needs no weights. Raises ContextError where they fill no window."""
    from grok_local.runtime.engine.tokens import BareVocabulary

    with BareVocabulary(request.path, context_size=window) as vocabulary:
        ids = vocabulary.tokenize(text)
    if len(ids) < window:
        needed = f"at least {window} are needed for one window, and with --window N at least N"
        raise ContextError(f"{name}: has {len(ids)} tokens: {needed}")
    return ids


def _told(number: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{number} of {count} windows ", end="\n" if number == count else "", file=sys.stderr, flush=True)
