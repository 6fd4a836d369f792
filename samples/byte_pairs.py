"""Byte-level BPE in plain Python: trains a small vocabulary, writes it as tokenizer.tok.json, and encodes with it.

The encoder merges, of all neighbours, those of the lowest rank until none is left, as tiktoken does: an independent
answer to what a text's ids are. It shares nothing with the package.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

__all__ = ["encode", "train", "words", "write_tokenizer"]

_SPECIAL = ["<|pad|>", "<|separator|>", "<|eos|>", *(f"<|reserved_{number}|>" for number in range(3, 128))]
_WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@cache
def _pattern() -> re.Pattern[str]:
    """Words as the release splits them (`word_split` V1). Python's own classes are not Unicode's."""
    letter, number, space = _category("L"), _category("N"), _WHITE_SPACE
    return re.compile(
        f"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{letter}{number}]?[{letter}]+|[{number}]"
        f"| ?[^{space}{letter}{number}]+[\r\n]*|[{space}]*[\r\n]+|[{space}]+(?![^{space}])|[{space}]+"
    )


def _category(major: str) -> str:
    """The inside of a class with all characters of a major category."""
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith(major)]
    runs = [list(run) for _, run in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    return "".join(f"\\U{run[0][1]:08x}-\\U{run[-1][1]:08x}" for run in runs)


def words(text: str) -> list[bytes]:
    return [word.encode() for word in _pattern().findall(text)]


def encode(text: str, ranks: Mapping[bytes, int]) -> list[int]:
    """The ids of a text without special tokens."""
    return [ranks[part] for word in words(text) for part in _merged(word, ranks)]


def _merged(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    if word in ranks:
        return [word]
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        candidates = [(ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not candidates:
            break
        _, at = min(candidates)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def train(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Ranks of at most `size` tokens in all: the special ones come first, then the bytes, as in the release."""
    ranks = {bytes([byte]): len(_SPECIAL) + byte for byte in range(256)}
    counts = Counter(word for text in texts for word in words(text))
    split = {word: [bytes([byte]) for byte in word] for word in counts}
    while len(_SPECIAL) + len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(_SPECIAL) + len(ranks))
        for parts in split.values():
            _join(parts, left, right)
    return ranks


def _join(parts: list[bytes], left: bytes, right: bytes) -> None:
    at = 0
    while at + 1 < len(parts):
        if parts[at] == left and parts[at + 1] == right:
            parts[at : at + 2] = [left + right]
        at += 1


def write_tokenizer(path: Path, ranks: Mapping[bytes, int], size: int) -> Path:
    """As the release has it; `size` tokens, of which those after the ranks' are control tokens."""
    end = len(_SPECIAL) + len(ranks)
    special = {**dict(enumerate(_SPECIAL)), **{token: f"<|control{token - end + 1}|>" for token in range(end, size)}}
    contents = {
        "regular_tokens": [{"bytes": list(data), "token": token} for data, token in ranks.items()],
        "special_tokens": [{"bytes": list(name.encode()), "token": token} for token, name in special.items()],
        "word_split": "V1",
        "vocab_size": size,
        "default_allowed_special": ["<|separator|>"],
    }
    path.write_text(json.dumps(contents), encoding="utf-8")
    return path
