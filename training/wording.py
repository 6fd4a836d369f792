"""Varies how a question is put, without changing what it asks."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from training.facts import Fact

__all__ = ["TellingWords", "varied"]

_OPENINGS = (
    "Please tell me:",
    "Hi,",
    "Hello,",
    "Hey,",
    "Quick question:",
    "So,",
    "One more thing:",
    "I wonder:",
    "Tell me,",
    "A question:",
    "OK,",
    "And",
    "But",
    "Also,",
    "I would like to know:",
)
_CLOSINGS = (
    "please",
    "pls",
    "plz",
    "thx",
    "asap",
    "exactly",
    "again",
    "in short",
    "for me",
    "here",
    "then",
    "on my machine",
    "with grok-local",
)

# Each group's members mean the same wherever they stand.
_SYNONYMS = (
    ("how do i", "how can i", "how to", "how would i", "how should i", "what is the way to", "how does one"),
    ("what is", "what's", "whats", "what does one mean by"),
    ("what does", "what would"),
    ("tell me", "explain", "describe", "say"),
    ("i want to", "i'd like to", "i need to", "i would like to", "let me"),
    ("can i", "may i", "is it possible to", "could i", "am i able to"),
    ("is there", "do you have", "is there any"),
    ("why is", "why's", "how come"),
    ("which", "what"),
    ("memory", "ram"),
    ("gpu", "graphics card"),
    ("fast", "quick"),
    ("speed", "pace"),
    ("slow", "sluggish"),
    ("big", "large"),
    ("need", "require"),
    ("show", "display"),
    ("begin", "start"),
    ("stop", "end", "quit"),
    ("use", "employ"),
    ("delete", "remove", "erase"),
    ("download", "fetch"),
    ("quantize", "pack"),
    ("folder", "directory"),
    ("computer", "machine", "workstation"),
    ("command", "instruction"),
    ("meaning", "sense"),
    ("purpose", "point"),
    ("picks", "chooses", "selects"),
    ("pick", "choose", "select"),
    ("many", "much"),
    ("doesn't", "does not"),
    ("don't", "do not"),
    ("it's", "it is"),
    ("happens", "goes on"),
    ("error", "failure"),
    ("change", "alter"),
    ("make", "create"),
)
_FILLERS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "for",
        "with",
        "is",
        "are",
        "do",
        "does",
        "it",
        "that",
        "this",
        "i",
        "you",
        "my",
        "me",
        "at",
        "by",
        "and",
        "or",
    ]
)

_ABOUT = (
    "{}",
    "{}?",
    "What is {}?",
    "what about {}",
    "Tell me about {}.",
    "explain {}",
    "How does {} work?",
    "{} please",
)


class TellingWords:
    """The words by which a fact differs from the others, those of its answer included."""

    def __init__(self, facts: list[Fact]) -> None:
        words = {fact.key: self._of(fact) for fact in facts}
        spread = Counter(word for counts in words.values() for word in counts)
        self._words = {key: list(counts) for key, counts in words.items()}
        self._chances = {
            key: _normalized([np.sqrt(count) / spread[word] for word, count in counts.items()])
            for key, counts in words.items()
        }

    @staticmethod
    def _of(fact: Fact) -> Counter[str]:
        text = " ".join([*fact.questions, fact.answer]).lower()
        return Counter(word for word in re.findall(r"[a-z0-9][a-z0-9_./-]*[a-z0-9]", text) if word not in _FILLERS)

    def question(self, fact: Fact, rng: np.random.Generator) -> str:
        """Two to five of them, as one types into a search box."""
        words, chances = self._words[fact.key], self._chances[fact.key]
        count = min(int(rng.integers(2, 6)), len(words))
        chosen = " ".join(rng.choice(words, count, replace=False, p=chances))
        return str(rng.choice(_ABOUT)).format(chosen)

    def mixed(self, facts: list[Fact], rng: np.random.Generator) -> str:
        """One or two telling words of each."""
        words: list[str] = []
        for fact in facts:
            count = min(int(rng.integers(1, 3)), len(self._words[fact.key]))
            words += map(str, rng.choice(self._words[fact.key], count, replace=False, p=self._chances[fact.key]))
        rng.shuffle(words)
        return str(rng.choice(_ABOUT)).format(" ".join(words))


def _normalized(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array = np.array(values)
    return array / array.sum()  # type: ignore[no-any-return]


def varied(question: str, rng: np.random.Generator) -> str:
    """Another way to type `question`: synonyms, small words lost, a slip of the finger, case and punctuation."""
    words = _with_synonyms(question, rng).split()
    if len(words) > 3 and rng.random() < 0.25:
        words = [w for w in words if w.lower() not in _FILLERS or rng.random() < 0.4] or words
    if len(words) > 5 and rng.random() < 0.1:
        del words[rng.integers(len(words))]
    if rng.random() < 0.15:
        words = _with_slip(words, rng)
    return _punctuated(" ".join(words), rng)


def _with_synonyms(question: str, rng: np.random.Generator) -> str:
    text = f" {question} "
    for group in _SYNONYMS:
        found = next((w for w in group if f" {w} " in text.lower()), None)
        if found is None or rng.random() < 0.6:
            continue
        at = text.lower().index(f" {found} ") + 1
        other = str(rng.choice(group))
        if text[at].isupper():
            other = other[0].upper() + other[1:]
        text = text[:at] + other + text[at + len(found) :]
    return text.strip()


def _with_slip(words: list[str], rng: np.random.Generator) -> list[str]:
    long = [i for i, word in enumerate(words) if len(word) > 4]
    if not long:
        return words
    at = long[rng.integers(len(long))]
    word = words[at]
    place = int(rng.integers(1, len(word) - 2))
    swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return [*words[:at], swapped if rng.random() < 0.5 else word[:place] + word[place + 1 :], *words[at + 1 :]]


def _punctuated(text: str, rng: np.random.Generator) -> str:
    chance = rng.random
    if chance() < 0.12:
        text = f"{rng.choice(_OPENINGS)} {text[0].lower()}{text[1:]}"
    if chance() < 0.06:
        text = f"{text.rstrip('?.!')} {rng.choice(_CLOSINGS)}{'?' if text.endswith('?') else ''}"
    if chance() < 0.25:
        text = text.rstrip("?.!") or text
    if chance() < 0.25:
        return text.lower()
    return text[0].upper() + text[1:] if chance() < 0.3 else text
