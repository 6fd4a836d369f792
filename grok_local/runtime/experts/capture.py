"""Has llama.cpp use our memory instead of the file it has mapped: for tensors that stay, and for experts in slots."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ctypes import CDLL, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grok_local.ggml import tensors as ggml_tensors
from grok_local.runtime.experts.weights import ExpertTensor, Resident

__all__ = ["Advice", "Capture", "MappedPiece", "Products", "mapped_pieces"]

_EVALUATIONS = 4  # after which every weight that is ever used has been seen


class Capture:
    """Looks at the nodes of llama.cpp's graph for the weights they use, until every one that stays has been seen."""

    def __init__(self, weights: Iterable[Resident]) -> None:
        self._unseen = {weight.tensor.name.encode(): weight for weight in weights}
        self._pieces: list[MappedPiece] = []
        self._evaluations = 0

    def attach(self, paths: Sequence[Path]) -> None:
        """llama.cpp has mapped these files: what it has of them in memory is given back."""
        self._pieces = mapped_pieces(paths)
        for piece in self._pieces:
            piece.advise(Advice.DONTNEED)  # touched again, they come from the file

    @property
    def is_looking(self) -> bool:
        """Whether there may be weights, or products with experts, that were not seen yet."""
        return self._evaluations < _EVALUATIONS

    def count_evaluation(self) -> None:
        """A complete one is over."""
        self._evaluations += 1

    def look_at(self, node: int) -> None:
        """Have llama.cpp read the weights that this node uses from our memory from now on."""
        for source in ggml_tensors.sources(node):
            weight = self._unseen.get(ggml_tensors.tensor_name(source))
            if weight is not None and self._is_mapped(source, weight):
                ggml_tensors.move_data(source, weight.region.address)
                del self._unseen[weight.tensor.name.encode()]

    def _is_mapped(self, tensor: int, weight: Resident) -> bool:
        """Whether it is this one: the output matrix on a device may be the embedding by another name."""
        address = ggml_tensors.data_address(tensor)
        places = (piece.address(weight.tensor.offset) for piece in self._pieces if piece.file == weight.file)
        return address in places and ggml_tensors.size_of(tensor) == weight.tensor.nbytes


class Products:
    """The nodes that multiply with experts, by name, and what they use instead of the model's."""

    def __init__(self, weights: Iterable[ExpertTensor]) -> None:
        self._weights = {weight.name.encode(): weight for weight in weights}
        self._found: dict[bytes, tuple[ExpertTensor, ggml_tensors.StandIn]] = {}

    def look_at(self, node: int, name: bytes) -> None:
        """Remember the node if it is one."""
        if name in self._found or not ggml_tensors.multiplies_experts(node):
            return
        for source in map(ggml_tensors.tensor_name, ggml_tensors.sources(node)):
            if source in self._weights:
                self._found[name] = self._weights[source], ggml_tensors.StandIn()

    @property
    def names(self) -> frozenset[bytes]:
        """Of those that were found."""
        return frozenset(self._found)

    def weight_of(self, name: bytes) -> ExpertTensor | None:
        """What the node of that name multiplies with."""
        return self._found[name][0] if name in self._found else None

    def redirect(self, node: int, name: bytes, *, address: int, stride: int, slots: npt.NDArray[np.int32]) -> bool:
        """Have the node use slots, every `stride` bytes from `address` on. Returns whether it wants as many."""
        return self._found[name][1].put(node, address=address, stride=stride, slots=slots)


class Advice(IntEnum):
    """Linux's for madvise."""

    NORMAL = 0
    SEQUENTIAL = 2
    WILLNEED = 3
    DONTNEED = 4
    POPULATE_READ = 22


@dataclass(frozen=True)
class MappedPiece:
    """A piece of a file that is mapped into this process: its bytes from `offset` on, at `start` to `end`."""

    file: int
    start: int
    end: int
    offset: int

    def address(self, offset: int) -> int | None:
        """Where a byte of the file is, None if not in this piece."""
        address = self.start + offset - self.offset
        return address if self.start <= address < self.end else None

    def advise(self, advice: Advice, first: int = 0, end: int = 1 << 62) -> None:
        """Tell the system about the pages that have bytes `first` to `end` of the file; it may not listen."""
        start = (self.start + max(first - self.offset, 0)) // PAGESIZE * PAGESIZE
        stop = self.start + min(end - self.offset, self.end - self.start)
        if start < stop:
            CDLL(None, use_errno=True).madvise(c_void_p(start), c_size_t(stop - start), c_int(advice))


def mapped_pieces(paths: Sequence[Path]) -> list[MappedPiece]:
    """What Linux says is mapped of these files."""
    # Some file systems show other device numbers there than stat does.
    names = {os.path.realpath(path): number for number, path in enumerate(paths)}
    inodes = {(status.st_dev, status.st_ino): number for number, status in enumerate(map(os.stat, paths))}
    pieces = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
            span, _, offset, device, inode, *rest = line.split(maxsplit=5)
            major, minor = (int(part, 16) for part in device.split(":"))
            number = inodes.get((os.makedev(major, minor), int(inode)), names.get("".join(rest)))
            if number is not None:
                start, end = (int(part, 16) for part in span.split("-"))
                pieces.append(MappedPiece(number, start, end, int(offset, 16)))
    return pieces
