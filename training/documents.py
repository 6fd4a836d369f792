"""Facts and prose -> an endless stream of training sequences.

Most documents are conversations in the transcript layout of `grok-local chat`, some are a bare question and its answer
as `grok-local generate` gets them, a few are prose. Questions are varied each time they are used: the model shall
recognise what is asked, not how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import sentencepiece

from grok_local.runtime.text.forms import DEFAULT_SYSTEM
from training.facts import Fact, FollowUp
from training.unknown import NO_ANSWER, unknown
from training.wording import TellingWords, varied

__all__ = ["Batch", "Documents", "Pieces", "bare", "conversation"]

EOS = 2
FIRST_PIECE = 325  # ids below are control tokens, digits, whitespace and bytes
# What a token counts for in the loss, by the part of the text it ends in.
SYSTEM, LAYOUT, QUESTION, ANSWER = 0.05, 0.3, 0.05, 1.0
CORRUPTED = 0.15  # of a question's tokens, at most
OPENINGS = 0.92  # of the documents end where the beginning of the last answer can be that of no other
JUDGED = 0.4  # of the questions are made up, and their facts what the judge says
UNKNOWN = 0.2  # of the others have no answer ...
MIXED = 0.2  # ... and of these, so many are words of several facts that make no question together
INTRODUCED = 0.2  # of the questions without answers stand in a conversation
FOLLOWED = 0.35  # of the answers that can be followed up are
KEYWORDS = 0.2  # of the questions are a few telling words instead of a wording
_TURN = 110  # tokens that a sequence has for each turn of its longest conversation
_SHORTEST = 16  # a sequence's last tokens stay empty rather than hold a stump of a document

_SYSTEMS = (
    "You are a helpful assistant.",
    "Grok answers questions about grok-local.",
    "A conversation between a user and an assistant.",
    "Answer briefly.",
    "You are Grok, a small model that explains grok-local.",
)

Pieces = list[tuple[str, float]]  # text and what its tokens count for


class Batch(NamedTuple):
    """`tokens`, `segments` and `asked` are int32 [sequences, length]; `weights` float32, of each token as a target.

    Segments number the documents of a sequence from 1; no token attends beyond its own. `asked` is the answer's number
    at the token before its first, and -1 everywhere else.
    """

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    asked: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Encoded:
    """A document's tokens, what each weighs, and of which answer it is the last token before."""

    ids: list[int]
    weights: list[float]
    asked: list[int]


def conversation(turns: list[tuple[str, str]], system: str = DEFAULT_SYSTEM) -> Pieces:
    """Question and answer pairs in the layout of runtime.chat.Transcript."""
    pieces: Pieces = [(system, SYSTEM)]
    for question, answer in turns:
        pieces += [("\n\nHuman:", LAYOUT), (f" {question}", QUESTION)]
        pieces += [("\n\nAssistant:", LAYOUT), (f" {answer}", ANSWER)]
    return pieces


def bare(question: str, answer: str) -> Pieces:
    """A question as one types it for `generate`, and the answer on the next line."""
    return [(question, QUESTION), (f"\n{answer}", ANSWER)]


