"""The weights of a model that are in RAM: where the file has them, where memory will, and what llama.cpp knows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from ctypes import CDLL, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from grok_local.formats.gguf_file import Header, Tensor
from grok_local.placement.shape import EXPERTS
from grok_local.runtime.experts.memory import HUGE, Region
from grok_local.runtime.experts.reader import Reader, Ticket

__all__ = ["Mapping", "Slices", "Weight", "dense_tensors", "expert_slices", "mappings", "weights_of"]

_LAYER = re.compile(rf"blk\.(\d+)\.{EXPERTS}\.weight")
# Bytes from which on what huge pages take beyond the end of a tensor, or beyond both ends of a slice, is little.
_LARGE_TENSOR, _LARGE_SLICE = 8 * HUGE, 32 * HUGE


@dataclass(frozen=True)
class Slices:
    """Where a file has a tensor of experts, one after the other every `stride` bytes."""

    file: int
    offset: int
    stride: int


@dataclass(frozen=True)
class Weight:
    """A tensor; of experts, `layer` is theirs and `stride` the bytes of one. `region` is where memory has it."""

    tensor: Tensor
    file: int
    layer: int | None
    stride: int
    region: Region

    def read(self, reader: Reader, expert: int = 0) -> Ticket:
        """Have it read, or one expert's slice of it."""
        at = expert * self.stride
        start = self.tensor.offset + at
        return reader.read(self.file, start, start + self.stride, region=self.region, at=at)

    def take_pages(self, expert: int, *, source: Weight, victim: int) -> None:
        """Have for an expert's slice the memory of a victim's in `source`, where it is as large."""
        if source.stride != self.stride:
            source.release(victim)
            return
        at = expert * self.stride
        self.region.take_pages(at, at + self.stride, source=source.region, source_start=victim * self.stride)

    def release(self, expert: int) -> None:
        """Give an expert's slice of memory back."""
        self.region.release(expert * self.stride, (expert + 1) * self.stride)


def weights_of(headers: Sequence[Header], names: Iterable[str], *, budget: int, huge: bool) -> Iterator[Weight]:
    """Those of the tensors that are named, with memory reserved for them. Raises OSError.

    Huge pages, if at all, where they take no more than small ones: a part of a tensor might have a page for its ends.
    """
    named = list(_named(headers, names))
    whole = sum(tensor.nbytes for _, tensor in named if _slices(tensor)[0] is not None) <= budget
    for file, tensor in named:
        layer, stride = _slices(tensor)
        large = huge and _deserves_huge_pages(tensor, stride, whole=whole)
        yield Weight(tensor, file, layer, stride, Region(tensor.offset, tensor.nbytes, huge=large))


def _deserves_huge_pages(tensor: Tensor, stride: int, *, whole: bool) -> bool:
    if whole or stride == tensor.nbytes:
        return tensor.nbytes >= _LARGE_TENSOR
    return stride % HUGE == 0 or stride >= _LARGE_SLICE


def expert_slices(headers: Sequence[Header], names: Iterable[str]) -> dict[int, list[Slices]]:
    """By layer, those of the tensors that are experts."""
    found: dict[int, list[Slices]] = {}
    for file, tensor in _named(headers, names):
        layer, stride = _slices(tensor)
        if layer is not None:
            found.setdefault(layer, []).append(Slices(file, tensor.offset, stride))
    return found


def dense_tensors(headers: Sequence[Header], names: Iterable[str]) -> list[tuple[int, Tensor]]:
    """Those of the tensors that are not, each with its file's number."""
    return [(file, tensor) for file, tensor in _named(headers, names) if _slices(tensor)[0] is None]


def _named(headers: Sequence[Header], names: Iterable[str]) -> Iterator[tuple[int, Tensor]]:
    wanted = set(names)
    for file, header in enumerate(headers):
        yield from ((file, tensor) for tensor in header.tensors if tensor.name in wanted)


def _slices(tensor: Tensor) -> tuple[int | None, int]:
    found = _LAYER.fullmatch(tensor.name)
    if found and len(tensor.shape) == 3:
        return int(found[1]), tensor.nbytes // tensor.shape[0]
    return None, tensor.nbytes


@dataclass(frozen=True)
class Mapping:
    """A piece of a file that is mapped into this process: its bytes from `offset` on, at `start` to `end`."""

    file: int
    start: int
    end: int
    offset: int

    def address(self, offset: int) -> int | None:
        """Where a byte of the file is, None if not in this piece."""
        address = self.start + offset - self.offset
        return address if self.start <= address < self.end else None

    def give_back(self) -> None:
        """The mapped pages need not stay in memory; touched again, they come from the file."""
        libc = CDLL(None, use_errno=True)
        libc.madvise(c_void_p(self.start), c_size_t(self.end - self.start), c_int(4))  # MADV_DONTNEED


def mappings(paths: Sequence[Path]) -> list[Mapping]:
    """What Linux says is mapped of these files."""
    # Some file systems show other device numbers there than stat does.
    names = {os.path.realpath(path): number for number, path in enumerate(paths)}
    inodes = {(status.st_dev, status.st_ino): number for number, status in enumerate(map(os.stat, paths))}
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
            span, _, offset, device, inode, *rest = line.split(maxsplit=5)
            major, minor = (int(part, 16) for part in device.split(":"))
            number = inodes.get((os.makedev(major, minor), int(inode)), names.get("".join(rest)))
            if number is not None:
                start, end = (int(part, 16) for part in span.split("-"))
                found.append(Mapping(number, start, end, int(offset, 16)))
    return found
