"""The tensors of a model that are in RAM: where the file has them, and where memory will."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from grok_local.formats.gguf_file import Header, Tensor
from grok_local.placement.shape import EXPERTS
from grok_local.runtime.experts.memory import HUGE, Region
from grok_local.runtime.experts.reader import Reader, Ticket

__all__ = ["StreamedTensor", "dense_tensors", "expert_slices", "streamed_tensors"]

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
class StreamedTensor:
    """A tensor; of experts, `layer` is theirs and `stride` the bytes of one. `region` is where memory has it."""

    tensor: Tensor
    file: int
    layer: int | None
    stride: int
    region: Region

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.tensor.name

    def read(self, reader: Reader, expert: int = 0) -> Ticket:
        """Have it read, or one expert's slice of it."""
        at = expert * self.stride
        start = self.tensor.offset + at
        return reader.read(self.file, start, start + self.stride, region=self.region, at=at)

    def take_pages(self, expert: int, *, source: StreamedTensor, victim: int) -> None:
        """Have for an expert's slice the memory of a victim's in `source`, where it is as large."""
        if source.stride != self.stride:
            source.release(victim)
            return
        at = expert * self.stride
        self.region.take_pages(at, at + self.stride, source=source.region, source_start=victim * self.stride)

    def release(self, expert: int) -> None:
        """Give an expert's slice of memory back."""
        self.region.release(expert * self.stride, (expert + 1) * self.stride)


def streamed_tensors(
    headers: Sequence[Header], names: Iterable[str], *, budget: int, huge: bool
) -> Iterator[StreamedTensor]:
    """Those of the tensors that are named, with memory reserved for them. Raises OSError.

    Huge pages, if at all, where they take no more than small ones: a part of a tensor might have a page for its ends.
    """
    named = list(_named(headers, names))
    whole = sum(tensor.nbytes for _, tensor in named if _slices(tensor)[0] is not None) <= budget
    for file, tensor in named:
        layer, stride = _slices(tensor)
        large = huge and _deserves_huge_pages(tensor, stride, whole=whole)
        yield StreamedTensor(tensor, file, layer, stride, Region(tensor.offset, tensor.nbytes, huge=large))


def _deserves_huge_pages(tensor: Tensor, stride: int, *, whole: bool) -> bool:
    if whole or stride == tensor.nbytes:
        return tensor.nbytes >= _LARGE_TENSOR
    return stride % HUGE == 0 or stride >= _LARGE_SLICE


def expert_slices(headers: Sequence[Header], names: Iterable[str]) -> dict[int, list[Slices]]:
    """By layer, those of the tensors that are experts."""
    slices: dict[int, list[Slices]] = {}
    for file, tensor in _named(headers, names):
        layer, stride = _slices(tensor)
        if layer is not None:
            slices.setdefault(layer, []).append(Slices(file, tensor.offset, stride))
    return slices


def dense_tensors(headers: Sequence[Header], names: Iterable[str]) -> list[tuple[int, Tensor]]:
    """Those of the tensors that are not, each with its file's number."""
    return [(file, tensor) for file, tensor in _named(headers, names) if _slices(tensor)[0] is None]


def _named(headers: Sequence[Header], names: Iterable[str]) -> Iterator[tuple[int, Tensor]]:
    wanted = set(names)
    for file, header in enumerate(headers):
        yield from ((file, tensor) for tensor in header.tensors if tensor.name in wanted)


def _slices(tensor: Tensor) -> tuple[int | None, int]:
    match = _LAYER.fullmatch(tensor.name)
    if match and len(tensor.shape) == 3:
        return int(match[1]), tensor.nbytes // tensor.shape[0]
    return None, tensor.nbytes
