"""The engine that a model has, which is opened anew where another shape is wanted: who uses it waits meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grok_local.errors import ModelError, OptionError
from grok_local.placement.planner import make_plan
from grok_local.placement.whatif import widest
from grok_local.runtime.engine.llama import LlamaEngine
from grok_local.runtime.scheduling.composing import Apart, InParts, Together
from grok_local.runtime.scheduling.scheduler import Scheduler
from grok_local.runtime.scheduling.turns import Turns

if TYPE_CHECKING:
    from grok_local.machine.facts import Say
    from grok_local.placement.load_options import LoadRequest
    from grok_local.runtime.engine.protocol import Engine, Lexicon
    from grok_local.runtime.remote.client import RemoteEngine

__all__ = ["Reopenable", "engine_class"]


def engine_class(request: LoadRequest) -> type[LlamaEngine | RemoteEngine]:
    """The engine in this process, or where it has to be contained, in one of its own."""
    if not request.contained:
        return LlamaEngine
    from grok_local.runtime.remote.client import RemoteEngine

    return RemoteEngine


class Reopenable:
    """An engine as `request` has it opened. Any thread may call any method.

    `turns` and `vocabulary` are the same ones for good. The `engine` itself belongs to whoever has it `alone`.
    """

    def __init__(self, request: LoadRequest, engine: Engine, *, say: Say | None) -> None:
        self.engine, self.request = engine, request
        self.turns = Turns(_scheduler(engine, request))
        self.in_place = threading.RLock()  # nobody opens or closes an engine meanwhile
        self.vocabulary: Lexicon = _Vocabulary(self)
        self._loaded, self._say = request, say
        self._is_closed = False

    @contextmanager
    def alone(self) -> Iterator[Engine]:
        """The engine itself: nobody else computes meanwhile, and its first sequence is nobody's."""
        with self.turns.alone():
            yield self.engine

    def reshape(self, parallel: int | None, *, reproducible: bool, most: int | None) -> None:
        """Have places for so many sequences, by default for as many as are fastest, at most `most`, and reproducible
        ones also where the model was loaded for those.

        Raises OptionError, also while an answer is under way, and PlacementError, and the engine is as it was; and what
        opening one raises: then it is opened again as it was.
        """
        with self.turns.stopped():
            self.check_open()
            now, wanted = self.request, self._wanted(parallel, reproducible=reproducible, most=most)
            if (wanted.parallel, wanted.reproducible) == (now.parallel, now.reproducible):
                return
            self._check_idle()
            plan = self.engine.placement.plan
            make_plan(plan.model, plan.machine, wanted.wishes)  # which raises what can be known before
            self._exchange(wanted)

    def check_open(self) -> None:
        """Raises ModelError once it was closed."""
        if self._is_closed:
            raise ModelError("the model is closed")

    def close(self) -> None:
        """Free the engine; safe to call twice."""
        with self.turns.stopped(), self.in_place:
            self._is_closed = True
            self.engine.close()

    def _wanted(self, parallel: int | None, *, reproducible: bool, most: int | None) -> LoadRequest:
        if parallel is None:
            now, plan = self.request.parallel, self.engine.placement.plan
            parallel = now if now > 1 else widest(plan, most=most).sequences
        return self._loaded.reshaped(parallel=parallel, reproducible=reproducible or self._loaded.reproducible)

    def _check_idle(self) -> None:
        self.turns.scheduler.end_cancelled()
        if not self.turns.scheduler.is_idle:
            raise OptionError("batch: an answer of this model is not read to its end: read it, or cancel it first")

    def _exchange(self, wanted: LoadRequest) -> None:
        with self.in_place:
            self.engine.close()  # first: there may be no room for both
            try:
                self._open(wanted)
            except Exception:
                self._open(self.request)
                raise

    def _open(self, request: LoadRequest) -> None:
        self.engine, self.request = engine_class(request)(request, say=self._say), request
        self.turns.go_on_with(_scheduler(self.engine, request))


class _Vocabulary:
    """The `Lexicon` of an engine that may be opened anew: whoever asks waits until it is."""

    def __init__(self, owner: Reopenable) -> None:
        self._owner = owner

    @property
    def bos(self) -> int:
        return self._owner.engine.bos

    @property
    def context_size(self) -> int:
        return self._owner.engine.context_size

    @property
    def metadata(self) -> dict[str, Any]:
        return self._owner.engine.metadata

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]:
        with self._owner.in_place:
            return self._owner.engine.tokenize(text, add_bos=add_bos, special=special)

    def continue_ids(self, text: str, *, special: bool = False) -> list[int]:
        with self._owner.in_place:
            return self._owner.engine.continue_ids(text, special=special)

    def detokenize(self, ids: Sequence[int]) -> str:
        with self._owner.in_place:
            return self._owner.engine.detokenize(ids)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        with self._owner.in_place:
            return self._owner.engine.piece(token, special=special)

    def special_text(self, name: str) -> str:
        with self._owner.in_place:
            return self._owner.engine.special_text(name)

    def control_names(self) -> list[str]:
        with self._owner.in_place:
            return self._owner.engine.control_names()

    def is_end(self, token: int) -> bool:
        with self._owner.in_place:
            return self._owner.engine.is_end(token)


def _scheduler(engine: Engine, request: LoadRequest) -> Scheduler:
    if request.reproducible:
        return Scheduler(engine, places=request.parallel, composer=Apart(), strict=True)
    composer = InParts() if engine.placement.plan.wishes.separate else Together()
    return Scheduler(engine, places=request.parallel, composer=composer)
