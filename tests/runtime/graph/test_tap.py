"""Observers look on together: each sees what it wants, a failure of one comes out, and the next evaluation is whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grok_local
from grok_local.errors import ModelError
from grok_local.ggml.tensors import tensor_name
from grok_local.runtime.experts.routing import read_routing
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending, Interrupted, Tap

IDS = [5, 6, 7, 8, 9]


class Watcher:
    """Wants the nodes whose names begin in some way; raises where it is told to."""

    def __init__(
        self,
        prefix: bytes,
        *,
        raises: str = "",
        error: BaseException | None = None,
        names: frozenset[bytes] | None = None,
    ) -> None:
        self.prefix, self.raises, self.error = prefix, raises, error or ValueError("told to")
        self.asked_about = names
        self.rows: list[Row] = []
        self.seen: list[bytes] = []
        self.endings: list[Ending] = []

    def _fail_in(self, method: str) -> None:
        if self.raises == method:
            raise self.error

    def begin(self, rows: Sequence[Row]) -> None:
        self._fail_in("begin")
        self.rows += rows

    def names(self) -> frozenset[bytes] | None:
        return self.asked_about

    def wants(self, node: int, name: bytes) -> bool:
        assert tensor_name(node) == name
        assert self.asked_about is None or name in self.asked_about
        wanted = name.startswith(self.prefix)
        if wanted:
            self._fail_in("wants")
        return wanted

    def see(self, node: int, name: bytes) -> None:
        self._fail_in("see")
        self.seen.append(name)

    def finish(self, ending: Ending) -> None:
        self.endings.append(ending)
        self._fail_in("finish")

    def close(self) -> None:
        pass


class Evaluator:
    """llama.cpp itself, with a small model and a context for each tap."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # a compiler may have built what it takes AMX for wrongly
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), params)

    @contextmanager
    def context(self, tap: Tap | None) -> Iterator[Any]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
        if tap:
            params.cb_eval = tap.callback
        made = llama_cpp.llama_init_from_model(self.model, params)
        yield made
        llama_cpp.llama_free(made)

    def logits(self, tap: Tap | None, context: Any) -> Any:
        """Of the last token, each time from an empty cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if tap:
            tap.begin([Row(token, i, 0, i == len(IDS) - 1) for i, token in enumerate(IDS)])
        tokens = (llama_cpp.llama_token * len(IDS))(*IDS)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(IDS)))
        if tap:
            tap.finish(complete=status == 0)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (2048,)).copy()


@pytest.fixture(scope="module")
def evaluator(packed: Path) -> Iterator[Evaluator]:
    made = Evaluator(packed)
    yield made
    llama_cpp.llama_model_free(made.model)


@pytest.fixture(scope="module")
def expected(evaluator: Evaluator) -> Any:
    with evaluator.context(None) as context:
        return evaluator.logits(None, context)


PREFIXES = (b"ffn_moe_topk-", b"ffn_moe_topk-1", b"attn_out", b"l_out", b"nothing", b"")
NAMES = [None, frozenset({b"attn_out-0"}), frozenset({b"ffn_moe_topk-0", b"ffn_moe_topk-1", b"l_out-0"})]
COMMON = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@COMMON
@given(wishes=st.lists(st.tuples(st.sampled_from(PREFIXES), st.sampled_from(NAMES)), max_size=4))
def test_each_sees_what_it_wants_whoever_else_looks_on(
    evaluator: Evaluator, expected: Any, wishes: list[tuple[bytes, frozenset[bytes] | None]]
) -> None:
    watchers = [Watcher(prefix, names=names) for prefix, names in wishes]
    tap, everything = Tap(watchers), Watcher(b"")
    with evaluator.context(tap) as context:
        assert np.array_equal(evaluator.logits(tap, context), expected)
    whole = Tap([everything])
    with evaluator.context(whole) as context:
        evaluator.logits(whole, context)
    for watcher in watchers:
        asked = everything.seen if watcher.asked_about is None else watcher.asked_about
        assert watcher.seen == [name for name in everything.seen if name.startswith(watcher.prefix) and name in asked]
        assert [row.token for row in watcher.rows] == IDS
        assert watcher.endings == [Ending.COMPLETE]


@COMMON
@given(
    prefixes=st.lists(st.sampled_from(PREFIXES[:4]), min_size=1, max_size=4),
    which=st.integers(0, 3),
    method=st.sampled_from(["begin", "wants", "see", "finish"]),
    error=st.sampled_from([ValueError("told to"), KeyboardInterrupt(), ModelError("broken")]),
)
def test_a_failure_comes_out_and_the_next_evaluation_is_whole(
    evaluator: Evaluator, expected: Any, prefixes: list[bytes], which: int, method: str, error: BaseException
) -> None:
    watchers = [Watcher(prefix) for prefix in prefixes]
    failing = watchers[which % len(watchers)]
    failing.raises, failing.error = method, error
    tap = Tap(watchers)
    with evaluator.context(tap) as context:
        with pytest.raises(type(error)) as caught:
            evaluator.logits(tap, context)
        assert caught.value is error
        assert tap.should_abort() or method == "begin"
        failing.raises = ""
        for watcher in watchers:
            watcher.seen.clear()
        assert np.array_equal(evaluator.logits(tap, context), expected)
        assert not tap.should_abort()
    for watcher in watchers:
        assert watcher.endings[-1] is Ending.COMPLETE
        assert watcher.seen
    if method in ("wants", "see"):
        assert all(watcher.endings[0] is Ending.FAILED for watcher in watchers)


def test_an_interrupt_is_no_failure(evaluator: Evaluator) -> None:
    first, second = Watcher(b"l_out", raises="see", error=Interrupted("interrupted")), Watcher(b"l_out")
    tap = Tap([first, second])
    with evaluator.context(tap) as context:
        with pytest.raises(Interrupted):
            evaluator.logits(tap, context)  # llama.cpp takes what ends in a callback for complete
        assert first.endings == second.endings == [Ending.INTERRUPTED]
        first.endings.clear()
        tap.begin([Row(5, 0, 0, True)])
        tap.finish(complete=False)
        assert first.endings == [Ending.INTERRUPTED]


def test_an_evaluation_that_nobody_finished_is_over_when_the_next_begins(evaluator: Evaluator) -> None:
    watcher = Watcher(b"l_out")
    tap = Tap([watcher])
    with evaluator.context(tap) as context:
        tap.begin([Row(5, 0, 0, True)])
        evaluator.logits(tap, context)
    assert watcher.endings == [Ending.INTERRUPTED, Ending.COMPLETE]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_record_beside_streaming_is_the_record_without(golden: Path, tmp_path: Path, streamed: bool) -> None:
    path = grok_local.quantize_checkpoint(golden, tmp_path / "x.gguf").path
    options: list[dict[str, Any]] = [{"stream": "off"}, {"stream": "on", "memory": "45M"} if streamed else {}]
    logits = []
    for number, more in enumerate(options):
        trace = tmp_path / f"{number}.jsonl"
        with grok_local.load(path, context=256, threads=2, repack="off", trace_experts=trace, **more) as model:
            assert model.placement.plan.streamed == (streamed and number == 1)
            logits.append(model.logits(list(range(5, 60))))
    assert np.array_equal(logits[0], logits[1])
    first, second = (read_routing(tmp_path / f"{number}.jsonl").experts for number in range(2))
    assert np.array_equal(first, second)
    assert len(first) == 55
