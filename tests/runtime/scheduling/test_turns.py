"""Several replies of one model, and several threads: as if each had the model alone."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import grok_local
from grok_local.runtime.engine.sampling import Sampling
from grok_local.runtime.graph.rows import Draw, Drawn, Row
from grok_local.runtime.scheduling.generation import Generation, Request
from grok_local.runtime.scheduling.scheduler import Scheduler
from grok_local.runtime.scheduling.turns import Turns
from samples.fake_engine import FakeEngine

QUESTIONS = ["What is an expert?", "What does a router do?", "Once upon a time", "one two three"]


@pytest.fixture(scope="module")
def alone(packed: Path) -> dict[str, str]:
    with grok_local.load(packed, context=256, threads=1) as model:
        return {question: "".join(answer(model, question)) for question in QUESTIONS}


def answer(model: grok_local.Model, question: str) -> grok_local.Reply:
    return model.generate(question, max_tokens=24, temperature=0.8, seed=3)


def test_replies_read_in_any_order(packed: Path, alone: dict[str, str]) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        replies = [answer(model, question) for question in QUESTIONS]
        texts = dict.fromkeys(QUESTIONS, "")
        for step in range(200):
            question, reply = QUESTIONS[step % 3], replies[step % 3]
            texts[question] += next(reply, "")
            if step % 7 == 0:
                model.logits(model.tokenize("something else"))
        assert {q: texts[q] for q in QUESTIONS[:3]} == {q: alone[q] for q in QUESTIONS[:3]}
        assert [reply.finish_reason for reply in replies] == ["length"] * 3 + [None]
        assert "not read yet" in repr(replies[3])
        assert "ended by 'length'" in repr(replies[0])


def test_a_reply_that_is_dropped_does_no_harm(packed: Path, alone: dict[str, str]) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        dropped = answer(model, QUESTIONS[0])
        next(dropped)
        del dropped
        gc.collect()
        assert "".join(answer(model, QUESTIONS[1])) == alone[QUESTIONS[1]]


def test_threads_on_one_model(packed: Path, alone: dict[str, str]) -> None:
    with grok_local.load(packed, context=256, threads=1) as model, ThreadPoolExecutor(8) as pool:
        asked = QUESTIONS * 12
        texts = pool.map(lambda question: "".join(answer(model, question)), asked)
        assert list(texts) == [alone[question] for question in asked]


def test_conversations_of_threads_stay_apart(packed: Path) -> None:
    def talk(model: grok_local.Model, name: str) -> list[str]:
        messages: list[dict[str, str]] = []
        for question in (f"I am {name}.", "Who am I?"):
            messages.append({"role": "user", "content": question})
            text = "".join(model.chat(messages, max_tokens=8, temperature=0))
            messages.append({"role": "assistant", "content": text})
        return [message["content"] for message in messages]

    with grok_local.load(packed, context=256, threads=1) as model:
        expected = [talk(model, name) for name in "abcd"]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda name: talk(model, name), "abcd")) == expected


def test_closing_waits_for_the_step_under_way(packed: Path) -> None:
    model = grok_local.load(packed, context=512, threads=1)
    reply = model.generate("word " * 200, max_tokens=50)
    errors: list[Exception] = []

    def read() -> None:
        try:
            list(reply)
        except grok_local.GrokLocalError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    model.close()
    reader.join()
    assert [str(error) for error in errors] in ([], ["the model is closed"])


def test_an_identical_prompt_has_the_same_answer_from_the_cache(packed: Path) -> None:
    with grok_local.load(packed, context=512, threads=2) as model:
        first = answer(model, "word " * 100)
        text = "".join(first)
        again = answer(model, "word " * 100)
        assert "".join(again) == text
        assert (again.stats.evaluated_tokens, again.stats.cached_tokens) == (0, first.stats.prompt_tokens)


class BrokenOffEngine(FakeEngine):
    """Somebody presses Ctrl-C in the step of that number."""

    broken_off = 0

    def step(self, rows: Sequence[Row], draws: Sequence[Draw] = ()) -> list[Drawn] | None:
        if self.steps + 1 == self.broken_off:
            self.steps += 1
            raise KeyboardInterrupt
        return super().step(rows, draws)


def read(turns: Turns, one: Generation) -> None:
    deadline = time.monotonic() + 10

    def has_ended() -> bool:
        assert time.monotonic() < deadline, "nobody computes it"
        return one.has_ended

    turns.until(has_ended, reading=[one])


def test_a_place_that_nobody_waits_for_any_more_is_anybodys() -> None:
    engine = BrokenOffEngine(sequences=1)
    turns = Turns(Scheduler(engine, places=1))
    first, second = (Generation(Request((7, number), Sampling(), 5), 64) for number in (1, 2))
    turns.submit(first, eager=True)
    turns.step()
    engine.broken_off = engine.steps + 1
    with pytest.raises(KeyboardInterrupt), turns.alone():
        pytest.fail("the place is taken")
    turns.submit(second)
    read(turns, first)
    read(turns, second)
