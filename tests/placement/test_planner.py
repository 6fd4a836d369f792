"""Plans for described machines, against golden tables and against arithmetic that can be done by hand."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_local.errors import GGUFError, OptionError, PlacementError
from grok_local.formats.gguf_file import read_model
from grok_local.machine.facts import Device, Machine, Speeds
from grok_local.placement.forecast import forecast
from grok_local.placement.plan import Plan
from grok_local.placement.planner import make_plan
from grok_local.placement.shape import ModelShape, Role
from grok_local.placement.shares import ram_reserve
from grok_local.placement.sizes.compute import compute_bytes
from grok_local.placement.wishes import RAM, Wishes
from grok_local.quantize.outline import outline
from samples.giants import write_giant

G = 1_000_000_000


@cache
def release(name: str) -> ModelShape:
    return ModelShape.from_headers([outline(name)])


def machine(ram: float, *vram: float, unified: bool = False, speed: float = 60e9) -> Machine:
    """RAM and GPUs in GB; RAM read at 60 GB/s, GPUs at 600, the disk at 7."""
    kind = "integrated" if unified else "gpu"
    sizes = [int(size * G) for size in vram]
    gpus = tuple(
        Device(f"GPU{i}", "", kind, size, size, 600e9, offloads=not unified)  # type: ignore[arg-type]
        for i, size in enumerate(sizes)
    )
    types = ("Q4_K", "Q6_K", "Q8_0", "F32")
    return Machine(
        int(ram * G), int(ram * G), 16, Speeds(dict.fromkeys(types, speed), memory=speed), 7e9, gpus, unified
    )


# -- by hand -----------------------------------------------------------------------------------------------------------
#
# Grok-1, 64 layers of 6144, experts Q4_K (4.5 bits), attention Q8_0 (8.5 bits), embedding Q6_K (6.5625 bits):
#   experts of a layer   8 x 3 x 6144 x 32768 x 4.5/8                                     = 2 717 908 992
#   the rest of a layer  (2 x 6144 x 6144 + 2 x 6144 x 1024) x 8.5/8 + 8 x 6144 x 4 + 4 x 6144 x 4 = 93 880 320
#   KV cache of a layer  8192 tokens x 2 x 1024 x 2 bytes                                 = 33 554 432
#   output (and, in RAM, the embedding it is tied to)  131072 x 6144 x 6.5625/8           = 660 602 880, norm 24 576
#   scores of 48 heads   48 x 8192 x 512 x 4 = 805 306 368, and a tenth for the rest of the compute buffer
# Grok-2, 64 layers of 8192, a dense network of 32768 beside experts of 16384:
#   experts of a layer   8 x 3 x 8192 x 16384 x 4.5/8                                     = 1 811 939 328
#   the rest of a layer  (2 x 8192 x 8192 + 2 x 8192 x 1024) x 8.5/8 + 3 x 8192 x 32768 x 6.5625/8 + 12 x 8192 x 4
#                                                                                         = 821 428 224
EXPERTS = {"grok-1": 2_717_908_992, "grok-2": 1_811_939_328}
DENSE = {"grok-1": 93_880_320, "grok-2": 821_428_224}
KV = 33_554_432
OUTPUT = {"grok-1": 660_602_880 + 24_576, "grok-2": 880_803_840 + 32_768}
EMBEDDING = {"grok-1": 660_602_880, "grok-2": 880_803_840}
SCORES = {"grok-1": 805_306_368, "grok-2": 1_073_741_824}
MARGIN = 512_000_000


@pytest.mark.parametrize("name", ["grok-1", "grok-2"])
def test_the_shape_is_what_the_releases_say(name: str) -> None:
    model = release(name)
    assert {model.layer_bytes(layer, Role.EXPERTS) for layer in range(64)} == {EXPERTS[name]}
    assert {model.layer_bytes(layer, Role.DENSE) for layer in range(64)} == {DENSE[name]}
    assert {model.kv_bytes(layer, context=8192, kv_type="f16") for layer in range(64)} == {KV}
    assert model.output_bytes == OUTPUT[name]
    # A token reads a quarter of the experts and everything else, of the embedding one row.
    row = EMBEDDING[name] // 131072
    assert model.read_per_token == 64 * (EXPERTS[name] // 4 + DENSE[name]) + OUTPUT[name] + row


# Each line: GB of RAM and of the GPUs; layers on each GPU (the output is one more); how many layers' experts each GPU
# holds; GB in RAM, GB left on the disk; tokens a second; tokens evaluated at once.
MACHINES = {
    "64 GB + 8 GB": machine(64, 8),
    "64 GB + 24 GB": machine(64, 24),
    "128 GB + 24 GB": machine(128, 24),
    "192 GB, no GPU": machine(192),
    "256 GB + 2 x 24 GB": machine(256, 24, 24),
    "512 GB + 2 x 48 GB": machine(512, 48, 48),
    "laptop, 32 GB + 8 GB": machine(32, 8),
    "Mac, 192 GB unified": machine(192, 155, unified=True, speed=400e9),
}
GOLDEN = """
grok-1 | 64 GB + 8 GB         | 40    | 0     | 60.8  | 118.8 | 0.199 | 1024
grok-1 | 64 GB + 24 GB        | 65    | 2     | 60.8  | 112.0 | 0.212 | 4096
grok-1 | 128 GB + 24 GB       | 65    | 4     | 121.6 | 44.0  | 0.441 | 2048
grok-1 | 192 GB, no GPU       | -     | -     | 183.7 | 0.0   | 1.19  | 512
grok-1 | 256 GB + 2 x 24 GB   | 34 31 | 6 6   | 142.0 | 0.0   | 1.62  | 512
grok-1 | 512 GB + 2 x 48 GB   | 34 31 | 15 15 | 93.1  | 0.0   | 2.3   | 512
grok-1 | laptop, 32 GB + 8 GB | 40    | 0     | 30.0  | 149.6 | 0.163 | 1024
grok-1 | Mac, 192 GB unified  | 65    | 53    | 30.2  | 0.8   | 8.27  | 512
grok-2 | 64 GB + 8 GB         | 7     | 0     | 60.8  | 106.9 | 0.196 | 512
grok-2 | 64 GB + 24 GB        | 24    | 0     | 60.8  | 93.5  | 0.226 | 1024
grok-2 | 128 GB + 24 GB       | 24    | 0     | 121.6 | 32.7  | 0.445 | 1024
grok-2 | 192 GB, no GPU       | -     | -     | 173.7 | 0.0   | 0.727 | 512
grok-2 | 256 GB + 2 x 24 GB   | 25 25 | 0 0   | 129.7 | 0.0   | 1.31  | 512
grok-2 | 512 GB + 2 x 48 GB   | 32 33 | 10 9  | 82.5  | 0.0   | 2.24  | 512
grok-2 | laptop, 32 GB + 8 GB | 50.5 GB of RAM beside its experts, and no smaller context fits either
grok-2 | Mac, 192 GB unified  | 65    | 53    | 21.1  | 0.0   | 6.94  | 512
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in GOLDEN.strip().splitlines()]


