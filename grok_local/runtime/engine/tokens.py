"""A model's vocabulary as llama.cpp has it: text to token ids and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp

from grok_local.errors import ModelError, OptionError

__all__ = ["Tokens"]


class Tokens:
    """The vocabulary of a llama_model; `metadata` is its GGUF's."""

    def __init__(self, model: Any, metadata: dict[str, Any]) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._metadata = metadata
        self.count = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.bos = int(llama_cpp.llama_vocab_bos(self._vocab))

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`, after BOS where the model wants one. `special`: text may name control tokens."""
        data = text.encode("utf-8", "surrogatepass")
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), add_bos, special)
        if count < 0:
            raise ModelError(f"llama.cpp cannot tokenize {len(data)} bytes of text")
        return list(ids[:count])

    def continue_ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text` as the continuation of other text: without BOS, and without the space SPM puts before a
        text.
        """
        if llama_cpp.llama_vocab_type(self._vocab) != llama_cpp.LLAMA_VOCAB_TYPE_SPM:
            return self.tokenize(text, add_bos=False, special=special)
        # No piece of such a vocabulary joins a digit to what follows.
        lead = self.tokenize("0", add_bos=False)
        ids = self.tokenize("0" + text, add_bos=False, special=special)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self.tokenize(text, add_bos=False, special=special)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes; a control token has none, or with `special` its name."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            used = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if used >= 0:
                return buffer.raw[:used]
            size = -used

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`; the inverse of `tokenize`. Raises OptionError for ids the vocabulary does not have."""
        self.check(ids)
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        size = 16 + 16 * len(ids)
        while True:
            buffer = ctypes.create_string_buffer(size)
            used = llama_cpp.llama_detokenize(self._vocab, tokens, len(ids), buffer, size, False, True)
            if used >= 0:
                return buffer.raw[:used].decode("utf-8", "replace")
            size = -used

    def special_text(self, name: str) -> str:
        """The text of the token that the metadata names as `name` ("bos", "eos"); empty if there is none."""
        token = self._metadata.get(f"tokenizer.ggml.{name}_token_id", -1)
        known = 0 <= token < self.count
        return self.piece(token, special=True).decode("utf-8", "replace") if known else ""

    def is_end(self, token: int) -> bool:
        """Whether the model says with it that the text is over."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def check(self, ids: Sequence[int]) -> None:
        """Raises OptionError for ids that the vocabulary does not have."""
        bad = [token for token in ids if not 0 <= token < self.count]
        if bad:
            raise OptionError(f"token {bad[0]} is not in the vocabulary of {self.count}")
