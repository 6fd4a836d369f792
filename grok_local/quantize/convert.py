"""`quantize_checkpoint`: the release goes in, a GGUF comes out, in one pass."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeAlias

from grok_local import units
from grok_local.errors import CheckpointError, GrokLocalError, OptionError, OutputError, TokenizerError
from grok_local.files import is_part, sync_folder
from grok_local.quantize.layout.output_plan import OutputPlan, plan_output
from grok_local.quantize.layout.pieces import Piece, plan_tensors
from grok_local.quantize.output.destination import Destination, cannot_write, missing_room
from grok_local.quantize.output.journal import Journal
from grok_local.quantize.output.part_file import PartFile
from grok_local.quantize.packing.pool import Budget, PackingRun, Progress
from grok_local.quantize.recipe import Recipe, recipe_named
from grok_local.quantize.sources.checkpoint import Checkpoint, check_scales, check_unchanged, check_whole, fingerprint
from grok_local.quantize.sources.recognise import input_files, open_checkpoint, open_vocabulary
from grok_local.quantize.sources.vocabulary import Vocabulary

__all__ = ["Limits", "Progress", "QuantizeReport", "pack_into", "quantize_checkpoint"]

# Takes the pieces that are to be packed, and a function that waits until those that are packed are on the disk. Says of
# which pieces the files are there, and is asked for more when those it said last are packed and journalled.
Supply: TypeAlias = Callable[[Sequence[Piece], Callable[[], None]], Iterable[Sequence[Piece]]]

_MAX_THREADS = 512


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_checkpoint` did. `path` is the file to load; `paths` are all parts."""

    path: Path
    paths: tuple[Path, ...]
    type: str
    tensors: int
    bytes: int
    seconds: float
    unchanged: bool  # the output was there already, packed from this checkpoint with these options
    resumed_pieces: int  # taken over from a run that was killed
    fallbacks: tuple[str, ...]  # a line for each kind of tensor that could not have the type asked for
    notes: tuple[str, ...] = ()  # what else the user should know


def quantize_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    type: str = "q4_k",
    tokenizer: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    memory: str | int = "4G",
    split_size: str | int | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizeReport:
    """Pack Grok-1's or Grok-2's release (or any checkpoint in their formats) into a GGUF at `output`.

    `type` is q4_k, q4_0, iq4_xs, mxfp4, q8_0, bf16 or f32. `memory` bounds the process's peak memory. With `split_size`
    the output becomes llama.cpp's numbered parts. `output` appears under its name only when complete; a killed run is
    continued by the same call. Raises CheckpointError, TokenizerError, OutputError or OptionError, listing all
    problems.
    """
    target, recipe = Path(output), recipe_named(type)
    limits = Limits.parsed(target, threads=threads, memory=memory, split_size=split_size)
    source, vocabulary = _open(Path(checkpoint), tokenizer, recipe, target)
    _check_no_input(target, source, Path(tokenizer) if tokenizer else None)
    plan = plan_output(source, recipe, vocabulary=vocabulary, name=target.name, split_size=limits.split_size)
    destination = Destination(target, plan, cache(partial(fingerprint, source)))
    return pack_into(destination, limits, partial(_all_at_once, source), force=force, progress=progress)


def _all_at_once(source: Checkpoint, pending: Sequence[Piece], _: Callable[[], None]) -> Iterable[Sequence[Piece]]:
    """The supply where all files are there. Raises CheckpointError where they are others in the end."""
    yield pending
    check_unchanged(source)


