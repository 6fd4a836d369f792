"""Grok-2's tokenizer.tok.json, as the vocabulary llama.cpp reads: byte-level BPE whose ranks are the tokens' ids.

The file lists tokens as bytes, with no word of how they are put together. llama.cpp wants the merges: of each token
the two it is made of. Those are what the algorithm itself is left with when it is given the token's bytes and may not
make the last merge. They do not hang on what stands around a token in a text, for a merge across its ends would keep
the token from being made at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from gguf.constants import TokenType

from grok_local.errors import TokenizerError
from grok_local.quantize.sources.vocabulary import TokenizerKind

__all__ = ["CHAT_TEMPLATE", "RANKS", "WORD_PATTERN", "read_ranks"]

_WHERE = "it is part of the release, huggingface.co/xai-org/grok-2; give it with --tokenizer FILE"
_LARGEST = 1 << 25  # bytes; the release's has 8 million
_LONGEST = 1024  # bytes of a token
_MOST = 1 << 20  # tokens, where the checkpoint does not say how many
_NEVER = math.inf  # the rank of what is no token
_SPLIT = "V1"
# Words as `word_split` V1 cuts them, and llama.cpp's pre-tokenizer "grok-2" too.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TURN = "<|separator|>"
_SPECIAL = {"padding": "<|pad|>", "eot": _END_OF_TURN, "eos": "<|eos|>"}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'].strip() + '<|separator|>\\n\\n' }}"
    "{% elif message['role'] == 'system' %}{{ 'System: ' + message['content'].strip() + '<|separator|>\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: '  + message['content'] + '<|separator|>\\n\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _printable_bytes() -> list[str]:
    """A character for each byte: itself where it can be seen, the others from U+0100 on, as byte-level BPE has it."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]


_CHARACTERS = _printable_bytes()


@dataclass(frozen=True)
class RankedTokenizer:
    """Tokens by id as llama.cpp spells them, with its types; and the merges, first those that are made first."""

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    special: tuple[tuple[str, int], ...]  # ("eot", 1) and so on

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the vocabulary's keys."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("grok-2")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for name, token in self.special:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        writer.add_add_bos_token(False)  # there is none
        writer.add_add_eos_token(False)
        writer.add_chat_template(CHAT_TEMPLATE)


def read_ranks(path: Path, vocabulary: int | None) -> RankedTokenizer:
    """The tokenizer in `path`, for `vocabulary` tokens (None: as many as it says). Raises TokenizerError."""
    try:
        return _tokenizer(_contents(path), vocabulary)
    except _UnreadableError as error:
        raise TokenizerError(f"{path}: {error}: {_WHERE}") from None


RANKS = TokenizerKind("tokenizer.tok.json", _WHERE, read_ranks)


class _UnreadableError(Exception):
    """The file is not what the release has."""


def _contents(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise _UnreadableError("too large to be the tokenizer")
        contents = json.loads(data)
    except OSError as error:
        raise _UnreadableError(f"cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise _UnreadableError("damaged: is not JSON") from None
    if not isinstance(contents, dict) or not {"regular_tokens", "special_tokens"} <= contents.keys():
        raise _UnreadableError("lists no regular_tokens and special_tokens")
    if contents.get("word_split") != _SPLIT or contents.get("pat_str", WORD_PATTERN) != WORD_PATTERN:
        raise _UnreadableError(f"splits words in another way than {_SPLIT}, which is what llama.cpp can do")
    return contents


def _tokenizer(contents: dict[str, Any], vocabulary: int | None) -> RankedTokenizer:
    regular, special = (_listed(contents[f"{kind}_tokens"]) for kind in ("regular", "special"))
    size = _size(contents.get("vocab_size"), [*regular, *special], vocabulary)
    names = {token: _name(data) for token, data in special.items()}
    spelled = {**{token: _spelled(data) for token, data in regular.items()}, **names}
    # llama.cpp wants a text of its own for each id, also for those that are in no use.
    tokens = tuple(spelled.get(token, f"<|unused{token}|>") for token in range(size))
    _check(tokens, regular, special)
    types = {**dict.fromkeys(regular, TokenType.NORMAL), **dict.fromkeys(special, TokenType.CONTROL)}
    return RankedTokenizer(
        tokens=tokens,
        types=tuple(types.get(token, TokenType.UNUSED) for token in range(size)),
        merges=tuple(_merges(regular)),
        special=tuple((key, token) for key, name in _SPECIAL.items() for token in names if names[token] == name),
    )


def _listed(tokens: Any) -> dict[int, bytes]:
    """The bytes of each token, by id."""
    if not isinstance(tokens, list):
        raise _UnreadableError("damaged: its tokens are no list")
    listed = dict(map(_token, tokens))
    if len(listed) < len(tokens):
        raise _UnreadableError("damaged: has two tokens of one id")
    return listed


def _token(entry: Any) -> tuple[int, bytes]:
    token, data = (entry.get("token"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    if type(token) is not int or token < 0 or not isinstance(data, list) or not 0 < len(data) <= _LONGEST:
        raise _UnreadableError(f"damaged: {entry!r:.80} is no token")
    if not all(type(byte) is int and 0 <= byte < 256 for byte in data):
        raise _UnreadableError(f"damaged: token {token} is not of bytes")
    return token, bytes(data)


def _name(data: bytes) -> str:
    if not (data.isascii() and data.decode("ascii").isprintable()):
        raise _UnreadableError("damaged: has a special token that is not plain text")
    return data.decode("ascii")


def _spelled(data: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in data)


def _size(said: Any, tokens: list[int], due: int | None) -> int:
    largest = max(tokens, default=0)
    size = said if type(said) is int else largest + 1
    if due is not None and size != due:
        raise _UnreadableError(f"has {size} tokens and the checkpoint's embedding {due} rows")
    if not largest < size <= (due or _MOST):
        raise _UnreadableError(f"damaged: has token {largest}, and says it has {size} tokens")
    return size


def _check(tokens: Sequence[str], regular: Mapping[int, bytes], special: Mapping[int, bytes]) -> None:
    """llama.cpp ends the process, without a word of use, where two tokens have one text."""
    if regular.keys() & special.keys() or len(set(tokens)) < len(tokens):
        raise _UnreadableError("damaged: has two tokens of one id, or of one text")
    single = {data for data in regular.values() if len(data) == 1}
    if len(single) < 256:
        raise _UnreadableError(f"damaged: has a token for {len(single)} of the 256 bytes")
    if _END_OF_TURN.encode() not in special.values():
        raise _UnreadableError(f"has no {_END_OF_TURN}, with which the release's turns end")


def _merges(regular: Mapping[int, bytes]) -> Iterator[str]:
    """In the order in which they are made: by the rank of what they make, which is its id."""
    ranks = {data: token for token, data in regular.items()}
    for _, data in sorted(regular.items()):
        parts = _parts(data, ranks)
        if len(parts) == 2:
            yield " ".join(map(_spelled, parts))


def _parts(data: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What byte-pair encoding makes of a token's bytes before the merge that makes the token.

    Two parts, or one for a single byte; more where no merges lead to the token. Then a text can have it only as a whole
    word, of which llama.cpp makes the parts.
    """
    parts = [data[at : at + 1] for at in range(len(data))]
    found = [ranks.get(left + right, _NEVER) for left, right in pairwise(parts)]
    while len(parts) > 2 and (best := min(found)) < _NEVER:
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del found[at]
        for near in (at - 1, at):
            if 0 <= near < len(found):
                found[near] = ranks.get(parts[near] + parts[near + 1], _NEVER)
    return parts
