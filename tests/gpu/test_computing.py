"""What a device computes: compared with dequantized weights in f32, to which it is nearer than the processor is, whose
products round what they multiply with to eight bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from grok_local.ggml.devices import BackendDevice

IDS = np.random.default_rng(3).integers(3, 2000, 48).tolist()
OPTIONS: dict[str, Any] = {"context": 256, "kv_type": "f32", "repack": "off", "threads": 2}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all": {},
    "half": {"gpu_layers": 2},
    "dense": {"experts_on": "cpu"},
    "experts": {"gpu_layers": 0, "experts_on": "gpu"},
}
# Relative RMS error of the median position; f16 is what a device rounds to.
MOST = {"f32": 5e-3, "bf16": 2e-2, "q8_0": 4e-2, "q4_k": 4e-2, "q4_0": 4e-2, "iq4_xs": 4e-2, "mxfp4": 4e-2}
CASES = [*((each, "all") for each in MOST), *itertools.product(("f32", "q4_k"), ("half", "dense", "experts"))]


def error(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.median(np.sqrt(((found - expected) ** 2).mean(1) / (expected**2).mean(1))))


def logits(path: Path, ids: list[int] = IDS, **options: Any) -> npt.NDArray[np.float32]:
    with grok_local.load(path, **{**OPTIONS, **options}) as model:
        return model.logits(ids)


@pytest.fixture(scope="module")
def exact_logits(exact_of: Callable[[str], Path]) -> Callable[[str], npt.NDArray[np.float32]]:
    known: dict[str, npt.NDArray[np.float32]] = {}

    def of(type: str) -> npt.NDArray[np.float32]:
        if type not in known:
            known[type] = logits(exact_of(type), placement="cpu")
        return known[type]

    return of


@pytest.mark.parametrize(("type", "placement"), CASES)
def test_logits_and_what_is_held(
    packed_as: Callable[[str], Path],
    exact_logits: Callable[[str], npt.NDArray[np.float32]],
    device: BackendDevice,
    type: str,
    placement: str,
) -> None:
    with grok_local.load(packed_as(type), **OPTIONS, **PLACEMENTS[placement]) as model:
        found = model.logits(IDS)
        assert model.placement.notes == ()
        held, planned = model.placement.held[0], model.placement.plan.shares[0]
    assert error(found, exact_logits(type)) < MOST[type]
    assert held.place == planned.place == device.name
    assert abs(held.weights - planned.weights) < 10_000
    assert held.kv == planned.kv
    assert 0 < held.compute <= planned.compute


@pytest.mark.parametrize("type", ["q8_0", "q4_k", "iq4_xs"])
def test_it_is_nearer_than_the_processor(
    packed_as: Callable[[str], Path], exact_logits: Callable[[str], npt.NDArray[np.float32]], type: str
) -> None:
    here, there = logits(packed_as(type), placement="cpu"), logits(packed_as(type))
    assert error(there, exact_logits(type)) < error(here, exact_logits(type))


def test_the_same_again(packed_as: Callable[[str], Path]) -> None:
    """Contexts that grow and shrink leave nothing behind."""
    with grok_local.load(packed_as("q4_k"), **OPTIONS) as model:
        first = model.logits(IDS[:12])
        model.logits(IDS[:3])
        assert np.array_equal(model.logits(IDS[:12]), first)
