"""What is planned for a GPU is what it holds, also where it takes less than others, or has less than it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import grok_local
from grok_local.formats.gguf_file import read_model
from grok_local.ggml.devices import DeviceKind, abilities_of, allocatable, backend_devices
from grok_local.machine.facts import Device, Machine, Speeds
from grok_local.placement.planner import make_plan
from grok_local.placement.shape import ModelShape
from grok_local.placement.wishes import Wishes
from samples.accounts import account_of, taking
from samples.giants import write_giant

G = 10**9
RANGE = (1 << 32) - 1
GPUS = [device for device in backend_devices() if device.kind is DeviceKind.GPU]

pytestmark = pytest.mark.skipif(not GPUS, reason="llama.cpp knows no GPU here")

Program = Callable[..., Any]


@pytest.mark.parametrize("parallel", [1, 16])
@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"experts_on": "cpu"},
        {"gpu_layers": 2},
        {"gpu_layers": 0, "experts_on": 2},
        {"experts_on": "cpu", "stream": "on"},
    ],
    ids=str,
)
def test_what_is_planned_is_held(packed_as: Callable[[str], Path], wishes: dict[str, Any], parallel: int) -> None:
    given = {"context": 256, "repack": "off", "threads": 2, "parallel": parallel, **wishes}
    with grok_local.load(packed_as("q4_k"), **given) as model:
        assert model.placement.notes == ()
        for planned, held in zip(model.placement.plan.shares, model.placement.held, strict=True):
            assert held.kv == planned.kv
            assert held.compute <= planned.compute
            if planned.place != "RAM":
                assert abs(held.weights - planned.weights) < 1 << 16


@pytest.fixture(scope="module", params=["grok-1", "grok-2"])
def giant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_giant(tmp_path_factory.mktemp("giant") / "giant.gguf", request.param)


@pytest.fixture(params=[RANGE, None], ids=["4 GiB", "any"])
def largest(request: pytest.FixtureRequest) -> Iterator[int | None]:
    with taking(GPUS, request.param):
        yield request.param


@pytest.mark.parametrize(
    ("ram", "vram", "wishes"),
    [
        (64, 24, Wishes()),
        (192, 24, Wishes(context=32768)),
        (192, 48, Wishes(context=2048, sequences=16)),
        (400, 200, Wishes(context=8192)),
        (192, 24, Wishes(context=8192, gpu_layers=10)),
    ],
    ids=str,
)
def test_llama_cpp_agrees_about_full_size_models(
    giant: Path, largest: int | None, ram: int, vram: int, wishes: Wishes
) -> None:
    """As benchmarks/compute.py does for all kinds of machines."""
    piece = abilities_of(GPUS[0]).piece
    gpu = Device(GPUS[0].name, "", "gpu", vram * G, vram * G, largest=largest, piece=piece)
    machine = Machine(ram * G, ram * G, 16, Speeds(), 7e9, (gpu,))
    plan = make_plan(ModelShape.from_headers(read_model(giant)), machine, wishes)
    for place, planned, held in account_of(giant, plan):
        assert held <= planned, place
        if place == "RAM" or piece is None or planned <= piece:  # in several pieces, nobody knows how they are filled
            assert planned <= max(1.3 * held, held + 20e6), place


# -- a device that takes less ------------------------------------------------------------------------------------------

ASKED = """
import json
from grok_local.machine.this_machine import local_devices
print(json.dumps([[device.largest, device.offloads, device.kind] for device in local_devices()]))
"""


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"RANGE": 1 << 26}, (1 << 26, "gpu")), ({"TYPE": 1, "RANGE": RANGE}, (RANGE, "integrated"))],
)
def test_the_backend_is_asked_what_it_takes(
    on_other: Program, settings: dict[str, int], found: tuple[int, str]
) -> None:
    ((largest, offloads, kind),) = json.loads(on_other(settings, "-c", ASKED).stdout)
    assert found[0] - 1024 <= largest <= found[0]
    assert (offloads, kind) == (True, found[1])


LOADED = """
import json, sys
import grok_local
given = json.loads(sys.argv[2])
with grok_local.load(sys.argv[1], context=256, repack="off", threads=2, **given) as model:
    model.logits(list(range(5, 45)))
    plan, held = model.placement.plan, model.placement.held
    print(json.dumps({
        "experts": plan.expert_layers, "notes": model.placement.notes, "layers": plan.gpu_layers, "batch": plan.batch,
        "planned": [share.weights for share in plan.shares], "held": [place.weights for place in held],
        "streamed": plan.streamed,
    }))
"""


def test_experts_too_large_for_the_device_are_planned_in_ram(
    on_other: Program, packed_as: Callable[[str], Path]
) -> None:
    done = on_other({"RANGE": 8_000_000}, "-c", LOADED, packed_as("f32"), json.dumps({"memory": "80M"}))
    found = json.loads(done.stdout)
    assert found["experts"]["Vulkan0"] == 0
    assert found["layers"] == 4
    assert abs(found["planned"][0] - found["held"][0]) < 1 << 16
    assert found["streamed"]  # 80 MB do not hold 75 of experts and the rest
    assert any("does not take experts of" in note for note in found["notes"]), found["notes"]


def test_a_wish_for_what_the_device_does_not_take_is_refused(
    on_other: Program, packed_as: Callable[[str], Path]
) -> None:
    options = ("--gpu-layers", 0, "--experts-on", 1, "--context", 256, "--max-tokens", 1)
    done = on_other({"RANGE": 8_000_000}, "-m", "grok_local", "generate", "-m", packed_as("f32"), *options, "Hello")
    assert done.returncode == 1
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    assert "error: --experts-on 1: Vulkan0 takes tensors of at most 8 MB" in done.stderr


# -- a device that has less --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("having", [55_000_000, 80_000_000, 97_000_000])
def test_what_a_device_really_has_is_used(on_other: Program, packed_as: Callable[[str], Path], having: int) -> None:
    done = on_other({"LIMIT": having}, "-c", LOADED, packed_as("f32"), "{}")
    found = json.loads(done.stdout)
    assert any("Vulkan0 ran out of memory" in note for note in found["notes"])
    assert found["layers"] == 4  # experts went first
    assert found["experts"]["Vulkan0"] == {55_000_000: 0, 80_000_000: 1, 97_000_000: 2}[having]


def test_a_wish_for_more_than_a_device_has_is_refused_once_with_what_fits(
    on_other: Program, packed_as: Callable[[str], Path]
) -> None:
    done = on_other({"LIMIT": 80_000_000}, "-c", LOADED, packed_as("f32"), json.dumps({"experts_on": 3}))
    reason = done.stderr.strip().splitlines()[-1]
    assert "Vulkan0 ran out of memory with" in reason
    advised = re.search(r"say --experts-on (\d)", reason)
    assert advised
    again = on_other({"LIMIT": 80_000_000}, "-c", LOADED, packed_as("f32"), json.dumps({"experts_on": int(advised[1])}))
    assert json.loads(again.stdout)["experts"]["Vulkan0"] == int(advised[1]) == 1


def test_what_can_be_allocated_is_found_out() -> None:
    assert allocatable(GPUS[0], 50_000_000) == 50_000_000
    assert abilities_of(GPUS[0]).offloads


FOUND = """
from grok_local.ggml.devices import allocatable, backend_devices
print(allocatable(backend_devices()[0], 10**9))
"""


def test_what_can_be_allocated_is_what_there_is(on_other: Program) -> None:
    found = int(on_other({"LIMIT": 300_000_000}, "-c", FOUND).stdout)
    assert 0.95 * 300_000_000 <= found <= 300_000_000