def row(name: str, title: str) -> list[str]:
    plan = make_plan(release(name), MACHINES[title])
    layers = " ".join(map(str, plan.layers)) or "-"
    experts = " ".join(str(plan.expert_layers[device.name]) for device in plan.machine.devices) or "-"
    speed = f"{forecast(plan).speed:.3g}"
    sizes = [f"{plan.ram.used / G:.1f}", f"{plan.disk / G:.1f}"]
    return [name, title, layers, experts, *sizes, speed, str(plan.batch)]


@pytest.mark.parametrize("expected", ROWS, ids=lambda cells: ", ".join(cells[:2]))
def test_plans_of_described_machines(expected: list[str]) -> None:
    name, title = expected[:2]
    if len(expected) == 3:
        with pytest.raises(PlacementError) as failed:
            make_plan(release(name), MACHINES[title])
        assert all(part in str(failed.value) for part in expected[2].split(", "))
    else:
        assert row(name, title) == expected


def room_by_hand(name: str, vram: float, *, copied: int = 0, batch: int = 512, several: bool = False) -> int:
    """Of a GPU: less what stays free and what is computed, the largest of scores, network and logits, and what is
    `copied` there from RAM meanwhile: 1 experts, 2 also the output and the KV cache of a layer. To that come the mask
    of batch x 8192, 7.25 activations, 4 MiB. Where there are several, two tensors of experts are copied at a time.
    """
    width, hidden = {"grok-1": (6144, 2 * 32768), "grok-2": (8192, 2 * 16384)}[name]
    scores = SCORES[name] * batch // 512 + int(1.05 * KV) * (copied == 2)
    inner = 4 * batch * hidden
    network = max(3 * inner, 2 * inner + EXPERTS[name] // 3 * (2 if several else 1) * (copied > 0))
    logits = 4 * batch * 131072 + EMBEDDING[name] * (copied == 2)
    rest = 4 * batch * (8192 + 29 * width // 4) + 4 * 2**20
    piped = 4 * batch * (4 * 8192 + 9 * width) if several and not copied else 0
    return int(vram * G) - MARGIN - max(scores, network, logits) - rest - piped


@pytest.mark.parametrize("name", ["grok-1", "grok-2"])
@pytest.mark.parametrize(("ram", "vram"), [(64, 8), (64, 24), (128, 24), (256, 48), (512, 80), (512, 12)])
def test_one_gpu_by_hand(name: str, ram: int, vram: int) -> None:
    plan = make_plan(release(name), machine(ram, vram))
    whole = 64 * (DENSE[name] + KV) + OUTPUT[name]
    room = room_by_hand(name, vram, copied=not plan.streamed, batch=plan.batch)
    if whole > room and not plan.streamed:
        room = room_by_hand(name, vram, copied=2, batch=plan.batch)
    if plan.layers == (65,):
        # All layers and the output fit; what is left takes whole layers of experts.
        layers, experts = 65, min((room - whole) // EXPERTS[name], 64)
    else:
        # The output and as many of the last layers as fit; no layer's experts are smaller than a layer is.
        layers, experts = 1 + (room - OUTPUT[name]) // (DENSE[name] + KV), 0
    assert plan.layers == (layers,)
    assert plan.expert_layers["GPU0"] == experts
    # RAM has the embedding, the other layers, their KV cache, the other experts, as far as it goes; then the disk.
    others = 65 - layers
    ram_room = int(ram * G) - ram_reserve(int(ram * G))
    fixed = EMBEDDING[name] + others * (DENSE[name] + KV) + plan.ram.compute
    wanted = (64 - experts) * EXPERTS[name]
    assert plan.ram.experts == min(wanted, ram_room - fixed)
    assert plan.disk == max(wanted - (ram_room - fixed), 0)


@pytest.mark.parametrize("name", ["grok-1", "grok-2"])
@pytest.mark.parametrize("vram", [(24, 24), (48, 48), (48, 24), (24, 8), (80, 80, 80), (16, 16, 16, 16)])
def test_several_gpus_are_filled_in_proportion(name: str, vram: tuple[int, ...]) -> None:
    plan = make_plan(release(name), machine(256, *vram))
    copied = 1 if sum(plan.layers) == 65 else 2
    others = [room_by_hand(name, size) for size in vram[1:]]
    rooms = [room_by_hand(name, vram[0], copied=copied, several=True), *others]
    used = [share.weights + share.kv for share in plan.shares[:-1]]
    assert all(taken <= room for taken, room in zip(used, rooms, strict=True))
    layer, left = DENSE[name] + KV, [room - taken for room, taken in zip(rooms, used, strict=True)]
    if sum(plan.layers) < 65:
        assert max(left) < layer + max(OUTPUT[name], EXPERTS[name])  # nothing more would have fitted
    elif plan.expert_layers[RAM]:
        assert max(left) < EXPERTS[name]
    dense = [count * layer / room for count, room in zip(plan.layers, rooms, strict=True)]
    assert max(dense[:-1]) - min(dense[:-1]) <= layer / min(rooms) + 1e-9


def test_everything_on_gpus_needs_no_room_for_copies() -> None:
    plan = make_plan(release("grok-1"), machine(64, 80, 80, 48))
    assert plan.expert_layers[RAM] == 0
    assert plan.disk == 0
    rooms = [room_by_hand("grok-1", size, several=True) for size in (80, 80, 48)]
    assert all(s.weights + s.kv <= room for s, room in zip(plan.shares[:-1], rooms, strict=True))


def test_streaming_speed_by_hand() -> None:
    # 64 GB: 60.8 for all; dense 6 669 million, KV cache 2 147, 4096 tokens at once: scores 6 442, and for the rest of
    # the compute buffer 134 + 705 + 17. Of 173 946 million of experts 44 686 stay. An answer's single tokens leave the
    # buffer alone but for 2 + 17 million, so that 51 965 stay; a token reads a quarter of the rest.
    plan = make_plan(release("grok-1"), machine(64))
    assert (plan.streamed, plan.batch) == (True, 4096)
    held = 60.8e9 - 6_669e6 - 2_147e6 - 6_442.5e6 - 134.2e6 - 704.6e6 - 16.8e6
    assert plan.ram.experts == pytest.approx(held, rel=1e-3)
    answering = 60.8e9 - 6_669e6 - 2_147e6 - 1.8e6 - 16.8e6
    assert plan.room_for_experts(1) == pytest.approx(answering, rel=1e-3)
    assert plan.room_for_experts(4096) == plan.room_for_experts(1 << 40) == plan.ram.experts
    read = (173_946e6 - answering) / 4
    disk = forecast(plan).readings[-2]
    assert disk.nbytes == pytest.approx(read, rel=1e-3)
    assert disk.seconds == pytest.approx(read / 7e9, rel=1e-3)


@pytest.mark.parametrize("ram", [24, 64, 128, 180])
def test_prompts_are_as_wide_as_pays_off(ram: int) -> None:
    """A prompt of 8192 tokens and an answer of 64, each of which chooses a quarter, read the fewest bytes."""
    plan = make_plan(release("grok-1"), machine(ram))

    def bytes_read(plan: Plan) -> float:
        lent = plan.room_for_experts(1) - plan.ram.experts
        return 8192 / plan.batch * plan.disk + 64 / 4 * (plan.disk - lent)

    assert plan.batch == 4096
    for width in (512, 1024, 2048, 4096):
        with suppress(PlacementError):
            other = make_plan(release("grok-1"), machine(ram), Wishes(batch=width))
            assert other.batch == width
            assert bytes_read(plan) <= bytes_read(other)


def test_a_gpus_buffers_are_not_lent() -> None:
    plan = make_plan(release("grok-1"), machine(64, 24))
    assert plan.streamed
    assert plan.ram.compute > 0
    assert plan.room_for_experts(1) == plan.ram.experts


def test_streaming_needs_one_tokens_experts_of_a_layer() -> None:
    fixed = 6_669_000_000 + 2_147_483_648 + 960_000_000
    with pytest.raises(PlacementError, match=r"beside its experts and 679 MB for those of a token.*--context 2048"):
        plan_with(Wishes(memory=fixed + 600_000_000))
    plan = plan_with(Wishes(memory=fixed + 800_000_000))
    assert any("all experts of a layer at once" in note for note in plan.notes)


def test_streaming_is_as_wished() -> None:
    assert not plan_with(Wishes(memory=64 * G, stream="off")).streamed
    assert plan_with(Wishes(stream="on")).streamed
    assert not plan_with(Wishes()).streamed
    assert plan_with(Wishes(stream="on")).batch == 512
    with pytest.raises(PlacementError, match="--repack on"):
        plan_with(Wishes(stream="on", repack="on"))


def test_decode_speed_by_hand() -> None:
    # 192 GB and no GPU: 50.16 GB a token at 60 GB/s is 0.8359 s, 64 layers of 35 us are 2.2 ms.
    plan = make_plan(release("grok-1"), machine(192))
    assert forecast(plan).seconds == pytest.approx(50_155_516_848 / 60e9 + 64 * 35e-6, rel=1e-3)
    # Full, the KV cache of 2.147 GB is read as well.
    assert forecast(plan).full_seconds - forecast(plan).seconds == pytest.approx(2_147_483_648 / 60e9, rel=1e-3)


# -- against llama.cpp -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grok-1", "grok-2"])
def test_llama_cpp_agrees_about_full_size_models(name: str, tmp_path: Path) -> None:
    giant = read_model(write_giant(tmp_path / "giant.gguf", name))
    model = ModelShape.from_headers(giant)
    assert replace(model, name="") == replace(release(name), name="")
    for context, batch in ((8192, 512), (2048, 512), (512, 512), (8192, 128)):
        found = _compute_buffer(giant[0].path, context=context, batch=batch)
        planned = compute_bytes(model, context=context, batch=batch)
        assert found <= planned <= 1.4 * found


def _compute_buffer(path: Path, *, context: int, batch: int) -> int:
    """Bytes llama.cpp would allocate, by its own account."""
    import llama_cpp

    from grok_local.ggml import log

    log.listen()
    log.clear()
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode, params.use_extra_bufts = True, llama_cpp.LLAMA_LOAD_MODE_NONE, False
    model = llama_cpp.llama_model_load_from_file(bytes(path), params)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = context, batch, batch
    llama_cpp.llama_free(llama_cpp.llama_init_from_model(model, options))
    llama_cpp.llama_model_free(model)
    return sum(buffer.nbytes for buffer in log.buffers() if buffer.use == "compute")


# -- wishes ------------------------------------------------------------------------------------------------------------


def plan_with(wishes: Wishes, *vram: float, ram: float = 256) -> Plan:
    return make_plan(release("grok-1"), machine(ram, *vram), wishes)


def test_wishes_are_honoured_and_the_rest_planned_around_them() -> None:
    assert plan_with(Wishes(gpu_layers=10), 24).layers == (10,)
    assert plan_with(Wishes(gpu_layers=10), 24).expert_layers["GPU0"] > 4
    assert plan_with(Wishes(gpu_layers=999), 24).layers == (65,)
    assert plan_with(Wishes(experts_on="cpu"), 24).expert_layers == {"GPU0": 0, RAM: 64}
    assert plan_with(Wishes(experts_on=2), 24).expert_layers["GPU0"] == 2
    assert plan_with(Wishes(experts_on="gpu"), *(80,) * 3).expert_layers[RAM] == 0
    none = plan_with(Wishes(gpu_layers=0, experts_on="cpu"), 24)
    assert (none.layers, none.overrides, none.shares[0].used) == ((0,), (), 0)


def test_experts_may_be_on_a_device_and_their_layers_in_ram() -> None:
    plan = plan_with(Wishes(gpu_layers=0), 24)
    assert plan.layers == (0,)
    assert plan.expert_layers["GPU0"] == 8
    assert plan.shares[0].kv == 0


def test_overrides_come_first() -> None:
    plan = plan_with(Wishes(overrides=((r"blk\.63\.ffn_up_exps", RAM), (r"attn_q", RAM))), 24)
    by_name = {weight.name: weight for weight in plan.model.weights}
    assert plan.place_of(by_name["blk.63.ffn_up_exps.weight"]) == RAM
    assert plan.place_of(by_name["blk.5.attn_q.weight"]) == RAM
    assert plan.place_of(by_name["blk.5.attn_k.weight"]) == "GPU0"
    assert plan.place_of(by_name["blk.63.ffn_down_exps.weight"]) == "GPU0"
    # Layer 63 is split and not counted; the queries' 2.6 GB in RAM make room for one more.
    assert plan.expert_layers["GPU0"] == 5
    assert plan_with(Wishes(overrides=plan.wishes.overrides[:1]), 24).expert_layers["GPU0"] == 4


@pytest.mark.parametrize("layers", ["0", "63", "0|1|2", "10|20|30|40|50|60", "0|1|2|3|4|5|6"])
@pytest.mark.parametrize("ram", [64, 256])
def test_what_an_override_puts_on_a_device_is_room_taken(layers: str, ram: int) -> None:
    """Fewer experts that nobody named go there, then fewer layers."""
    plan = plan_with(Wishes(overrides=((rf"blk\.({layers})\.ffn_.*_exps", "GPU0"),)), 24, ram=ram)
    assert plan.expert_layers["GPU0"] >= len(layers.split("|"))
    assert plan.shares[0].used <= plan.shares[0].capacity
    room = room_by_hand("grok-1", 24, copied=2 * (not plan.streamed), batch=plan.batch)
    free = room - plan.shares[0].weights - plan.shares[0].kv
    assert free < (EXPERTS["grok-1"] if plan.layers == (65,) else OUTPUT["grok-1"])


def test_what_an_override_puts_elsewhere_costs_a_layer_nothing() -> None:
    without, given = (plan_with(Wishes(overrides=given), 8).layers for given in ((), ((r"attn_[qo]", RAM),)))
    assert given > without


@pytest.mark.parametrize(
    ("wishes", "vram", "words"),
    [
        (Wishes(gpu_layers=65), (8,), "44 fit, say --gpu-layers 44"),
        (Wishes(experts_on=20), (24,), "room for the experts of 4 layers.*say --experts-on 4"),
        (Wishes(experts_on="gpu"), (24,), "say --experts-on 4"),
        (Wishes(gpu_layers=5), (), "no GPU that llama.cpp knows"),
        (Wishes(overrides=(("exps", "GPU0"),)), (24,), "GPU0 would hold .* and has room for 23.5 GB"),
        (Wishes(memory=10**12), (), "there are 256 GB of RAM"),
        (Wishes(memory=8 * G), (), "--context 512 would fit"),
        (Wishes(memory=4 * G), (), "no smaller context fits either"),
        (Wishes(memory=100 * G, repack="on"), (), "copies in RAM"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(wishes: Wishes, vram: tuple[int, ...], words: str) -> None:
    with pytest.raises(PlacementError) as failed:
        plan_with(wishes, *vram)
    assert re.search(words, str(failed.value))


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(kv_type="q4_0"),
        Wishes(experts_on="tpu"),  # type: ignore[arg-type]
        Wishes(overrides=(("(", RAM),)),
        Wishes(overrides=(("exps", "GPU7"),)),
        Wishes(overrides=(("a" * 100_000, RAM),)),
        Wishes(overrides=(("blk{99999999999}", RAM),)),
        Wishes(overrides=(("[[:alpha:]]+", RAM),)),
    ],
)
def test_wishes_that_make_no_sense(wishes: Wishes) -> None:
    with pytest.raises(OptionError):
        plan_with(wishes, 24)


def test_the_advised_plans_work() -> None:
    assert plan_with(Wishes(gpu_layers=44), 8).layers == (44,)
    assert plan_with(Wishes(experts_on=4), 24).expert_layers["GPU0"] == 4
    assert plan_with(Wishes(memory=8 * G, context=512)).disk > 0


def test_an_override_without_effect_is_noted() -> None:
    plan = plan_with(Wishes(overrides=(("zzz", RAM), ("attn_q", RAM))), 24)
    assert plan.notes == ("--override zzz=RAM matches no tensor",)


def test_repacking_is_for_what_fits_and_what_the_self_test_allows() -> None:
    speeds = Speeds(plain={"Q4_K": 10e9, "Q8_0": 20e9}, repacked={"Q4_K": 15e9}, memory=20e9)
    roomy = replace(machine(256), speeds=speeds)
    plan = make_plan(release("grok-1"), roomy)
    assert len(plan.repacked) == 3 * 64
    assert forecast(plan).speed > forecast(make_plan(release("grok-1"), roomy, Wishes(repack="off"))).speed
    assert not make_plan(release("grok-1"), replace(machine(128), speeds=speeds)).repacked
    slower = replace(speeds, repacked={"Q4_K": 9e9})
    assert not make_plan(release("grok-1"), replace(roomy, speeds=slower)).repacked
    assert make_plan(release("grok-1"), replace(roomy, speeds=slower), Wishes(repack="on")).repacked


# -- any machine -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    name=st.sampled_from(["grok-1", "grok-2"]),
    ram=st.floats(1, 1024),
    vram=st.lists(st.floats(0.1, 200), max_size=5),
    context=st.integers(1, 131072),
    gpu_layers=st.none() | st.integers(0, 70),
    experts_on=st.none() | st.integers(0, 64) | st.sampled_from(["cpu", "gpu"]),
)
def test_a_plan_never_promises_more_than_there_is(
    name: str, ram: float, vram: list[float], context: int, gpu_layers: int | None, experts_on: int | None
) -> None:
    described = machine(ram, *vram)
    try:
        plan = make_plan(release(name), described, Wishes(context, gpu_layers=gpu_layers, experts_on=experts_on))
    except PlacementError:
        return
    assert all(share.used <= max(share.capacity, 0) for share in plan.shares)
    held = sum(share.weights for share in plan.shares) + plan.disk
    copies = sum(w.nbytes for w in plan.model.weights if w.tied and plan.place_of(w) != RAM)
    assert held == plan.model.nbytes + copies
    assert sum(share.kv for share in plan.shares) == sum(
        plan.model.kv_bytes(layer, context=context, kv_type="f16") for layer in range(64)
    )
    assert 0 < forecast(plan).seconds <= forecast(plan).full_seconds


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                f"grok.{key}"
                for key in (
                    "block_count",
                    "expert_count",
                    "attention.head_count_kv",
                    "attention.head_count",
                    "embedding_length",
                    "feed_forward_length",
                )
            ]
        ),
        st.integers(-5, 2**64) | st.text() | st.lists(st.integers(0, 9) | st.text()),
    )
)
def test_metadata_that_makes_no_sense(changed: dict[str, object]) -> None:
    header = outline("grok-1")
    with suppress(GGUFError):
        ModelShape.from_headers([replace(header, metadata={**header.metadata, **changed})])
