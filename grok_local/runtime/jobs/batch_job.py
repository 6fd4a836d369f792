"""A batch from its lines to its results: tokens counted, the width chosen, what is missing computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import llama_cpp

from grok_local.errors import GrokLocalError
from grok_local.formats.identity import identity
from grok_local.machine.this_machine import this_machine
from grok_local.placement.forecast import forecast
from grok_local.placement.planner import make_plan
from grok_local.placement.whatif import Width, widest
from grok_local.runtime.jobs.batch_lines import Asked, Author
from grok_local.runtime.remote.probing import probe_workers
from grok_local.runtime.scheduling.generation import Generation
from grok_local.runtime.text.batch import Prepared, Result, Tasks
from grok_local.runtime.text.forms import template_text

if TYPE_CHECKING:
    from grok_local.formats.gguf_file import Header
    from grok_local.machine.facts import Say
    from grok_local.placement.load_options import LoadRequest
    from grok_local.placement.shape import ModelShape
    from grok_local.runtime.scheduling.generation import Stats
    from grok_local.runtime.text.batch import Watch

__all__ = ["Job", "chosen_width", "estimate", "fingerprint", "loaded_with", "prepared", "run"]

_LARGE = 1_000_000_000  # bytes: for smaller models nothing is measured, they should start at once


class Runner(Protocol):
    """What answers tasks: a model, or several of them. Results come as they are finished."""

    def run(self, tasks: Iterable[Prepared | Result], *, size: int, watch: Watch = ...) -> Iterator[Result]: ...


@dataclass(frozen=True)
class _Line:
    """A line that can be answered, and its tasks."""

    asked: Asked
    tasks: tuple[Prepared, ...]
    longest: int  # tokens that they may have, prompts and answers together


@dataclass(frozen=True)
class Job:
    """The lines that are to be answered, the longest first, so that the time left only shrinks; and those that cannot.

    `size` is how many tokens prompt and answer may have together.
    """

    lines: tuple[_Line, ...]
    refused: tuple[tuple[Asked, GrokLocalError], ...]
    size: int

    @property
    def prompt_tokens(self) -> int:
        """Of all tasks."""
        return sum(len(task.request.prompt) for line in self.lines for task in line.tasks)

    @property
    def most_tokens(self) -> int:
        """How many the answers may have at most, together."""
        return sum(line.longest for line in self.lines) - self.prompt_tokens

    @property
    def tasks(self) -> int:
        """How many answers there are to be."""
        return sum(len(line.tasks) for line in self.lines)

    @property
    def context(self) -> int:
        """Tokens that a sequence needs room for."""
        return max((_longest(task, self.size) for line in self.lines for task in line.tasks), default=1)


@dataclass(frozen=True)
class Cost:
    """What a job takes if every answer is as long as it may be: seconds, and bytes from the disk."""

    seconds: float
    from_disk: float


@dataclass(frozen=True)
class BatchProgress:
    """How far a run is. `generated` counts tokens of answers, those under way among them; `rest` is what may follow."""

    done: int
    total: int
    failed: int
    generated: int
    rest: int


def prepared(asked: Iterable[Asked], tasks: Tasks, *, size: int) -> Job:
    """Every line tokenized, with what cannot be answered set apart."""
    lines, refused = list[_Line](), list[tuple[Asked, GrokLocalError]]()
    for one in asked:
        results = [] if one.error else [tasks.prepare(0, task) for task in one.tasks]
        error = one.error or next((r.error for r in results if isinstance(r, Result)), None)
        if error:
            refused.append((one, error))
        else:
            ready = tuple(result for result in results if isinstance(result, Prepared))
            lines.append(_Line(one, ready, sum(_longest(task, size) for task in ready)))
    return Job(tuple(sorted(lines, key=lambda line: -line.longest)), tuple(refused), size)


def estimate(job: Job, width: Width) -> Cost:
    """By the forecast: prompts in full batches, then answers, `width.sequences` of them together."""
    read = forecast(width.plan, together=width.plan.batch)
    prompts = job.prompt_tokens / width.plan.batch
    steps = job.most_tokens / width.sequences
    return Cost(
        prompts * read.seconds + steps * width.together.seconds,
        prompts * read.from_disk + steps * width.together.from_disk,
    )


def chosen_width(
    request: LoadRequest, shape: ModelShape, *, context: int, most: int, parallel: int | None, say: Say
) -> Width:
    """How many sequences of `context` tokens go together here: `parallel`, or as many as are fastest, at most `most`.

    A large model's kernels and disk are measured for it, the first time. Raises OptionError, PlacementError,
    WorkerError.
    """
    large = shape.nbytes >= _LARGE
    machine = this_machine(
        shape.types if large else (),
        threads=request.threads,
        disk=request.path if large else None,
        workers=probe_workers(request.workers),
        say=say,
    )
    alone = make_plan(shape, machine, replace(request.wishes, context=context))
    if parallel is None:
        return widest(alone, most=max(most, 1))
    plan = make_plan(shape, machine, replace(alone.wishes, sequences=parallel))
    return Width(parallel, plan, forecast(plan, together=parallel), forecast(alone))


def run(
    runner: Runner | None,
    job: Job,
    author: Author,
    *,
    write: Callable[[Mapping[str, Any]], None],
    watch: Callable[[BatchProgress], None] = lambda _: None,
) -> int:
    """Answer the lines of a job, and write each when it is finished. Returns how many failed. Where no line can be
    answered, nobody is needed for it.

    Raises what ends the model; what is written stays.
    """
    return _Run(runner, job, author, write, watch).run()


class _Run:
    def __init__(
        self,
        runner: Runner | None,
        job: Job,
        author: Author,
        write: Callable[[Mapping[str, Any]], None],
        watch: Callable[[BatchProgress], None],
    ) -> None:
        self._runner, self._job, self._author, self._write, self._watch = runner, job, author, write, watch
        self._line_of = [line for line in job.lines for _ in line.tasks]
        self._results: dict[str | int, list[Result]] = {}
        self._failed = self._done = self._generated = 0
        self._rest = job.most_tokens

    def run(self) -> int:
        for asked, error in self._job.refused:
            self._write_line(self._author.refused(asked, error), failed=True)
        tasks = [task for line in self._job.lines for task in line.tasks]
        numbered = (replace(task, index=index) for index, task in enumerate(tasks))
        for result in self._runner.run(numbered, size=self._job.size, watch=self._look) if self._runner else ():
            if result.finish_reason == "interrupted":
                raise KeyboardInterrupt
            self._collect(result)
        return self._failed

    def _collect(self, result: Result) -> None:
        line = self._line_of[result.index]
        found = self._results.setdefault(line.asked.id, [])
        found.append(result)
        task = next(task for task in line.tasks if task.id == result.id)
        self._rest -= _longest(task, self._job.size) - len(task.request.prompt)
        self._generated += result.stats.generated_tokens
        if len(found) == len(line.tasks):
            found.sort(key=lambda one: one.index)
            failed = any(one.error for one in found)
            self._write_line(self._author.written(line.asked, found), failed=failed)
            del self._results[line.asked.id]

    def _write_line(self, value: Mapping[str, Any], *, failed: bool) -> None:
        self._write(value)
        self._done += 1
        self._failed += failed
        self._look(())

    def _look(self, flying: Iterable[Stats]) -> None:
        now = sum(stats.generated_tokens for stats in flying)
        total = len(self._job.lines) + len(self._job.refused)
        self._watch(BatchProgress(self._done, total, self._failed, self._generated + now, max(self._rest - now, 0)))


def _longest(task: Prepared, size: int) -> int:
    return Generation(task.request, size).longest


# -- what results come from --------------------------------------------------------------------------------------------


def loaded_with(headers: Sequence[Header], request: LoadRequest, *, context: int) -> dict[str, Any]:
    """What results depend on beside their lines, for a manifest. Raises OptionError for a missing template."""
    text = template_text(headers[0].metadata, request.template)
    model = identity(headers)
    return {
        "model": model,
        "context": context,
        "kv_type": request.wishes.kv_type,
        "routing": request.wishes.routing,
        "template": request.template,
        "template_text": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32],
        "reproducible": fingerprint(model, request) if request.reproducible else False,
    }


def fingerprint(model: str, request: LoadRequest) -> str:
    """What the bits of results depend on beside the request: the model, llama.cpp and its kernels, and the mode."""
    parts: Iterator[object] = iter(
        (
            model,
            llama_cpp.__version__,
            llama_cpp.llama_print_system_info(),
            request.wishes.kv_type,
            request.wishes.repack,
            request.reproducible,
            *([] if request.wishes.routing == "release" else [request.wishes.routing]),
        )
    )
    return "fp_" + hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
