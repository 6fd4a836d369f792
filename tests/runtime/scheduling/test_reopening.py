"""A model is opened anew for a batch: who uses it waits meanwhile, and if that fails it is as it was."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import grok_local
from grok_local.errors import GrokLocalError, ModelError, OptionError, PlacementError
from grok_local.library.names import model_request
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.text.model import Model

PROMPTS = ["What is an expert?", "What does a router do?", "Once upon a time", "one two three", "Why?", "x"]
MESSAGES = [{"role": "user", "content": "What is an expert?"}]


class ClosingEngine(LlamaEngine):
    """Is closed for a while before another one is opened; others may notice."""

    def close(self) -> None:
        super().close()
        if hasattr(self, "closing"):
            self.closing.set()
            time.sleep(0.3)

    closing: threading.Event


@contextmanager
def reopened_beside(packed: Path, act: Callable[[Model], object]) -> Iterator[tuple[Model, Future[object]]]:
    """A model that was opened anew, while another thread began to `act`; with what came of that."""
    request = model_request(str(packed), {"context": 256, "threads": 1})
    engine = ClosingEngine(request)
    engine.closing = threading.Event()
    with Model(request, engine) as model, ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: (engine.closing.wait(), act(model))[1])
        results = model.batch(PROMPTS, parallel=4, max_tokens=2)
        assert next(results).error is None
        yield model, found
        list(results)


def text_of(model: Model, prompt: str = "Once upon a time") -> str:
    return "".join(model.generate(prompt, max_tokens=6, temperature=0))


def test_replies_that_nobody_has_read_yet_go_on(packed: Path) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        expected = text_of(model)
        reply = model.generate("Once upon a time", max_tokens=6, temperature=0)
        answer = model.chat(MESSAGES, max_tokens=6, temperature=0)
        tasks = model.tasks({"max_tokens": 2})
        assert len(list(model.batch(PROMPTS, parallel=4, max_tokens=2))) == len(PROMPTS)
        assert "".join(reply).split()[:1] == expected.split()[:1]  # other widths are other kernels
        assert "".join(answer).strip() == (model.conversation.remembered() or {})["reply"]
        assert [result.error for result in model.run([tasks.prepare(0, "x")])] == [None]


@pytest.mark.parametrize(
    "act",
    [
        text_of,
        lambda model: model.score(["some text"])[0].total,
        lambda model: len(model.tokenize("some text")),
        lambda model: len("".join(model.chat(MESSAGES, max_tokens=3))),
    ],
)
def test_who_comes_meanwhile_waits(packed: Path, act: Callable[[Model], object]) -> None:
    with reopened_beside(packed, act) as (model, found):
        assert found.result(20)
        assert model.placement.plan.wishes.sequences == 4


def test_who_waited_has_the_new_engine_alone(packed: Path) -> None:
    order = []

    def use(model: Model) -> bool:
        with model.alone() as engine:
            order.append("in")
            time.sleep(0.3)
            order.append("out")
            return engine is model.engine

    with reopened_beside(packed, use) as (model, found):
        with model.alone():
            order.append("another")
        assert found.result(20)
    assert order.index("out") == order.index("in") + 1


@pytest.mark.parametrize("parallel", [-3, 0, 257, 1000, True, "4", 2.0])
def test_a_width_that_none_can_have(packed: Path, parallel: int) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        with pytest.raises(OptionError, match="parallel"):
            next(model.batch(PROMPTS, parallel=parallel))
        assert text_of(model)


def test_a_reproducible_sequence_has_a_place_more(packed: Path) -> None:
    with pytest.raises(OptionError, match="1 to 255"):
        grok_local.load(packed, context=256, parallel=256, reproducible=True)


def test_a_width_that_does_not_fit(packed: Path) -> None:
    with grok_local.load(packed, context=256, threads=1, memory="30M") as model:
        before = model.engine
        with pytest.raises(PlacementError):
            next(model.batch(PROMPTS, parallel=200))
        assert model.engine is before
        assert text_of(model)


def test_what_cannot_be_opened_leaves_a_model_as_it_was(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        expected, reply = text_of(model), model.generate("Once upon a time", max_tokens=6, temperature=0)
        monkeypatch.setattr(sys, "executable", "/bin/false")  # the process for a reproducible engine
        with pytest.raises(GrokLocalError):
            next(model.batch(PROMPTS, parallel=2, reproducible=True))
        assert model.placement.plan.wishes.sequences == 1
        assert "".join(reply) == text_of(model) == expected


def test_answers_that_were_cancelled_are_not_waited_for(packed: Path) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        results = model.batch(PROMPTS, parallel=4, max_tokens=20)
        next(results)
        results.close()
        reply = model.generate("Once", max_tokens=50)
        next(reply)
        del reply
        assert len(list(model.batch(PROMPTS, parallel=2, max_tokens=2))) == len(PROMPTS)


def test_what_was_loaded_reproducible_stays_so(packed: Path) -> None:
    with grok_local.load(packed, context=256, threads=1, reproducible=True) as model:
        list(model.batch(PROMPTS[:2], parallel=2, max_tokens=2))
        assert model.placement.plan.wishes.reproducible


def test_a_closed_model_stays_closed(packed: Path) -> None:
    model = grok_local.load(packed, context=256, threads=1)
    model.close()
    with pytest.raises(ModelError, match="the model is closed"):
        next(model.batch(PROMPTS, parallel=4))


def test_nothing_to_answer_opens_nothing(packed: Path) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        before = model.engine
        assert list(model.batch([])) == []
        assert model.engine is before
