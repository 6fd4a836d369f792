"""`arrival`: a release is fetched and packed at once, and need never be on the disk as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grok_local.arrival.landing import Landing, Ordered
from grok_local.arrival.lots import Lot, least_room, lots_of
from grok_local.arrival.passage import Passage, Shown
from grok_local.arrival.room import Room, disk_used, on_same_disk
from grok_local.arrival.skeleton import Skeleton
from grok_local.errors import FetchError, OptionError
from grok_local.files import PULL, gone_mark, journal_of
from grok_local.hub.elsewhere import check_tokenizer
from grok_local.hub.fetch import fetch_tokenizer, pulling
from grok_local.hub.fetcher import Fetcher
from grok_local.hub.listing import Listing
from grok_local.hub.repositories import RemoteFile, Repository, repository_of
from grok_local.quantize.convert import Limits, QuantizeReport, pack_into
from grok_local.quantize.layout.output_plan import plan_output
from grok_local.quantize.output.destination import Destination
from grok_local.quantize.recipe import recipe_named
from grok_local.quantize.sources.checkpoint import Checkpoint, Place, looked_at
from grok_local.quantize.sources.recognise import header_reader, open_checkpoint, open_vocabulary

__all__ = ["Order", "arrival"]

_LINE = 160  # bytes of the journal for a piece
_LISTS = 1 << 16  # bytes of the listing, locks and lists


@dataclass(frozen=True)
class Order:
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
        if self.room.discard:
            gone_mark(self.skeleton.source).touch()
        return report


@contextmanager
def arrival(order: Order, progress: Shown | None = None) -> Iterator[Arrival]:
    """What is ordered, planned by what the hub says of its files, and by their headers.

    Raises OptionError, FetchError, CheckpointError or TokenizerError.
    """
    repository, recipe, folder, output = (
        repository_of(order.release),
        recipe_named(order.type),
        order.folder,
        order.output,
    )
    check_tokenizer(repository, order.tokenizer)
    with pulling(repository, folder) as listing:
        _check_output(listing, folder, output)
        passage = Passage(listing.nbytes, progress)
        fetcher = Fetcher(listing, folder)
        notes = tuple(fetch_tokenizer(repository, folder, given=order.tokenizer))
        tensors = {folder / file.path: file for file in listing.files if file.path not in repository.others}
        skeleton = Skeleton(fetcher, tensors, header_reader(order.release))
        skeleton.add(_small_files(repository, fetcher))
        skeleton.read_headers(passage.header)
        outlined = open_checkpoint(skeleton.folder)
        coming = outlined.moved({skeleton.path_of(path): Place(path, file.stamp) for path, file in tensors.items()})
        vocabulary = open_vocabulary(outlined.folder, None, size=coming.dimensions.vocabulary)
        plan = plan_output(coming, recipe, vocabulary=vocabulary, name=output.name, split_size=order.limits.split_size)
        destination = Destination(output, plan, partial(skeleton.fingerprint, outlined))
        lots = _lots(destination, tensors, folder)
        room = _room(destination, lots, skeleton, coming=coming, discard=order.discard)
        ordered = Ordered(coming, tensors, lots, room, partial(_fetcher, listing, folder, passage))
        yield Arrival(destination, ordered, skeleton, passage, notes, order.limits)


def _check_output(listing: Listing, folder: Path, output: Path) -> None:
    """No option may have the release's files replaced by what is made of them. Raises OptionError."""
    if output.resolve() in {(folder / file.path).resolve() for file in listing.files}:
        raise OptionError(f"-o {output}: is the name of one of the release's files: choose another")


def _small_files(repository: Repository, fetcher: Fetcher) -> list[Path]:
    """What is beside the tensors, brought and whole. Raises FetchError."""
    beside = [file for file in fetcher.listing.files if file.path in repository.others]
    problems = [problem for file in beside if (problem := fetcher.bring(file))]
    if problems:
        raise FetchError(problems)
    elsewhere = [fetcher.folder / repository.tokenizer.path] if repository.tokenizer else []
    return [*map(fetcher.path_of, beside), *elsewhere]


def _fetcher(listing: Listing, folder: Path, passage: Passage, done: Collection[RemoteFile]) -> Fetcher:
    return Fetcher(listing, folder, passage.fetched, done=done)


def _lots(destination: Destination, tensors: Mapping[Path, RemoteFile], folder: Path) -> list[Lot]:
    sizes = {path: file.size for path, file in tensors.items()}
    return lots_of(destination.plan.pieces, sizes, same_disk=on_same_disk(folder, destination.target))


def _room(destination: Destination, lots: list[Lot], skeleton: Skeleton, *, coming: Checkpoint, discard: bool) -> Room:
    folder, plan, pieces = skeleton.source, destination.plan, sum(len(lot.pieces) for lot in lots)
    same = on_same_disk(folder, destination.target)
    own = [*destination.partials, *destination.finals, journal_of(destination.target)] if same else []
    padding = plan.nbytes - sum(lot.packed for lot in lots) + _LINE * pieces if same else 0
    files = [path for lot in lots for path in lot.files]
    return Room(
        folder,
        together=least_room(lots, discard=discard),
        beside=skeleton.full_size(looked_at(coming)) + padding + _LISTS,
        there=disk_used([*files, *(folder / PULL).rglob("*"), *own]),
        output=plan.nbytes if same else 0,
        release=sum(lot.nbytes for lot in lots),
        discard=discard,
    )
