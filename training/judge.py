"""Made-up questions, and what they ask in the judgement of a classifier that knows every wording.

It is naive Bayes over words and groups of letters, so it recognises misspelt and shuffled words that a small network
has not met; what it knows the network learns from its labels. Where two facts are about as likely, nobody can tell
what is asked, and the honest answer is the right one: that is how the network learns to say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline, make_union

from training.facts import Fact
from training.unknown import unknown
from training.wording import TellingWords, varied

__all__ = ["UNCLEAR", "judged_questions"]

UNCLEAR = ""  # in place of a fact's key
_MARGIN = 2.0  # nats by which the first fact must be likelier than the next one with another answer
_SMOOTHING = 0.007
_UNKNOWN = 4000  # made-up questions without an answer, which are a class of their own
_AT_ONCE = 2000
_WORD = r"[a-z0-9][a-z0-9_./-]*"


def judged_questions(facts: Sequence[Fact], path: Path, *, count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and their facts' keys, kept in `path` (tab-separated lines) for the next time."""
    if not path.exists():
        maker = _Maker(facts, seed)
        questions = [maker.make() for _ in range(count)]
        labelled = zip(questions, _labels(facts, questions, seed), strict=True)
        path.write_text("".join(f"{key}\t{question}\n" for question, key in labelled), "utf-8")
    lines = [line.split("\t", 1) for line in path.read_text("utf-8").splitlines()]
    return [(question, key) for key, question in lines]


class _Maker:
    """Makes questions up; `make` is one of any kind."""

    def __init__(self, facts: Sequence[Fact], seed: int) -> None:
        self._facts, self._words, self._rng = facts, TellingWords(list(facts)), np.random.default_rng([seed, 1])
        self._kinds = (self._spliced, self._spliced, self._thinned, self._disturbed, self._searched, self._mixed)

    def make(self) -> str:
        fact, other = (self._facts[index] for index in self._rng.choice(len(self._facts), 2, replace=False))
        return self._kinds[self._rng.integers(len(self._kinds))](fact, other).replace("\t", " ")

    def _spliced(self, fact: Fact, other: Fact) -> str:
        """The beginning of one fact's question and the end of another's."""
        first, second = self._wording(fact), self._wording(other)
        begins = first[: 1 + int(self._rng.integers(len(first)))]
        return " ".join(begins + second[int(self._rng.integers(len(second))) :])

    def _thinned(self, fact: Fact, _: Fact) -> str:
        """A question that lost a third of its words."""
        return " ".join(word for word in self._wording(fact) if self._rng.random() > 1 / 3) or fact.questions[0]

    def _disturbed(self, fact: Fact, other: Fact) -> str:
        """A question with a telling word of another fact in it."""
        words = self._wording(fact)
        words.insert(int(self._rng.integers(len(words) + 1)), self._words.mixed([other], self._rng).split()[0])
        return " ".join(words)

    def _searched(self, fact: Fact, _: Fact) -> str:
        return self._words.question(fact, self._rng)

    def _mixed(self, fact: Fact, other: Fact) -> str:
        return self._words.mixed([fact, other], self._rng)

    def _wording(self, fact: Fact) -> list[str]:
        return varied(fact.questions[int(self._rng.integers(len(fact.questions)))], self._rng).split()


def _labels(facts: Sequence[Fact], questions: list[str], seed: int) -> list[str]:
    model = _fitted(facts, seed)
    keys = [*(fact.key for fact in facts), UNCLEAR]
    answers = np.unique([*(fact.answer for fact in facts), UNCLEAR], return_inverse=True)[1]
    labels: list[str] = []
    for at in range(0, len(questions), _AT_ONCE):
        part = [question.lower() for question in questions[at : at + _AT_ONCE]]
        labels += [_label(row, keys, answers) for row in model.predict_log_proba(part)]
    return labels


def _label(likely: Any, keys: list[str], answers: Any) -> str:
    best = int(likely.argmax())
    others = likely[answers != answers[best]]
    return keys[best] if likely[best] - others.max() > _MARGIN else UNCLEAR


def _fitted(facts: Sequence[Fact], seed: int) -> Any:
    rng = np.random.default_rng([seed, 2])
    texts = [question.lower() for fact in facts for question in fact.questions]
    labels = [index for index, fact in enumerate(facts) for _ in fact.questions]
    texts += [unknown(rng).lower() for _ in range(_UNKNOWN)]
    labels += [len(facts)] * _UNKNOWN
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_WORD),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    return make_pipeline(features, MultinomialNB(alpha=_SMOOTHING, fit_prior=False)).fit(texts, labels)
