"""The tensors of a model that are in RAM: where the file has them, and where memory will."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from grok_local.files import BLOCK
from grok_local.formats.gguf_file import Header, Tensor
from grok_local.pages import HUGE, Region
from grok_local.placement.shape import EXPERTS
from grok_local.runtime.experts.reader import Reader, Ticket

__all__ = ["ExpertTensor", "Resident", "bytes_of_experts", "dense_tensors", "expert_tensors", "residents"]

_LAYER = re.compile(rf"blk\.(\d+)\.{EXPERTS}\.weight")
_LARGE = 8 * HUGE  # bytes from which on what huge pages take beyond a tensor's ends is little


@dataclass(frozen=True)
class Resident:
    """A tensor that stays; `region` is where memory has it."""

    tensor: Tensor
    file: int
    region: Region

    def read(self, reader: Reader) -> Ticket:
        """Have it read."""
        return reader.read(self.file, self.tensor.offset, self.tensor.nbytes, region=self.region, at=0)


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of experts, one after the other every `stride` bytes of the file; a slice of it is one's."""

    tensor: Tensor
    file: int
    layer: int

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.tensor.name

    @property
    def stride(self) -> int:
        """Bytes of a slice."""
        return self.tensor.nbytes // self.tensor.shape[0]

    @property
    def slack(self) -> int:
        """Bytes of a block before the first slice: memory has every slice so many bytes behind a block's start."""
        return self.tensor.offset % BLOCK

    @property
    def span(self) -> int:
        """Bytes of whole blocks for a slice."""
        return -(-(self.slack + self.stride) // BLOCK) * BLOCK

    def read(self, reader: Reader, expert: int, *, region: Region, at: int) -> Ticket:
        """Have an expert's slice read into the blocks at `at`."""
        offset = self.tensor.offset + expert * self.stride
        return reader.read(self.file, offset, self.stride, region=region, at=at + self.slack)

    def read_ahead(self, reader: Reader, expert: int) -> Ticket:
        """Have an expert's slice read into the page cache."""
        offset = self.tensor.offset + expert * self.stride
        return reader.read_ahead(self.file, offset, offset + self.stride)


def residents(headers: Sequence[Header], names: Iterable[str], *, whole: bool) -> Iterator[Resident]:
    """Those of the named tensors that stay, with memory reserved: dense ones, and experts too if `whole`.

    Raises OSError.
    """
    for file, tensor in _named(headers, names):
        if whole or _layer(tensor) is None:
            yield Resident(tensor, file, Region(tensor.offset, tensor.nbytes, huge=tensor.nbytes >= _LARGE))


def expert_tensors(headers: Sequence[Header], names: Iterable[str]) -> dict[int, list[ExpertTensor]]:
    """By layer, those of the named tensors that are experts."""
    found: dict[int, list[ExpertTensor]] = {}
    for file, tensor in _named(headers, names):
        layer = _layer(tensor)
        if layer is not None:
            found.setdefault(layer, []).append(ExpertTensor(tensor, file, layer))
    return found


def bytes_of_experts(headers: Sequence[Header], names: Iterable[str]) -> int:
    """What all experts among the named tensors take."""
    return sum(tensor.nbytes for _, tensor in _named(headers, names) if _layer(tensor) is not None)


def dense_tensors(headers: Sequence[Header], names: Iterable[str]) -> list[tuple[int, Tensor]]:
    """Those of the named tensors that are not experts, each with its file's number."""
    return [(file, tensor) for file, tensor in _named(headers, names) if _layer(tensor) is None]


def _named(headers: Sequence[Header], names: Iterable[str]) -> Iterator[tuple[int, Tensor]]:
    wanted = set(names)
    for file, header in enumerate(headers):
        yield from ((file, tensor) for tensor in header.tensors if tensor.name in wanted)


def _layer(tensor: Tensor) -> int | None:
    """Of a tensor of experts."""
    match = _LAYER.fullmatch(tensor.name)
    return int(match[1]) if match and len(tensor.shape) == 3 else None
