"""`quantize_checkpoint`: the release goes in, a GGUF comes out, in one pass."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grok_local import units
from grok_local.errors import CheckpointError, GGUFError, GrokLocalError, OptionError, OutputError, TokenizerError
from grok_local.formats import gguf_file
from grok_local.formats.gguf_file import KEYS
from grok_local.quantize.layout.output_plan import Part, Plan, plan_output, plan_tensors
from grok_local.quantize.output.journal import Journal
from grok_local.quantize.packing.pool import Budget, Progress, pack
from grok_local.quantize.recipe import Recipe, recipe_named
from grok_local.quantize.sources.checkpoint import Checkpoint, fingerprint, open_checkpoint
from grok_local.quantize.sources.sentencepiece import Tokenizer, find_tokenizer, read_tokenizer

__all__ = ["Progress", "QuantizeReport", "quantize_checkpoint"]


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
    """Pack Grok-1's release (or any checkpoint in its format) into a GGUF at `output`.

    `type` is q4_k, q4_0, iq4_xs, mxfp4, q8_0, bf16 or f32. `memory` bounds the process's peak memory. With `split_size`
    the output becomes llama.cpp's numbered parts. `output` appears under its name only when complete; a killed run is
    continued by the same call. Raises CheckpointError, TokenizerError, OutputError or OptionError, listing all
    problems.
    """
    started = time.monotonic()
    recipe = recipe_named(type)
    target = Path(output)
    limit = units.parse_size(split_size) if split_size is not None else None
    memory_limit = units.parse_size(memory)
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise OptionError(f"{threads} threads: at least one is needed, and at most {_MAX_THREADS} make sense")
    if limit == 0:
        raise OptionError("split size 0: must be more")
    if limit is None and gguf_file.is_part(target):
        raise OptionError(f"{target.name}: is the name of a part; leave the numbers out, or give --split-size")
    source, vocabulary = _open_inputs(Path(checkpoint), tokenizer, recipe, target)
    try:
        plan = plan_output(
            source,
            recipe,
            tokenizer=vocabulary,
            fingerprint=fingerprint(source),
            name=target.name,
            split_size=limit,
        )
        finals = [target.with_name(part.name) for part in plan.parts]
        resumed = 0
        unchanged = _is_done(plan, finals, force=force)
        if not unchanged:
            resumed = _pack(plan, target, finals, threads=threads, memory=memory_limit, force=force, progress=progress)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(_explain(error, target)) from error
    return QuantizeReport(
        path=finals[0],
        paths=tuple(finals),
        type=recipe.name,
        tensors=len(plan.tensors),
        bytes=plan.nbytes,
        seconds=time.monotonic() - started,
        unchanged=unchanged,
        resumed_pieces=resumed,
        fallbacks=tuple(_fallbacks(plan)),
    )


def _open_inputs(
    path: Path, tokenizer: str | os.PathLike[str] | None, recipe: Recipe, target: Path
) -> tuple[Checkpoint, Tokenizer]:
    """Open both, or raise one error with everything that is wrong with either, and with the disk."""
    problems: list[GrokLocalError] = []
    source: Checkpoint | None = None
    vocabulary: Tokenizer | None = None
    try:
        source = open_checkpoint(path)
    except CheckpointError as error:
        problems.append(error)
    try:
        found = find_tokenizer(source.folder if source else path, Path(tokenizer) if tokenizer else None)
        vocabulary = read_tokenizer(found, source.dimensions.vocabulary if source else None)
    except TokenizerError as error:
        problems.append(error)
    if source and vocabulary:
        return source, vocabulary
    if source:
        needed = sum(tensor.nbytes for tensor in plan_tensors(source, recipe))
        problems += [OutputError(line) for line in _space_problem(target, needed)]
    kind = problems[0].__class__ if len({p.__class__ for p in problems}) == 1 else CheckpointError
    raise kind(line for problem in problems for line in problem.problems)


def _is_done(plan: Plan, finals: list[Path], *, force: bool) -> bool:
    """Whether the output is there already. Raises OutputError if something else is there, and `force` is not given."""
    present = [final for final in finals if final.exists()]
    held = [_holds(final, part, plan) for final, part in zip(finals, plan.parts, strict=True)]
    if force or not present:
        return False
    if sum(held) < len(present):
        raise OutputError(
            f"{finals[0]}: exists, and is not what this command would write: choose another name with -o, "
            "or replace it with --force"
        )
    return all(held)


def _holds(path: Path, part: Part, plan: Plan) -> bool:
    """Whether `path` is that part of the finished plan."""
    try:
        header = gguf_file.read_header(path)
    except GGUFError:
        return False
    return header.size == part.size and header.metadata.get(KEYS.PLAN) == plan.digest


def _journal_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.journal")


def _pack(
    plan: Plan,
    target: Path,
    finals: list[Path],
    *,
    threads: int | None,
    memory: int,
    force: bool,
    progress: Callable[[Progress], None] | None,
) -> int:
    """Pack into `.partial` files, then give them their names. Returns how many pieces an earlier run had left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    budget = Budget.of(memory, threads or os.cpu_count() or 1, plan)
    partials = [final.with_name(final.name + ".partial") for final in finals]
    with Journal(_journal_path(target), plan, force=force) as journal:
        _prepare(plan, partials, finals, resumed=journal.resumed and not force)
        try:
            present = sum(partial.stat().st_blocks * 512 for partial in partials if partial.exists())
            problems = _space_problem(target, plan.nbytes - present)
            if problems:
                raise OutputError(problems)
            digests, resumed = pack(plan, partials, journal, budget=budget, progress=progress)
            _complete(plan, partials, digests)
        except BrokenPipeError:  # of whoever is shown the progress
            raise
        except OSError as error:
            raise OutputError(
                f"{_explain(error, target)}; what is packed so far is kept: run the same command again"
            ) from error
        finally:
            if journal.empty:  # nothing to go on from: leave nothing behind
                for partial in partials:
                    partial.unlink(missing_ok=True)
                journal.finish()
        for partial, final in zip(partials, finals, strict=True):
            partial.rename(final)
        _sync_folder(target.parent)
        journal.finish()
    return resumed


