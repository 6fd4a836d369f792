"""What devices are and say decides what they get: their limits, what is copied to them, how fast they are."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_local.errors import PlacementError
from grok_local.machine.facts import Device, Machine
from grok_local.placement.forecast import forecast, limit
from grok_local.placement.load_options import load_request
from grok_local.placement.plan import Plan
from grok_local.placement.planner import make_plan
from grok_local.placement.shape import Role
from grok_local.placement.shares import ram_budget
from grok_local.placement.whatif import described, enough_ram, with_less, with_smaller
from grok_local.placement.wishes import ALL_LAYERS, RAM, Wishes
from tests.placement.test_planner import DENSE, EXPERTS, KV, OUTPUT, G, machine, release

RANGE = (1 << 32) - 1  # bytes of the largest tensor, of most Vulkan drivers


def changed(machine: Machine, **facts: Any) -> Machine:
    return replace(machine, devices=tuple(replace(device, **facts) for device in machine.devices))


def largest_scores(plan: Plan) -> int:
    return 4 * plan.model.heads * -(-plan.attended // 256) * 256 * plan.batch


# -- the largest tensor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "wishes"),
    [
        ("grok-1", (64, 24), Wishes()),
        ("grok-1", (96, 48), Wishes()),
        ("grok-1", (128, 24), Wishes(context=16384)),
        ("grok-1", (192, 100, 100), Wishes(context=65536)),
        ("grok-2", (192, 48), Wishes(context=32768)),
        ("grok-1", (64, 24), Wishes(batch=4096)),
        ("grok-1", (192, 48), Wishes(context=8192, sequences=16)),
    ],
)
def test_a_device_is_given_no_larger_scores_than_it_takes(name: str, sizes: Any, wishes: Wishes) -> None:
    """They would be computed in RAM, which has no room for them."""
    free = make_plan(release(name), machine(*sizes), wishes)
    limited = make_plan(release(name), changed(machine(*sizes), largest=RANGE), wishes)
    assert largest_scores(limited) <= RANGE
    assert limited.batch == free.batch or 2 * largest_scores(limited) > RANGE
    assert limited.batch >= wishes.sequences
    without = make_plan(
        release(name), changed(machine(512, *sizes[1:]), largest=RANGE), Wishes(gpu_layers=0, experts_on=0)
    )
    assert without.batch == 512


def test_a_narrowed_batch_is_said() -> None:
    plan = make_plan(release("grok-2"), changed(machine(192, 48), largest=RANGE), Wishes(context=32768))
    assert plan.batch == 256
    assert any("prompts are taken 256 tokens at a time" in note and "4.29 GB" in note for note in plan.notes)


def test_experts_too_large_for_a_device_stay_in_ram() -> None:
    largest = EXPERTS["grok-1"] // 3
    taken = make_plan(release("grok-1"), changed(machine(256, 48), largest=largest))
    plan = make_plan(release("grok-1"), changed(machine(256, 48), largest=largest - 1))
    assert taken.expert_layers["GPU0"] > 10
    assert plan.expert_layers == {"GPU0": 0, RAM: 64}
    assert plan.layers == (65,)
    assert plan.ram.experts + plan.disk == 64 * EXPERTS["grok-1"]
    assert any("GPU0 does not take experts of 906 MB" in note for note in plan.notes)
    # RAM works on them itself, a whole batch at a time.
    assert plan.ram.compute > 4 * plan.batch * 2 * 2 * 32768


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        (Wishes(gpu_layers=0, experts_on=1), "--experts-on 1: GPU0 takes tensors of at most 134 MB, and blk"),
        (Wishes(experts_on="gpu"), "--experts-on gpu: GPU0 takes tensors"),
        (
            Wishes(overrides=((r"blk\.5\.ffn_up_exps", "GPU0"),)),
            "--override .*GPU0: GPU0 takes tensors of at most 134 MB",
        ),
    ],
)
def test_what_a_device_does_not_take_is_refused_with_the_reason(wishes: Wishes, words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        make_plan(release("grok-1"), changed(machine(256, 24), largest=1 << 27), wishes)


def test_experts_go_to_the_device_that_takes_them() -> None:
    two = machine(256, 24, 24)
    first, second = two.devices
    plan = make_plan(release("grok-1"), replace(two, devices=(replace(first, largest=1 << 28), second)))
    assert plan.expert_layers["GPU0"] == 0
    assert plan.expert_layers["GPU1"] > 4


def test_an_output_too_large_for_a_device_stays_in_ram() -> None:
    plan = make_plan(release("grok-1"), changed(machine(256, 24), largest=600_000_000))
    (output,) = [weight for weight in plan.model.weights if weight.role is Role.OUTPUT and weight.rows > 1]
    assert plan.place_of(output) == RAM
    assert plan.shares[0].dense == 64 * DENSE["grok-1"] + OUTPUT["grok-1"] - output.nbytes


def test_types_that_a_device_has_no_products_for_stay_in_ram() -> None:
    plan = make_plan(release("grok-1"), changed(machine(256, 48), lacks=frozenset({"Q4_K"})))
    assert plan.expert_layers["GPU0"] == 0
    with pytest.raises(PlacementError, match="GPU0 has no products for Q4_K: leave it out"):
        make_plan(release("grok-1"), changed(machine(256, 48), lacks=frozenset({"Q4_K"})), Wishes(experts_on=3))


# -- copies ------------------------------------------------------------------------------------------------------------


def test_integrated_gpus_get_copies_too_unless_they_say_otherwise() -> None:
    apple = machine(128, 90, unified=True)
    other = changed(apple, offloads=True)
    wishes = Wishes(experts_on=4)
    more = make_plan(release("grok-1"), replace(other, memory=256 * G, available=256 * G), wishes).shares[0].compute
    less = make_plan(release("grok-1"), replace(apple, memory=256 * G, available=256 * G), wishes).shares[0].compute
    assert more > EXPERTS["grok-1"] // 3 + 4 * 512 * 2 * 65536 > less


@pytest.mark.parametrize(("context", "held"), [(2048, 1.208), (8192, 1.221), (16384, 1.686), (32768, 3.330)])
def test_copies_and_scores_share_a_buffer(context: int, held: float) -> None:
    """`held` are llama.cpp's own figures in GB for Grok-1 with dense tensors on a GPU and experts in RAM."""
    compute = make_plan(release("grok-1"), machine(192, 24), Wishes(context=context)).shares[0].compute
    assert held * G <= compute <= 1.3 * held * G


