"""What looks on, and what goes together: streaming beside a device, many sequences, two devices, a worker with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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
from tests.gpu.test_computing import IDS, OPTIONS, error, logits
from tests.runtime.experts.streaming import memory_for
from tests.workers import Worker

Floats = npt.NDArray[np.float32]
PREFIX = IDS[:20]
TWO_DEVICES = """
import json, sys
import numpy as np
import grok_local
from tests.gpu.test_computing import IDS, OPTIONS
with grok_local.load(sys.argv[1], **OPTIONS) as model:
    np.save(sys.argv[2], model.logits(IDS))
    pairs = zip(model.placement.held, model.placement.plan.shares)
    print(json.dumps([[a.place, a.weights - b.weights, a.kv - b.kv, b.weights] for a, b in pairs]))
"""


@pytest.fixture(scope="module")
def floats(packed_as: Callable[[str], Path]) -> Path:
    return packed_as("f32")


@pytest.fixture(scope="module")
def exact(floats: Path) -> Floats:
    return logits(floats, placement="cpu")


def test_streamed_beside_dense_tensors_on_the_device(floats: Path, exact: Floats, tmp_path: Path) -> None:
    memory, trace = memory_for(floats, 10, context=256), tmp_path / "trace.jsonl"
    with grok_local.load(floats, memory=memory, experts_on="cpu", trace_experts=trace, **OPTIONS) as model:
        assert model.placement.plan.streamed
        assert model.placement.plan.gpu_layers == 4
        assert error(model.logits(IDS), exact) < 5e-3
        stats = model.engine.expert_stats()
        assert stats is not None
        assert stats.misses > 0
    assert read_routing(trace).experts.shape[:2] == (len(IDS), 3)


@pytest.mark.parametrize("wishes", [{}, {"experts_on": "cpu"}, {"experts_on": "cpu", "stream": "on"}])
def test_sixteen_sequences_with_a_prefix_in_common(floats: Path, wishes: dict[str, Any]) -> None:
    """Each is what it is alone."""
    request = LoadRequest(floats, Wishes(64, sequences=16, kv_type="f32", repack="off", **wishes), threads=2)
    tails = [IDS[20 + number : 22 + number] for number in range(16)]
    with closing(LlamaEngine(request)) as engine:
        engine.evaluate(PREFIX)
        for number in range(1, 16):
            assert engine.copy(0, number, length=len(PREFIX)) == len(PREFIX)
        together = engine.evaluate_together(dict(enumerate(tails)))
        alone = np.stack([engine.logits([*PREFIX, *tail])[-1] for tail in tails[:3]])
    assert error(together[:3], alone) < 5e-3
    assert min(error(together[:1], alone[1:2]), error(together[1:2], alone[2:3])) > 0.1


def test_two_devices(floats: Path, exact: Floats, tmp_path: Path) -> None:
    """The same one twice."""
    env = {**os.environ, "GGML_VK_VISIBLE_DEVICES": "0,0"}
    command = [sys.executable, "-c", TWO_DEVICES, str(floats), str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stderr == ""
    assert error(np.load(tmp_path / "x.npy"), exact) < 5e-3
    for place, weights, kv, planned in json.loads(done.stdout):
        if place != "RAM":
            assert abs(weights) < 10_000
            assert kv == 0
            assert planned > 10_000_000


def test_a_worker_with_a_device(floats: Path, exact: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    with Worker() as worker:
        monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "")  # ours has none
        with grok_local.load(floats, workers=[worker.endpoint], **OPTIONS) as model:
            assert error(model.logits(IDS), exact) < 5e-3
            assert [held.place for held in model.placement.held] == ["RPC0", "RAM"]
            assert abs(model.placement.held[0].weights - model.placement.plan.shares[0].weights) < 10_000
        _, _, errors = worker.end()
    assert "llvmpipe" in errors
    assert "ggml_vulkan" not in errors
