"""What the cache says it holds is what llama.cpp goes on from: after interrupts, for several sequences, and for models
that cannot forget.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import grok_local
from grok_local.errors import ModelError
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.wishes import Wishes
from grok_local.runtime.engine.llama import LlamaEngine
from samples.recurrent import write_recurrent

IDS = random.Random(7).choices(range(5, 2000), k=4000)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recurrent(tmp_path_factory.mktemp("recurrent") / "recurrent.gguf")


@pytest.fixture(params=["attention", "recurrent"])
def path(request: pytest.FixtureRequest) -> Path:
    """Both kinds of memory have to keep what is promised."""
    return Path(request.getfixturevalue("packed" if request.param == "attention" else "recurrent"))


def opened(path: Path, *, sequences: int = 1) -> LlamaEngine:
    return LlamaEngine(LoadRequest(path, Wishes(context=4096, sequences=sequences, batch=512), threads=1))


def last_logits(engine: LlamaEngine, ids: list[int]) -> npt.NDArray[np.float32]:
    """After `ids`, on top of whatever the cache can be used of."""
    engine.evaluate(ids[:-1])
    (logits,) = engine.evaluate_together({0: ids[-1:]})
    return np.asarray(logits)


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1])
def test_an_interrupted_prompt_can_be_read_again(path: Path, seconds: float) -> None:
    with closing(opened(path)) as fresh:
        expected = last_logits(fresh, IDS)
    with closing(opened(path)) as engine:
        engine.evaluate(IDS[:700])
        timer = threading.Timer(seconds, engine.interrupt)
        timer.start()
        engine.evaluate(IDS)
        timer.join()
        assert engine.interrupted
        assert engine.cached[0] == IDS[: len(engine.cached[0])]
        assert len(engine.cached[0]) < len(IDS)
        engine.interrupted = False
        for _ in range(2):
            assert np.array_equal(last_logits(engine, IDS), expected)


def test_what_cannot_be_forgotten_is_forgotten_whole(path: Path) -> None:
    with closing(opened(path)) as fresh:
        expected = last_logits(fresh, [*IDS[:20], *IDS[50:60]])
    with closing(opened(path)) as engine:
        engine.evaluate(IDS[:40])
        found = last_logits(engine, [*IDS[:20], *IDS[50:60]])
        assert engine.cached[0] == [*IDS[:20], *IDS[50:60]]
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_sequence_that_is_forgotten_leaves_the_others_alone(path: Path) -> None:
    with closing(opened(path, sequences=2)) as untouched:
        untouched.evaluate_together({1: IDS[:30]})
        expected = untouched.evaluate_together({1: IDS[30:31]})
    with closing(opened(path, sequences=2)) as engine:
        engine.evaluate(IDS[100:140])
        engine.evaluate_together({1: IDS[:30]})
        engine.evaluate([*IDS[100:110], *IDS[200:210]])  # of sequence 0 the end has to go
        found = engine.evaluate_together({1: IDS[30:31]})
        assert np.array_equal(found, expected)


def test_an_interrupt_leaves_every_sequence_as_it_was(path: Path) -> None:
    with closing(opened(path, sequences=3)) as untouched:
        untouched.evaluate_together({0: IDS[:5], 1: IDS[10:15]})
        expected = untouched.evaluate_together({0: IDS[5:6], 1: IDS[15:16]})
    with closing(opened(path, sequences=3)) as engine:
        engine.evaluate_together({0: IDS[:5], 1: IDS[10:15]})
        with interrupted(engine), pytest.raises(ModelError, match="interrupted"):
            engine.evaluate_together({0: IDS[5:200], 2: IDS[300:500]})
        if engine.cached[0]:  # a model that cannot forget has forgotten this sequence whole
            assert engine.cached[0] == IDS[:5]
        else:
            engine.evaluate_together({0: IDS[:5]})
        assert np.array_equal(engine.evaluate_together({0: IDS[5:6], 1: IDS[15:16]}), expected)


@contextmanager
def interrupted(engine: LlamaEngine) -> Iterator[None]:
    """Whatever is evaluated inside is interrupted as soon as llama.cpp looks."""
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.0005):
            engine.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        engine.interrupted = False


@pytest.fixture
def chatting(recurrent: Path) -> Iterator[grok_local.Model]:
    with grok_local.load(recurrent, context=1024, threads=1) as model:
        yield model


def test_a_conversation_goes_on_after_an_interrupt(chatting: grok_local.Model) -> None:
    question = {"role": "user", "content": "the people"}
    reply = chatting.chat([question], seed=1, max_tokens=60)
    next(reply)
    chatting.interrupt()
    list(reply)
    answer = {"role": "assistant", "content": reply.text}
    following = chatting.chat([question, answer, {"role": "user", "content": "and then?"}], seed=1, max_tokens=8)
    list(following)
    assert following.finish_reason in ("stop", "length")
