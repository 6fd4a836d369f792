"""Many prompts from a file, answered together, with a result a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from grok_local.commands.options import (
    Bundle,
    ModelOption,
    Parallel,
    Reproducible,
    bundled,
    load_options,
    print_json,
    resumable,
    sampling_options,
    say,
    structure_options,
)
from grok_local.commands.prompts import input_lines, require_apart
from grok_local.commands.running import MaxTokens, Stop, answer_options, opened, shown_packing
from grok_local.errors import GGUFError, LinesFailed, OptionError
from grok_local.library.built_in import BUILT_IN

if TYPE_CHECKING:
    from grok_local.adapters.fleet import Fleet
    from grok_local.formats.gguf_file import Header
    from grok_local.placement.load_options import LoadOptions, LoadRequest
    from grok_local.placement.shape import ModelShape
    from grok_local.placement.whatif import Width
    from grok_local.runtime.engine.tokens import BareVocabulary
    from grok_local.runtime.jobs.batch_job import Job, Runner
    from grok_local.runtime.jobs.batch_lines import Asked, Author
    from grok_local.runtime.jobs.ledger import Ledger
    from grok_local.runtime.text.batch import Tasks

__all__ = ["batch"]

_MAX_TOKENS = 128  # of an answer, where neither line nor option says


@bundled(sampling=sampling_options, structure=structure_options, loading=load_options)
def batch(
    file: Annotated[
        Path,
        typer.Argument(
            help='A prompt a line, JSON ({"prompt"} or {"messages"}), or OpenAI\'s batch lines; - is stdin.',
            metavar="IN",
        ),
    ],
    model: ModelOption = BUILT_IN,
    output: Annotated[
        Optional[Path],
        typer.Option("-o", "--output", help="Where results go; a stopped run goes on from there.  [default: stdout]"),
    ] = None,
    parallel: Parallel = None,
    reproducible: Reproducible = False,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="Results in the order of the input, in the end.")
    ] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try lines again that failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and load nothing.")] = False,
    max_tokens: MaxTokens = _MAX_TOKENS,
    stop: Stop = None,
    logprobs: Annotated[
        Optional[int], typer.Option(help="Add each token's log-probability, and those of so many others.", min=0)
    ] = None,
    template: Annotated[
        Optional[str],
        typer.Option(help="What lays conversations out.  [default: the model's own]", metavar="none|FILE"),
    ] = None,
    ray: Annotated[
        Optional[str],
        typer.Option(help="Use all nodes of this Ray cluster, each with its own copy of MODEL.", metavar="ADDRESS"),
    ] = None,
    sampling: Bundle = None,
    structure: Bundle = None,
    loading: Bundle = None,
) -> None:
    """Answer many prompts together, a result a line as each is finished. Stopped, the same command goes on.

    grok-local batch -m grok-1-q4_k prompts.jsonl -o answers.jsonl
    """
    from grok_local.runtime.jobs.batch_lines import read_batch

    require_apart(file, output)
    if retry_errors and output is None:
        raise OptionError("--retry-errors belongs to --output, which has what failed before")
    asked = read_batch(input_lines(file), as_text=file.suffix == ".txt")
    if not asked:
        raise OptionError(f"{file}: has no line that is not blank")
    defaults = answer_options(sampling, structure, model, max_tokens=max_tokens, stop=stop) | {"logprobs": logprobs}
    work = _Work(model, {**(loading or {}), "template": template}, defaults, parallel, reproducible, ray)
    work.check()
    with ExitStack() as stack:
        ledger = None
        if dry_run and output is not None and output.exists():
            say(f"note: lines that have their results in {output} already are counted too")
        elif output is not None and not dry_run:
            ledger = stack.enter_context(work.ledger(output, asked, retry=retry_errors))
            stack.enter_context(resumable())
        failed = _answered(work, asked, ledger, in_order=in_order, dry_run=dry_run)
    if failed:
        raise LinesFailed(f"{failed} of {len(asked)} lines could not be answered: their results say why")


@dataclass(frozen=True)
class _Work:
    """What is asked of all lines: of which model, how it is loaded, and what answers are like."""

    model: str
    loading: dict[str, Any]
    defaults: dict[str, Any]
    parallel: int | None
    reproducible: bool
    ray: str | None

    def __post_init__(self) -> None:
        for option, name in {"--worker": "workers", "--trace-experts": "trace_experts"}.items():
            if self.ray is not None and self.loading.get(name):
                raise OptionError(f"{option}: not with --ray, where every node has a model of its own")

    @cached_property
    def request(self) -> LoadRequest:
        """How the model would be loaded for one sequence."""
        from grok_local.library.names import model_request

        options = cast("LoadOptions", self.loading | {"reproducible": self.reproducible})
        return model_request(self.model, options, packing=shown_packing)

    @cached_property
    def headers(self) -> list[Header]:
        """The model's. Raises GGUFError for one that cannot be run."""
        from grok_local.formats.gguf_file import read_model
        from grok_local.placement.runnable import why_not

        headers = read_model(self.request.path)
        if reason := why_not(headers):
            raise GGUFError(f"{self.request.path}: {reason}")
        return headers

    @cached_property
    def shape(self) -> ModelShape:
        from grok_local.placement.shape import ModelShape

        return ModelShape.from_headers(self.headers)

    @cached_property
    def size(self) -> int:
        """Tokens that prompt and answer may have together."""
        from grok_local.placement.wishes import usual_context

        return usual_context(self.shape, self.request.wishes)

    @cached_property
    def author(self) -> Author:
        from grok_local.formats.identity import identity
        from grok_local.runtime.jobs.batch_job import fingerprint
        from grok_local.runtime.jobs.batch_lines import Author

        return Author(self.model, fingerprint(identity(self.headers), self.request))

    def ledger(self, output: Path, asked: list[Asked], *, retry: bool) -> Ledger:
        """The output, with what an earlier run has done. Raises OptionError where that was another job."""
        from grok_local.runtime.jobs.batch_job import loaded_with
        from grok_local.runtime.jobs.batch_lines import id_of
        from grok_local.runtime.jobs.ledger import Ledger

        made_with = {**self.defaults, **loaded_with(self.headers, self.request, context=self.size)}
        lines = {one.id: one.digest for one in asked}
        return Ledger(output, made_with, lines, key=id_of, retry=retry)

    def check(self) -> None:
        """Raises OptionError for options that no line could be answered with, before there is an output."""
        from grok_local.runtime.engine.sampling import Constraint

        with self._tasks() as (tasks, vocabulary):
            structure = tasks.check().structure
            if structure is not None:
                Constraint(structure.grammar, vocabulary.for_grammars)

    def job(self, asked: list[Asked]) -> Job:
        """The lines tokenized, which needs no weights."""
        from grok_local.runtime.jobs.batch_job import prepared

        with self._tasks() as (tasks, _):
            return prepared(asked, tasks, size=self.size)

    @contextmanager
    def _tasks(self) -> Iterator[tuple[Tasks, BareVocabulary]]:
        from grok_local.runtime.engine.tokens import BareVocabulary
        from grok_local.runtime.text.batch import Tasks

        defaults = {name: value for name, value in self.defaults.items() if name != "seed"}
        seed = self.defaults.get("seed") or 0
        with BareVocabulary(self.request.path, context_size=self.size) as vocabulary:
            yield Tasks(vocabulary, template=self.request.template, defaults=defaults, seed=seed), vocabulary

    def width(self, job: Job) -> Width:
        """How many sequences go together on this machine: as many as was said, or as are fastest."""
        from grok_local.runtime.jobs.batch_job import chosen_width

        return chosen_width(
            self.request, self.shape, context=job.context, most=job.tasks, parallel=self.parallel, say=say
        )

    def fitted(self, job: Job) -> LoadRequest:
        """How the model is loaded for the job on this machine."""
        loading = replace(self.request, wishes=replace(self.request.wishes, context=job.context))
        return loading.reshaped(parallel=self.width(job).sequences, reproducible=self.reproducible)

    def fleet(self, job: Job) -> Fleet:
        """The nodes that answer the job. Raises OptionError, WorkerError."""
        from grok_local.adapters.fleet import Fleet
        from grok_local.adapters.replica import Order
        from grok_local.formats.identity import identity

        # Conversations are laid out here, by this machine's template.
        options = self.loading | {"template": None, "context": job.context, "reproducible": self.reproducible}
        here = Path(self.model)
        name = str(here.absolute()) if self.model != BUILT_IN and here.exists() else self.model
        order = Order(name, cast("LoadOptions", options), identity(self.headers), self.parallel, job.tasks)
        fingerprint = self.author.fingerprint if self.reproducible else None
        return Fleet(self.ray or "auto", order, fingerprint=fingerprint, say=say)


