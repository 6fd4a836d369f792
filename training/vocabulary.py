"""Trains a SentencePiece tokenizer of the release's kind on the corpus.

The release's model file was read for its settings: BPE, identity normalization, a dummy prefix, byte fallback, runs of
newlines, tabs and spaces and the digits as user-defined pieces, 20 control pieces; the first learned piece has id 325.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import sentencepiece

from grok_local.runtime.text.forms import DEFAULT_SYSTEM
from training.facts import Fact

__all__ = ["train_tokenizer"]


def train_tokenizer(facts: list[Fact], prose: list[str], *, vocabulary: int) -> bytes:
    """The serialized model, of `vocabulary` pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=_sentences(facts, prose),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        max_sentencepiece_length=16,
        user_defined_symbols=list(_user_defined()),
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        unk_surface="[UNK]",
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def _sentences(facts: list[Fact], prose: list[str]) -> Iterator[str]:
    for fact in facts:
        # An answer is seen in full far more often than any one wording of its question.
        yield from fact.questions
        yield from [fact.answer] * 3
    yield from prose
    yield from [DEFAULT_SYSTEM, "Human: Assistant:"] * 50


def _user_defined() -> Iterator[str]:
    yield from ("\n" * n for n in range(1, 11))
    yield from "0123456789"
    yield from ("\t" * n for n in range(1, 9))
    yield from (" " * n for n in range(2, 17))
    yield from ("<|separator|>", "<|mask|>")
    yield from (f"<|control{n}|>" for n in range(1, 21))
