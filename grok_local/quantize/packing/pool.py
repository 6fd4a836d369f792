"""Packs a plan's pieces with a pool of threads, within a memory budget.

The calling thread reads slabs ahead, the workers pack and hash their pieces, and two more threads write and journal
them: nobody waits for the disk while there is something to pack. Everything passes through a few reused buffers.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grok_local import units
from grok_local.errors import OptionError
from grok_local.quantize.layout.output_plan import OutputPlan
from grok_local.quantize.layout.pieces import Piece, piece_rows
from grok_local.quantize.output.journal import Journal
from grok_local.quantize.output.part_file import PartFile, aligned_empty
from grok_local.quantize.packing.blocks import Workspace, pack_piece
from grok_local.quantize.packing.slabs import Slab, read_slab, slab_bytes

__all__ = ["Budget", "PackingRun", "Progress", "slab_runs"]

# The interpreter, numpy, the tokenizer and the header of 131,072 pieces, measured 210 MB; the rest is the allocator's.
_FIXED_MEMORY = 350_000_000
_SLABS = 2
_WRITERS = 2


@dataclass(frozen=True)
class Progress:
    """How far it is. `phase` is "check" (what an earlier run left) or "pack"; counts are weights."""

    phase: str
    done: int
    total: int
    tensor: str
    bytes_read: int  # of the checkpoint, in this run
    bytes_written: int

    @property
    def label(self) -> str:
        return self.tensor


@dataclass(frozen=True)
class Budget:
    """How many threads pack, and the bytes of each slab read ahead and of each packed piece."""

    threads: int
    slab: int
    piece: int

    @classmethod
    def of(cls, memory: int, threads: int, plan: OutputPlan) -> Budget:
        """What fits into `memory` bytes: fewer threads if need be. Raises OptionError below the least that works."""
        tensors = plan.tensors
        piece = max(piece.nbytes for piece in plan.pieces)
        least = max(slab_bytes(t, min(piece_rows(t.width), t.rows)) for t in tensors)
        per_thread = max(Workspace.nbytes(t) for t in tensors) + piece
        fixed = _FIXED_MEMORY + _WRITERS * piece
        spare = memory - fixed - _SLABS * least
        if spare < per_thread:
            needed = units.format_bytes(1.005 * (fixed + _SLABS * least + per_thread))
            raise OptionError(f"--memory {units.format_bytes(memory)} is too little here: give {needed} or more")
        threads = min(threads, spare // per_thread)
        most = max(
            slab_bytes(t, t.rows if t.transposed else min(threads * piece_rows(t.width), t.rows)) for t in tensors
        )
        slab = (memory - fixed - threads * per_thread) // _SLABS
        return cls(threads, min(slab, most), piece)


def slab_runs(pieces: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """Runs of consecutive pieces of one matrix whose slab takes at most `limit` bytes (or a single piece's)."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not (_follows(piece, run[-1]) and slab_bytes(piece.tensor, piece.stop - run[0].start) <= limit):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _follows(piece: Piece, last: Piece) -> bool:
    return piece.tensor is last.tensor and piece.expert == last.expert and piece.start == last.stop


@dataclass
class _Load:
    """A slab in memory and how many of its pieces are still to be packed."""

    slab: Slab
    memory: npt.NDArray[np.uint8]
    left: int


class PackingRun:
    """Packs a plan's pieces into `files`, one for each part, and writes down in the journal which are done."""

    def __init__(
        self, plan: OutputPlan, files: Sequence[PartFile], journal: Journal, progress: Callable[[Progress], None] | None
    ) -> None:
        self.digests: dict[int, bytes] = {}  # SHA-256 by piece index
        self._plan = plan
        self._files = files
        self._journal = journal
        self._progress = progress
        self._total = sum(piece.weights for piece in plan.pieces)
        self._done = self._read = self._written = 0
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._workspace = Workspace()
        self._slabs: queue.SimpleQueue[npt.NDArray[np.uint8]] = queue.SimpleQueue()
        self._outputs: queue.SimpleQueue[npt.NDArray[np.uint8]] = queue.SimpleQueue()

    def check(self, threads: int) -> int:
        """Take over the journal's pieces whose bytes are still right. Returns how many."""
        journaled = [piece for piece in self._plan.pieces if piece.index in self._journal.entries]
        with ThreadPoolExecutor(threads) as pool:
            try:
                for piece, digest in zip(journaled, pool.map(self._check_piece, journaled), strict=True):
                    if digest:
                        self.digests[piece.index] = digest
                        self._report("check", piece)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return len(self.digests)

    def _check_piece(self, piece: Piece) -> bytes | None:
        entry = self._journal.entries[piece.index]
        if entry.get("source") != list(piece.tensor.source.stamp):
            return None
        memory = self._workspace.array("out", (piece.nbytes,), np.uint8)
        self._files[piece.tensor.part].read(memory, piece.offset)
        digest = hashlib.sha256(memory).digest()
        return digest if digest.hex() == entry.get("sha256") else None

    @property
    def pending(self) -> list[Piece]:
        """Every piece that has no digest yet."""
        return [piece for piece in self._plan.pieces if piece.index not in self.digests]

    def _reserve(self, budget: Budget) -> None:
        """The buffers, which come back at the end of each `pack`."""
        for _ in range(_SLABS):
            self._slabs.put(np.empty(budget.slab, np.uint8))
        for _ in range(budget.threads + _WRITERS):
            self._outputs.put(aligned_empty(budget.piece))

    def pack(self, budget: Budget, pieces: Iterable[Piece]) -> None:
        """Pack them, and have them journalled. Raises the first failure, after the threads have stopped."""
        if self._slabs.empty():
            self._reserve(budget)
        # The packers are left first, so that the writers get all they packed.
        with ThreadPoolExecutor(_WRITERS) as writers, ThreadPoolExecutor(budget.threads) as packers:
            try:
                for together in slab_runs(pieces, budget.slab):
                    memory = self._slabs.get()
                    if self._failure:
                        break
                    load = _Load(read_slab(together, memory), memory, len(together))
                    self._read += load.slab.values.nbytes
                    for piece in together:
                        packers.submit(self._pack_piece, piece, load, writers)
            except BaseException as error:
                self._failure = self._failure or error
                packers.shutdown(cancel_futures=True)
        if self._failure:
            raise self._failure

    def _pack_piece(self, piece: Piece, load: _Load, writers: ThreadPoolExecutor) -> None:
        output = self._outputs.get()
        try:
            if self._failure:
                raise self._failure
            packed = pack_piece(piece, load.slab, self._workspace, output)
            writers.submit(self._store, piece, packed, hashlib.sha256(packed).digest(), output)
        except BaseException as error:
            self._failure = self._failure or error
            self._outputs.put(output)
        with self._lock:
            load.left -= 1
            done = load.left == 0
        if done:
            self._slabs.put(load.memory)

    def _store(
        self,
        piece: Piece,
        packed: npt.NDArray[np.uint8],
        digest: bytes,
        output: npt.NDArray[np.uint8],
    ) -> None:
        try:
            self._files[piece.tensor.part].write(packed, piece.offset)
            self._journal.record(piece, digest)
            with self._lock:
                self.digests[piece.index] = digest
                self._written += piece.nbytes
                self._report("pack", piece)
        except BaseException as error:
            self._failure = self._failure or error
        self._outputs.put(output)

    def _report(self, phase: str, piece: Piece) -> None:
        self._done += piece.weights
        if self._progress:
            tensor = piece.tensor.name
            self._progress(Progress(phase, self._done, self._total, tensor, self._read, self._written))
