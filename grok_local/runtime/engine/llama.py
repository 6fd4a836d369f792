"""llama.cpp's model and context behind a small API, on the low-level binding.

Where the weights go is `opening`'s business. The KV cache knows which tokens are in it, so that a prompt that begins as
the last one did only costs its new tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from grok_local.errors import ContextError, GrokLocalError, ModelError, NoRoomError, OptionError
from grok_local.formats import gguf_file
from grok_local.ggml import log
from grok_local.machine.facts import Device, Say
from grok_local.placement.load_options import LoadRequest
from grok_local.placement.runnable import why_not_continued
from grok_local.runtime.engine.interrupts import Halt, ctrl_c_later
from grok_local.runtime.engine.kv_cache import KVCache, RowBatch
from grok_local.runtime.engine.opening import open_planned
from grok_local.runtime.engine.protocol import Placement
from grok_local.runtime.engine.sampling import Draws, Sampling, check_finite, log_probabilities
from grok_local.runtime.engine.tokens import Tokens
from grok_local.runtime.experts.waiting import ExpertStats
from grok_local.runtime.graph.rows import Draw, Drawn, Row

__all__ = ["LlamaEngine"]

_MOST_OUTPUTS = 512  # tokens whose logits llama.cpp keeps at once: of 131072 float32 each
_SCORED = 64  # the same, where little memory matters more than wide batches
_NO_ROOM, _ABORTED = 1, 2  # llama_decode's answers when the KV cache is full, and when the abort callback said so


@dataclass
class _Evaluation:
    """llama.cpp's batch, and what it answered."""

    batch: Any
    status: int = _ABORTED


