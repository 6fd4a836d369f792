"""The release's SentencePiece model, as the vocabulary llama.cpp reads.

User-defined pieces become NORMAL: with their own type llama.cpp splits text at them and adds a space after each, and
nearly every text gets other ids than the official tokenizer's. `<|...|>` pieces become CONTROL, so that plain text
never produces one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from gguf import GGUFWriter
from gguf.constants import TokenType

from grok_local.errors import TokenizerError
from grok_local.quantize.sources.vocabulary import TokenizerKind

__all__ = ["SENTENCEPIECE", "read_tokenizer"]

_WHERE = "it is in the git repository github.com/xai-org/grok-1 (2,229,219 bytes); give it with --tokenizer FILE"


@dataclass(frozen=True)
class Tokenizer:
    """Pieces by id, with their scores and llama.cpp types."""

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    special: tuple[tuple[str, int], ...]  # ("bos", 1) and so on

    @property
    def size(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the vocabulary's keys."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(list(self.pieces))
        writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))
        for name, token in self.special:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        # The reference runner encodes prompts without BOS; llama.cpp's default for this kind would add one.
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(True)


def read_tokenizer(path: Path, vocabulary: int | None) -> Tokenizer:
    """The tokenizer in `path`, which must have `vocabulary` pieces (None: any number). Raises TokenizerError."""
    try:
        data = path.read_bytes()
        if not data:  # of which the library says a great deal by itself
            raise TokenizerError(f"{path}: empty: {_WHERE}")
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = len(model)
    except (RuntimeError, OSError, ValueError, TypeError):
        raise TokenizerError(f"{path}: not a SentencePiece model: {_WHERE}") from None
    if vocabulary is not None and size != vocabulary:
        raise TokenizerError(f"{path}: has {size} pieces and the checkpoint's embedding {vocabulary} rows: {_WHERE}")
    scores = tuple(model.get_score(i) for i in range(size))
    if not all(score.is_integer() for score in scores):
        raise TokenizerError(f"{path}: a unigram model, where Grok-1's is a BPE one: {_WHERE}")
    special = {"bos": model.bos_id(), "eos": model.eos_id(), "unknown": model.unk_id(), "padding": model.pad_id()}
    return Tokenizer(
        pieces=tuple(model.id_to_piece(i).encode() for i in range(size)),
        scores=scores,
        types=tuple(_type(model, i) for i in range(size)),
        special=tuple((name, token) for name, token in special.items() if token >= 0),
    )


def _type(model: sentencepiece.SentencePieceProcessor, token: int) -> TokenType:
    piece = model.id_to_piece(token)
    if model.is_unknown(token):
        return TokenType.UNKNOWN
    if model.is_control(token) or (piece.startswith("<|") and piece.endswith("|>")):
        return TokenType.CONTROL
    if model.is_byte(token):
        return TokenType.BYTE
    return TokenType.UNUSED if model.is_unused(token) else TokenType.NORMAL


SENTENCEPIECE = TokenizerKind("tokenizer.model", _WHERE, read_tokenizer)
