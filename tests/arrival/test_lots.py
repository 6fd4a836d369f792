"""Which files of the real releases are needed together, and what room that takes; and the gate that keeps to it."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from grok_local.arrival.lots import Gate, Lot, least_room, lots_of
from grok_local.models import grok1, grok2
from grok_local.models.release import Kind
from grok_local.quantize.layout.pieces import pieces_of, plan_tensors
from grok_local.quantize.recipe import recipe_named
from grok_local.quantize.sources.checkpoint import Checkpoint, NumberType, Shard, SourceTensor, looked_at

GB = 1e9


def published_grok_1() -> Checkpoint:
    """All tensors of the release with their files, of which there are none."""
    dims = grok1.RELEASE.published
    tensors = []
    for leaf in grok1.leaves(dims):
        *outer, rows, columns = (1, 1, *leaf.shape)[-3:]
        item = 1 if leaf.kind in (Kind.EXPERTS, Kind.ATTENTION) else 4
        matrices = tuple(
            (Shard(Path(leaf.file_name), expert * rows * columns * item, range(rows), range(columns)),)
            for expert in range(outer[0])
        )
        dtype: NumberType = "i1" if item == 1 else "f4"
        tensors.append(SourceTensor(leaf.target, leaf.path, "", dtype, leaf.transposed, matrices, None, ()))
    return Checkpoint(Path(), grok1.RELEASE, dims, tuple(tensors))


def published_grok_2() -> Checkpoint:
    dims = grok2.RELEASE.published
    tensors = []
    for tensor in grok2.named_tensors(dims):
        matrices = tuple(tuple(_shards(tensor)) for _ in tensor.names)
        tensors.append(SourceTensor(tensor.target, tensor.title, "", "bf16", False, matrices, None, ()))
    return Checkpoint(Path(), grok2.RELEASE, dims, tuple(tensors))


def _shards(tensor: grok2.NamedTensor) -> Iterator[Shard]:
    rows, columns = (1, *tensor.target.shape)[-2:]
    if tensor.axis is None:
        yield Shard(Path(tensor.file_name()), 0, range(rows), range(columns))
        return
    for rank in range(8):
        height, width = (rows // 8, columns) if tensor.axis == 0 else (rows, columns // 8)
        top, left = (rank * height, 0) if tensor.axis == 0 else (0, rank * width)
        yield Shard(Path(tensor.file_name(rank)), 0, range(top, top + height), range(left, left + width))


def sizes_of(checkpoint: Checkpoint) -> dict[Path, int]:
    sizes: dict[Path, int] = {}
    for tensor in checkpoint.tensors:
        for shard in (shard for matrix in tensor.matrices for shard in matrix):
            nbytes = len(shard.rows) * len(shard.columns) * tensor.item_size
            sizes[shard.path] = sizes.get(shard.path, 0) + nbytes
    return sizes


def planned(checkpoint: Checkpoint, *, type: str = "q4_k") -> list[Lot]:
    pieces = pieces_of(plan_tensors(checkpoint, recipe_named(type)))
    return lots_of(pieces, sizes_of(checkpoint), same_disk=True)


def test_of_grok_1_each_file_goes_alone() -> None:
    lots = planned(published_grok_1())
    packed, release = sum(lot.packed for lot in lots), sum(lot.nbytes for lot in lots)
    assert [len(lot.files) for lot in lots] == [1] * 770
    assert 318 * GB < release < 319 * GB
    assert least_room(lots, discard=True) - packed < 0.1 * GB
    assert least_room(lots, discard=False) == packed + release


def test_of_grok_2_eight_files_are_needed_together_once() -> None:
    lots = planned(published_grok_2())
    packed, release = sum(lot.packed for lot in lots), sum(lot.nbytes for lot in lots)
    assert sorted(len(lot.files) for lot in lots) == [1] * 31 + [8]
    assert {path.name[:19] for path in lots[0].files} == {"pytorch_model-00007"}  # w2, first of all
    assert 539 * GB < release < 540 * GB
    room = least_room(lots, discard=True)
    assert room - packed < 7 * GB
    others = sorted(lots, key=lambda lot: lot.files)  # as the hub lists them
    assert least_room(others, discard=True) > room + 60 * GB


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "bf16", "f32"])
def test_no_other_order_takes_less(type: str) -> None:
    """Of any two lots that follow each other in another order, swapping them does no harm."""
    lots = planned(published_grok_2(), type=type)
    best = least_room(lots, discard=True)
    for first in range(len(lots)):
        assert least_room([*lots[first:], *lots[:first]], discard=True) >= best
    assert least_room(lots[::-1], discard=True) >= best


def test_what_is_kept_of_files_that_go_is_little() -> None:
    for checkpoint, most in ((published_grok_1(), 0.5), (published_grok_2(), 1.5)):
        assert sum(span.nbytes for span in looked_at(checkpoint)) < most * GB


def _lot(nbytes: int, packed: int) -> Lot:
    return Lot((Path(str(nbytes)),), (), nbytes, packed)


def test_the_gate_lets_in_what_fits() -> None:
    lots = [_lot(10, 5), _lot(8, 4), _lot(6, 3), _lot(4, 2)]
    room, inside, most = least_room(lots, discard=True), 0, 0
    gate, entered = Gate(room), queue.SimpleQueue[Lot]()

    def feed() -> None:
        for lot in lots:
            assert gate.enter(lot)
            entered.put(lot)

    feeder = threading.Thread(target=feed)
    feeder.start()
    for _ in lots:
        lot = entered.get(timeout=10)
        inside += lot.nbytes + lot.packed
        most = max(most, inside)
        inside -= lot.nbytes
        gate.leave(lot)
    feeder.join()
    assert most <= room


def test_the_gate_never_waits_for_nothing() -> None:
    gate = Gate(10)
    gate.count(_lot(0, 9))
    assert gate.enter(_lot(5, 5))  # more than there is room for, and yet the only one
    waiting: list[bool] = []
    thread = threading.Thread(target=lambda: waiting.append(gate.enter(_lot(5, 5))))
    thread.start()
    gate.close()
    thread.join()
    assert waiting == [False]


def test_least_room_by_hand() -> None:
    lots: Sequence[Lot] = [_lot(10, 5), _lot(8, 4)]
    assert least_room(lots, discard=True) == max(10 + 5, 5 + 8 + 4)
    assert least_room(lots, discard=False) == 10 + 5 + 8 + 4
    assert least_room(lots[::-1], discard=True) == max(8 + 4, 4 + 10 + 5)
    assert math.isclose(least_room([], discard=True), 0)
