"""Where an output goes, and in which state its files are: absent, unfinished, complete, or something else."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from grok_local.errors import GGUFError, OutputError
from grok_local.files import journal_of, partial_of, sync_folder
from grok_local.formats.gguf_file import KEYS, read_header
from grok_local.machine.disk import free_space, nearest_folder
from grok_local.quantize.layout.output_plan import OutputPlan, Part
from grok_local.quantize.output.journal import Journal
from grok_local.quantize.output.part_file import PartFile, allow_open_files
from grok_local.units import format_bytes

__all__ = ["Destination", "cannot_write", "missing_room"]


@dataclass(frozen=True)
class Destination:
    """The files of an output planned for the name `target`.

    Until they are complete they have other names. `fingerprint` tells the checkpoint's, which is asked for only when it
    is needed: where a complete output seems to be there, and at the end. It is empty while nobody can tell.
    """

    target: Path
    plan: OutputPlan
    fingerprint: Callable[[], str]

    @property
    def finals(self) -> list[Path]:
        """The files' names when they are complete."""
        return [self.target.with_name(part.name) for part in self.plan.parts]

    @property
    def partials(self) -> list[Path]:
        """Their names until then."""
        return [partial_of(final) for final in self.finals]

    def is_complete(self, *, force: bool) -> bool:
        """Whether the output is there already. Raises OutputError if something else is, unless `force` is given."""
        present = [final for final in self.finals if final.exists()]
        if force or not present:
            return False
        held = [self._holds(final, part) for final, part in zip(self.finals, self.plan.parts, strict=True)]
        if sum(held) < len(present):
            raise OutputError(
                f"{self.finals[0]}: exists, and {self._strangeness(present)}: choose another name with -o, or replace "
                "it with --force"
            )
        if all(held):
            self._forget_journal()
        return all(held)

    def _forget_journal(self) -> None:
        """A run that was killed when its files had their names left its journal, which nobody needs."""
        path = journal_of(self.target)
        if path.exists() and not any(partial.exists() for partial in self.partials):
            with suppress(OutputError, OSError), Journal(path, self.plan) as journal:
                journal.finish()

    def _strangeness(self, present: list[Path]) -> str:
        """What to say of files that are not known to be the finished plan's."""
        parts = [part for final, part in zip(self.finals, self.plan.parts, strict=True) if final in present]
        alike = all(self._holds(*pair, of_any=True) for pair in zip(present, parts, strict=True))
        if alike and not self.fingerprint():
            return "whether it was packed from this release cannot be told while not all of that is there"
        return "is not what this command would write"

    def _holds(self, path: Path, part: Part, *, of_any: bool = False) -> bool:
        """Whether `path` is that part of the finished plan, with the numbers of this checkpoint or of any."""
        try:
            header = read_header(path)
        except GGUFError:
            return False
        fingerprint = str(header.metadata.get(KEYS.CHECKPOINT, "")) if of_any else self.fingerprint()
        right = bool(fingerprint) and header.metadata.get(KEYS.PLAN) == self.plan.digest(fingerprint)
        return right and header.size == part.size

    @contextmanager
    def unfinished(self, *, force: bool) -> Iterator[tuple[list[PartFile], Journal]]:
        """The files to pack into, and the journal, for this process alone; what an earlier run of this plan left is
        kept. With `force` nothing else is in the way. Raises OutputError, InUseError.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with Journal(journal_of(self.target), self.plan, force=force) as journal:
            if not (journal.resumed or force):
                self._refuse_strangers(journal)
            self._prepare(resumed=journal.resumed, force=force)
            try:
                self._check_room()
                allow_open_files(len(self.plan.parts))
                with ExitStack() as stack:
                    paired = zip(self.partials, self.plan.parts, strict=True)
                    yield [stack.enter_context(PartFile(path, part.size)) for path, part in paired], journal
            except BrokenPipeError:  # of whoever is shown the progress
                raise
            except OSError as error:
                text = f"{cannot_write(error, self.target)}; what is packed so far is kept: run the same command again"
                raise OutputError(text) from error
            finally:
                if journal.empty:  # nothing to go on from: leave nothing behind
                    for partial in self.partials:
                        partial.unlink(missing_ok=True)
                    journal.finish()

    def _refuse_strangers(self, journal: Journal) -> None:
        """An unfinished file without its journal is somebody else's, or of no use. Raises OutputError."""
        present = [partial for partial in self.partials if partial.exists()]
        if present:
            journal.finish()
            raise OutputError(
                f"{present[0]}: is there without its journal, so nothing can go on from it: move it away, or begin "
                "anew with --force"
            )

    def _prepare(self, *, resumed: bool, force: bool) -> None:
        """Leave only what the run may go on from: stray bytes of another would stay in the padding.

        With `force` what is complete is not gone on from.
        """
        for partial, final, part in zip(self.partials, self.finals, self.plan.parts, strict=True):
            if not resumed:
                partial.unlink(missing_ok=True)
            elif not (force or partial.exists()) and final.exists() and self._holds(final, part):
                final.rename(partial)  # killed between the parts' renames

    def _check_room(self) -> None:
        present = sum(partial.stat().st_blocks * 512 for partial in self.partials if partial.exists())
        problems = missing_room(self.target, self.plan.nbytes - present)
        if problems:
            raise OutputError(problems)

    def publish(self, files: list[PartFile], journal: Journal, digests: Mapping[int, bytes]) -> None:
        """Write the headers, wait until everything is on the disk, then give the files their names."""
        fingerprint = self.fingerprint()
        for file, part in zip(files, self.plan.parts, strict=True):
            file.write_header(self.plan.final_header(part, fingerprint, digests))
        for partial, final in zip(self.partials, self.finals, strict=True):
            partial.rename(final)
        sync_folder(self.target.parent)
        journal.finish()


def missing_room(target: Path, needed: int) -> list[str]:
    """What to say where the disk of `target` has not `needed` bytes free."""
    folder = nearest_folder(target.absolute().parent)
    free = free_space(folder)
    if needed <= free:
        return []
    return [
        f"{folder}: {format_bytes(needed - free)} of disk space are missing: {target.name} takes "
        f"{format_bytes(needed)} more and {format_bytes(free)} are free; make room, or choose another disk with -o"
    ]


def cannot_write(error: OSError, target: Path) -> str:
    """What to say of an error of the output's files."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        advice = "give a larger --split-size, or raise the limit with ulimit -n"
        return f"{target}: too many open files: each part takes two, and the limit is {limit}: {advice}"
    return f"{error.filename or target}: cannot be written ({error.strerror or error})"
