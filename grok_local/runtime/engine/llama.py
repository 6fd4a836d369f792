"""llama.cpp's model and context behind a small API, on the low-level binding.

Where the weights go is `loading`'s business. The KV cache holds one sequence, and `Engine.cached` says which tokens are
in it, so that a prompt that begins as the last one did only costs its new tokens.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from grok_local.errors import ContextError, ModelError, OptionError
from grok_local.formats import gguf_file
from grok_local.machine.kernels import Say
from grok_local.machine.limits import core_count
from grok_local.placement.planner import Wishes
from grok_local.runtime.engine import log
from grok_local.runtime.engine.opening import open_planned, release
from grok_local.runtime.engine.sampling import Sampling, new_chain
from grok_local.runtime.experts import ExpertStats, RouterTap
from grok_local.runtime.graph.record import Row

__all__ = ["Engine"]

_MAX_CONTEXT = 1 << 24
_MAX_THREADS = 512  # GGML_MAX_N_THREADS
_MOST_OUTPUTS = 512  # tokens whose logits llama.cpp keeps at once: of 131072 float32 each
_ABORTED = 2  # llama_decode's answer when the abort callback said so


class Engine:
    """A loaded model with one sequence. Not thread-safe. Raises ModelError, GGUFError or OptionError from its
    constructor.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, wishes: Wishes | None = None, say: Say | None = None
    ) -> None:
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._chain: Any = None
        self._tap: RouterTap | None = None
        self.interrupted = False
        self.cached: list[int] = []
        self._lengths: dict[int, int] = {}  # of the sequences in the KV cache but the first
        wishes = wishes or Wishes()
        if wishes.context is not None and not 1 <= wishes.context <= _MAX_CONTEXT:
            raise OptionError(f"context {wishes.context}: must be 1 to {_MAX_CONTEXT}")
        if threads is not None and not 1 <= threads <= _MAX_THREADS:
            raise OptionError(f"{threads} threads: must be 1 to {_MAX_THREADS}")
        self.threads = threads or core_count()
        self.headers = gguf_file.read_model(path)
        try:
            self._open(gguf_file.first_part(path), wishes, say)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, wishes: Wishes, say: Say | None) -> None:
        log.listen()
        llama_cpp.llama_backend_init()
        self._abort = llama_cpp.ggml_abort_callback(self._should_abort)
        opened = open_planned(
            path,
            self.headers,
            wishes=wishes,
            threads=self.threads,
            interrupted=lambda: self.interrupted,
            abort=self._abort,
            say=say,
        )
        self._model, self._context, self.placement = opened.model, opened.context, opened.placement
        self._tap = opened.tap
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.context_size = min(self.placement.plan.context, int(llama_cpp.llama_n_ctx(self._context)))
        self._batch_size = min(self.placement.plan.batch, int(llama_cpp.llama_n_batch(self._context)))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(self._batch_size, 0, 1)

    def close(self) -> None:
        """Free everything; the engine is unusable afterwards."""
        self._end_sampling()
        batch, context, model, tap = self._batch, self._context, self._model, self._tap
        self._batch = self._context = self._model = self._tap = None
        if batch:
            llama_cpp.llama_batch_free(batch)
        release(model, context, tap)

    @property
    def metadata(self) -> dict[str, Any]:
        """The GGUF's metadata."""
        return self.headers[0].metadata

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`, after BOS where the model wants one. `special`: text may name control tokens."""
        self._check_open()
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
        self._check_open()
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            used = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if used >= 0:
                return buffer.raw[:used]
            size = -used

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`; the inverse of `tokenize`. Raises OptionError for ids the vocabulary does not have."""
        self._check_open()
        self._check_ids(ids)
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        size = 16 + 16 * len(ids)
        while True:
            buffer = ctypes.create_string_buffer(size)
            used = llama_cpp.llama_detokenize(self._vocab, tokens, len(ids), buffer, size, False, True)
            if used >= 0:
                return buffer.raw[:used].decode("utf-8", "replace")
            size = -used

    @property
    def bos(self) -> int:
        """The BOS token's id, or -1."""
        return int(llama_cpp.llama_vocab_bos(self._vocab))

    def special_text(self, name: str) -> str:
        """The text of the token that the metadata names as `name` ("bos", "eos"); empty if there is none."""
        token = self.metadata.get(f"tokenizer.ggml.{name}_token_id", -1)
        known = 0 <= token < self.vocabulary
        return self.piece(token, special=True).decode("utf-8", "replace") if known else ""

    def is_end(self, token: int) -> bool:
        """Whether the model says with it that the text is over."""
        self._check_open()
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def evaluate(self, ids: Sequence[int]) -> int:
        """Make the KV cache hold exactly `ids`, with the last one's logits ready. Returns how many had to be evaluated.

        Stops early, with `interrupted` set and the cache at what was done, when `interrupt` was called. Raises
        ContextError when they do not fit.
        """
        self._check_open()
        if not ids:
            raise ContextError("the prompt is empty: there is nothing to continue")
        if len(ids) > self.context_size:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and the context {self.context_size}: shorten it, or give --context"
            )
        self._truncate(min(_common_prefix(self.cached, ids), len(ids) - 1))
        return self.extend(ids[len(self.cached) :])

    def extend(self, ids: Sequence[int]) -> int:
        """Evaluate `ids` after what the cache holds; they must fit. Returns how many were, fewer than all if
        interrupted.
        """
        before = len(self.cached)
        for start in range(0, len(ids), self._batch_size):
            if not self._decode(ids[start : start + self._batch_size], logits="last"):
                break
        return len(self.cached) - before

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [len(ids), vocabulary]: the logits after each of `ids`, from an empty cache."""
        self._check_open()
        self._check_ids(ids)
        if len(ids) > self.context_size:
            raise ContextError(f"{len(ids)} tokens do not fit the context of {self.context_size}: give a larger one")
        self.interrupted = False
        out = np.empty((len(ids), self.vocabulary), np.float32)
        self._truncate(0)
        width = min(self._batch_size, _MOST_OUTPUTS)
        for start in range(0, len(ids), width):
            chunk = ids[start : start + width]
            if not self._decode(chunk, logits="all"):
                raise ModelError("interrupted")
            computed = llama_cpp.llama_get_logits(self._context)
            out[start : start + len(chunk)] = np.ctypeslib.as_array(computed, (len(chunk), self.vocabulary))
        return out

    def evaluate_together(self, pieces: Mapping[int, Sequence[int]]) -> npt.NDArray[np.float32]:
        """Evaluate tokens of several sequences at once, each after those its sequence has; `pieces` by its number.

        float32 [pieces, vocabulary]: the logits after the last of each. Needs Wishes.sequences. Sequence 0 is the one
        of the other methods. Raises ModelError if interrupted, ContextError, OptionError.
        """
        self._check_open()
        self.interrupted = False
        rows = [row for number, ids in pieces.items() for row in self._rows_of(number, ids)]
        used = len(self.cached) + sum(self._lengths.values()) + len(rows)
        if used > self.context_size or len(rows) > self._batch_size:
            raise ContextError(
                f"{len(rows)} tokens at once, {used} in all: at most {self._batch_size} and {self.context_size} fit"
            )
        if not self._evaluate(rows):
            for number in pieces:
                llama_cpp.llama_memory_seq_rm(self._memory, number, self._length(number), -1)
            raise ModelError("interrupted")
        for number, ids in pieces.items():
            if number == 0:
                self.cached += ids
            else:
                self._lengths[number] = self._length(number) + len(ids)
        computed = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(computed, (len(pieces), self.vocabulary)).copy()

    def _rows_of(self, sequence: int, ids: Sequence[int]) -> Iterator[Row]:
        self._check_ids(ids)
        if not (ids and 0 <= sequence < self.placement.plan.wishes.sequences):
            raise OptionError(f"sequence {sequence} with {len(ids)} tokens: needs tokens, and a place in the context")
        start = self._length(sequence)
        return (Row(token, start + i, sequence, i == len(ids) - 1) for i, token in enumerate(ids))

    def _length(self, sequence: int) -> int:
        return self._lengths.get(sequence, 0) if sequence else len(self.cached)

    def expert_stats(self) -> ExpertStats | None:
        """What was read and waited for so far; None where no experts are streamed."""
        return self._tap.stats.copy() if self._tap and self.placement.plan.streamed else None

    def begin_sampling(self, options: Sampling, recent: Sequence[int]) -> None:
        """From now on choose tokens by `options`; `recent` are the last tokens so far, for the repetition penalty."""
        self._check_open()
        self._end_sampling()
        self._chain = new_chain(options, self.vocabulary, recent=recent)

    def sample(self) -> int:
        """The choice after the last evaluated token; the next choices remember it."""
        self._check_open()
        return int(llama_cpp.llama_sampler_sample(self._chain, self._context, -1))

    def _end_sampling(self) -> None:
        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
        self._chain = None

    def interrupt(self) -> None:
        """End the evaluation that is under way as soon as llama.cpp looks; from a signal handler or another thread."""
        self.interrupted = True

    def _should_abort(self, _: Any) -> bool:
        # Called for every node of the graph; Python handles pending signals on the way.
        return self.interrupted or (self._tap is not None and self._tap.should_abort())

    def _truncate(self, length: int) -> None:
        if length < len(self.cached):
            if not llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1):
                # Recurrent models cannot forget a part.
                llama_cpp.llama_memory_clear(self._memory, True)
                length = 0
            del self.cached[length:]

    def _decode(self, ids: Sequence[int], *, logits: str) -> bool:
        """Evaluate `ids` after the cached ones. False if interrupted."""
        start, last = len(self.cached), len(ids) - 1
        rows = [Row(token, start + i, 0, logits == "all" or i == last) for i, token in enumerate(ids)]
        if not self._evaluate(rows):
            llama_cpp.llama_memory_seq_rm(self._memory, 0, start, -1)
            return False
        self.cached += ids
        return True

    def _evaluate(self, rows: Sequence[Row]) -> bool:
        """Have llama.cpp compute them. False if interrupted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.output
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row.sequence
        log.clear()
        try:
            if self._tap:
                self._tap.begin(rows)
            with self._ctrl_c_later():
                status = llama_cpp.llama_decode(self._context, batch)
            if self._tap:
                self._tap.finish(complete=status == 0)
        except BaseException:
            for row in rows:
                llama_cpp.llama_memory_seq_rm(self._memory, row.sequence, row.position, -1)
            raise
        if status in (0, _ABORTED):
            return bool(status == 0)
        raise ModelError(f"llama.cpp failed to evaluate {len(rows)} tokens (status {status}): {log.reason()}")

    @contextmanager
    def _ctrl_c_later(self) -> Iterator[None]:
        """In a callback from C a KeyboardInterrupt would get lost: Ctrl-C ends the evaluation, then it is raised."""
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
            yield
            return
        came: list[int] = []

        def remember(number: int, _: object) -> None:
            came.append(number)
            self.interrupted = True

        signal.signal(signal.SIGINT, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if came:
                self.interrupted = False
        if came:
            raise KeyboardInterrupt

    def _check_ids(self, ids: Sequence[int]) -> None:
        bad = [token for token in ids if not 0 <= token < self.vocabulary]
        if bad:
            raise OptionError(f"token {bad[0]} is not in the vocabulary of {self.vocabulary}")

    def _check_open(self) -> None:
        if not self._context:
            raise ModelError("the model is closed")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