class LlamaEngine:
    """An `Engine` in this process. One that nobody closes is freed when nobody has it any more.

    `workers` are the devices that were registered of other machines; `say` is told what takes long. The constructor
    raises GGUFError, ModelError, OptionError, PlacementError or OutputError.
    """

    def __init__(self, request: LoadRequest, *, workers: Sequence[Device] = (), say: Say | None = None) -> None:
        self._halt = halt = Halt()
        self.failure: GrokLocalError | None = None
        self.threads = request.threads
        self.headers = gguf_file.read_model(request.path)
        log.listen()
        llama_cpp.llama_backend_init()
        opened = open_planned(
            request,
            self.headers,
            workers=workers,
            interrupted=lambda: halt.is_wanted,
            abort=halt.callback,
            say=say,
        )
        # llama.cpp aborts the process when it is to decode with a model that first encodes.
        encodes = llama_cpp.llama_model_has_encoder(opened.model) or not llama_cpp.llama_model_has_decoder(opened.model)
        self._refusal = why_not_continued(self.headers) or ("a model that first encodes" if encodes else None)
        self._files = [(path, path.stat()) for path in (header.path for header in self.headers)]
        self._opened, halt.tap = opened, opened.watch.tap if opened.watch else None
        self.placement: Placement = opened.placement
        plan = self.placement.plan
        self._tokens = Tokens(opened.model, self.metadata)
        self._draws = Draws(opened.context, self._tokens)
        self._cache = KVCache(opened.context, sequences=plan.wishes.sequences)
        self.context_size = min(plan.context, int(llama_cpp.llama_n_ctx(opened.context)))
        self.batch_size = min(plan.batch, int(llama_cpp.llama_n_batch(opened.context)))
        self._batch = RowBatch(self.batch_size)
        closing = ExitStack()  # nothing of which leads back to the engine
        for close in (opened.close, self._batch.close, self._draws.close, halt.close):
            closing.callback(close)
        self._freed = weakref.finalize(self, closing.close)
        self._freed.atexit = False  # memory is given back then anyway

    def close(self) -> None:
        """Free everything; the engine is unusable afterwards. Safe to call twice."""
        self._freed()

    @property
    def interrupted(self) -> bool:
        """Whether an evaluation is to end, or has ended, before it is complete."""
        return self._halt.is_wanted

    @interrupted.setter
    def interrupted(self, value: bool) -> None:
        self._halt.is_wanted = value

    # -- the model -----------------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> dict[str, Any]:
        """The GGUF's metadata."""
        return self.headers[0].metadata

    @property
    def vocabulary(self) -> int:
        """The number of tokens there are."""
        return self._tokens.count

    @property
    def bos(self) -> int:
        """The BOS token's id, or -1."""
        return self._tokens.bos

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`, after BOS where the model wants one. `special`: text may name control tokens."""
        return self._open_tokens().tokenize(text, add_bos=add_bos, special=special)

    def continue_ids(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text` as the continuation of other text."""
        return self._open_tokens().continue_ids(text, special=special)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes; a control token has none, or with `special` its name."""
        return self._open_tokens().piece(token, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of `ids`; the inverse of `tokenize`. Raises OptionError for ids the vocabulary does not have."""
        return self._open_tokens().detokenize(ids)

    def special_text(self, name: str) -> str:
        """The text of the token that the metadata names as `name` ("bos", "eos"); empty if there is none."""
        return self._open_tokens().special_text(name)

    def control_names(self) -> list[str]:
        """The texts that `special` takes for control tokens, and nothing else does."""
        return self._open_tokens().control_names()

    def is_end(self, token: int) -> bool:
        """Whether the model says with it that the text is over."""
        return self._open_tokens().is_end(token)

    def _open_tokens(self) -> Tokens:
        self._check_open()
        return self._tokens

    # -- evaluating ----------------------------------------------------------------------------------------------------

    @property
    def cached(self) -> list[list[int]]:
        """The tokens in the KV cache, of each sequence."""
        return self._cache.sequences

    def step(self, rows: Sequence[Row], draws: Sequence[Draw] = ()) -> list[Drawn] | None:
        """Evaluate `rows` of any sequences at once, each the next of its sequence, and choose what follows.

        A draw with a chain needs an output among the rows of its sequence, or logits that an earlier one kept there.
        None if interrupted, and then nothing has changed. Raises NoRoomError, which leaves everything as it was,
        OptionError for tokens there are not, ModelError.
        """
        self._check_open()
        self._check_usable()
        self._tokens.check([row.token for row in rows])
        if rows:
            with self._evaluation(rows) as going:
                going.status = llama_cpp.llama_decode(self._opened.context, going.batch)
            if not self._is_complete(going.status, rows):
                return None
        outputs: dict[int, list[int]] = {}
        for index in (index for index, row in enumerate(rows) if row.output):
            outputs.setdefault(rows[index].sequence, []).append(index)
        found: list[Drawn] = []
        for draw in draws:
            at = outputs.get(draw.sequence, [])
            self._draws.keep(draw, at, length=len(self._cache.ids(draw.sequence)))
            found.append(self._draws.drawn(draw, at)._replace(known=self._draws.known(draw, at)))
        return found

    def copy(self, source: int, target: int, *, length: int) -> int:
        """Have `target` begin as the first `length` tokens of `source`, without evaluating them.

        Returns how many of them it has then: fewer, of a model that cannot forget a sequence's end.
        """
        self._check_open()
        found = self._cache.copy(source, target, length=length)
        self._draws.copy(source, target, length=found)
        return found

    def forget(self, sequence: int, *, start: int = 0) -> int:
        """Forget a sequence from position `start` on. Returns how many of its tokens remain, none of a model that
        cannot forget only a part.
        """
        self._check_open()
        self._cache.truncate(sequence, start)
        remain = len(self._cache.ids(sequence))
        self._draws.shorten(sequence, remain)
        return remain

    def save(self, path: Path) -> None:
        """Write sequence 0 to a file, as llama.cpp does. Raises OutputError."""
        self._check_open()
        self._cache.save(path)

    def restore(self, path: Path, ids: Sequence[int]) -> None:
        """Have sequence 0 be what `save` wrote of `ids`. llama.cpp believes the file. Raises ModelError."""
        self._check_open()
        self._draws.shorten(0, 0)
        self._cache.restore(path, ids)

    def evaluate(self, ids: Sequence[int]) -> int:
        """Make the KV cache hold exactly `ids` in sequence 0. Returns how many had to be evaluated.

        Stops early, with `interrupted` set and the cache at what was done, when `interrupt` was called. Raises
        ContextError when they do not fit.
        """
        self._check_open()
        if not ids:
            raise ContextError("the prompt is empty: there is nothing to continue")
        if len(ids) > self.context_size:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and the context {self.context_size}: shorten it, or take more"
            )
        self._check_usable()
        kept = self._cache.keep(ids)
        return self.extend(ids[kept:])

    def extend(self, ids: Sequence[int]) -> int:
        """Evaluate `ids` after what the cache holds of sequence 0; they must fit. Returns how many were, fewer than all
        if interrupted.
        """
        for start in range(0, len(ids), self.batch_size):
            chunk = ids[start : start + self.batch_size]
            if self.step(self._rows(0, chunk)) is None:
                return start
        return len(ids)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """float32 [len(ids), vocabulary]: the logits after each of `ids`, from an empty cache."""
        self._check_open()
        self._cache.truncate(0, 0)
        return self.tail_logits(ids, 0)

    def tail_logits(self, ids: Sequence[int], start: int) -> npt.NDArray[np.float32]:
        """float32 [len(ids) - start, vocabulary]: the logits after each of `ids` from `start` on.

        What the KV cache holds of the beginning is not evaluated again. Raises ContextError, OptionError, ModelError.
        """
        out, row = np.empty((len(ids) - start, self.vocabulary), np.float32), 0
        for part in self._tail(ids, start, width=_MOST_OUTPUTS):
            out[row : row + len(part)] = part
            row += len(part)
        return out

    def score(self, ids: Sequence[int], start: int) -> list[float]:
        """Natural logarithms of the probabilities of `ids` from `start` on, each after all before it; `start` is at
        least 1. Memory is bounded. Raises as `tail_logits` does.
        """
        found: list[float] = []
        for part in self._tail(ids[:-1], start - 1, width=_SCORED):
            following = start + len(found)
            found += log_probabilities(part, ids[following : following + len(part)])
        return found

    def _tail(self, ids: Sequence[int], start: int, *, width: int) -> Iterator[npt.NDArray[np.float32]]:
        """The logits after each of `ids` from `start` on, [rows, vocabulary], valid until the next are asked for."""
        self._open_tokens().check(ids)
        if len(ids) > self.context_size:
            raise ContextError(f"{len(ids)} tokens do not fit the context of {self.context_size}: give a larger one")
        self._check_usable()
        self.interrupted = False
        kept = self._cache.keep(ids[: start + 1])
        whole = self.extend(ids[kept:start]) == start - kept
        for at in range(start, len(ids), min(width, self.batch_size)):
            chunk = ids[at : at + min(width, self.batch_size)]
            whole = whole and self.step([row._replace(output=True) for row in self._rows(0, chunk)]) is not None
            if not whole:
                raise ModelError("interrupted")
            yield self._outputs(len(chunk))

    def evaluate_together(self, pieces: Mapping[int, Sequence[int]]) -> npt.NDArray[np.float32]:
        """Evaluate tokens of several sequences at once, each after those its sequence has; `pieces` by its number.

        float32 [pieces, vocabulary]: the logits after the last of each. Needs Wishes.sequences. Sequence 0 is the one
        of the other methods. Raises ModelError if interrupted, ContextError, OptionError.
        """
        self._check_open()
        self.interrupted = False
        rows = [row for number, ids in pieces.items() for row in self._checked_rows(number, ids)]
        longest = max(row.position for row in rows) + 1
        if longest > self.context_size or len(rows) > self.batch_size:
            raise ContextError(
                f"{len(rows)} tokens at once, {longest} in a sequence: at most {self.batch_size} and "
                f"{self.context_size} fit"
            )
        if self.step(rows) is None:
            raise ModelError("interrupted")
        return self._outputs(len(pieces)).copy()

    def _checked_rows(self, sequence: int, ids: Sequence[int]) -> list[Row]:
        self._tokens.check(ids)
        if not (ids and 0 <= sequence < self.placement.plan.wishes.sequences):
            raise OptionError(f"sequence {sequence} with {len(ids)} tokens: needs tokens, and a place in the context")
        return self._rows(sequence, ids)

    def _rows(self, sequence: int, ids: Sequence[int]) -> list[Row]:
        """Of the next tokens of a sequence; only the last has an output."""
        start, last = len(self._cache.ids(sequence)), len(ids) - 1
        return [Row(token, start + i, sequence, i == last) for i, token in enumerate(ids)]

    def _outputs(self, count: int) -> npt.NDArray[np.float32]:
        computed = llama_cpp.llama_get_logits(self._opened.context)
        logits = np.ctypeslib.as_array(computed, (count, self.vocabulary))
        check_finite(logits)
        return logits

    @contextmanager
    def _evaluation(self, rows: Sequence[Row]) -> Iterator[_Evaluation]:
        """Around llama.cpp's evaluation of `rows`: what is not complete leaves nothing in the cache."""
        going, tap = _Evaluation(self._batch.filled(rows)), self._halt.tap
        log.clear()
        try:
            if tap:
                tap.begin(rows)
            with ctrl_c_later(self):
                yield going
            if tap:
                tap.finish(complete=going.status == 0)
        except BaseException:
            self._cache.roll_back(rows)
            raise

    def _is_complete(self, status: int, rows: Sequence[Row]) -> bool:
        """Whether the rows are in the cache now; False if interrupted. Raises NoRoomError, ModelError."""
        if status == 0:
            self._cache.add(rows)
            return True
        self._cache.roll_back(rows)
        if status == _ABORTED:
            return False
        if status == _NO_ROOM:
            raise NoRoomError(f"the KV cache has no room for {len(rows)} tokens more")
        raise ModelError(f"llama.cpp failed to evaluate {len(rows)} tokens (status {status}): {log.reason()}")

    def expert_stats(self) -> ExpertStats | None:
        """What was read and waited for so far; None where no experts are streamed."""
        return self._opened.watch.expert_stats() if self._opened.watch else None

    def routing_counts(self) -> list[list[int]] | None:
        """How often each expert of each layer was chosen; None where that is not counted."""
        return self._opened.watch.routing_counts() if self._opened.watch else None

    # -- sampling ------------------------------------------------------------------------------------------------------

    def begin_sampling(self, options: Sampling, recent: Sequence[int], grammar: str | None = None) -> int:
        """A way to choose tokens, for draws; `recent` are the last tokens so far, for the repetition penalty.

        `grammar`, as llguidance reads it, says what may come. Raises OptionError if this vocabulary cannot follow it.
        """
        self._check_open()
        return self._draws.begin(options, recent, grammar)

    def end_sampling(self, chain: int) -> None:
        """It is not needed any more."""
        self._draws.end(chain)

    # -- interrupts ----------------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """End the evaluation that is under way as soon as llama.cpp looks; from a signal handler or another thread."""
        self.interrupted = True

    def _check_usable(self) -> None:
        """Mapped weights change with their file. One that was deleted or replaced is kept by the mapping as it was."""
        if self._refusal:
            raise ModelError(f"{self.headers[0].path}: {self._refusal}")
        for path, before in self._files:
            try:
                now = path.stat()
            except OSError:
                continue
            same_file = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
            if same_file and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                self.failure = ModelError(f"{path}: the file has changed since it was loaded: load the model again")
                raise self.failure

    def _check_open(self) -> None:
        if not self._freed.alive:
            raise ModelError("the model is closed")
