"""The policy alone: what it promises whatever is asked of it, and how often it hits."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from grok_local.runtime.experts.residency import Residency

EXPERTS = 8


@st.composite
def residencies(draw: st.DrawFn) -> Residency:
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    return Residency(sizes, experts=EXPERTS, used=2, budget=draw(st.integers(0, 1000)))


@given(residencies(), st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 7), min_size=1)), max_size=40))
def test_the_chosen_are_held_within_the_budget(residency: Residency, requests: list[tuple[int, set[int]]]) -> None:
    held: set[tuple[int, int]] = set()
    for number, chosen in requests:
        layer = number % len(residency.sizes)
        victims, missing = residency.request(layer, sorted(chosen))
        assert set(victims) <= held
        assert not set(victims) & {(layer, expert) for expert in chosen}
        assert {expert for expert in chosen if (layer, expert) not in held} == set(missing)
        held = (held - set(victims)) | {(layer, expert) for expert in chosen}
        assert residency.used == sum(residency.sizes[layer] for layer, _ in held)
        assert residency.used <= max(residency.budget, len(chosen) * residency.sizes[layer])
        assert all(residency.holds(*expert) for expert in held)


@given(residencies(), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_what_is_in_use_stays_when_more_is_read_ahead(residency: Residency, layers: list[int]) -> None:
    count = len(residency.sizes)
    for number in layers:
        layer, following = number % count, (number + 1) % count
        residency.request(layer, [0, 1])
        if layer != following and residency.fits_beside(following, experts=EXPERTS, busy=layer):
            victims, _ = residency.request(following, range(EXPERTS), busy=layer)
            assert all(victim.layer != layer for victim in victims)
            assert residency.used <= residency.budget


def test_shares_are_equal_and_the_rest_is_spread() -> None:
    # After room for one token's experts, wherever it is.
    assert Residency([10] * 8, experts=EXPERTS, used=2, budget=8 * 30 + 45).shares == [4, 3, 3, 3, 4, 3, 3, 3]
    assert Residency([10] * 4, experts=EXPERTS, used=2, budget=10**9).shares == [8] * 4
    assert Residency([10] * 4, experts=EXPERTS, used=2, budget=35).shares == [1, 0, 0, 0]
    assert Residency([10, 40], experts=EXPERTS, used=2, budget=180).shares == [2, 2]


def hit_rate(budget: int, *, layers: int = 32, tokens: int = 800, repeat: float = 0.0) -> float:
    """Of top 2 of 8, chosen evenly; with the chance `repeat` a token chooses what the one before did."""
    rng, residency = random.Random(1), Residency([1] * layers, experts=EXPERTS, used=2, budget=budget)
    hits, last = 0, {layer: [0, 1] for layer in range(layers)}
    for _ in range(tokens):
        for layer in range(layers):
            if rng.random() >= repeat:
                last[layer] = rng.sample(range(EXPERTS), 2)
            residency.count(layer, dict.fromkeys(last[layer], 1), tokens=1)
            _, missing = residency.request(layer, last[layer])
            hits += 2 - len(missing)
    return hits / (2 * layers * tokens)


def test_hits_are_as_many_as_memory_has_experts() -> None:
    # What no policy can beat without knowing the future: the share of experts that is held.
    for held in (0.1875, 0.3, 0.5, 0.66, 0.8):
        assert abs(hit_rate(int(held * 256)) - int(held * 256) / 256) < 0.015
    assert hit_rate(256) > 0.98
    # Below one token's experts a global order of use would never hit.
    assert hit_rate(48) > 0.16


def test_a_layer_keeps_what_its_next_token_repeats() -> None:
    assert hit_rate(66, repeat=1.0) > 0.99
    assert hit_rate(66, repeat=0.5) > 0.5


def test_a_sweep_over_all_experts_costs_what_is_not_held() -> None:
    residency = Residency([1] * 16, experts=EXPERTS, used=2, budget=64)
    read = [0, 0, 0]
    for sweep in range(3):
        for layer in range(16):
            read[sweep] += len(residency.request(layer, range(EXPERTS))[1])
    assert read[0] == 128
    assert max(read[1:]) <= 128 - 64 + EXPERTS


def test_the_expert_goes_that_was_chosen_least() -> None:
    residency = Residency([1], experts=EXPERTS, used=2, budget=3)
    for chosen in (*[[0]] * 20, *[[1]] * 10, [2], [0], [1], [0], [1]):
        residency.count(0, dict.fromkeys(chosen, 1), tokens=1)
        residency.request(0, chosen)
    residency.count(0, {3: 1}, tokens=1)
    assert residency.request(0, [3])[0] == [(0, 2)]
    # A prompt says at once what its tokens choose.
    residency.count(0, {1: 5, 3: 90}, tokens=100)
    assert residency.request(0, [4])[0] == [(0, 0)]


def test_what_was_cleared_is_read_again() -> None:
    residency = Residency([10, 10], experts=EXPERTS, used=2, budget=60)
    residency.request(0, [1, 2])
    residency.clear()
    assert (residency.used, residency.holds(0, 1)) == (0, False)
    assert residency.request(0, [1])[1] == [1]
