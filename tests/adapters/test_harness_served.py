"""lm-evaluation-harness at a server, without a tokenizer of its own: its scores are those of the model in its process.
Needs lm_eval, aiohttp and tenacity.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grok_local
from grok_local.library.built_in import CHECKPOINT
from tests.commands.test_serving import serving
from tests.serve.conftest import Running, started

pytest.importorskip("lm_eval", reason="lm_eval is too large for the group dev: pip install 'lm_eval[api]'")
pytest.importorskip("tenacity", reason="lm_eval's own models over HTTP need more: pip install 'lm_eval[api]'")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from grok_local.adapters.harness import GrokLocalLM

QUESTIONS = ["What is an expert?", "What does the router do?", "Which command packs a checkpoint?", "Who made Grok-1?"]
CHOICES = [" One of the parallel feed-forward networks.", " grok-local quantize", " A café in Zürich – 東京 🙂"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in f32: packed types round activations too, where a hair decides much."""
    return grok_local.quantize_checkpoint(CHECKPOINT, tmp_path_factory.mktemp("t") / "t.gguf", type="f32").path


@pytest.fixture(scope="module")
def lm(tiny: Path) -> Iterator[GrokLocalLM]:
    found = GrokLocalLM(str(tiny), context=256, kv_type="f32")
    yield found
    found.close()


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Running]:
    """With one place: where in the KV cache a sequence lies changes sums by a hair, and a hair may change an expert."""
    with started(tiny, loading={"kv_type": "f32", "parallel": 1}) as running:
        yield running


@pytest.fixture(params=[(1, 1), (4, 1), (3, 4)], ids=["one", "several-prompts", "several-requests"])
def remote(served: Running, request: pytest.FixtureRequest) -> LocalCompletionsAPI:
    size, together = request.param
    url = f"{served.url}/v1/completions"
    return LocalCompletionsAPI(url, model="tiny", batch_size=size, num_concurrent=together, max_length=256)


def asked(kind: Any, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


def pairs_for(lm: GrokLocalLM) -> list[tuple[str, str]]:
    """Likely and unlikely, and what the model ends: EOS is what comes next."""
    greedy = [(_prompt(question), {"until": [], "max_gen_toks": 60}) for question in QUESTIONS]
    answers = lm.generate_until(asked("generate_until", *greedy), disable_tqdm=True)
    pairs = [(_prompt(question), choice) for question in QUESTIONS for choice in CHOICES]
    return [*pairs, *((_prompt(question), answer) for question, answer in zip(QUESTIONS, answers, strict=True))]


def test_scores_are_those_of_the_whole_text(tiny: Path, lm: GrokLocalLM, remote: LocalCompletionsAPI) -> None:
    pairs = pairs_for(lm)
    found = remote.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    with grok_local.load(tiny, context=256, kv_type="f32") as model:
        for (context, continuation), (value, _) in zip(pairs, found, strict=True):
            (score,) = model.score([context + continuation])
            expected = sum(one or 0.0 for one in score.logprobs[len(model.tokenize(context)) :])
            assert value == pytest.approx(expected, abs=1e-4)


def test_scores_are_those_in_the_process(lm: GrokLocalLM, remote: LocalCompletionsAPI) -> None:
    """It reads a context and then what follows, in other widths: that changes sums by a hair, and seldom by more."""
    pairs = asked("loglikelihood", *pairs_for(lm), ("", "It begins"), ("x " * 100, " x"))
    expected, found = (one.loglikelihood(pairs, disable_tqdm=True) for one in (lm, remote))
    assert sum(is_greedy for _, is_greedy in expected) >= len(QUESTIONS)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    differences = [abs(ours - theirs) for (ours, _), (theirs, _) in zip(expected, found, strict=True)]
    assert statistics.median(differences) < 1e-4
    assert max(differences) < 0.005


def test_scores_that_are_reproducible(packed: Path) -> None:
    """With 4 bits, in other widths, and with others beside: the same."""
    pairs = [(_prompt(question), choice) for question in QUESTIONS for choice in CHOICES]
    with serving(packed, "--parallel", "2", "--reproducible") as (_, url, _):
        address = f"{url}/v1/completions"
        remote = LocalCompletionsAPI(address, model="tiny", batch_size=3, num_concurrent=4, max_length=256)
        found = remote.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    lm = GrokLocalLM(str(packed), context=256, reproducible=True)
    expected = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    lm.close()
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-9)


def test_texts_as_a_whole(lm: GrokLocalLM, remote: LocalCompletionsAPI) -> None:
    texts = asked("loglikelihood_rolling", *[(f"{question} It is known. " * 20,) for question in QUESTIONS])
    expected = lm.loglikelihood_rolling(texts, disable_tqdm=True)
    assert remote.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, rel=4e-6)


def test_answers(lm: GrokLocalLM, remote: LocalCompletionsAPI) -> None:
    some = asked(
        "generate_until", *[(_prompt(question), {"until": ["\n"], "max_gen_toks": 20}) for question in QUESTIONS]
    )
    assert remote.generate_until(some, disable_tqdm=True) == lm.generate_until(some, disable_tqdm=True)


def _prompt(question: str) -> str:
    return f"Human: {question}\n\nAssistant:"
