"""How good a trained model is: the built-in one, on wordings it was not trained on.

The corpus holds one wording of every fact out of training. Each becomes a conversation of one turn; perplexity is
over its tokens after the introduction, the share of right answers is over the 100 questions of tests/questions.jsonl,
greedily decoded.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import grok_local
from grok_local.library.built_in import CHECKPOINT
from grok_local.quantize.sources.recognise import open_checkpoint
from samples.reference_model import ReferenceModel
from training.documents import ANSWER, EOS, SYSTEM, Pieces, conversation
from training.facts import is_right, read_facts
from training.unknown import NO_ANSWER

__all__ = [
    "Judged",
    "Scores",
    "counted",
    "document_ids",
    "held_out_documents",
    "judged",
    "right_answers",
    "routes",
    "scores",
]

ROOT = Path(__file__).parents[1]
QUESTIONS = ROOT / "tests" / "questions.jsonl"
HELD_OUT = ROOT / "tests" / "held_out.jsonl"
TYPES = ("q8_0", "q4_k", "iq4_xs", "mxfp4", "q4_0")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of every position's distribution, and of the tokens that came, per document."""

    distributions: list[npt.NDArray[np.float32]]  # [scored tokens, vocabulary]
    came: list[npt.NDArray[np.intp]]
    answers: list[npt.NDArray[np.bool_]]

    def perplexity(self, *, only_answers: bool = False) -> float:
        losses = [
            -rows[np.arange(len(came)), came][answers if only_answers else slice(None)]
            for rows, came, answers in zip(self.distributions, self.came, self.answers, strict=True)
        ]
        return float(np.exp(np.concatenate(losses).mean()))

    def divergence_from(self, base: Scores) -> float:
        """KL(base || self) in nats, mean per token."""
        return float(self.divergences_from(base).mean())

    def divergences_from(self, base: Scores) -> Floats:
        """KL(base || self) in nats, of each token."""
        pairs = zip(base.distributions, self.distributions, strict=True)
        found: Floats = np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs])
        return found


def held_out_documents(step: int = 1) -> list[Pieces]:
    """Every `step`-th fact, asked as it was not in training."""
    return [conversation([(wording, fact.answer)]) for fact in read_facts()[::step] for wording in fact.held_out]


def document_ids(model: grok_local.Model, pieces: Pieces) -> tuple[list[int], int, int]:
    """Ids with EOS, how many are of the introduction, and how many come before the answer."""
    texts = ["".join(text for text, _ in pieces[:count]) for count in (1, len(pieces) - 1, len(pieces))]
    introduction, question, whole = (model.tokenize(text) for text in texts)
    return [*whole, EOS], len(introduction), len(question)


def scores(model: grok_local.Model, documents: list[Pieces]) -> Scores:
    """Evaluate every document."""
    result = Scores([], [], [])
    for pieces in documents:
        assert [pieces[0][1], pieces[-1][1]] == [SYSTEM, ANSWER]
        ids, start, answer = document_ids(model, pieces)
        logits = model.logits(ids[:-1])[start - 1 :]
        logits -= logits.max(-1, keepdims=True)
        result.distributions.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        result.came.append(np.array(ids[start:]))
        result.answers.append(np.arange(start, len(ids)) >= answer)
    return result


def right_answers(model: grok_local.Model, *, chat: bool = True) -> list[tuple[bool, str, str]]:
    """Whether it was right, the question, and the answer, for each of the questions."""
    results = []
    for line in QUESTIONS.read_text("utf-8").splitlines():
        asked = json.loads(line)
        message = {"role": "user", "content": asked["question"]}
        if chat:
            reply: grok_local.Reply = model.chat([message], temperature=0, max_tokens=80)
        else:
            reply = model.generate(asked["question"], temperature=0, max_tokens=80)
        text = "".join(reply).strip()
        results.append((is_right(text, asked["keywords"]), asked["question"], text))
    return results


@dataclass(frozen=True)
class Judged:
    """A question of tests/held_out.jsonl, whether there is an answer to it, and what the model said.

    `is_new`: it is about what came with the last release.
    """

    question: str
    answerable: bool
    is_new: bool
    answer: str
    verdict: str  # "right", "honest" (it says that it has no answer) or "wrong"


def judged(model: grok_local.Model, *, chat: bool = True) -> list[Judged]:
    """Each of the 420 questions, which were written from the README and the documents alone, greedily answered.

    To what the documents do not answer, the honest answer is the right one.
    """
    return [_judged(model, json.loads(line), chat=chat) for line in HELD_OUT.read_text("utf-8").splitlines()]


def counted(results: list[Judged], *, answerable: bool, is_new: bool | None = None) -> Counter[str]:
    """How many have which verdict, of all or of those that are new or not."""
    chosen = [result for result in results if is_new is None or result.is_new is is_new]
    return Counter(result.verdict for result in chosen if result.answerable is answerable)


def _judged(model: grok_local.Model, asked: dict[str, Any], *, chat: bool) -> Judged:
    question, answerable = asked["question"], asked["kind"] == "fact"
    message = {"role": "user", "content": question}
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 90}
    reply = model.chat([message], **options) if chat else model.generate(question, **options)
    text = "".join(reply).strip()
    honest = text.startswith(NO_ANSWER[:20])
    right = is_right(text, asked["keywords"]) and not honest if answerable else honest
    verdict = "right" if right else "honest" if honest else "wrong"
    return Judged(question, answerable, "since" in asked, text, verdict)


def routes(model: grok_local.Model, documents: list[Pieces]) -> Floats:
    """Share of the tokens' routes that each expert gets, [layers, experts]; every row adds up to 1."""
    dims = open_checkpoint(CHECKPOINT).dimensions
    reference = ReferenceModel(CHECKPOINT, dims)
    counts = np.zeros((dims.layers, dims.experts))
    for pieces in documents:
        _, chosen = reference.forward(document_ids(model, pieces)[0])
        for layer in range(dims.layers):
            counts[layer] += np.bincount(chosen[layer].ravel(), minlength=dims.experts)
    shares: Floats = counts / counts.sum(-1, keepdims=True)
    return shares