def test_only_the_first_device_takes_over_from_ram() -> None:
    first, second, _ = make_plan(release("grok-1"), machine(256, 24, 24)).shares
    assert first.compute > 2 * EXPERTS["grok-1"] // 3
    assert second.compute < G
    left_out = machine(256, 0.6, 24)  # nothing fits the first, which llama.cpp then does not know
    plan = make_plan(release("grok-1"), left_out)
    assert plan.shares[0].used == 0
    assert plan.shares[1].compute > EXPERTS["grok-1"] // 3


# -- speed -------------------------------------------------------------------------------------------------------------


def test_a_device_slower_than_ram_gets_nothing_it_would_slow_down() -> None:
    slow = changed(machine(256, 24), speed=9e7)
    plan = make_plan(release("grok-1"), slow)
    assert (plan.layers, plan.shares[0].used) == ((0,), 0)
    assert any("GPU0 is slower than RAM" in note for note in plan.notes)
    assert make_plan(release("grok-1"), slow, Wishes(gpu_layers=10)).layers == (10,)
    assert make_plan(release("grok-1"), changed(machine(256, 24), speed=61e9)).layers == (65,)
    # Beside a disk that is slower still, it is worth having.
    hard_disk = replace(changed(machine(64, 24), speed=5e9), disk_speed=2e8)
    assert make_plan(release("grok-1"), hard_disk).shares[0].used > 0


def test_the_limit_counts_each_byte_where_it_lies() -> None:
    plan = make_plan(release("grok-1"), machine(256, 24))
    on_gpu = sum(weight.read for weight in plan.model.weights if plan.place_of(weight) == "GPU0")
    in_ram = plan.model.read_per_token - on_gpu
    assert limit(plan) == pytest.approx(1 / (on_gpu / 600e9 + in_ram / 60e9))
    assert limit(make_plan(release("grok-1"), changed(machine(256, 24), speed=0.0))) == 0


# -- less than it said -------------------------------------------------------------------------------------------------


