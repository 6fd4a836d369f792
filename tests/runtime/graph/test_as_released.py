"""Grok-2 computed as its release does, by correcting llama.cpp's graph: against the reference's forward pass.

Alone, with everything else that looks on, for many sequences at once, and where the weights are not in our memory. The
router's cap is low and the temperature begins early, so that both matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from grok_local.errors import ModelError, OptionError
from grok_local.formats.gguf_file import Header, read_model
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.shape import ModelShape, Role
from grok_local.placement.sizes.compute import compute_bytes
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.experts.routing import read_routing
from grok_local.runtime.graph.deviations import Deviations, deviations_of
from grok_local.runtime.graph.router import ReleaseGates
from grok_local.runtime.graph.rows import Draw, Row
from grok_local.runtime.graph.tap import Ending
from grok_local.runtime.graph.temperature import AttentionTemperature
from samples.grok2_release import SMALL_2, write_release
from samples.reference_grok2 import ReferenceGrok2, Routing
from tests.workers import Worker

Floats = npt.NDArray[np.float32]
SPEC = replace(SMALL_2, layers=3, expert_width=512, experts=8, router_cap=2.0, temperature_length=16)
IDS = np.random.default_rng(3).integers(128, SPEC.vocabulary, 60).tolist()
OPTIONS: dict[str, Any] = {"context": 128, "threads": 1, "kv_type": "f32"}
SEQUENCES = [IDS[:40], IDS[20:25], IDS[10:31]]  # of different lengths, two of them beyond the temperature's


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("as-released"), SPEC)


@pytest.fixture(scope="module")
def reference(release: Path) -> ReferenceGrok2:
    return ReferenceGrok2(release)


@pytest.fixture(scope="module")
def path(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("as-released-packed") / "x.gguf"
    return grok_local.quantize_checkpoint(release, output, type="f32").path


def errors(found: Floats, truth: Floats) -> Floats:
    out: Floats = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
    return out


def check(found: Floats, reference: ReferenceGrok2, routing: Routing = Routing.RELEASE) -> None:
    """As near as llama.cpp's own way comes to its reference."""
    for each in Routing:
        distance = errors(found, reference.forward(IDS[: len(found)], each)[0])
        if each is routing:
            assert np.median(distance) < 1e-3
            assert distance.max() < 5e-3
        else:
            assert np.median(distance) > 0.05


def test_positions_beyond_the_temperature_length_are_other_than_those_without(release: Path) -> None:
    """Else the other tests would say nothing of it."""
    reference = ReferenceGrok2(release)
    truth, _ = reference.forward(IDS, Routing.RELEASE)
    reference.config["attn_temperature_len"] = 1024
    distance = errors(reference.forward(IDS, Routing.RELEASE)[0], truth)
    assert distance[: SPEC.temperature_length + 1].max() == 0
    assert np.median(distance[SPEC.temperature_length + 1 :]) > 0.01


def test_alone(path: Path, reference: ReferenceGrok2) -> None:
    with grok_local.load(path, **OPTIONS) as model:
        check(model.logits(IDS), reference)
        (note,) = [note for note in model.placement.notes if "--routing" in note]
        assert "gates capped at 2 and not renormalised, attention sharper beyond 16 tokens" in note


def test_as_llama_cpp_does(path: Path, reference: ReferenceGrok2) -> None:
    with grok_local.load(path, routing="llama.cpp", **OPTIONS) as model:
        check(model.logits(IDS), reference, Routing.LLAMA_CPP)
        assert "the gates and the attention are llama.cpp's" in "\n".join(model.placement.notes)


def test_token_by_token_and_again(path: Path, reference: ReferenceGrok2) -> None:
    """llama.cpp computes one graph again and again here, first for positions that need a factor, then for others."""
    with grok_local.load(path, **OPTIONS) as model:
        for _ in range(2):
            rows = [model.engine.tail_logits(IDS[: number + 1], number) for number in range(40)]
            check(np.concatenate(rows), reference)


def memory_for(path: Path, experts: int) -> int:
    """RAM in which so many experts fit beside everything else."""
    shape = ModelShape.from_headers(read_model(path))
    rest = sum(weight.nbytes for weight in shape.weights if weight.role is not Role.EXPERTS and not weight.tied)
    kv = sum(shape.kv_bytes(layer, context=128, kv_type="f32") for layer in range(shape.layers))
    compute = compute_bytes(shape, context=128, batch=512)
    return rest + kv + compute + experts * shape.layer_bytes(0, Role.EXPERTS) // shape.experts


@pytest.mark.parametrize("held", [9, None])
def test_streamed_and_recorded(path: Path, reference: ReferenceGrok2, tmp_path: Path, held: int | None) -> None:
    memory, trace = None if held is None else memory_for(path, held), tmp_path / "trace.jsonl"
    with grok_local.load(path, stream="on", memory=memory, trace_experts=trace, **OPTIONS) as model:
        assert model.placement.plan.streamed
        check(model.logits(IDS), reference)
        stats = model.engine.expert_stats()
        assert stats is not None
        assert (stats.misses > 0) == (held is not None)
    recorded = read_routing(trace).experts
    _, routes = reference.forward(IDS, Routing.RELEASE)
    assert (recorded == routes.transpose(1, 0, 2)).mean() > 0.99


def test_experts_that_all_fit_do_not_end_the_correction(path: Path, reference: ReferenceGrok2) -> None:
    """Nobody else looks on then after the first evaluation."""
    with grok_local.load(path, stream="on", **OPTIONS) as model:
        check(model.logits(IDS), reference)
        check(model.logits(IDS), reference)


