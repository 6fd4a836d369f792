"""Grok-2's gates and attention on a device, where nodes of the graph are corrected in its memory: as the reference has
them, also beside streaming and a record, and for many sequences.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.experts.routing import read_routing
from samples.grok2_release import write_release
from samples.reference_grok2 import ReferenceGrok2, Routing
from tests.runtime.graph.test_as_released import IDS, OPTIONS, SEQUENCES, SPEC, errors, memory_for

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("gates"), SPEC)


@pytest.fixture(scope="module")
def reference(release: Path) -> ReferenceGrok2:
    return ReferenceGrok2(release)


@pytest.fixture(scope="module")
def path(release: Path) -> Path:
    return grok_local.quantize_checkpoint(release, release / "x.gguf", type="f32").path


def check(found: Floats, truth: Floats) -> None:
    """A device rounds to f16, and a near tie may go to another expert."""
    assert np.median(errors(found, truth)) < 5e-3


@pytest.mark.parametrize(
    "wishes",
    [{}, {"gpu_layers": 2}, {"experts_on": "cpu"}, {"gpu_layers": 0, "experts_on": "gpu"}],
)
def test_wherever_weights_are(path: Path, reference: ReferenceGrok2, wishes: dict[str, Any]) -> None:
    with grok_local.load(path, repack="off", **OPTIONS, **wishes) as model:
        check(model.logits(IDS), reference.forward(IDS, Routing.RELEASE)[0])
        rows = [model.engine.tail_logits(IDS[: number + 1], number) for number in range(20)]
        check(np.concatenate(rows), reference.forward(IDS[:20], Routing.RELEASE)[0])


def test_streamed_and_recorded(path: Path, reference: ReferenceGrok2, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    wishes: dict[str, Any] = {"experts_on": "cpu", "memory": memory_for(path, 4), "trace_experts": trace}
    with grok_local.load(path, **OPTIONS, **wishes) as model:
        assert model.placement.plan.streamed
        assert model.placement.plan.gpu_layers == SPEC.layers + 1
        truth, routes = reference.forward(IDS, Routing.RELEASE)
        check(model.logits(IDS), truth)
    assert (read_routing(trace).experts == routes.transpose(1, 0, 2)).mean() > 0.98


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("wishes", [{}, {"experts_on": "cpu", "stream": "on"}])
def test_many_sequences(path: Path, reference: ReferenceGrok2, separate: bool, wishes: dict[str, Any]) -> None:
    wished = Wishes(context=128, kv_type="f32", sequences=3, separate=separate, repack="off", **wishes)
    with closing(LlamaEngine(LoadRequest(path, wished, threads=1))) as engine:
        engine.evaluate_together({number: ids[:-1] for number, ids in enumerate(SEQUENCES)})
        found = engine.evaluate_together({number: ids[-1:] for number, ids in enumerate(SEQUENCES)})
    check(found, np.stack([reference.forward(ids, Routing.RELEASE)[0][-1] for ids in SEQUENCES]))
