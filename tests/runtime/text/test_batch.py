"""Many prompts on one model: together, by threads, in an event loop; and what each gets is what it gets alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grok_local
from grok_local.errors import ContextError, OptionError, TemplateError
from samples.rewritten import chatml

PROMPTS = ["What is an expert?", "What does a router do?", "Once upon a time", "one two three", "Why?", "x"]


@pytest.fixture(scope="module")
def wide(packed: Path) -> Iterator[grok_local.Model]:
    with grok_local.load(packed, context=256, threads=2, parallel=4, kv_type="f32") as model:
        yield model


def test_results_come_as_they_are_finished(wide: grok_local.Model) -> None:
    requests = [{"prompt": prompt, "max_tokens": 4 + 20 * (i == 0), "id": prompt} for i, prompt in enumerate(PROMPTS)]
    found = list(wide.batch(requests, temperature=0))
    assert {result.id for result in found} == set(PROMPTS)
    assert found[0].index != 0
    assert all(len(result.tokens) <= 24 and result.error is None for result in found)


def test_together_is_as_alone(wide: grok_local.Model) -> None:
    alone = {prompt: wide.generate(prompt, max_tokens=1, temperature=0, logprobs=0) for prompt in PROMPTS}
    for reply in alone.values():
        list(reply)
    for result in wide.batch(PROMPTS, max_tokens=1, temperature=0, logprobs=0):
        reply = alone[PROMPTS[result.index]]
        assert result.logprobs
        assert reply.logprobs
        assert abs(result.logprobs[0].logprob - reply.logprobs[0].logprob) < 0.05


def test_logprobs_are_those_of_the_logits(wide: grok_local.Model) -> None:
    reply = wide.generate(PROMPTS[0], max_tokens=5, temperature=0.8, seed=3, logprobs=2)
    list(reply)
    assert reply.logprobs
    logits = wide.logits([*reply.prompt, *reply.tokens]).astype(np.float64)[len(reply.prompt) - 1 :]
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for row, found in zip(expected, reply.logprobs, strict=False):
        assert math.isclose(found.logprob, row[found.token], abs_tol=0.03)
        assert [token for token, _, _ in found.top] == list(np.argsort(-row)[:2])
        assert found.top[0][2] >= found.top[1][2]


def test_bad_requests_fail_alone(wide: grok_local.Model) -> None:
    requests = ["fine", {"prompt": "x", "nonsense": 1}, {"prompt": "word " * 400}, {"messages": []}, 5, ""]
    found = {result.index: result for result in wide.batch(requests, max_tokens=2)}
    assert found[0].error is None
    assert isinstance(found[1].error, OptionError)
    assert isinstance(found[2].error, ContextError)
    assert all(isinstance(found[index].error, OptionError) for index in (3, 4, 5))


@pytest.mark.parametrize("name", ["temprature", "max_token", "prefix", "id", "prompt"])
def test_options_that_there_are_not(wide: grok_local.Model, name: str) -> None:
    options: Any = {name: 1}
    with pytest.raises(TypeError, match=name):
        wide.batch(PROMPTS, **options)


@pytest.mark.parametrize("requests", ["one text", b"one text", {"prompt": "x"}, 5, None])
def test_what_is_no_list_of_prompts(wide: grok_local.Model, requests: Any) -> None:
    with pytest.raises(OptionError, match="a list of prompts"):
        wide.batch(requests)


def test_any_option_of_a_task_may_be_one_of_all(packed: Path, tmp_path: Path) -> None:
    with grok_local.load(chatml(packed, tmp_path / "c.gguf"), context=256, threads=1, parallel=2) as model:
        text = "<|im_start|>one"
        plain, special = (len(model.tokenize(text, special=special)) for special in (False, True))
        asked = [text, {"prompt": text, "special": False}, {"prompt": text, "special": None}]
        asked.append({"messages": [{"role": "user", "content": "x"}]})
        found = sorted(model.batch(asked, special=True, max_tokens=1), key=lambda result: result.index)
        assert [result.stats.prompt_tokens for result in found[:3]] == [special, plain, special]
        assert "special: of a prompt alone" in str(found[3].error)
        (told,) = model.batch(["one two"], echo=True, prompt_logprobs=0, max_tokens=1)
        assert told.prompt == "one two"
        assert len(told.prompt_logprobs or ()) == told.stats.prompt_tokens


def test_lines_that_no_program_would_write_fail_alone(wide: grok_local.Model) -> None:
    user = {"role": "user", "content": "hi"}
    values: list[Any] = [None, 5, True, {}, "x", [5], [{}]]
    odd: list[dict[str, Any]] = [{"messages": value} for value in values]
    odd += [{"prompt": 5}, {"prompt": None}, {"prompt": "x", "messages": [user]}, {"id": 1.5, "prompt": "x"}]
    fine: list[dict[str, Any]] = [
        {"prompt": "x", "messages": None},
        {"prompt": None, "messages": [user]},
        {"id": "\ud83d", "prompt": "hi"},
    ]
    found = {result.index: result for result in wide.batch([*odd, *fine], max_tokens=2)}
    assert [isinstance(found[index].error, OptionError) for index in range(len(found))] == [True] * 11 + [False] * 3
    assert found[13].id == "\ud83d"


def test_a_conversation_that_a_template_refuses_fails_alone(packed: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    template += "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    (tmp_path / "strict.jinja").write_text(template)
    user = {"role": "user", "content": "hi"}
    with grok_local.load(packed, context=256, threads=1, template=str(tmp_path / "strict.jinja")) as model:
        results = list(model.batch([{"messages": [user, user]}, {"messages": [user]}], max_tokens=2, parallel=2))
        errors = {result.index: result.error for result in results}
        with pytest.raises(TemplateError, match="must alternate"):
            model.chat([user, user])
    assert isinstance(errors[0], TemplateError)
    assert errors[1] is None


def test_a_batch_may_be_left(wide: grok_local.Model) -> None:
    results = wide.batch(PROMPTS * 10, max_tokens=20)
    next(results)
    results.close()
    assert "".join(wide.generate("Once", max_tokens=3))


def test_a_batch_and_other_work_beside_it(wide: grok_local.Model) -> None:
    texts = []
    for result in wide.batch(PROMPTS * 3, max_tokens=6, temperature=0):
        texts.append(result.text)
        if len(texts) == 5:
            assert wide.score(["some text"])[0].total < 0
            assert len("".join(wide.generate("Once upon", max_tokens=4, temperature=0)))
    assert len(texts) == len(PROMPTS) * 3


def test_a_model_of_one_place_is_opened_anew(packed: Path) -> None:
    with grok_local.load(packed, context=256, threads=1) as model:
        reply = model.generate("Once", max_tokens=50)
        next(reply)
        with pytest.raises(OptionError, match="not read to its end"):
            next(model.batch(PROMPTS, parallel=3))
        reply.cancel()
        assert list(reply)[-1:] is not None
        assert reply.finish_reason == "interrupted"
        assert len(list(model.batch(PROMPTS, parallel=3, max_tokens=2))) == len(PROMPTS)
        assert model.placement.plan.wishes.sequences == 3


def test_reproducible_bits(packed: Path) -> None:
    requests = [{"prompt": [5, 6, 7, 8, *range(20, 20 + i * 3)], "id": i} for i in range(9)]
    found = []
    for width in (1, 4):
        with grok_local.load(packed, context=256, threads=1) as model:
            results = model.batch(requests, parallel=width, reproducible=True, max_tokens=6, logprobs=1)
            found.append({result.id: (result.tokens, result.logprobs) for result in results})
    assert found[0] == found[1]


def test_threads_go_on_together(packed: Path) -> None:
    with grok_local.load(packed, context=256, threads=1, parallel=4) as model, ThreadPoolExecutor(8) as pool:

        def ask(prompt: str) -> str:
            return "".join(model.generate(prompt, max_tokens=12, temperature=0))

        alone = {prompt: ask(prompt) for prompt in PROMPTS}
        found = list(pool.map(ask, PROMPTS * 4))
        same = sum(text == alone[prompt] for text, prompt in zip(found, PROMPTS * 4, strict=True))
        assert same >= 0.8 * len(found)  # other widths are other kernels, and tokens may come out otherwise


def test_in_an_event_loop(wide: grok_local.Model) -> None:
    async def read(prompt: str) -> str:
        return "".join([piece async for piece in wide.agenerate(prompt, max_tokens=6, temperature=0)])

    async def everything() -> list[str]:
        return await asyncio.gather(*map(read, PROMPTS))

    assert all(asyncio.run(everything()))


def test_a_cancelled_task_ends_its_answer(wide: grok_local.Model) -> None:
    async def leave() -> grok_local.Reply:
        answer = wide.achat([{"role": "user", "content": "Why?"}], max_tokens=200)
        await anext(answer)
        task = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer.reply

    reply = asyncio.run(leave())
    list(reply)
    assert reply.finish_reason == "interrupted"


@pytest.mark.parametrize("likely", [-1, 101, 2.5, True])
def test_logprobs_that_nobody_can_have(wide: grok_local.Model, likely: int) -> None:
    with pytest.raises(OptionError, match="logprobs"):
        wide.generate("x", logprobs=likely)


def test_an_answer_goes_on_from_its_beginning(wide: grok_local.Model) -> None:
    messages = [{"role": "user", "content": "What is an expert?"}]
    task = {"messages": messages, "temperature": 0, "max_tokens": 6, "logprobs": 0}
    results = wide.batch([{**task, "prefix": "It is"}, {**task, "prefix": "It is "}, {"prompt": "x", "prefix": "It"}])
    begun, refused, alone = sorted(results, key=lambda result: result.index)
    laid = wide.conversation.lay_out(messages, reserve=1)
    ids = [*laid.ids, *wide.engine.continue_ids(" It is")]
    assert begun.text == "".join(wide.generate(ids, max_tokens=6, temperature=0, stop=wide.conversation.form.stop))
    assert "white space" in str(refused.error)
    assert "messages alone" in str(alone.error)
