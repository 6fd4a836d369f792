"""Records of routing: what is written is what the independent model chooses, and what is read back is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

import grok_local
from grok_local.errors import OptionError
from grok_local.runtime.experts.routing import Routing, read_routing
from samples.checkpoints import Spec
from samples.reference_model import ReferenceModel
from tests.conftest import Run

IDS = list(range(100, 160))


@pytest.fixture(scope="module")
def record(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing")
    path = grok_local.quantize_checkpoint(golden, folder / "x.gguf", type="f32").path
    with grok_local.load(path, context=256, kv_type="f32", trace_experts=folder / "trace.jsonl") as model:
        model.logits(IDS)
        model.engine.evaluate([*IDS, 7])  # one more, whose last layer is computed too
    return folder / "trace.jsonl"


def test_a_record_has_what_the_independent_model_chooses(record: Path, golden: Path) -> None:
    _, routes = ReferenceModel(golden, Spec().dimensions()).forward(IDS)  # [layers, tokens, 2]
    found = read_routing(record)
    assert found.experts.shape == (len(IDS) + 1, 12, 2)
    assert found.count == 8
    same = np.sort(found.experts[: len(IDS)], 2) == np.sort(routes.transpose(1, 0, 2), 2)
    assert same.all(2).mean() > 0.98  # a near tie may turn
    rows = [json.loads(line) for line in record.read_text().splitlines()[1:]]
    assert [row["token"] for row in rows] == [*IDS, 7]
    assert [row["position"] for row in rows] == list(range(len(IDS) + 1))


def test_the_last_layer_of_a_prompt_is_unknown(packed: Path, tmp_path: Path) -> None:
    with grok_local.load(packed, context=256, trace_experts=tmp_path / "trace.jsonl") as model:
        model.engine.evaluate([5, 6, 7])
    found = read_routing(tmp_path / "trace.jsonl")
    assert (found.experts[:2, 1] == -1).all()
    assert (found.experts[:, 0] >= 0).all()
    assert (found.experts[2] >= 0).all()


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    tokens, layers = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    pair = st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True)
    experts = draw(st.lists(st.lists(pair, min_size=layers, max_size=layers), min_size=tokens, max_size=tokens))
    return Routing("x", 8, np.array(experts, np.int16))


@given(routings())
def test_shares_and_rates(routing: Routing) -> None:
    assert np.allclose(routing.shares.sum(1), 1)
    assert 0 <= routing.repeats <= 1
    assert routing.pinned_rate(8) == 1
    # What stays is chosen by the first half and counted in the second.
    twice = Routing("x", 8, np.concatenate([routing.experts, routing.experts]))
    best = np.sort(routing.shares, 1)[:, -3:].sum(1).mean()
    assert twice.pinned_rate(3) == pytest.approx(best)
    assert twice.hit_rate(8) == 1
    assert 0 <= routing.hit_rate(3) <= 1


def test_skewed_choices_are_held() -> None:
    rng = np.random.default_rng(1)
    chances = np.array([0.3, 0.25, 0.2, 0.05, 0.05, 0.05, 0.05, 0.05])

    def routing(p: npt.NDArray[np.float64] | None) -> Routing:
        chosen = [[rng.choice(8, 2, replace=False, p=p) for _ in range(24)] for _ in range(400)]
        return Routing("x", 8, np.array(chosen, np.int16))

    skewed = routing(chances)
    assert skewed.pinned_rate(3) > 0.7
    assert skewed.hit_rate(3) > 0.95 * skewed.pinned_rate(3)
    assert routing(None).hit_rate(3) == pytest.approx(3 / 8, abs=0.03)


FACTS = {"model": "x", "layers": 1, "experts": 4, "experts_used": 2}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["nonsense"],
        [{"layers": 1}],
        [{**FACTS, "layers": 0}],
        [{**FACTS, "experts": 10**9}],
        [{**FACTS, "experts": 60000}, {"experts": [[50000, 1]]}],
        [{**FACTS, "layers": True}],
        [{**FACTS, "layers": 10**5, "experts_used": 10**5}],
        [FACTS, '{"experts": [[Infinity, 1]]}'],
        [FACTS, {"experts": [[0, 4]]}],
        [FACTS, {"experts": [[0]]}],
        [FACTS, {"experts": [[0, 1], [0, 1]]}],
        [FACTS, {"experts": 5}],
        [FACTS, {"experts": [["a", "b"]]}],
        [FACTS, []],
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, lines: list[Any]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(OptionError, match="is no record of experts"):
        read_routing(path)


def test_a_record_that_was_cut_off_is_read_to_there(record: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(record.read_bytes()[:-20])
    assert len(read_routing(tmp_path / "cut").experts) == len(IDS)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(data)
    with pytest.raises(OptionError):
        read_routing(path)


def test_the_command_shows_draws_and_describes(record: Path, tmp_path: Path, run: Run) -> None:
    shown = run("routing", record).stdout
    assert "61 tokens through 12 layers" in shown
    assert "experts held of each layer" in shown
    described = json.loads(run("routing", record, "--json").stdout)
    assert len(described["shares"]) == 12
    assert described["hit_rates"][6]["held"] == 7
    for name, start in (("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("x.pdf", b"%PDF")):
        assert run("routing", record, "-o", tmp_path / name).returncode == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    odd = tmp_path / "odd.jsonl"
    odd.write_text(record.read_text().replace("Grok-1 format", r"$\frac{$"))
    assert run("routing", odd, "-o", tmp_path / "odd.png").returncode == 0
    assert "ends in .png" in run("routing", record, "-o", tmp_path / "x.txt").stderr
    assert "cannot be written" in run("routing", record, "-o", tmp_path / "none" / "x.png").stderr
    assert run("routing", tmp_path / "nothing").returncode == 2
    assert "give one of them" in run("routing", record, "-o", tmp_path / "x.png", "--json").stderr
