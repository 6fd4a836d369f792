"""`arrival`: a release is fetched and packed at once, and need never be on the disk as a whole."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from grok_local.arrival.landing import Landing, Ordered
from grok_local.arrival.lots import Lot, least_room, lots_of
from grok_local.arrival.passage import Passage, Shown
from grok_local.arrival.room import Room, disk_used, on_same_disk
from grok_local.arrival.skeleton import Skeleton
from grok_local.errors import FetchError, OptionError
from grok_local.files import PULL, gone_mark, journal_of
from grok_local.folders import checkpoints_folder
from grok_local.hub.elsewhere import check_tokenizer
from grok_local.hub.fetch import fetch_tokenizer, pulling
from grok_local.hub.fetcher import Fetcher
from grok_local.hub.listing import Listing
from grok_local.hub.repositories import RemoteFile, Repository, repository_of
from grok_local.quantize.convert import Limits, QuantizeReport, pack_into
from grok_local.quantize.layout.output_plan import OutputPlan, plan_output
from grok_local.quantize.output.destination import Destination
from grok_local.quantize.recipe import Recipe, recipe_named
from grok_local.quantize.sources.checkpoint import Checkpoint, looked_at
from grok_local.quantize.sources.recognise import header_reader, open_checkpoint, open_vocabulary
from grok_local.units import format_bytes

__all__ = ["Wanted", "arrival"]

_LINE = 160  # bytes of the journal for a piece
_LISTS = 1 << 16  # bytes of the listing, locks and lists


@dataclass(frozen=True)
class Wanted:
    """A release to be packed to `type`: its files come into `folder`, and with `discard` they go again."""

    release: str
    folder: Path
    output: Path
    limits: Limits
    type: str = "q4_k"
    discard: bool = False
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Arrival:
    """A release that is planned and not fetched yet; `notes` are for the user."""

    destination: Destination
    ordered: Ordered
    skeleton: Skeleton
    passage: Passage
    notes: tuple[str, ...]
    limits: Limits

    @property
    def room(self) -> Room:
        """What it takes of the disk."""
        return self.ordered.room

    def pack(self, *, force: bool = False) -> QuantizeReport:
        """Fetch and pack. Raises FetchError, OutputError, CheckpointError, OptionError."""
        with Landing(self.ordered, self.skeleton) as landing:
            supply, progress = landing.ready, self.passage.packed
            report = pack_into(self.destination, self.limits, force=force, progress=progress, supply=supply)
        self.skeleton.remove()
        if self.room.discard and report.unchanged:
            return replace(report, notes=tuple(self._not_discarded()))
        if self.room.discard:
            gone_mark(self.skeleton.source).touch()
        return report

    def _not_discarded(self) -> Iterator[str]:
        """Files go as they are packed: where nothing had to be, those that are there stay, and that is said."""
        folder = self.skeleton.source
        there = [path for path in self.skeleton.tensors if path.exists()]
        if there:
            nbytes = format_bytes(sum(path.stat().st_size for path in there))
            of_ours = folder.absolute().parent == checkpoints_folder().absolute()
            delete = f"grok-local rm {shlex.quote(folder.name)}" if of_ours else f"delete {folder}"
            yield (
                f"the output was there already, so --discard deleted nothing: {len(there)} of the release's files "
                f"stay, {nbytes}; grok-local verify checks the output, then {delete}"
            )


@contextmanager
def arrival(order: Wanted, progress: Shown | None = None) -> Iterator[Arrival]:
    """What is ordered, planned by what the hub says of its files, and by their headers.

    Raises OptionError, FetchError, CheckpointError or TokenizerError.
    """
    repository, recipe = repository_of(order.release), recipe_named(order.type)
    check_tokenizer(repository, order.tokenizer)
    with pulling(repository, order.folder) as listing:
        _check_output(order, listing)
        passage = Passage(listing.nbytes, progress)
        notes = tuple(fetch_tokenizer(repository, order.folder, given=order.tokenizer))
        skeleton = _skeleton(order, repository, listing, passage)
        outlined = open_checkpoint(skeleton.folder)
        coming = outlined.moved(skeleton.places())
        plan = _plan(order, recipe, coming, vocabulary_of=outlined.folder)
        destination = Destination(order.output, plan, partial(skeleton.fingerprint, outlined, coming))
        lots = _lots(order, plan, skeleton)
        room = _room(order, destination, lots, beside=skeleton.full_size(looked_at(coming)))
        fetcher = partial(_fetcher, listing, order.folder, passage)
        ordered = Ordered(coming, skeleton.tensors, lots, room, fetcher)
        yield Arrival(destination, ordered, skeleton, passage, notes, order.limits)


def _check_output(order: Wanted, listing: Listing) -> None:
    """No option may have the release's files replaced by what is made of them. Raises OptionError."""
    if order.output.resolve() in {(order.folder / file.path).resolve() for file in listing.files}:
        raise OptionError(f"-o {order.output}: is the name of one of the release's files: choose another")


def _skeleton(order: Wanted, repository: Repository, listing: Listing, passage: Passage) -> Skeleton:
    """All that is needed of the files before they come. Raises FetchError."""
    fetcher = Fetcher(listing, order.folder)
    tensors = {fetcher.path_of(file): file for file in listing.files if file.path not in repository.others}
    skeleton = Skeleton(fetcher, tensors, header_reader(order.release))
    skeleton.add(_small_files(repository, fetcher))
    skeleton.read_headers(passage.header)
    return skeleton


def _small_files(repository: Repository, fetcher: Fetcher) -> list[Path]:
    """What is beside the tensors, brought and whole. Raises FetchError."""
    beside = [file for file in fetcher.listing.files if file.path in repository.others]
    problems = [problem for file in beside if (problem := fetcher.bring(file))]
    if problems:
        raise FetchError(problems)
    elsewhere = [fetcher.folder / repository.tokenizer.path] if repository.tokenizer else []
    return [*map(fetcher.path_of, beside), *elsewhere]


def _plan(order: Wanted, recipe: Recipe, coming: Checkpoint, *, vocabulary_of: Path) -> OutputPlan:
    vocabulary = open_vocabulary(vocabulary_of, None, size=coming.dimensions.vocabulary)
    name, split_size = order.output.name, order.limits.split_size
    return plan_output(coming, recipe, vocabulary=vocabulary, name=name, split_size=split_size)


def _fetcher(listing: Listing, folder: Path, passage: Passage, done: Collection[RemoteFile]) -> Fetcher:
    return Fetcher(listing, folder, passage.fetched, done=done)


def _lots(order: Wanted, plan: OutputPlan, skeleton: Skeleton) -> list[Lot]:
    sizes = {path: file.size for path, file in skeleton.tensors.items()}
    return lots_of(plan.pieces, sizes, same_disk=on_same_disk(order.folder, order.output))


def _room(order: Wanted, destination: Destination, lots: list[Lot], *, beside: int) -> Room:
    """Where the output goes to another disk, that one's room is the destination's to check."""
    plan, same = destination.plan, on_same_disk(order.folder, order.output)
    own = [*destination.partials, *destination.finals, journal_of(order.output)] if same else []
    rest = plan.nbytes - sum(lot.packed for lot in lots) + _LINE * len(plan.pieces) if same else 0
    files = [path for lot in lots for path in lot.files]
    return Room(
        order.folder,
        together=least_room(lots, discard=order.discard),
        beside=beside + rest + _LISTS,
        there=disk_used([*files, *(order.folder / PULL).rglob("*"), *own]),
        output=plan.nbytes if same else 0,
        release=sum(lot.nbytes for lot in lots),
        discard=order.discard,
    )
