"""What of a release's files is needed when they are not there: their headers before they come, samples when they are
gone.

A skeleton has a file for each, of the same size, with nothing but those parts in it and holes between them. So it opens
like the checkpoint itself, and has the same fingerprint once all samples are in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from grok_local.errors import CheckpointError, FetchError
from grok_local.files import BLOCK, PULL, JsonLines, partial_of, write_whole
from grok_local.hub.download import StopError, read_span
from grok_local.hub.fetcher import CONNECTIONS, Fetcher, access
from grok_local.hub.listing import is_offline
from grok_local.hub.ranges import open_ranges
from grok_local.hub.reasons import reason
from grok_local.hub.repositories import RemoteFile
from grok_local.quantize.sources.checkpoint import Checkpoint, Place, Span, fingerprint
from grok_local.quantize.sources.recognise import HeaderReader

__all__ = ["Skeleton"]


class Skeleton:
    """The skeleton of a listing's files, in the folder of what is half-fetched."""

    def __init__(self, fetcher: Fetcher, tensors: Mapping[Path, RemoteFile], read_header: HeaderReader) -> None:
        keep, listing = fetcher.folder / PULL, fetcher.listing
        self.source, self.folder = fetcher.folder, keep / f"skeleton-{listing.digest}"
        self.tensors = tensors
        self._fetcher, self._read_header = fetcher, read_header
        self._known = keep / f"fingerprint-{listing.digest}"
        self._kept_list = self.folder / "kept.jsonl"
        for other in set(keep.glob("skeleton-*")) - {self.folder}:  # of what the hub had before
            shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)
        self._kept, self._small = self._read_kept(), 0

    def _read_kept(self) -> set[Path]:
        """The files of which all is here that is needed when they are gone; those whose part is gone come again."""
        with JsonLines(self._kept_list) as lines:
            listed = [self.source / line for line in lines.read() if isinstance(line, str)]
            kept = {path for path in listed if path in self.tensors and self.path_of(path).exists()}
            if len(kept) < len(listed):
                lines.clear()
                lines.append(*(str(path.relative_to(self.source)) for path in kept))
        return kept

    def path_of(self, path: Path) -> Path:
        """The skeleton's file for one of the release's."""
        return self.folder / path.relative_to(self.source)

    # -- before the files come -----------------------------------------------------------------------------------------

    def read_headers(self, seen: Callable[[int, int, str], None]) -> None:
        """Have all headers there; `seen` hears how many are, of how many. Raises FetchError."""
        problems: list[str] = []
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                for number, (path, problem) in enumerate(pool.map(self._outline, self.tensors), 1):
                    problems += [problem] if problem else []
                    seen(number, len(self.tensors), path.name)
            finally:
                self._fetcher.stopped.set()
                pool.shutdown(cancel_futures=True)
        if problems:
            more = [f"and {len(problems) - 5} more like these"] if len(problems) > 5 else []
            raise FetchError([*problems[:5], *more])

    def add(self, paths: Iterable[Path]) -> None:
        """Have small files there whole, which are beside the tensors."""
        for path in paths:
            write_whole(self.path_of(path), path.read_bytes())
            self._small += 2 * (path.stat().st_size + BLOCK)  # here and there

    def places(self) -> dict[Path, Place]:
        """Where each of the skeleton's files of tensors will be whole."""
        return {self.path_of(path): Place(path, file.stamp) for path, file in self.tensors.items()}

    def _outline(self, path: Path) -> tuple[Path, str | None]:
        """Returns what went wrong, for the user."""
        file, outline = self.tensors[path], self.path_of(path)
        if outline.exists():
            return path, None
        if is_offline() and (problem := self._fetcher.bring(file)):
            return path, problem
        try:
            self._read(file, outline)
        except CheckpointError as error:
            return path, str(error)
        except StopError:
            return path, f"{file.path}: stopped"
        except Exception as error:
            return path, f"{file.path}: {reason(error)}"
        return path, None

    def _read(self, file: RemoteFile, outline: Path) -> None:
        outline.parent.mkdir(parents=True, exist_ok=True)
        with partial_of(outline).open("wb") as target, self._opened(file, target) as source:
            target.truncate(file.size)
            self._read_header(source, file.path)
            target.flush()
            os.fsync(target.fileno())
        partial_of(outline).rename(outline)

    @contextmanager
    def _opened(self, file: RemoteFile, target: BinaryIO) -> Iterator[BinaryIO]:
        """The release's file, here or on the hub; what is read of it is written to `target` too."""
        path = self._fetcher.path_of(file)
        url, headers = access(self._fetcher.listing, file)
        stopped = self._fetcher.stopped

        def part(span: range) -> bytes:
            if self._fetcher.has(file):
                data = _read_part(path, span)
            else:
                data = read_span(url, span, headers=headers, stopped=stopped)
            os.pwrite(target.fileno(), data, span.start)
            return data

        with open_ranges(part, file.size) as source:
            yield source

    # -- while they come and go ----------------------------------------------------------------------------------------

    def check(self, path: Path) -> None:
        """Whether a file has the header that was planned with: it came before it could be hashed. Raises FetchError."""
        outline = self.path_of(path)
        with path.open("rb") as whole, outline.open("rb") as planned:
            same = self._read_header(whole, path.name) == self._read_header(planned, path.name)
        if not same:
            outline.unlink()
            raise FetchError(
                f"{path.name}: its header is not the one that came alone before: run the same command again"
            )

    def keep(self, spans: Iterable[Span]) -> None:
        """Copy parts of files, after which those may go."""
        by_path: dict[Path, list[Span]] = {}
        for span in spans:
            by_path.setdefault(span.path, []).append(span)
        for path, parts in by_path.items():
            with self.path_of(path).open("r+b") as target:
                for span in parts:
                    target.seek(span.offset)
                    target.write(_read_part(path, range(span.offset, span.offset + span.nbytes)))
                target.flush()
                os.fsync(target.fileno())

    def mark(self, paths: Sequence[Path]) -> None:
        """Note that all is kept of these files."""
        with JsonLines(self._kept_list) as lines:
            lines.append(*(str(path.relative_to(self.source)) for path in paths))
            os.fsync(lines.fileno())
        self._kept |= set(paths)

    def has_kept(self, path: Path) -> bool:
        """Whether a file may be gone."""
        return path in self._kept

    def full_size(self, spans: Iterable[Span]) -> int:
        """Bytes of the disk that the skeleton and the small files take at most, once it has these parts."""
        samples = dict.fromkeys(self.tensors, 0)
        for span in spans:
            samples[span.path] += span.nbytes + 2 * BLOCK
        return self._small + sum(self._full_size(path, nbytes) for path, nbytes in samples.items())

    def _full_size(self, path: Path, samples: int) -> int:
        whole = -(-self.tensors[path].size // BLOCK) * BLOCK
        return min(whole, self.path_of(path).stat().st_blocks * 512 + samples)

    # -- at the end ----------------------------------------------------------------------------------------------------

    def fingerprint(self, outlined: Checkpoint, coming: Checkpoint) -> str:
        """Of the checkpoint as the skeleton has it, or as its files have, which an earlier pull may have left; empty
        where neither has all of it.
        """
        if self._known.exists():
            return self._known.read_text("ascii")
        if len(self._kept) == len(self.tensors):
            found = fingerprint(outlined)
        elif all(map(self._fetcher.has, self.tensors.values())):
            found = fingerprint(coming)
        else:
            return ""
        write_whole(self._known, found.encode())
        return found

    def remove(self) -> None:
        """Nothing but the fingerprint is needed any more."""
        shutil.rmtree(self.folder)


def _read_part(path: Path, span: range) -> bytes:
    """Bytes of a file. Raises OSError."""
    with path.open("rb") as file:
        file.seek(span.start)
        return file.read(len(span))