class Documents:
    """Draws documents and lays them out in sequences; the same `seed` and step always give the same batch."""

    def __init__(
        self,
        facts: list[Fact],
        prose: list[str],
        tokenizer: sentencepiece.SentencePieceProcessor,
        *,
        follow_ups: Sequence[FollowUp] = (),
        judged: Sequence[tuple[str, str]] = (),
        seed: int,
    ) -> None:
        self._by_key = {fact.key: fact for fact in facts}
        self._follow_ups: dict[str, list[FollowUp]] = {}
        for follow_up in follow_ups:
            self._follow_ups.setdefault(follow_up.after, []).append(follow_up)
        self._prose, self._tokenizer, self._seed = prose, tokenizer, seed
        self._words = TellingWords(facts)
        self._judged = judged
        self.answers = sorted({NO_ANSWER, *(fact.answer for fact in facts)})
        self._numbers = {answer: number for number, answer in enumerate(self.answers)}
        self._openings = dict(zip(self.answers, openings(self.answers), strict=True))
        # Those asked in more wordings than usual come up more often.
        self._facts = [fact for fact in facts for _ in range(max(1, len(fact.questions) // 20))]

    def batch(self, step: int, *, sequences: int, length: int) -> Batch:
        """The batch of training step `step`."""
        rng = np.random.default_rng([self._seed, step])
        return _filled(sequences, length, lambda: self._document(rng, length // _TURN))

    def questions(self, step: int, *, sequences: int, length: int) -> Batch:
        """Questions without their answers, of which that step sees many more."""
        rng = np.random.default_rng([self._seed, step, 1])
        return _filled(sequences, length, lambda: self._question(rng))

    def _document(self, rng: np.random.Generator, most_turns: int) -> Encoded:
        kind = rng.random()
        if kind < 0.4:
            system = DEFAULT_SYSTEM if rng.random() < 0.9 else str(rng.choice(_SYSTEMS))
            turns = 1 if rng.random() < 0.6 else int(rng.integers(1, most_turns + 1))
            pieces = conversation(list(self._turns(rng, turns)), system)
        elif kind < 0.98:
            pieces = bare(*self._turn(rng)[1:])
        else:
            pieces = [(self._prose[rng.integers(len(self._prose))], LAYOUT)]
        numbers = [self._numbers[text[1:]] for text, weight in pieces if weight == ANSWER]
        is_cut = bool(numbers) and rng.random() < OPENINGS
        if is_cut:
            (answer, _) = pieces.pop()
            pieces.append((answer[0] + self._openings[answer[1:]], ANSWER))
        ids, weights = encode(self._tokenizer, pieces)
        if is_cut:
            ids, weights = ids[:-1], weights[:-1]  # no EOS: it does not end there
        return Encoded(self._corrupted(ids, weights, rng), weights, _asked(weights, numbers))

    def _question(self, rng: np.random.Generator) -> Encoded:
        turn = self._turn(rng)[1:]
        pieces = conversation([turn]) if rng.random() < INTRODUCED else bare(*turn)
        ids, weights = encode(self._tokenizer, pieces)
        asked = _asked(weights, [self._numbers[turn[1]]])
        end = 1 + max(place for place, number in enumerate(asked) if number >= 0)
        return Encoded(self._corrupted(ids[:end], weights[:end], rng), weights[:end], asked[:end])

    def _turns(self, rng: np.random.Generator, count: int) -> Iterator[tuple[str, str]]:
        key = ""
        for _ in range(count):
            following = self._follow_ups.get(key, [])
            turn = self._followed(following, rng) if following and rng.random() < FOLLOWED else self._turn(rng)
            key = turn[0]
            yield turn[1:]

    def _followed(self, following: Sequence[FollowUp], rng: np.random.Generator) -> tuple[str, str, str]:
        chosen = following[int(rng.integers(len(following)))]
        question = varied(chosen.questions[rng.integers(len(chosen.questions))], rng)
        return chosen.key, question, self._by_key[chosen.key].answer

    def _turn(self, rng: np.random.Generator) -> tuple[str, str, str]:
        """The fact's key, the question, and its answer."""
        if self._judged and rng.random() < JUDGED:
            question, key = self._judged[int(rng.integers(len(self._judged)))]
            return key, question, self._by_key[key].answer if key else NO_ANSWER
        if rng.random() < UNKNOWN:
            return "", self._mixed(rng) if rng.random() < MIXED else varied(unknown(rng), rng), NO_ANSWER
        fact = self._facts[rng.integers(len(self._facts))]
        if self._follow_ups and rng.random() < FOLLOWED / 3:  # more often than their share: they are few
            fact = self._by_key[list(self._follow_ups)[rng.integers(len(self._follow_ups))]]
        if rng.random() < KEYWORDS:
            return fact.key, self._words.question(fact, rng), fact.answer
        return fact.key, varied(fact.questions[rng.integers(len(fact.questions))], rng), fact.answer

    def _mixed(self, rng: np.random.Generator) -> str:
        chosen = rng.choice(len(self._facts), int(rng.integers(2, 5)), replace=False)
        return self._words.mixed([self._facts[index] for index in chosen], rng)

    def _corrupted(self, ids: list[int], weights: list[float], rng: np.random.Generator) -> list[int]:
        """Some of the questions' tokens replaced by any: an answer must not hang on one of them."""
        hit = rng.random(len(ids)) < rng.uniform(0, CORRUPTED)
        other = rng.integers(FIRST_PIECE, self._tokenizer.vocab_size(), len(ids))
        return [
            int(new) if bad and weight == QUESTION and token >= FIRST_PIECE else token
            for token, weight, bad, new in zip(ids, weights, hit, other, strict=True)
        ]


def _filled(sequences: int, length: int, document: Callable[[], Encoded]) -> Batch:
    tokens, segments, asked = np.zeros((3, sequences, length), np.int32)
    batch = Batch(tokens, segments, np.zeros((sequences, length), np.float32), asked - 1)
    for row in range(sequences):
        _fill(batch, row, document)
    return batch


def _fill(batch: Batch, row: int, document: Callable[[], Encoded]) -> None:
    at, number, length = 0, 1, batch.tokens.shape[1]
    while at < length - _SHORTEST:
        # What does not fit is cut off at the end of the sequence.
        next_one = document()
        end = min(at + len(next_one.ids), length)
        batch.tokens[row, at:end] = next_one.ids[: end - at]
        batch.segments[row, at:end] = number
        batch.weights[row, at:end] = next_one.weights[: end - at]
        batch.asked[row, at:end] = next_one.asked[: end - at]
        at, number = end, number + 1


def openings(answers: Sequence[str]) -> list[str]:
    """Of each the words that begin no other, and one more: what comes after them is the one thing that can.

    `answers` are sorted and all different.
    """
    words = [answer.split(" ") for answer in answers]
    shared = [0, *(_in_common(*pair) for pair in pairwise(words)), 0]
    telling = [max(before, after) + 2 for before, after in pairwise(shared)]
    return [" ".join(those[:count]) for those, count in zip(words, telling, strict=True)]


def _in_common(first: Sequence[str], second: Sequence[str]) -> int:
    return next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))


def _asked(weights: list[float], numbers: list[int]) -> list[int]:
    begins = [weight != ANSWER and coming == ANSWER for weight, coming in pairwise(weights)]
    coming = iter(numbers)
    return [*(next(coming, -1) if begin else -1 for begin in begins), -1]


def encode(tokenizer: sentencepiece.SentencePieceProcessor, pieces: Pieces) -> tuple[list[int], list[float]]:
    """Ids of the text that `pieces` make, tokenized as one, with EOS; and what each weighs, by the piece it ends in."""
    ids = tokenizer.encode("".join(part for part, _ in pieces))
    ends = np.cumsum([len(part.encode()) for part, _ in pieces])
    # The dummy prefix is one byte more than the text.
    places = np.cumsum([_bytes(tokenizer, token) for token in ids]) - 2
    inside = np.minimum(np.searchsorted(ends, places, side="right"), len(pieces) - 1)
    return [*ids, EOS], [*(pieces[i][1] for i in inside), ANSWER]


def _bytes(tokenizer: sentencepiece.SentencePieceProcessor, token: int) -> int:
    return 1 if tokenizer.is_byte(token) else len(tokenizer.id_to_piece(token).replace("\u2581", " ").encode())
