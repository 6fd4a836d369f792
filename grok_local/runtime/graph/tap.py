"""Looks on while llama.cpp computes: observers of its graph, any number of them together.

llama.cpp asks before each node of its graph whether somebody wants to see it, and shows it when it is computed. Only
the tap knows that C loses exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any, Protocol

import llama_cpp

from grok_local.errors import ModelError
from grok_local.ggml.tensors import Names
from grok_local.runtime.graph.rows import Row

__all__ = ["Ending", "Interrupted", "Observer", "Tap"]

_LOST = (
    "an exception broke into the evaluation from outside (a signal's?): what it computed is worth nothing; do it again"
)


class Interrupted(ModelError):  # noqa: N818  # nothing went wrong
    """Something was waited for when the user had enough: nothing is wrong, but what was computed is worth nothing."""


class Ending(Enum):
    """How an evaluation ended."""

    COMPLETE = "complete"
    INTERRUPTED = "interrupted"  # by the user: nothing is wrong, but what was computed is worth nothing
    FAILED = "failed"  # somebody raised an exception on the way, or computing failed


class Observer(Protocol):
    """Looks on at evaluations. What a method raises ends the evaluation and comes out of it."""

    def begin(self, rows: Sequence[Row]) -> None:
        """An evaluation of these tokens is about to start."""

    def names(self) -> AbstractSet[bytes] | None:
        """The nodes to be asked about in the evaluation that begins; None for all. A set that stays costs nothing."""

    def wants(self, node: int, name: bytes) -> bool:
        """Whether to be shown this node, a ggml_tensor about to be computed; called for each that it is asked about."""

    def see(self, node: int, name: bytes) -> None:
        """A node that was wanted is computed."""

    def finish(self, ending: Ending) -> None:
        """The evaluation is over."""

    def close(self) -> None:
        """The model is freed; let go of everything."""


class Tap:
    """Shows llama.cpp's graph to `observers`, in their order.

    Whoever evaluates calls `begin` and `finish` around it, and gives llama.cpp `callback`.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.error: BaseException | None = None
        self._observers = tuple(observers)
        self._asked = _Asked(self._observers)
        self._names = Names()
        self._shown_to: list[Observer] = []  # the node that is being computed
        self._is_open = False
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    def should_abort(self) -> bool:
        """Whether what is being computed is of no use."""
        return self.error is not None

    def begin(self, rows: Sequence[Row]) -> None:
        """An evaluation is about to start. Raises what an observer raises."""
        if self._is_open:  # an exception left the evaluation before, and nobody finished it
            self._end(_ending_of(self.error, complete=False))
        self.error = None
        self._shown_to = []
        for observer in self._observers:
            observer.begin(rows)
        self._asked.update()
        self._is_open = True

    def finish(self, *, complete: bool) -> None:
        """The evaluation is over; it is not complete if it was interrupted. Raises what went wrong meanwhile."""
        if self.error is None and self._shown_to and complete:
            self.error = ModelError(_LOST)
        self._end(_ending_of(self.error, complete=complete))
        if self.error is not None and (complete or not isinstance(self.error, Interrupted)):
            raise self.error

    def close(self) -> None:
        """Let every observer go."""
        for observer in self._observers:
            observer.close()

    def _end(self, ending: Ending) -> None:
        """Tell the observers; after one that fails, the others learn that the evaluation did."""
        self._is_open = False
        for observer in self._observers:
            try:
                observer.finish(ending)
            except BaseException as error:
                self.error = self.error or error
                ending = Ending.FAILED

    def _on_node(self, node: int, ask: bool, _: Any) -> bool:
        # An exception would get lost in C, and wrong numbers come out.
        try:
            if self.error is None:
                return self._ask(node) if ask else self._show(node)
        except BaseException as error:
            self.error = error
        return ask  # stop after this node, and then for good

    def _ask(self, node: int) -> bool:
        # A signal's exception at the very start of a callback nobody can catch; but it is noticed.
        if self._shown_to:
            raise ModelError(_LOST)
        name = self._names.of(node)
        asked = self._asked.by_name.get(name, self._asked.always)
        if not asked:
            return False
        self._shown_to = [observer for observer in asked if observer.wants(node, name)]
        return bool(self._shown_to)

    def _show(self, node: int) -> bool:
        name = self._names.of(node)
        for observer in self._shown_to:
            observer.see(node, name)
        self._shown_to = []
        return True  # interrupts are left to llama.cpp's own callback: it takes what ends here for complete


class _Asked:
    """Which observers are asked about which nodes. Most nodes nobody is asked about, and each costs a token time."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.by_name: dict[bytes, tuple[Observer, ...]] = {}
        self.always: tuple[Observer, ...] = ()  # about every node
        self._observers = observers
        self._sets: list[AbstractSet[bytes] | None] = []

    def update(self) -> None:
        """An evaluation begins."""
        sets = [observer.names() for observer in self._observers]
        if len(sets) == len(self._sets) and all(now is before for now, before in zip(sets, self._sets, strict=True)):
            return
        pairs = list(zip(self._observers, sets, strict=True))
        self.always = tuple(observer for observer, names in pairs if names is None)
        self.by_name = {
            name: tuple(observer for observer, names in pairs if names is None or name in names)
            for name in set().union(*(names for names in sets if names is not None))
        }
        self._sets = sets


def _ending_of(error: BaseException | None, *, complete: bool) -> Ending:
    if error is not None and not isinstance(error, Interrupted):
        return Ending.FAILED
    return Ending.COMPLETE if complete and error is None else Ending.INTERRUPTED
