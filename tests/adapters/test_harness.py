"""lm-evaluation-harness with our model: its scores are ours, whatever way they take. Needs lm_eval."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grok_local
from grok_local.errors import OptionError
from grok_local.library.built_in import CHECKPOINT

pytest.importorskip("lm_eval", reason="lm_eval is too large for the group dev: pip install lm_eval")

from lm_eval.api.instance import Instance

from grok_local.adapters.harness import GrokLocalLM, main

QUESTIONS = [
    ("What is an expert?", "One of the parallel feed-forward networks in a layer.", "A person who knows it all.", 0),
    ("How many experts does the router choose for a token?", "Eight of two.", "Two of eight.", 1),
    ("Which command packs a checkpoint?", "grok-local quantize", "grok-local worker", 0),
    ("Which command fetches the release?", "grok-local rm", "grok-local pull", 1),
    ("What does the router do?", "It scores all experts for each token.", "It connects two machines.", 0),
]
TASK = """
task: piqa_like
dataset_path: json
dataset_kwargs: {{data_files: {questions}, cache_dir: {cache}}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def asked(*arguments: Any) -> list[Any]:
    return [Instance(request_type="loglikelihood", doc={}, arguments=given, idx=0) for given in arguments]


def scored(lm: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    results: list[tuple[float, bool]] = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    return results


def by_definition(model: grok_local.Model, ids: list[int], start: int) -> float:
    """The logarithm of the probability of what comes from `start` on, in float64."""
    powers = np.exp(model.logits(ids[:-1]).astype(np.float64))
    shares = np.log(powers / powers.sum(1, keepdims=True))
    return float(sum(shares[at - 1, ids[at]] for at in range(start, len(ids))))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, which is trained, in f32: packed types round activations too, where a hair decides much."""
    folder = tmp_path_factory.mktemp("tiny")
    return grok_local.quantize_checkpoint(CHECKPOINT, folder / "t.gguf", type="f32").path


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[grok_local.Model]:
    with grok_local.load(tiny, context=512, kv_type="f32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def lm(tiny: Path) -> Iterator[Any]:
    loaded = GrokLocalLM(str(tiny), context=512, kv_type="f32")
    yield loaded
    loaded.close()


def test_choices_are_scored_as_model_score_does(lm: Any, model: grok_local.Model) -> None:
    compared = 0
    for question, first, second, _ in QUESTIONS:
        context = f"Question: {question}\nAnswer:"
        choices = [f" {first}", f" {second}"]
        values = [value for value, _ in scored(lm, *((context, choice) for choice in choices))]
        ids = model.tokenize(context)
        for choice, value, score in zip(choices, values, model.score([context], choices=choices)[0], strict=True):
            whole = model.tokenize(context + choice)
            after = [one for one in model.score([whole])[0].logprobs[len(ids) :] if one is not None]
            assert whole[: len(ids)] == ids
            assert value == pytest.approx(sum(after), abs=1e-4)
            assert value == pytest.approx(by_definition(model, whole, len(ids)), abs=1e-3)
            if score.tokens == whole[len(ids) :]:
                compared += 1
                assert value == pytest.approx(score.total, abs=1e-4)
    assert compared == 2 * len(QUESTIONS)


def test_what_follows_greedily_is_greedy(lm: Any, model: grok_local.Model) -> None:
    context = "Human: What is an expert?\n\nAssistant:"
    answer = "".join(model.generate(context, max_tokens=100, stop="\n", temperature=0))
    last = answer[:-1] + "!"
    assert len(model.tokenize(answer)) > 8
    assert [greedy for _, greedy in scored(lm, (context, answer), (context, last), (context, " Z" + answer))] == [
        *(True, False, False)
    ]


def test_a_context_is_evaluated_once(tiny: Path, model: grok_local.Model, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    context = "A layer has eight experts, and a router. " * 12 + "The router chooses"
    before = len(model.tokenize(context))
    words = [" the", " two", " expert", " it", " layer", " of two experts", " a", " experts for every token of a text"]
    lengths = {word: len(model.tokenize(context + word)) - before for word in words}
    single = [word for word in words if lengths[word] == 1]
    several = [word for word in words if lengths[word] > 1]
    assert len(single) > 2
    assert len(several) > 1
    lm = GrokLocalLM(str(tiny), context=512, kv_type="f32", trace_experts=trace)
    values = scored(lm, *((context, word) for word in words))
    lm.close()
    evaluated = len(trace.read_text().splitlines()) - 1
    # The context's last token once more for each continuation of several; those of one token share it.
    assert evaluated == before - 1 + 1 + sum(lengths[word] for word in several)
    scores = model.score([context], choices=words)[0]
    assert [value for value, _ in values] == pytest.approx([score.total for score in scores], abs=1e-4)


def test_edges_of_contexts(lm: Any, model: grok_local.Model) -> None:
    # A blank at a context's end belongs to what follows.
    assert scored(lm, ("The router ", "chooses")) == scored(lm, ("The router", " chooses"))
    # Before a text without a context comes BOS.
    ids = [model.engine.bos, *model.tokenize("The router")]
    assert scored(lm, ("", "The router"))[0][0] == pytest.approx(by_definition(model, ids, 1), abs=1e-3)
    # What is too long loses its beginning: the context has 512 tokens, and one more is predicted.
    long = "The router chooses two experts. " * 200
    whole = model.tokenize(f"{long}It is small.")
    start = len(model.tokenize(long.rstrip()))
    expected = by_definition(model, whole[-513:], 513 - (len(whole) - start))
    assert scored(lm, (long, "It is small."))[0][0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(OptionError, match="the continuation has 0 tokens"):
        scored(lm, ("The router", ""))
    with pytest.raises(OptionError, match="room for 1 to as many"):
        scored(lm, ("The router", long))
    with pytest.raises(OptionError, match="apply_chat_template: not supported"):
        lm.tokenizer_name  # noqa: B018


def test_whole_texts_are_scored_in_windows(lm: Any, model: grok_local.Model) -> None:
    texts = ["The router chooses two experts.", "A layer has eight experts, and a router. " * 120, ""]
    found = lm.loglikelihood_rolling(asked(*((text,) for text in texts)), disable_tqdm=True)
    for text, value in zip(texts, found, strict=True):
        ids, expected = [model.engine.bos, *model.tokenize(text)], 0.0
        for start in range(1, len(ids), 512):
            end = min(start + 512, len(ids))
            begin = max(0, end - 513)  # as much before it as fits
            expected += by_definition(model, ids[begin:end], start - begin)
        assert value == pytest.approx(expected, abs=1e-3)
    assert found[2] == 0


def test_generating(lm: Any, model: grok_local.Model) -> None:
    context = "Human: What is a router?\n\nAssistant:"

    def generated(*options: dict[str, Any]) -> list[str]:
        texts: list[str] = lm.generate_until(asked(*((context, given) for given in options)), disable_tqdm=True)
        return texts

    expected = "".join(model.generate(context, max_tokens=30, stop=["."], temperature=0))
    assert generated({"until": [".", ""], "max_gen_toks": 30, "do_sample": False, "temperature": 0.9}) == [expected]
    assert generated({"until": ".", "max_gen_toks": 30, "num_beams": 1}) == [expected]
    assert len(model.tokenize(generated({"max_gen_toks": 3})[0])) <= 4
    sampling = {"do_sample": True, "temperature": 1.5, "seed": 1, "max_gen_toks": 12}
    first, second = generated(sampling, sampling), generated(sampling, sampling)
    assert first == second
    assert first[0] != first[1]  # a task that asks twice wants two answers
    options = {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0}
    again = [
        "".join(model.generate(context, max_tokens=12, seed=seed, **options))  # type: ignore[arg-type]
        for seed in (1, 2)
    ]
    assert first == again
    assert lm.generate_until(asked(("", {"max_gen_toks": 4})), disable_tqdm=True)[0]
    assert lm.generate_until(asked(("expert " * 900, {"max_gen_toks": 4})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 4}, "num_beams: not supported"),
        ({"typical_p": 0.5}, "typical_p: not supported"),
        ({"max_gen_toks": 512}, "max_gen_toks 512: the context has 512 tokens"),
        ({"until": [5]}, "stop"),
        ({"do_sample": True, "top_p": 2}, "top_p 2"),
    ],
)
def test_what_cannot_be_generated_is_refused_first(lm: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        lm.generate_until(asked(("The router", {}), ("The router", options)), disable_tqdm=True)


def test_the_entry_point_is_the_class() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    value = project.partition('[project.entry-points."lm_eval.models"]\ngrok-local = "')[2].partition('"')[0]
    assert importlib.metadata.EntryPoint("grok-local", value, "lm_eval.models").load() is GrokLocalLM
    assert callable(main)


def test_a_task_from_its_command_line(tiny: Path, model: grok_local.Model, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    named = [dict(zip(("goal", "sol1", "sol2", "label"), question, strict=True)) for question in QUESTIONS]
    questions.write_text("\n".join(map(json.dumps, named)))
    (tmp_path / "piqa_like.yaml").write_text(TASK.format(questions=questions, cache=tmp_path / "data"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "grok_local.adapters.harness", "run", "--model", "grok-local", "--model_args"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
        return subprocess.run(
            [*command, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )

    loaded = f"path={tiny},context=512,kv_type=f32"
    task = ("--tasks", "piqa_like", "--include_path", str(tmp_path))
    kept = ("--output_path", "out", "--log_samples", "--use_cache", str(tmp_path / "cache"))
    done = run(loaded, *task, *kept)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for path in tmp_path.rglob("samples_*.jsonl") for line in path.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        pairs = [(given["arg_0"], given["arg_1"]) for given in sample["arguments"].values()]
        scores = model.score([pairs[0][0]], choices=[choice for _, choice in pairs])[0]
        values = [float(response[0][0]) for response in sample["resps"]]
        assert values == pytest.approx([score.total for score in scores], abs=1e-4)
        assert sample["acc"] == float(int(np.argmax(values)) == sample["doc"]["label"])
    assert "Cached requests: 10, Requests remaining: 0" in run(loaded, *task, *kept).stderr
    missing = run("path=missing", *task)
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("error: missing: no such file")
