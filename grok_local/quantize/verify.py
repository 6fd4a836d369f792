"""Checks a GGUF: its structure, its numbers, its own hashes; or against the checkpoint it was packed from."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.errors import GGUFError, VerifyError
from grok_local.formats import gguf_file
from grok_local.formats.gguf_file import KEYS, Header, Tensor
from grok_local.ggml import quants
from grok_local.quantize.layout.pieces import PIECE_WEIGHTS, Piece, PlannedTensor, piece_rows, pieces_of, plan_tensors
from grok_local.quantize.packing.blocks import Workspace, pack_piece, weights_of
from grok_local.quantize.packing.pool import Progress, slab_runs
from grok_local.quantize.packing.slabs import read_slab, slab_bytes
from grok_local.quantize.recipe import PACKED_TYPES, RECIPES
from grok_local.quantize.sources.recognise import open_checkpoint

__all__ = ["TensorCheck", "VerifyReport", "verify"]

_SLAB = 256_000_000  # bytes

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class TensorCheck:
    """A tensor's verdict. The errors are of its weights against the release's in float32; None without a checkpoint."""

    name: str
    type: str
    problem: str | None
    relative_rms: float | None = None
    max_error: float | None = None

    @property
    def exact(self) -> bool:
        """Whether every weight is, bit for bit, what the release says."""
        return self.max_error == 0


@dataclass(frozen=True)
class VerifyReport:
    """`problems` is empty when all is well."""

    path: Path
    tensors: tuple[TensorCheck, ...]
    hashed: bool  # whether the file has hashes to check
    problems: tuple[str, ...]


def verify(
    path: Path, against: Path | None = None, *, sha256: str | None = None, progress: Report | None = None
) -> VerifyReport:
    """Check structure, numbers and stored hashes, or re-pack `against` and compare every byte. Without hashes a matrix
    with a hole of zeros is a problem too. `sha256` is what the whole file must have, in hex.

    Raises GGUFError where the file cannot be read as a GGUF at all, CheckpointError for the checkpoint, VerifyError
    where they have different tensors.
    """
    headers = gguf_file.read_model(path)
    total = sum(len(header.tensors) for header in headers)
    promised = headers[0].metadata.get("split.tensors.count", total)
    problems = [] if promised == total else [f"{path}: has {total} tensors, and says it has {promised}"]
    if not gguf_file.metadata_is_intact(headers):
        problems.append(f"{path}: its metadata is not what it was packed with")
    if sha256 and (found := _file_hash(path)) != sha256.strip().lower():
        problems.append(f"{path}: its SHA-256 is {found}: it is another file, or damaged")
    checks = _against(headers, against, progress) if against else _by_hash(headers, progress)
    problems += [f"{check.name}: {check.problem}" for check in checks if check.problem]
    hashed = all(KEYS.TENSOR_HASHES in header.metadata for header in headers)
    return VerifyReport(path, tuple(checks), hashed, tuple(problems))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


def _by_hash(headers: list[Header], progress: Report | None) -> list[TensorCheck]:
    """Look at every tensor, and hash those that have a hash."""
    work = [pair for header in headers for pair in _with_hashes(header)]
    total = sum(tensor.nbytes for tensor, _ in work)
    checks, done = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (tensor, _), problem in zip(work, pool.map(_check_tensor, work), strict=True):
            checks.append(TensorCheck(tensor.name, tensor.type.name, problem))
            done += tensor.nbytes
            if progress:
                progress(Progress("check", done, total, tensor.name, done, 0))
    return checks


def _with_hashes(header: Header) -> list[tuple[Tensor, str | None]]:
    hashes = header.metadata.get(KEYS.TENSOR_HASHES)
    if hashes is None:
        return [(tensor, None) for tensor in header.tensors]
    weights = header.metadata.get(KEYS.PIECE_WEIGHTS)
    listed = isinstance(hashes, list) and all(isinstance(text, str) for text in hashes)
    if not listed or len(hashes) != len(header.tensors) or not isinstance(weights, int) or weights != PIECE_WEIGHTS:
        raise GGUFError(f"{header.path}: damaged: its hashes do not belong to its tensors")
    return list(zip(header.tensors, hashes, strict=True))


def _check_tensor(work: tuple[Tensor, str | None]) -> str | None:
    tensor, expected = work
    digest, empty, pieces = hashlib.sha256(), 0, 0
    with tensor.path.open("rb", buffering=0) as file:
        for offset, size in _piece_spans(tensor):
            file.seek(offset)
            data = np.fromfile(file, np.uint8, size)
            if data.nbytes != size:
                raise GGUFError(f"{tensor.path}: became shorter while it was read")
            if not quants.is_finite(tensor.type, data):
                return "has values that are not finite (NaN or infinity): the model cannot be right"
            if expected:
                digest.update(hashlib.sha256(data).digest())
            empty, pieces = empty + (not data.any()), pieces + 1
    if expected:
        return None if digest.hexdigest() == expected else "its bytes do not have the stored hash: the file is damaged"
    return _hole(empty, pieces) if len(tensor.shape) > 1 and empty else None


def _hole(empty: int, pieces: int) -> str:
    """What to say of a matrix that has zeros alone in `empty` of its pieces: downloads and disks leave such holes."""
    return f"{'all' if empty == pieces else f'{empty} of {pieces} pieces'} zeros: probably a hole in the file"


def _piece_spans(tensor: Tensor) -> Iterator[tuple[int, int]]:
    experts, rows, width = (1, 1, *tensor.shape)[-3:]
    row_bytes = quants.bytes_per_row(tensor.type, width)
    for expert in range(experts):
        for start in range(0, rows, piece_rows(width)):
            stop = min(start + piece_rows(width), rows)
            yield tensor.offset + (expert * rows + start) * row_bytes, (stop - start) * row_bytes


def _against(headers: list[Header], checkpoint: Path, progress: Report | None) -> list[TensorCheck]:
    """Pack every tensor again and compare."""
    pairs = _match(headers, checkpoint)
    sums = {planned.name: _Sums() for planned, _ in pairs}
    pieces = list(pieces_of(planned for planned, _ in pairs))
    total, done = sum(piece.weights for piece in pieces), 0
    memory = np.empty(max(_SLAB, *(slab_bytes(p.tensor, p.rows) for p in pieces)), np.uint8)
    files = {planned.name: tensor for planned, tensor in pairs}
    compare = _Comparison(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for run in slab_runs(pieces, _SLAB):
            slab = read_slab(run, memory)
            for piece, result in zip(run, pool.map(lambda p, s=slab: compare(p, s), run), strict=True):
                sums[piece.tensor.name].add(result)
                done += piece.weights
                if progress:
                    progress(Progress("check", done, total, piece.tensor.name, done, 0))
    return [sums[planned.name].verdict(tensor) for planned, tensor in pairs]


def _match(headers: list[Header], path: Path) -> list[tuple[PlannedTensor, Tensor]]:
    """Pairs of what the checkpoint calls for and what the file has, of the file's types. Raises VerifyError."""
    checkpoint = open_checkpoint(path)
    recipe = RECIPES["f32"]  # only names and shapes matter; types are the file's
    planned = {tensor.name: tensor for tensor in plan_tensors(checkpoint, recipe)}
    present = {tensor.name: tensor for header in headers for tensor in header.tensors}
    problems = [f"{name}: in the checkpoint, but not in the GGUF" for name in planned.keys() - present.keys()]
    problems += [f"{name}: in the GGUF, but not in the checkpoint" for name in present.keys() - planned.keys()]
    problems += [
        f"{name}: has shape {list(present[name].shape)} where the checkpoint calls for {list(tensor.shape)}"
        for name, tensor in planned.items()
        if name in present and present[name].shape != tensor.shape
    ]
    problems += [
        f"{tensor.name}: is {tensor.type.name}, which no checkpoint is packed to here"
        for tensor in present.values()
        if tensor.type not in PACKED_TYPES
    ]
    if problems:
        raise VerifyError(sorted(problems))
    return [(replace(planned[n], type=t.type, wanted=t.type, offset=t.offset), t) for n, t in present.items()]


