"""Has llama.cpp read weights from our memory instead of from the file it has mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ctypes import CDLL, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from grok_local.ggml import tensors as ggml_tensors
from grok_local.runtime.experts.weights import StreamedTensor

__all__ = ["Capture"]

_EVALUATIONS = 4  # after which every weight that is ever used has been seen


class Capture:
    """Looks at the nodes of llama.cpp's graph for the weights they use, until every one has been seen."""

    def __init__(self, weights: Iterable[StreamedTensor]) -> None:
        self._unseen = {weight.name.encode(): weight for weight in weights}
        self._products: dict[bytes, StreamedTensor] = {}
        self._pieces: list[MappedPiece] = []
        self._evaluations = 0

    def attach(self, paths: Sequence[Path]) -> None:
        """llama.cpp has mapped these files: what it has of them in memory is given back."""
        self._pieces = mapped_pieces(paths)
        for piece in self._pieces:
            piece.give_back()

    @property
    def is_looking(self) -> bool:
        """Whether there may be weights that were not seen yet."""
        return bool(self._unseen)

    def product_with(self, name: bytes) -> StreamedTensor | None:
        """The experts that the node of that name multiplies with."""
        return self._products.get(name)

    def count_evaluation(self) -> None:
        """A complete one is over."""
        self._evaluations += 1
        if self._evaluations == _EVALUATIONS:
            self._unseen.clear()

    def look_at(self, node: int, name: bytes) -> None:
        """Have llama.cpp read the weights that this node uses from our memory from now on."""
        for source in ggml_tensors.sources(node):
            weight = self._unseen.get(ggml_tensors.tensor_name(source))
            if weight is None or not self._is_mapped(source, weight):
                continue
            ggml_tensors.move_data(source, weight.region.address)
            if weight.layer is not None:
                self._products[name] = weight
            del self._unseen[weight.name.encode()]

    def _is_mapped(self, tensor: int, weight: StreamedTensor) -> bool:
        """Whether it is this one: the output matrix on a device may be the embedding by another name."""
        address = ggml_tensors.data_address(tensor)
        places = (piece.address(weight.tensor.offset) for piece in self._pieces if piece.file == weight.file)
        return address in places and ggml_tensors.size_of(tensor) == weight.tensor.nbytes


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

    def give_back(self) -> None:
        """The mapped pages need not stay in memory; touched again, they come from the file."""
        libc = CDLL(None, use_errno=True)
        libc.madvise(c_void_p(self.start), c_size_t(self.end - self.start), c_int(4))  # MADV_DONTNEED


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