def pack_into(
    destination: Destination,
    limits: Limits,
    supply: Supply,
    *,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizeReport:
    """Pack what is planned, as the `supply` has it. Raises OutputError, OptionError, CheckpointError."""
    started, resumed = time.monotonic(), 0
    try:
        unchanged = destination.is_complete(force=force)
        if not unchanged:
            budget = Budget.of(limits.memory, limits.threads, destination.plan)
            with destination.unfinished(force=force) as (files, journal):
                run = PackingRun(destination.plan, files, journal, progress)
                resumed = run.check(budget.threads)
                for pieces in supply(run.pending, partial(_sync, destination, files, journal)):
                    run.pack(budget, pieces)
                destination.publish(files, journal, run.digests)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(cannot_write(error, destination.target)) from error
    return _report(destination, started=started, unchanged=unchanged, resumed=resumed)


def _sync(destination: Destination, files: Sequence[PartFile], journal: Journal) -> None:
    """First the bytes, then the journal that says they are there, then the names of both."""
    for file in files:
        file.sync()
    journal.sync()
    sync_folder(destination.target.parent)


@dataclass(frozen=True)
class Limits:
    """What packing may take, and how large a part may be."""

    threads: int
    memory: int  # bytes
    split_size: int | None  # bytes of a part's tensors

    @classmethod
    def parsed(cls, target: Path, *, threads: int | None, memory: str | int, split_size: str | int | None) -> Limits:
        """Raises OptionError."""
        size = None if split_size is None else units.parse_size(split_size)
        if threads is not None and not 1 <= threads <= _MAX_THREADS:
            raise OptionError(f"{threads} threads: at least one is needed, and at most {_MAX_THREADS} make sense")
        if size == 0:
            raise OptionError("split size 0: must be more")
        if size is None and is_part(target):
            raise OptionError(f"{target.name}: is the name of a part; leave the numbers out, or give --split-size")
        return cls(threads or os.cpu_count() or 1, units.parse_size(memory), size)


def _open(
    path: Path, tokenizer: str | os.PathLike[str] | None, recipe: Recipe, target: Path
) -> tuple[Checkpoint, Vocabulary]:
    """Open both, or raise one error with everything that is wrong with either, and with the disk."""
    problems: list[GrokLocalError] = []
    source: Checkpoint | None = None
    vocabulary: Vocabulary | None = None
    try:
        source = open_checkpoint(path)
        check_whole(source)
        check_scales(source)
    except CheckpointError as error:
        problems.append(error)
    if source is None and not path.is_dir():
        raise CheckpointError(problems[0].problems)
    try:
        given, size = Path(tokenizer) if tokenizer else None, source.dimensions.vocabulary if source else None
        vocabulary = open_vocabulary(source.folder if source else path, given, size=size)
    except TokenizerError as error:
        problems.append(error)
    if source and vocabulary and not problems:
        return source, vocabulary
    if source:
        needed = sum(tensor.nbytes for tensor in plan_tensors(source, recipe))
        problems += [OutputError(line) for line in missing_room(target, needed)]
    kind = problems[0].__class__ if len({p.__class__ for p in problems}) == 1 else CheckpointError
    raise kind(line for problem in problems for line in problem.problems)


def _check_no_input(target: Path, source: Checkpoint, tokenizer: Path | None) -> None:
    """No `force` may replace what is being read. Raises OutputError."""
    inputs = input_files(source) | ({tokenizer} if tokenizer else set())
    if target.exists() and any(path.exists() and target.samefile(path) for path in inputs):
        raise OutputError(f"{target}: is a file of the checkpoint itself: choose another name with -o")


def _report(destination: Destination, *, started: float, unchanged: bool, resumed: int) -> QuantizeReport:
    plan = destination.plan
    return QuantizeReport(
        path=destination.finals[0],
        paths=tuple(destination.finals),
        type=plan.recipe.name,
        tensors=len(plan.tensors),
        bytes=plan.nbytes,
        seconds=time.monotonic() - started,
        unchanged=unchanged,
        resumed_pieces=resumed,
        fallbacks=tuple(sorted(set(_fallbacks(plan)))),
    )


def _fallbacks(plan: OutputPlan) -> Iterator[str]:
    for tensor in plan.tensors:
        if tensor.type != tensor.wanted:
            rows = f"rows of {tensor.width} do not fit {tensor.wanted.name}"
            yield f"{tensor.source.role}: {rows}; packed as {tensor.type.name}"
