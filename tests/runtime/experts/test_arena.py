"""Slots, the memory of what is computed, and reads to anywhere: what each promises alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grok_local.files import BLOCK
from grok_local.pages import HUGE, Region, has_huge_pages
from grok_local.runtime.experts.arena import Arena, Scratch
from grok_local.runtime.experts.reader import Reader
from grok_local.runtime.experts.residency import Expert

EXPERTS = [Expert(layer, expert) for layer in range(3) for expert in range(8)]


@given(st.lists(st.sampled_from(EXPERTS), max_size=60), st.integers(0, 24))
def test_no_two_experts_have_one_slot(changes: list[Expert], count: int) -> None:
    arena, held = Arena([BLOCK, 2 * BLOCK], slots=len(EXPERTS)), dict[Expert, int]()
    for expert in changes:
        if expert in held:
            arena.give_back([expert])
            del held[expert]
        else:
            lowest = min(set(range(len(EXPERTS))) - set(held.values()))
            held[expert] = arena.take(expert)
            assert held[expert] == lowest
    assert len(set(held.values())) == len(held)
    assert all(slot < arena.touched for slot in held.values())
    arena.release(count)
    assert arena.touched <= count
    assert set(arena.beyond(count)) == {expert for expert, slot in held.items() if slot >= count}
    arena.close()


def test_slots_lie_one_after_the_other_and_keep_what_is_in_them() -> None:
    arena = Arena([BLOCK, 2 * BLOCK], slots=2000)
    assert arena.region.address % HUGE == 0
    assert [arena.position(slot, part) for slot in (0, 1) for part in (0, 1)] == [0, BLOCK, 3 * BLOCK, 4 * BLOCK]
    for slot in (0, 999, 1000, 1999):
        arena.region.view(arena.position(slot, 0), arena.position(slot, 1))[:] = bytes([slot % 255 + 1]) * BLOCK
    arena.release(1000)
    kept = [arena.region.view(arena.position(slot, 0), arena.position(slot, 1))[0] for slot in (0, 999, 1999)]
    assert kept == [1, 999 % 255 + 1, 0]
    arena.close()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_room_is_made_for_the_widest_since_memory_was_given_back(widths: list[int]) -> None:
    """Nobody has seen a buffer, so nothing can be given back: room once needed stays needed."""
    scratch, widest = Scratch(), 16
    for tokens in widths:
        found, widest = scratch.width_for(tokens), max(widest, tokens)
        assert widest <= found < 2 * max(widest, 16)


@given(st.integers(0, 3 * BLOCK), st.integers(1, 40_000), st.integers(0, 2 * BLOCK))
def test_any_bytes_reach_any_place(tmp_path_factory: pytest.TempPathFactory, start: int, nbytes: int, at: int) -> None:
    path = tmp_path_factory.getbasetemp() / "some.bytes"
    if not path.exists():
        path.write_bytes(random.Random(1).randbytes(20 * BLOCK))
    data = path.read_bytes()[start : start + nbytes]
    region, reader = Region(0, 40 * BLOCK), Reader([path], threads=2)
    ticket = reader.read(0, start, len(data), region=region, at=BLOCK + at)
    assert ticket.wait(10)
    assert ticket.error is None
    assert bytes(region.view(BLOCK + at, BLOCK + at + len(data))) == data
    if (start - at) % BLOCK:  # not in place: nothing beside it is written to
        assert not any(region.view(0, BLOCK + at))
        assert not any(region.view(BLOCK + at + len(data), 40 * BLOCK))
    reader.close()
    region.close()


def test_whether_there_are_huge_pages(tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    for text, expected in (("always [madvise] never\n", True), ("always madvise [never]\n", False)):
        setting.write_text(text)
        assert has_huge_pages(setting) is expected
    assert has_huge_pages(tmp_path / "nothing")