def _prepare(plan: Plan, partials: list[Path], finals: list[Path], *, resumed: bool) -> None:
    """Leave only what the run may go on from: stray bytes of another would stay in the padding."""
    for partial, final, part in zip(partials, finals, plan.parts, strict=True):
        if not resumed:
            partial.unlink(missing_ok=True)
        elif not partial.exists() and _holds(final, part, plan):  # killed between the parts' renames
            final.rename(partial)


def _complete(plan: Plan, partials: list[Path], digests: list[bytes]) -> None:
    """Write the headers, whose first bytes make the files GGUFs, and wait until everything is on the disk."""
    for part, partial in zip(plan.parts, partials, strict=True):
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
            file.write(plan.final_header(part, digests))
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _space_problem(target: Path, needed: int) -> list[str]:
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return []
    missing = units.format_bytes(needed - free)
    return [
        f"{folder}: {missing} of disk space are missing: {target.name} takes {units.format_bytes(needed)} more and "
        f"{units.format_bytes(free)} are free; make room, or choose another disk with -o"
    ]


def _fallbacks(plan: Plan) -> list[str]:
    kinds = {
        (
            t.source.leaf.path.rpartition("decoder_layer_")[2].partition("/")[2] or t.source.leaf.path,
            t.width,
            t.wanted,
            t.type,
        )
        for t in plan.tensors
        if t.type != t.wanted
    }
    return sorted(
        f"{path}: rows of {width} do not fit {wanted.name}; packed as {kind.name}"
        for path, width, wanted, kind in kinds
    )


def _explain(error: OSError, target: Path) -> str:
    return f"{error.filename or target}: cannot be written ({error.strerror or error})"
