"""A model's vocabulary as llama.cpp has it: text to token ids and back."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from grok_local.errors import ModelError, OptionError
from grok_local.files import first_part
from grok_local.formats import gguf_file
from grok_local.ggml import log
from grok_local.ggml.libraries import open_library

__all__ = ["BareVocabulary", "Tokens"]

_DEEP = 4096  # bytes of text, from which on the stack is looked after
_STACK, _STACK_PER_BYTE, _PAGE = 16 << 20, 1024, 4096
_stack_size = threading.Lock()  # Python has one for all threads to come


class Tokens:
    """The vocabulary of a llama_model; `metadata` is its GGUF's."""

    def __init__(self, model: Any, metadata: dict[str, Any]) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._metadata = metadata
        self.count = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._is_empty = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE
        self.bos = int(llama_cpp.llama_vocab_bos(self._vocab))
        self._eos = int(llama_cpp.llama_vocab_eos(self._vocab))

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`, after BOS where the model wants one and the text has none, and never with EOS at its end.
        `special`: text may name control tokens. Raises OptionError for a file without a tokenizer.
        """
        if self._is_empty:  # llama.cpp would end the process
            raise OptionError("the model's GGUF has no tokenizer: its prompts can be token ids only, not text")
        data = _bytes_of(text)
        ids = self._ids(data, add_bos, special) if len(data) < _DEEP else self._on_large_stack(data, add_bos, special)
        # What the text names and what llama.cpp adds may both be there.
        begins_twice = add_bos and len(ids) > 1 and ids[0] == ids[1] == self.bos
        ends = add_bos and bool(llama_cpp.llama_vocab_get_add_eos(self._vocab)) and ids[-1:] == [self._eos]
        return ids[begins_twice : len(ids) - ends]

    def _ids(self, data: bytes, add_bos: bool, special: bool) -> list[int]:
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), add_bos, special)
        if count < 0:
            raise ModelError(f"llama.cpp cannot tokenize {len(data)} bytes of text")
        return list(ids[:count])

    def _on_large_stack(self, data: bytes, add_bos: bool, special: bool) -> list[int]:
        """In a thread of its own: std::regex, which splits the text for some vocabularies, calls itself for every
        character of a run of them, 300 bytes of stack each.
        """
        future: Future[list[int]] = Future()
        with _stack_size:
            before = threading.stack_size(_STACK + _STACK_PER_BYTE * len(data) // _PAGE * _PAGE)
            try:
                thread = threading.Thread(target=_settle, args=(future, self._ids, data, add_bos, special))
                thread.start()
            except (RuntimeError, MemoryError):
                raise ModelError(f"no memory for the stack that tokenizing {len(data)} bytes of text needs") from None
            finally:
                threading.stack_size(before)
        thread.join()
        return future.result()

    @cached_property
    def for_grammars(self) -> Any:
        """The vocabulary as llguidance has it: made once, in up to a second. Raises OptionError where no token ends a
        text.
        """
        from llguidance import LLTokenizer

        ends = [token for token in range(self.count) if self.is_end(token)]
        if not ends:
            raise OptionError("this model has no token that ends a text, which an answer in a given form needs")
        # What begins with 0xff is a token that no text spells.
        pieces = [self.piece(token) or b"\xff" + self.piece(token, special=True) for token in range(self.count)]
        tokenize = ctypes.cast(open_library("llama").llama_tokenize, ctypes.c_void_p).value
        maker: Any = LLTokenizer  # whose stubs leave this one out
        return maker.from_llamacpp(
            tokens=pieces, vocab_ptr=self._vocab, tokenize_fptr=tokenize, eos_token=ends, slices=None
        )

    def control_names(self) -> list[str]:
        """The texts that `special` takes for control tokens, and nothing else does."""
        if self._is_empty:
            return []
        mask = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        named = (t for t in range(self.count) if llama_cpp.llama_vocab_get_attr(self._vocab, t) & mask)
        return [llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace") for token in named]

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
        """The token's bytes; a control token has none, or with `special` its name, nor has one of a file without texts
        of tokens.
        """
        if self._is_empty:
            return b""
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
        if self._is_empty:
            return ""
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


class BareVocabulary(Tokens):
    """A GGUF's vocabulary without its weights, for what has to be known before they are loaded, or while they are busy
    elsewhere. A context manager; without one it is freed when nobody has it any more.

    `context_size`: tokens that prompt and answer may have together. Raises GGUFError, ModelError.
    """

    def __init__(self, path: Path, *, context_size: int) -> None:
        headers = gguf_file.read_model(path)
        log.listen()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(first_part(path)), params)
        if not self._model:
            raise ModelError(f"{path}: llama.cpp cannot read its vocabulary: {log.reason()}")
        self._free = weakref.finalize(self, llama_cpp.llama_model_free, self._model)
        self._free.atexit = False
        self.metadata, self.context_size = headers[0].metadata, context_size
        super().__init__(self._model, self.metadata)

    def __enter__(self) -> BareVocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self._free()


def _bytes_of(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"the text has half a character at place {error.start}: no UTF-8 can say it") from None


def _settle(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)
