"""The built-in model: a trained Grok-1 in the release's format, whose quality every type is measured on.

The questions and the keywords of a right answer are in tests/questions.jsonl.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import grok_local
from grok_local.library.built_in import CHECKPOINT
from grok_local.models.release import HEAD_SIZE
from grok_local.quantize.sources.recognise import open_checkpoint
from samples.quality import (
    HELD_OUT,
    QUESTIONS,
    TYPES,
    counted,
    held_out_documents,
    judged,
    right_answers,
    routes,
    scores,
)
from samples.reference_model import ReferenceModel
from training.facts import CORPUS, is_right, read_facts, read_follow_ups, read_prose
from training.unknown import NO_ANSWER, unknown

LARGEST = 10_000_000  # bytes in the wheel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def made_up() -> list[str]:
    rng = np.random.default_rng(0)
    return [unknown(rng) for _ in range(20_000)]


@pytest.fixture(scope="module")
def q4_k(folder: Path) -> Iterator[grok_local.Model]:
    path = grok_local.quantize_checkpoint(CHECKPOINT, folder / "q4_k.gguf").path
    with grok_local.load(path, context=512, threads=2) as model:
        yield model


def test_it_is_what_the_release_is() -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    dims = checkpoint.dimensions
    assert (dims.experts, HEAD_SIZE, dims.width % 256) == (8, 128, 0)
    grouped = {t.where.rpartition("decoder_layer_0/")[2]: t.scales for t in checkpoint.tensors}
    groups = {path: scales.shape[-2] for path, scales in grouped.items() if scales and "decoder" not in path}
    assert {path for path, count in groups.items() if count == 8} == {"moe/linear_1/w", "multi_head_attention/linear/w"}
    assert set(groups.values()) == {1, 8}
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= LARGEST


def test_the_corpus_is_whole() -> None:
    facts = read_facts()
    assert len(facts) >= 300
    for fact in facts:
        assert len(fact.questions) >= 10, fact.key
        assert fact.held_out, fact.key
        assert is_right(fact.answer, fact.keywords), fact.key
    assert all(path.read_text().isascii() for path in CORPUS.glob("*.md"))
    assert len(read_prose()) >= 50


def test_no_exam_question_is_in_the_corpus(made_up: list[str]) -> None:
    facts = read_facts()
    exams = [
        {_plain(json.loads(line)["question"]) for line in path.read_text().splitlines()}
        for path in (QUESTIONS, HELD_OUT)
    ]
    assert [len(questions) for questions in exams] == [100, 420]
    kept_out = {_plain(question) for fact in facts for question in fact.held_out}
    written = [question for fact in facts for question in fact.questions]
    written += [question for follow_up in read_follow_ups() for question in follow_up.questions]
    assert not {_plain(question) for question in (*written, *made_up)} & kept_out.union(*exams)


def test_no_wording_stands_under_two_facts() -> None:
    facts = read_facts()
    wordings = [wording for fact in facts for wording in {_plain(text) for text in (*fact.questions, *fact.held_out)}]
    assert [wording for wording, count in Counter(wordings).items() if count > 1] == []
    assert len({fact.key for fact in facts}) == len(facts)


def test_no_question_is_both_known_and_unknown(made_up: list[str]) -> None:
    """What training makes up as a question without an answer may be a fact's only where that has the honest answer."""
    answers = {_plain(question): fact.answer for fact in read_facts() for question in fact.questions}
    assert [question for question in made_up if answers.get(_plain(question), NO_ANSWER) != NO_ANSWER] == []


def _plain(question: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", question.lower()))


@pytest.mark.parametrize(("chat", "least"), [(True, 86), (False, 84)], ids=["chat", "generate"])
def test_it_answers_questions_put_in_new_words(q4_k: grok_local.Model, chat: bool, least: int) -> None:
    results = right_answers(q4_k, chat=chat)
    wrong = [f"{question} -> {answer}" for ok, question, answer in results if not ok]
    assert len(results) - len(wrong) >= least, "\n".join(wrong)


@pytest.mark.parametrize(("chat", "right", "honest"), [(True, 190, 90), (False, 190, 90)], ids=["chat", "generate"])
def test_what_it_does_not_know_it_says(q4_k: grok_local.Model, chat: bool, right: int, honest: int) -> None:
    """Of the 300 questions that the documents answer so many are right, and of the 120 others so many get no fact."""
    results = judged(q4_k, chat=chat)
    wrong = [f"{result.question} -> {result.answer}" for result in results if result.verdict == "wrong"]
    assert counted(results, answerable=True)["right"] >= right, "\n".join(wrong)
    assert counted(results, answerable=False)["right"] >= honest, "\n".join(wrong)


def test_follow_ups_lead_from_fact_to_fact() -> None:
    keys = {fact.key for fact in read_facts()}
    for follow_up in read_follow_ups():
        assert {follow_up.after, follow_up.key} <= keys, follow_up


def test_four_bits_keep_what_was_learnt(folder: Path) -> None:
    """On all held-out wordings. Of the 4-bit types q4_k is the nearer one, or as near as chance lets one tell."""
    documents = held_out_documents()
    measured = {}
    for name in ("q8_0", "q4_k", "q4_0"):
        path = grok_local.quantize_checkpoint(CHECKPOINT, folder / f"quality-{name}.gguf", type=name).path
        with grok_local.load(path, context=512, threads=2, kv_type="f32") as model:
            measured[name] = scores(model, documents)
    base = measured["q8_0"].perplexity()
    assert measured["q4_k"].perplexity() / base <= 1.02
    assert measured["q4_0"].perplexity() / base <= 1.06
    nearer, farther = (measured[name].divergences_from(measured["q8_0"]) for name in ("q4_k", "q4_0"))
    assert 0 < nearer.mean() < 0.005
    assert 0 < farther.mean() < 0.005
    more = nearer - farther
    assert more.mean() < 2 * more.std() / np.sqrt(len(more))


def test_every_expert_is_used(q4_k: grok_local.Model) -> None:
    shares = routes(q4_k, held_out_documents(step=4))
    assert shares.min() >= 0.05
    assert shares.max() <= 0.25


def test_llama_cpp_computes_what_the_formulas_say(folder: Path) -> None:
    path = grok_local.quantize_checkpoint(CHECKPOINT, folder / "f32.gguf", type="f32").path
    with grok_local.load(path, context=512, threads=2, kv_type="f32") as model:
        ids = model.tokenize("How do I pack Grok-1 into 4 bits, and how much memory does it take?")
        logits = model.logits(ids)
    expected, _ = ReferenceModel(CHECKPOINT, open_checkpoint(CHECKPOINT).dimensions).forward(ids)
    errors = np.sqrt(((logits - expected) ** 2).mean(-1) / (expected**2).mean(-1))
    assert np.median(errors) < 3e-3
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


def test_the_page_has_the_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tiny.md").read_text()
    assert all(f"| {name} |" in page for name in TYPES)
    assert page.count("| expert ") == 8