def test_with_less_memory_experts_go_first() -> None:
    plan = make_plan(release("grok-1"), machine(256, 24))
    fixed = 64 * (DENSE["grok-1"] + KV) + OUTPUT["grok-1"]
    compute = plan.shares[0].compute
    for experts in (3, 1, 0):
        lower = with_less(plan, "GPU0", fixed + compute + experts * EXPERTS["grok-1"] + 1)
        assert (lower.layers, lower.expert_layers["GPU0"]) == ((65,), experts)
        assert lower.shares[0].used <= lower.shares[0].capacity
    assert sum(with_less(plan, "GPU0", 6 * G).layers) in range(20, 64)
    assert with_less(plan, "GPU0", 0).shares[0].used == 0


@pytest.mark.parametrize(
    ("wish", "vram"), [("experts_on", 8), ("experts_on", 24), ("experts_on", 48), ("gpu_layers", 8), ("gpu_layers", 16)]
)
def test_what_is_advised_works(wish: str, vram: int) -> None:
    wishes: dict[str, Any] = {"kv_type": "f32", "context": 16384, wish: 64}
    with pytest.raises(PlacementError) as refused:
        make_plan(release("grok-1"), machine(256, vram), Wishes(**wishes))
    wishes[wish] = int(re.findall(r"say --[a-z-]+ (\d+)", str(refused.value))[0])
    assert make_plan(release("grok-1"), machine(256, vram), Wishes(**wishes))


def test_with_less_memory_a_wish_is_refused_with_what_fits() -> None:
    plan = make_plan(release("grok-1"), machine(256, 48), Wishes(experts_on=8))
    most = plan.shares[0].used - 3 * EXPERTS["grok-1"]
    with pytest.raises(PlacementError, match="say --experts-on 5"):
        with_less(plan, "GPU0", most)
    assert make_plan(plan.model, changed(plan.machine, most=most), Wishes(experts_on=5)).expert_layers["GPU0"] == 5


@pytest.mark.parametrize("said", ["all", "-1", -1])
def test_all_layers_may_be_asked_for(said: Any) -> None:
    assert load_request(Path("x.gguf"), {"gpu_layers": said}).wishes.gpu_layers == ALL_LAYERS


def test_all_layers_are_called_all() -> None:
    with pytest.raises(PlacementError, match="--gpu-layers all: the layers need"):
        make_plan(release("grok-1"), machine(256, 8), Wishes(gpu_layers=ALL_LAYERS))


def test_what_a_device_left_in_ram_is_planned_there() -> None:
    plan = make_plan(release("grok-1"), machine(256, 48))
    assert plan.expert_layers["GPU0"] > 0
    assert with_smaller(plan, "GPU0").expert_layers["GPU0"] == 0


def test_workers_take_nothing_over() -> None:
    worker = Device("RPC0", "", "worker", 48 * G, 48 * G, offloads=False)
    plan = make_plan(release("grok-1"), replace(machine(256), devices=(worker,)))
    assert plan.shares[0].compute < G < plan.shares[0].experts


@pytest.mark.parametrize(("name", "least"), [("grok-1", 30), ("grok-2", 78)])
@pytest.mark.parametrize("offloads", [True, False])
def test_where_gpus_share_the_ram_what_runs_without_them_runs_with_them(name: str, least: int, offloads: bool) -> None:
    shape = release(name)
    for free in range(least, 128, 3):
        apple = replace(machine(128, 96, unified=True), available=free * G)
        apple = replace(apple, devices=tuple(replace(device, offloads=offloads) for device in apple.devices))
        try:
            make_plan(shape, apple, Wishes(experts_on="cpu"))
        except PlacementError:
            continue
        plan = make_plan(shape, apple, Wishes())
        assert all(share.used <= share.capacity for share in plan.shares)
        assert sum(share.used for share in plan.shares) <= free * G


@pytest.mark.parametrize(("name", "sizes", "free"), [("grok-2", (96, 96), 65), ("grok-2", (20,), 65)])
def test_where_layers_fit_beside_no_gpu_ram_has_them_all(name: str, sizes: tuple[int, ...], free: int) -> None:
    """They need as much in RAM as on a GPU, and the GPU's buffers are what is too much."""
    shared = replace(machine(128, *sizes, unified=True), available=free * G)
    assert set(make_plan(release(name), shared).layers) == {0}


def test_a_workers_memory_is_no_share_of_this_machines() -> None:
    apple = machine(64, 48, unified=True)
    worker = Device("RPC0", "", "worker", 200 * G, 200 * G, offloads=False)
    plan = make_plan(release("grok-1"), replace(apple, devices=(*apple.devices, worker)))
    assert plan.expert_layers["RPC0"] > 50
    assert plan.ram.capacity == ram_budget(apple, Wishes()) - plan.shares[0].used


