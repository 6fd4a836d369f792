"""Reads the corpus: facts (a question in many wordings, and its answer) and plain prose.

A fact is a block of lines:

    ## key
    Q: a wording of the question        (ten or more)
    H: a wording held out of training   (to measure with)
    A: the answer
    K: word; other word|its alternative (what a right answer says)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CORPUS", "Fact", "FollowUp", "is_right", "read_facts", "read_follow_ups", "read_prose"]

CORPUS = Path(__file__).parent / "corpus"
_PROSE = "prose.md"
_FOLLOW_UPS = "followups.md"


@dataclass(frozen=True)
class Fact:
    """One thing the model knows; `keywords` are groups of alternatives, one of each group must be in a right answer."""

    key: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    keywords: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class FollowUp:
    """Questions that make sense after a fact's answer alone, and the key of the fact that answers them."""

    after: str
    questions: tuple[str, ...]
    key: str


def read_follow_ups(folder: Path = CORPUS) -> list[FollowUp]:
    """Lines of the form "key > question | question > key"."""
    lines = [line.split(" > ") for line in (folder / _FOLLOW_UPS).read_text("utf-8").splitlines() if line.strip()]
    return [FollowUp(after, tuple(text.strip() for text in asked.split("|")), key) for after, asked, key in lines]


def read_facts(folder: Path = CORPUS) -> list[Fact]:
    """Every fact of the corpus, in the order of files and blocks. Raises ValueError for a block with a part missing."""
    files = [path for path in sorted(folder.glob("*.md")) if path.name not in (_PROSE, _FOLLOW_UPS)]
    return [_fact(block) for path in files for block in _blocks(path)]


def read_prose(folder: Path = CORPUS) -> list[str]:
    """The paragraphs of plain prose."""
    return [" ".join(block.split()) for block in (folder / _PROSE).read_text("utf-8").split("\n\n") if block.strip()]


def is_right(answer: str, keywords: tuple[tuple[str, ...], ...]) -> bool:
    """Whether `answer` has a word of every group, in any case."""
    text = answer.lower()
    return all(any(word.lower() in text for word in group) for group in keywords)


def parse_keywords(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.strip() for word in group.split("|")) for group in text.split(";"))


def _blocks(path: Path) -> Iterator[list[str]]:
    for block in path.read_text("utf-8").split("\n\n"):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if lines:
            yield lines


def _fact(lines: list[str]) -> Fact:
    key = lines[0].removeprefix("## ")
    parts: dict[str, list[str]] = {"Q": [], "H": [], "A": [], "K": []}
    for line in lines[1:]:
        kind, _, text = line.partition(": ")
        parts[kind].append(text.strip())
    if not parts["Q"] or len(parts["A"]) != 1 or len(parts["K"]) != 1:
        raise ValueError(f"{key}: needs questions, one answer and one line of keywords")
    return Fact(key, tuple(parts["Q"]), tuple(parts["H"]), parts["A"][0], parse_keywords(parts["K"][0]))