def steps(sequences: Sequence[Sequence[int]]) -> Iterator[list[Row]]:
    """Half of each at once, then token by token as long as they go, all together."""
    starts = [len(ids) // 2 for ids in sequences]
    yield [
        Row(token, at, number, at == starts[number] - 1)
        for number, ids in enumerate(sequences)
        for at, token in enumerate(ids[: starts[number]])
    ]
    for step in range(max(map(len, sequences))):
        rows = [(number, starts[number] + step) for number in range(len(sequences))]
        going = [(number, at) for number, at in rows if at < len(sequences[number])]
        if going:
            yield [Row(sequences[number][at], at, number, True) for number, at in going]


@pytest.mark.parametrize("separate", [False, True])
def test_many_sequences(path: Path, reference: ReferenceGrok2, separate: bool) -> None:
    """In one cache, and each in a part of its own, where llama.cpp cuts a step into parts."""
    wishes = Wishes(context=128, kv_type="f32", sequences=3, separate=separate, repack="off", gpu_layers=0)
    truths = [reference.forward(ids, Routing.RELEASE)[0].astype(np.float64) for ids in SEQUENCES]
    distances = []
    with closing(LlamaEngine(LoadRequest(path, wishes, threads=1))) as engine:
        chains = [engine.begin_sampling(Sampling(temperature=0), []) for _ in SEQUENCES]
        for rows in steps(SEQUENCES):
            asked = [row for row in rows if row.output]
            drawn = engine.step(rows, [Draw(row.sequence, chains[row.sequence], likely=20) for row in asked])
            assert drawn is not None
            for row, found in zip(asked, drawn, strict=True):
                likely, logits = found.tokens[0].likely, truths[row.sequence][row.position]
                assert likely is not None
                expected = np.sort(logits - np.logaddexp.reduce(logits))[::-1][:20]
                distances.append(np.abs([top[2] for top in likely.top] - expected).max())
    assert np.median(distances) < 0.01
    assert max(distances) < 0.1


def test_where_the_weights_are_not_in_our_memory(path: Path, reference: ReferenceGrok2) -> None:
    """A worker's memory can be read and written only as a GPU's can."""
    with Worker() as worker, grok_local.load(path, workers=[worker.endpoint], gpu_layers=-1, **OPTIONS) as model:
        assert model.placement.plan.gpu_layers == SPEC.layers + 1
        check(model.logits(IDS), reference)
        check(np.concatenate([model.engine.tail_logits(IDS[: n + 1], n) for n in range(25)]), reference)


# -- whose graphs are corrected ----------------------------------------------------------------------------------------


def with_keys(path: Path, **changed: Any) -> list[Header]:
    (header,) = read_model(path)
    keys = {f"grok.{name.replace('__', '.')}": value for name, value in changed.items()}
    metadata = {name: value for name, value in {**header.metadata, **keys}.items() if value is not None}
    return [replace(header, metadata=metadata)]


def test_the_keys_say_what_is_to_be_corrected(path: Path, packed: Path) -> None:
    assert deviations_of(read_model(path)) == Deviations(layers=3, router_cap=2.0, temperature_length=16)
    assert deviations_of(read_model(packed)) is None  # Grok-1
    for cap in (None, 0.0, -1.0, float("nan"), float("inf"), 30, "30"):
        assert deviations_of(with_keys(path, router_logit_softcapping=cap)) is None
    for length in (None, 0, 1, -3, "1024", 7.5):
        found = deviations_of(with_keys(path, attention__temperature_length=length))
        assert found == Deviations(layers=3, router_cap=2.0, temperature_length=0)
    for score_cap in (0.0, float("nan"), 30):
        found = deviations_of(with_keys(path, attn_logit_softcapping=score_cap))
        assert found == Deviations(layers=3, router_cap=2.0, temperature_length=0)
    yarn = deviations_of(with_keys(path, rope__scaling__type="yarn"))
    assert yarn is not None
    assert yarn.temperature_length == 0
    (header,) = read_model(path)
    others = tuple(tensor for tensor in header.tensors if tensor.name != "blk.0.ffn_up.weight")
    sparse = replace(header, tensors=others)
    assert deviations_of([sparse]) is None  # Grok-1, whose keys another converter wrote


def test_a_graph_without_what_was_to_be_corrected_is_an_error() -> None:
    for observer in (ReleaseGates(layers=2, cap=30), AttentionTemperature(layers=2, length=16, cap=30)):
        observer.begin([Row(5, 0, 0, True)])
        observer.finish(Ending.INTERRUPTED)
        with pytest.raises(ModelError, match=r"cannot be corrected.*--routing llama\.cpp"):
            observer.finish(Ending.COMPLETE)


def test_a_failure_on_the_way_comes_out(path: Path, reference: ReferenceGrok2, monkeypatch: pytest.MonkeyPatch) -> None:
    with grok_local.load(path, **OPTIONS) as model:
        with monkeypatch.context() as patch:
            patch.setattr("grok_local.runtime.graph.router.read_floats", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.logits(IDS[:5])
        check(model.logits(IDS), reference)


def test_an_option_that_is_none(path: Path) -> None:
    with pytest.raises(OptionError, match=r"choose one of release, llama\.cpp"):
        grok_local.load(path, routing="other")  # type: ignore[arg-type]