@dataclass
class _Sums:
    """Collects a tensor's errors over its pieces."""

    same: bool = True
    error: float = 0.0
    power: float = 0.0
    largest: float = 0.0

    def add(self, other: _Sums) -> None:
        self.same &= other.same
        self.error += other.error
        self.power += other.power
        self.largest = max(self.largest, other.largest)

    def verdict(self, tensor: Tensor) -> TensorCheck:
        relative = math.sqrt(self.error / self.power) if self.power else 0.0
        problem = None if self.same else "its bytes are not those that packing the checkpoint gives"
        return TensorCheck(tensor.name, tensor.type.name, problem, relative, self.largest)


class _Comparison:
    """Compares a piece of the file with the checkpoint's."""

    def __init__(self, files: dict[str, Tensor]) -> None:
        self._files = files
        self._workspace = Workspace()

    def __call__(self, piece: Piece, slab: Any) -> _Sums:
        stored = self._read(piece)
        packed = self._workspace.array("packed", (piece.nbytes,), np.uint8)
        sums = _Sums(same=bool(np.array_equal(pack_piece(piece, slab, self._workspace, packed), stored)))
        row_bytes = piece.tensor.row_bytes
        for start, truth in weights_of(piece, slab, self._workspace):
            unpacked = self._workspace.array("unpacked", truth.shape, np.float32)
            first = start - piece.start
            span = stored[first * row_bytes : (first + len(truth)) * row_bytes]
            quants.dequantize(piece.tensor.type, span, unpacked)
            sums.add(_errors(unpacked, truth))
        return sums

    def _read(self, piece: Piece) -> npt.NDArray[np.uint8]:
        stored: npt.NDArray[np.uint8] = self._workspace.array("stored", (piece.nbytes,), np.uint8)
        with self._files[piece.tensor.name].path.open("rb", buffering=0) as file:
            file.seek(piece.offset)
            if file.readinto(memoryview(stored)) != piece.nbytes:
                raise GGUFError(f"{file.name}: became shorter while it was read")
        return stored


def _errors(unpacked: npt.NDArray[np.float32], truth: npt.NDArray[np.float32]) -> _Sums:
    with np.errstate(invalid="ignore", over="ignore"):  # what a damaged file holds may be anything
        np.subtract(unpacked, truth, out=unpacked)
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.vdot(unpacked, unpacked))
    largest = float(max(unpacked.max(initial=0), -unpacked.min(initial=0)))
    if not math.isfinite(error):
        largest = math.inf
    return _Sums(error=error, power=float(np.vdot(truth, truth)), largest=largest)
