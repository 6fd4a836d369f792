"""Made-up questions, and what they ask in the judgement of two classifiers that know every wording.

They are naive Bayes and a linear support vector machine over words and groups of letters, so they recognise misspelt
and shuffled words that a small network has not met; what they know the network learns from their labels. Where the two
disagree, nobody can tell what is asked, and the honest answer is the right one: that is how the network learns to say
so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_union
from sklearn.svm import LinearSVC

from training.facts import Fact
from training.unknown import NO_ANSWER, unanswered, unknown
from training.wording import TellingWords, varied

__all__ = ["UNCLEAR", "judged_questions"]

UNCLEAR = ""  # in place of a fact's key
_SMOOTHING = 0.007  # of naive Bayes
_SLACK = 0.3  # of the support vector machine
_UNKNOWN = 3000  # made-up questions without an answer, which are a class of their own, beside those written down
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
        often = (self._spliced, self._rephrased)
        self._kinds = (*often, *often, self._thinned, self._disturbed, self._searched, self._mixed)

    def make(self) -> str:
        fact, other = (self._facts[index] for index in self._rng.choice(len(self._facts), 2, replace=False))
        return self._kinds[self._rng.integers(len(self._kinds))](fact, other).replace("\t", " ")

    def _spliced(self, fact: Fact, other: Fact) -> str:
        """The beginning of one fact's question and the end of another's."""
        first, second = self._wording(fact), self._wording(other)
        begins = first[: 1 + int(self._rng.integers(len(first)))]
        return " ".join(begins + second[int(self._rng.integers(len(second))) :])

    def _rephrased(self, fact: Fact, _: Fact) -> str:
        """The same of two wordings of one fact."""
        return self._spliced(fact, fact)

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


class _Judges:
    """Both classifiers, fitted to all wordings; `labels` are the facts' keys, or UNCLEAR."""

    def __init__(self, facts: Sequence[Fact], seed: int) -> None:
        rng = np.random.default_rng([seed, 2])
        self._keys = {fact.answer: fact.key for fact in facts}
        asked = [(question, fact.answer) for fact in facts for question in fact.questions]
        asked += [(question, NO_ANSWER) for question in (*unanswered(), *(unknown(rng) for _ in range(_UNKNOWN)))]
        self._features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_WORD),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
        )
        known = self._features.fit_transform([question.lower() for question, _ in asked])
        answers = [answer for _, answer in asked]
        self._both = [
            model.fit(known, answers)
            for model in (MultinomialNB(alpha=_SMOOTHING, fit_prior=False), LinearSVC(C=_SLACK, random_state=seed))
        ]

    def labels(self, questions: Sequence[str]) -> list[str]:
        features = self._features.transform([question.lower() for question in questions])
        first, second = (model.predict(features) for model in self._both)
        return [self._keys.get(a, UNCLEAR) if a == b else UNCLEAR for a, b in zip(first, second, strict=True)]


def _labels(facts: Sequence[Fact], questions: list[str], seed: int) -> list[str]:
    judges = _Judges(facts, seed)
    parts = [questions[at : at + _AT_ONCE] for at in range(0, len(questions), _AT_ONCE)]
    return [label for part in parts for label in judges.labels(part)]