def test_several_devices_share_what_ram_there_is() -> None:
    plan = make_plan(release("grok-1"), machine(128, 96, 96, unified=True), Wishes())
    assert sum(share.used for share in plan.shares) <= 128 * G


def test_with_more_ram_the_devices_that_share_it_have_more() -> None:
    small = machine(16, 11, unified=True, speed=400e9)
    worker = Device("RPC0", "", "worker", 24 * G, 24 * G, offloads=False)
    larger = described(ram="192G").applied_to(replace(small, devices=(*small.devices, worker)), types=["Q4_K"])
    assert [device.free for device in larger.devices] == [132 * G, 24 * G]
    assert larger.unified
    # And what is said of enough RAM is that machine's.
    plan = make_plan(release("grok-1"), replace(machine(64, 48, unified=True, speed=400e9), disk_speed=2e9))
    found = enough_ram(plan)
    assert found
    size, prediction = found
    supposed = described(ram=str(size)).applied_to(plan.machine, types=["Q4_K"])
    assert forecast(make_plan(release("grok-1"), supposed)).seconds == prediction.seconds


def test_with_more_ram_other_devices_are_what_they_were() -> None:
    gpu = machine(64, 24)
    assert described(ram="256G").applied_to(gpu, types=["Q4_K"]).devices == gpu.devices


# -- what the user puts on a device ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vram", "layers"), [(24, 1), (24, 4), (32, 5)])
@pytest.mark.parametrize("ram", [60, 64])
@pytest.mark.parametrize("experts_on", [None, "cpu"])
def test_experts_that_an_override_puts_on_a_device_take_its_room(
    vram: int, layers: int, ram: int, experts_on: Any
) -> None:
    pattern = rf"blk\.({'|'.join(map(str, range(layers)))})\.ffn_.*_exps"
    wishes = Wishes(overrides=((pattern, "GPU0"),), experts_on=experts_on)
    plan = make_plan(release("grok-1"), machine(ram, vram), wishes)
    (share, _) = plan.shares
    assert share.experts >= layers * plan.model.layer_bytes(0, Role.EXPERTS)
    assert share.used <= share.capacity


@given(
    st.lists(st.tuples(st.integers(0, 63), st.sampled_from(("GPU0", "GPU1", RAM))), max_size=6),
    st.sampled_from((24, 48, 90)),
    st.sampled_from((60, 128, 300)),
)
@settings(max_examples=40)
def test_no_override_makes_a_plan_promise_more_than_there_is(
    placed: list[tuple[int, str]], vram: int, ram: int
) -> None:
    overrides = tuple((rf"blk\.{layer}\.ffn_.*_exps", place) for layer, place in placed)
    with suppress(PlacementError):
        plan = make_plan(release("grok-1"), machine(ram, vram, 24), Wishes(overrides=overrides))
        assert all(share.used <= share.capacity for share in plan.shares)


def test_a_slow_device_that_gets_nothing_narrows_no_batch() -> None:
    """And what is noted of it is no error."""
    slow = changed(machine(256, 24), largest=RANGE, most=0, speed=1e9)
    for context in (8192, 65536):
        plan = make_plan(release("grok-1"), slow, Wishes(context=context))
        assert plan.batch == make_plan(release("grok-1"), machine(256), Wishes(context=context)).batch
        assert any("slower than RAM" in note for note in plan.notes)


@pytest.mark.parametrize("context", [8192, 65536])
def test_a_device_too_small_for_anything_narrows_no_batch(context: int) -> None:
    first, second = machine(256, 24, 0.6).devices
    both = replace(machine(256), devices=(first, replace(second, largest=1 << 28)))
    plan, alone = (make_plan(release("grok-1"), m, Wishes(context=context)) for m in (both, machine(256, 24)))
    assert (plan.batch, plan.shares[1].used) == (alone.batch, 0)
    assert not any("at a time" in note for note in plan.notes)


def test_notes_name_the_limit_of_a_device_that_is_used() -> None:
    first, second = machine(192, 48, 24).devices
    devices = (replace(first, largest=RANGE), replace(second, largest=1 << 20, most=0))
    plan = make_plan(release("grok-2"), replace(machine(192), devices=devices), Wishes(context=32768))
    assert any("4.29 GB" in note for note in plan.notes)
