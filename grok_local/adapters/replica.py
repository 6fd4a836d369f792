"""A node's own copy of the model. Ray runs it as an actor, whose threads may call any method at once.

It knows nothing of Ray. The engine is imported late: the driver, which only sends orders, needs none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grok_local
from grok_local.errors import GGUFError, WorkerError

if TYPE_CHECKING:
    from grok_local.placement.load_options import LoadOptions, LoadRequest
    from grok_local.runtime.scheduling.generation import Stats
    from grok_local.runtime.text.batch import Prepared, Result
    from grok_local.runtime.text.model import Model

__all__ = ["Order", "Ready", "Replica"]


@dataclass(frozen=True)
class Order:
    """What a node is to load: what `-m` means there, which has to be the model of that `identity`.

    `parallel` is how many sequences go together, None for as many as are fastest on the node, at most `most`.
    `version` is that of the driver's package, whose tasks the node has to understand.
    """

    model: str
    options: LoadOptions
    identity: str
    parallel: int | None
    most: int
    version: str = grok_local.__version__


@dataclass(frozen=True)
class Ready:
    """A loaded model: how many sequences go together, what its results depend on, and what was said on the way."""

    width: int
    fingerprint: str
    notes: tuple[str, ...]


class Replica:
    """It is loaded by `open`, and answers as many tasks at once as threads ask it."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._model: Model | None = None
        self._flying: dict[int, Stats] = {}

    def open(self) -> Ready:
        """Load the model. Raises WorkerError for another version, GGUFError for another model, and as `load` does."""
        from grok_local.ggml.libraries import let_threads_rest

        let_threads_rest()  # before llama.cpp is loaded
        from grok_local.library.names import model_request
        from grok_local.runtime.jobs.batch_job import fingerprint
        from grok_local.runtime.text.model import load_model

        self._check_version()
        notes: list[str] = []
        request = model_request(self._order.model, self._order.options)
        loading = self._fitted(request, notes)
        self._model = load_model(loading, say=notes.append)
        notes += self._model.placement.notes
        return Ready(loading.parallel, fingerprint(self._order.identity, loading), tuple(notes))

    def answer(self, task: Prepared, size: int) -> Result:
        """What becomes of a task. Raises what ends the model."""
        assert self._model is not None  # whoever sends tasks has waited for `open`
        note = partial(self._note, task.index)
        try:
            return next(iter(self._model.run([task], size=size, watch=note)))
        finally:
            self._flying.pop(task.index, None)

    def under_way(self) -> dict[int, Stats]:
        """What the tasks that are being answered took so far, by their index."""
        return dict(self._flying)

    def _note(self, index: int, stats: Collection[Stats]) -> None:
        self._flying.update((index, one) for one in stats)

    def _check_version(self) -> None:
        here, there = grok_local.__version__, self._order.version
        if here != there:
            raise WorkerError(f"grok-local there is {here}, and {there} here: both have to be the same")

    def _fitted(self, request: LoadRequest, notes: list[str]) -> LoadRequest:
        """The request, for as many sequences as shall go together here."""
        from grok_local.formats.gguf_file import read_model
        from grok_local.formats.identity import identity
        from grok_local.placement.shape import ModelShape
        from grok_local.runtime.jobs.batch_job import chosen_width

        headers = read_model(request.path)
        if identity(headers) != self._order.identity:
            raise GGUFError(f"{request.path}: is another model there than here")
        width = chosen_width(
            request,
            ModelShape.from_headers(headers),
            context=request.wishes.context or 1,
            most=self._order.most,
            parallel=self._order.parallel,
            say=notes.append,
        )
        return request.reshaped(parallel=width.sequences, reproducible=request.reproducible)