def _answered(work: _Work, asked: list[Asked], ledger: Ledger | None, *, in_order: bool, dry_run: bool) -> int:
    """Answer the lines that have no result yet. Returns how many failed, those of earlier runs among them."""
    from grok_local.runtime.jobs.batch_job import run
    from grok_local.views.plans import print_estimate
    from grok_local.views.progress import batch_view

    order = {one.id: number for number, one in enumerate(asked)}
    done = ledger.done if ledger else {}
    if done:
        say(f"note: {len(done)} of {len(asked)} lines have their results already")
    job = work.job([one for one in asked if one.id not in done])
    failed = sum(done.values())
    if job.lines or job.refused:
        if dry_run:
            print_estimate(job, work.width(job), chosen=work.parallel is None)
            return 0
        writing = _writing(ledger, order if in_order else None)
        with _runner(work, job) as running, batch_view() as watch, writing as write:
            failed += run(running, job, work.author, write=write, watch=watch)
    if ledger and in_order:
        ledger.sort(order)
    return failed


def _runner(work: _Work, job: Job) -> AbstractContextManager[Runner | None]:
    """What answers the job; nobody where no line can be answered."""
    if not job.lines:
        return nullcontext()
    return work.fleet(job) if work.ray is not None else opened(work.fitted(job))


@contextmanager
def _writing(ledger: Ledger | None, order: Mapping[str | int, int] | None) -> Iterator[Callable[[Any], None]]:
    """Where results go: to the ledger, or to stdout, where those that shall be in order come at the end."""
    from grok_local.runtime.jobs.batch_lines import id_of

    if ledger or order is None:
        yield ledger.write if ledger else print_json
        return
    results: list[tuple[int, Mapping[str, Any]]] = []
    try:
        yield lambda result: results.append((order[cast("str | int", id_of(result))], result))
    finally:  # whatever ended the run, what was answered is told
        for _, result in sorted(results, key=lambda pair: pair[0]):
            print_json(result)
