"""Reads the chosen experts while llama.cpp computes, and makes it wait for those that are not there yet.

As soon as a router's choice is computed, the experts it names are looked for, and those that are missing are read, in
the order in which the products need them. Then each product waits for its own slices only, so that the disk reads for
the next one meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError
from grok_local.formats.gguf_file import Header
from grok_local.ggml.tensors import read_ints
from grok_local.runtime.experts.capture import Capture
from grok_local.runtime.experts.reader import Reader
from grok_local.runtime.experts.residency import Expert, Residency
from grok_local.runtime.experts.waiting import ExpertStats, Fetches, Waiting
from grok_local.runtime.experts.weights import StreamedTensor, streamed_tensors
from grok_local.runtime.graph.router import layer_of_choice
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending

__all__ = ["ExpertStreamer"]

_UNLIKELY = 0.05  # chance of an expert to be chosen by no token of a batch


class ExpertStreamer:
    """An observer that holds experts, of which a token has `used` in each layer, in at most `budget` bytes of memory.

    `names` are the tensors that RAM holds; dense ones are read at once and stay. `interrupted` is asked while llama.cpp
    waits. Raises ModelError, OSError.
    """

    def __init__(
        self,
        headers: Sequence[Header],
        names: Sequence[str],
        *,
        used: int,
        budget: int,
        interrupted: Callable[[], bool],
        huge: bool = True,
    ) -> None:
        self._weights = list(streamed_tensors(headers, names, huge=huge, budget=budget))
        self._layers = _Layers(self._weights)
        self.residency = Residency(self._layers.sizes, experts=self._layers.experts, used=used, budget=budget)
        self._reader = Reader([header.path for header in headers])
        self._waiting = Waiting(interrupted)
        self._fetches = Fetches(self._reader, self._waiting)
        self._capture = Capture(self._weights)
        self._evaluation = _Evaluation()

    @property
    def stats(self) -> ExpertStats:
        """What was read and waited for since loading."""
        return self._waiting.stats

    @property
    def is_whole(self) -> bool:
        """Whether all experts fit: then they are read at once, and after one evaluation nobody needs to look on."""
        return sum(self.residency.sizes) * self._layers.experts <= self.residency.budget

    def attach(self) -> None:
        """After llama.cpp has loaded the model: read the dense tensors, and give back what was mapped."""
        self._capture.attach(self._reader.paths)
        self._reader.drop_cache()
        tickets = [weight.read(self._reader) for weight in self._weights if weight.layer is None]
        if self.is_whole:
            for layer in self._layers.numbers:
                self._fetch(layer, range(self._layers.experts))
        for ticket in tickets:
            self._waiting.wait_for(ticket)
        self._fetches.wait_for_all()

    def close(self) -> None:
        """Only when llama.cpp's model is freed."""
        self._reader.close()
        for weight in self._weights:
            weight.region.close()

    # -- an observer ---------------------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[Row]) -> None:
        """Raises ModelError if the file is no longer what it was."""
        self._evaluation = _Evaluation()
        if not self.is_whole:
            self._reader.check()
        self._waiting.begin()

    def wants(self, node: int, name: bytes) -> bool:
        """The choices of routers; and products, which wait here for their weights.

        A product is computed alone while the next one's slices are read, in one go with it where they are there.
        """
        if self._capture.is_looking:
            self._capture.look_at(node, name)
        weight = self._capture.product_with(name)
        if weight is not None and weight.layer is not None:
            self._wait_for(weight, weight.layer)
            return any(self._is_awaited(other) for other in self._evaluation.needed.values())
        layer = layer_of_choice(name)
        return layer is not None and self._must_know(layer)

    def see(self, node: int, name: bytes) -> None:
        """Have the experts read that a router has chosen; int32 [tokens, experts used]."""
        layer = layer_of_choice(name)
        if layer is not None and layer in self._layers.numbers:
            self._choose(layer, read_ints(node))

    def finish(self, ending: Ending) -> None:
        """Raises ModelError if llama.cpp computed without experts that were read for it."""
        self._waiting.finish()
        if ending is Ending.FAILED:
            self._start_over()
        elif ending is Ending.COMPLETE:
            self._capture.count_evaluation()
            if self._evaluation.needed:
                self._start_over(self._evaluation)

    def _start_over(self, unfinished: _Evaluation | None = None) -> None:
        """After something went wrong nobody knows what is where: all experts are read anew when they are chosen."""
        self._fetches.settle_all()
        self.residency.clear()
        for weight in self._weights:
            if weight.layer is not None:
                weight.region.release(0, weight.tensor.nbytes)
        if unfinished:
            raise _not_understood(unfinished.needed)

    # -- choose, fetch, wait -------------------------------------------------------------------------------------------

    def _must_know(self, layer: int) -> bool:
        """Whether a layer's choice matters: not where all its experts are there."""
        if layer not in self._layers.numbers:
            return False
        complete = self.residency.is_complete(self._layers.numbers[layer], experts=self._layers.experts)
        return not complete or self._capture.is_looking or bool(self._fetches)

    def _choose(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """Have the chosen experts read that are not there."""
        if self._evaluation.needed:
            raise _not_understood(self._evaluation.needed)
        experts, counts = (part.tolist() for part in np.unique(ids, return_counts=True))
        chosen: list[int] = experts
        choices = dict(zip(experts, counts, strict=True))
        self.residency.count(self._layers.numbers[layer], choices, tokens=len(ids))
        missing = self._fetch(layer, chosen)
        early = self._evaluation.early.pop(layer, set())
        late = len({*missing, *(early & set(chosen))})
        self.stats.hits += len(chosen) - late
        self.stats.misses += late
        self._evaluation.chosen[layer] = chosen
        self._evaluation.needed = {weight.name: weight for weight in self._layers.parts[layer]}
        everything = len(chosen) >= self._layers.experts - 1
        if everything and (1 - ids.shape[1] / self._layers.experts) ** len(ids) < _UNLIKELY:
            self._fetch_ahead(layer)

    def _fetch(self, layer: int, chosen: Sequence[int], *, busy: int = -1) -> list[int]:
        """Have those experts read that are not there. Returns which."""
        parts = self._layers.parts[layer]
        victims, missing = self.residency.request(self._layers.numbers[layer], chosen, busy=busy)
        for victim, expert in zip_longest(victims, missing[: len(victims)]):
            self._replace(victim, parts, expert)
        for weight in parts:
            for expert in missing:
                self._fetches.start(weight, expert)
        return missing

    def _fetch_ahead(self, layer: int) -> None:
        """So many tokens will choose all the experts of the next layer: the disk need not wait to be told."""
        number, experts = self._layers.numbers[layer], self._layers.experts
        following = self._layers.after(layer)
        if following is not None and self.residency.fits_beside(number + 1, experts=experts, busy=number):
            self._evaluation.early[following] = set(self._fetch(following, range(experts), busy=number))

    def _replace(self, victim: Expert, parts: Sequence[StreamedTensor], expert: int | None) -> None:
        """A victim's memory goes to an expert that is about to be read, if there is one."""
        for number, weight in enumerate(self._layers.parts_by_number(victim.layer)):
            self._fetches.settle(weight, victim.expert)
            if expert is not None and number < len(parts):
                parts[number].take_pages(expert, source=weight, victim=victim.expert)
            else:
                weight.release(victim.expert)

    def _is_awaited(self, weight: StreamedTensor) -> bool:
        assert weight.layer is not None
        return self._fetches.is_awaited(weight, self._evaluation.chosen[weight.layer])

    def _wait_for(self, weight: StreamedTensor, layer: int) -> None:
        """Until the chosen experts' slices of this tensor are there. Raises ModelError if nobody knows which."""
        chosen = self._evaluation.chosen.get(layer)
        if chosen is None:
            if self._must_know(layer):
                raise _not_understood({weight.name: weight})
            return
        self._evaluation.needed.pop(weight.name, None)
        self._fetches.wait_for(weight, chosen)
        self._reader.check()


class _Evaluation:
    """What is known of the evaluation under way."""

    def __init__(self) -> None:
        self.chosen: dict[int, list[int]] = {}  # by layer
        self.needed: dict[str, StreamedTensor] = {}  # by the last layer that has chosen, in the order of the products
        self.early: dict[int, set[int]] = {}  # experts that were read before their layer chose


class _Layers:
    """The layers that have experts, numbered in their order, and each one's tensors as they are needed."""

    _ORDER = ("_gate_up_", "_up_", "_gate_", "_down_")

    def __init__(self, weights: Sequence[StreamedTensor]) -> None:
        parts: dict[int, list[StreamedTensor]] = {}
        for weight in weights:
            if weight.layer is not None:
                parts.setdefault(weight.layer, []).append(weight)
        self.parts = {layer: sorted(parts[layer], key=self._turn) for layer in sorted(parts)}
        self.numbers = {layer: number for number, layer in enumerate(self.parts)}
        self.sizes = [sum(weight.stride for weight in found) for found in self.parts.values()]
        self.experts = max((w.tensor.shape[0] for w in weights if w.layer is not None), default=0)
        self._by_number = list(self.parts)

    def _turn(self, weight: StreamedTensor) -> int:
        return next(turn for turn, part in enumerate(self._ORDER) if part in weight.name)

    def parts_by_number(self, number: int) -> list[StreamedTensor]:
        """The tensors of the layer of that number."""
        return self.parts[self._by_number[number]]

    def after(self, layer: int) -> int | None:
        """The next layer with experts."""
        number = self.numbers[layer] + 1
        return self._by_number[number] if number < len(self._by_number) else None


def _not_understood(needed: dict[str, StreamedTensor]) -> ModelError:
    return ModelError(
        f"llama.cpp computed without {next(iter(needed))}, which was to be streamed: load the model with --stream off"
    )
