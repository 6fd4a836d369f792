"""Models loaded as planned: with a worker on the loopback as the second device, results are those of one device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from grok_local.errors import OptionError, PlacementError
from grok_local.formats import gguf_file
from grok_local.placement.shape import ModelShape, Role
from grok_local.runtime.remote.client import RemoteEngine
from samples.processes import bytes_read, forget_cached
from tests.runtime.experts.streaming import memory_for
from tests.workers import Worker

IDS = list(range(5, 105))
OFF: dict[str, Any] = {"context": 256, "threads": 2, "repack": "off"}


@pytest.fixture(scope="module")
def floats(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for a worker with little memory: 220 MB."""
    return grok_local.quantize_checkpoint(golden, tmp_path_factory.mktemp("f32") / "x.gguf", type="f32").path


@pytest.fixture(scope="module")
def expected(floats: Path) -> npt.NDArray[np.float32]:
    with grok_local.load(floats, **OFF) as model:
        assert [held.place for held in model.placement.held] == ["RAM"]
        assert model.placement.notes == ()
        return model.logits(IDS)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as running:
        yield running


@pytest.mark.parametrize(
    ("wishes", "layers", "experts"),
    [
        ({"experts_on": "cpu"}, 13, 0),  # dense tensors on the worker, experts here
        ({"gpu_layers": 0, "experts_on": "gpu"}, 0, 12),  # and the other way round
        ({}, 13, 12),
        ({"gpu_layers": 5, "experts_on": 3}, 5, 3),
        ({"overrides": [r"attn_q=RAM", r"(?<=blk)\.(?P<layer>[01])\.ffn_.*_exps=RAM"]}, 13, 10),  # not for std::regex
        ({"placement": "cpu"}, 0, 0),
    ],
)
def test_logits_are_the_same_wherever_weights_are(
    floats: Path,
    expected: npt.NDArray[np.float32],
    worker: Worker,
    wishes: dict[str, Any],
    layers: int,
    experts: int,
) -> None:
    with grok_local.load(floats, workers=[worker.endpoint], **OFF, **wishes) as model:
        assert np.abs(model.logits(IDS) - expected).max() < 1e-3
        plan = model.placement.plan
        assert (plan.gpu_layers, plan.expert_layers["RPC0"]) == (layers, experts)
        # What the worker really holds is what was planned, which `notes` would tell otherwise.
        assert model.placement.notes == ()
        held, planned = model.placement.held[0], plan.shares[0]
        assert abs(held.weights - planned.weights) < 1 << 20
        assert held.kv == planned.kv
        assert held.compute <= planned.compute


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_streaming_beside_a_device_reads_what_is_dense(floats: Path, worker: Worker) -> None:
    shape = ModelShape.from_headers(gguf_file.read_model(floats))
    dense = sum(weight.nbytes for weight in shape.weights if weight.role is not Role.EXPERTS)
    forget_cached(floats)
    options: dict[str, Any] = {**OFF, "experts_on": "cpu", "memory": memory_for(floats, 20, context=256)}
    with grok_local.load(floats, workers=[worker.endpoint], **options) as model:
        assert model.placement.plan.streamed
        assert isinstance(model.engine, RemoteEngine)
        assert bytes_read(model.engine.pid) < dense + 10_000_000 < floats.stat().st_size / 3


SMALL_WORKER = """
import psutil, resource, sys
from grok_local.ggml import devices, rpc
from grok_local.runtime.remote.server import serve_worker
devices.backend_devices()
most = psutil.Process().memory_info().vms + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
serve_worker(sys.argv[1], 1)  # threads take address space that is no memory
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit of address space")
@pytest.mark.parametrize("spare", [250_000_000, 60_000_000])
def test_out_of_memory_is_a_step_down_and_said(floats: Path, expected: npt.NDArray[np.float32], spare: int) -> None:
    with (
        Worker(program=SMALL_WORKER, arguments=[str(spare)]) as small,
        grok_local.load(floats, workers=[small.endpoint], **OFF) as model,
    ):
        assert np.abs(model.logits(IDS) - expected).max() < 1e-3
        assert 0 < model.placement.held[0].weights < spare
        assert "RPC0 ran out of memory" in model.placement.notes[0]


def test_repacking_survives_any_build_and_gives_nearly_the_same(golden: Path, tmp_path: Path) -> None:
    """On a processor with AMX a build by GCC 12 crashes with llama.cpp's own choice of layouts; ours must not."""
    path = grok_local.quantize_checkpoint(golden, tmp_path / "x.gguf", type="q4_0").path
    logits, repacked = {}, {}
    for repack in ("off", "on", "auto"):
        with grok_local.load(path, context=256, threads=2, repack=repack) as model:
            logits[repack] = np.concatenate([model.logits(IDS), model.logits(IDS[:1])])
            repacked[repack] = len(model.placement.plan.repacked)
    assert repacked["off"] == repacked["auto"] == 0  # too small to be worth it
    assert (logits["auto"] == logits["off"]).all()
    # Experts, and whatever else has a faster layout here.
    with grok_local.load(path, context=256, threads=2, repack="on") as model:
        allowed = model.placement.plan.machine.speeds.repacked
        wanted = [w for w in model.placement.plan.model.weights if w.type in allowed and w.layer is not None]
        assert repacked["on"] == len([w for w in wanted if w.rows > 1 and w.rows % 8 == 0])
    errors = np.sqrt(((logits["on"] - logits["off"]) ** 2).mean(1) / (logits["off"] ** 2).mean(1))
    assert np.median(errors) < 0.1
    assert np.isfinite(logits["on"]).all()


def test_a_machine_without_gpu_says_so(packed: Path) -> None:
    for wishes in ({"gpu_layers": 3}, {"experts_on": 2}, {"experts_on": "gpu"}):
        with pytest.raises(PlacementError, match="no GPU that llama"):
            grok_local.load(packed, **wishes)
    for wishes in ({"gpu_layers": 0}, {"experts_on": "cpu"}, {"placement": "cpu"}):
        grok_local.load(packed, context=64, **wishes).close()


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(packed: Path) -> None:
    with pytest.raises(PlacementError, match=r"--context \d+ would fit"):
        grok_local.load(packed, context=1 << 24, memory="1G")
    with pytest.raises(PlacementError, match="no smaller context fits"):
        grok_local.load(packed, memory="4M")


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "gpu"},
        {"repack": "maybe"},
        {"experts_on": "tpu"},
        {"experts_on": -1},
        {"gpu_layers": -2},
        {"overrides": ["nothing"]},
        {"overrides": ["x=CUDA7"]},
        {"overrides": ["(=RAM"]},
        {"memory": "much"},
        {"workers": ["host:port"]},
        {"workers": "127.0.0.1:9"},
        {"workers": [5]},
        {"overrides": [None]},
        {"context": "many"},
        {"threads": 1.5},
        {"gpu_layers": "many"},
    ],
)
def test_options_that_make_no_sense(packed: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        grok_local.load(packed, **options)


def test_misspelt_options_are_not_swallowed(packed: Path) -> None:
    with pytest.raises(TypeError, match="gpu_layer"):
        grok_local.load(packed, gpu_layer=3)  # type: ignore[call-arg]
