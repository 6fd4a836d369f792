"""Reads the chosen experts while llama.cpp computes, and makes it wait for those that are not there yet.

As soon as a router's choice is computed, the experts it names are looked for, and those that are missing are read, in
the order in which the products need them. Then each product waits for its own slices only, so that the disk reads for
the next one meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError
from grok_local.formats.gguf_file import Header
from grok_local.ggml import tensors as ggml_tensors
from grok_local.runtime.experts.reader import Reader, Ticket
from grok_local.runtime.experts.residency import Expert, Residency
from grok_local.runtime.experts.weights import Mapping, Weight, mappings, weights_of
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Interrupted, RouterTap

__all__ = ["ExpertStreamer"]

_UNLIKELY = 0.05  # chance of an expert to be chosen by no token of a batch
_CAPTURES = 4  # evaluations after which every weight that is ever used has been seen


class ExpertStreamer(RouterTap):
    """The experts of a model, of which a token has `used` in each layer, in at most `budget` bytes of memory.

    `names` are the tensors that RAM holds; dense ones are read at once and stay. Raises ModelError, OSError.
    """

    def __init__(
        self,
        headers: Sequence[Header],
        names: Sequence[str],
        *,
        used: int,
        budget: int,
        huge: bool = True,
        **tap: Any,
    ) -> None:
        super().__init__(**tap)
        found = list(weights_of(headers, names, huge=huge, budget=budget))
        self._weights = {weight.tensor.name.encode(): weight for weight in found}
        self._layers = _by_layer(found)
        self._order = list(self._layers)
        self._numbers = {layer: number for number, layer in enumerate(self._order)}
        self._experts = max((weight.tensor.shape[0] for weight in found if weight.layer is not None), default=0)
        sizes = [sum(weight.stride for weight in parts) for parts in self._layers.values()]
        self.residency = Residency(sizes, experts=self._experts, used=used, budget=budget)
        self._tickets: dict[tuple[str, int], Ticket] = {}
        self._mappings: list[Mapping] = []
        self._unseen = dict(self._weights)
        self._captures = 0
        self._products: dict[bytes, Weight] = {}
        self._chosen: dict[int, list[int]] = {}
        self._ahead: dict[int, set[int]] = {}  # experts read before they were chosen
        self._waiting: dict[str, Weight] = {}
        self._ready: set[int] = set()  # layers that have chosen in this evaluation
        self._reader = Reader([header.path for header in headers])

    def attach(self) -> None:
        """After llama.cpp has loaded the model: read the dense tensors, and give back what was mapped."""
        self._mappings = mappings(self._reader.paths)
        for mapping in self._mappings:
            mapping.give_back()
        self._reader.drop_cache()
        tickets = [weight.read(self._reader) for weight in self._weights.values() if weight.layer is None]
        if self.is_whole:
            for layer in self._layers:
                self._fetch(layer, range(self._experts))
        for ticket in [*tickets, *self._tickets.values()]:
            self._wait(ticket)
        self._tickets.clear()

    @property
    def is_whole(self) -> bool:
        """Whether all experts fit: then they are read at once, and after one evaluation nobody needs to look on."""
        return self._recorder is None and sum(self.residency.sizes) * self._experts <= self.residency.budget

    def close(self) -> None:
        """Only when llama.cpp's model is freed."""
        self._reader.close()
        for weight in self._weights.values():
            weight.region.close()
        super().close()

    def begin(self, rows: Sequence[Row]) -> None:
        """Raises ModelError if the file is no longer what it was."""
        self._waiting.clear()
        self._ready.clear()
        if self.error is not None and not isinstance(self.error, Interrupted):
            self._start_over()
        if not self.is_whole:
            self._reader.check()
        super().begin(rows)

    def finish(self, *, complete: bool) -> None:
        """Raises what went wrong meanwhile."""
        self._captures += complete
        if self._captures == _CAPTURES:
            self._unseen.clear()
        if self.error is None and self._waiting and complete:
            self.error = _not_understood(self._waiting)
        super().finish(complete=complete)

    def _start_over(self) -> None:
        """After something went wrong nobody knows what is where: all experts are read anew when they are chosen."""
        for ticket in self._tickets.values():
            self._finish(ticket)
        self._tickets.clear()
        self._ahead.clear()
        self.residency.clear()
        for parts in self._layers.values():
            for weight in parts:
                weight.region.release(0, weight.tensor.nbytes)

    # -- llama.cpp asks ------------------------------------------------------------------------------------------------

    def _asked(self, node: int, name: bytes) -> bool:
        if self._unseen:
            self._capture(node, name)
        weight = self._products.get(name)
        if weight is None:
            return super()._asked(node, name)
        self._wait_for(weight)
        # Computed alone while the next product's slices are read; in one go with it where they are there.
        return any(self._is_awaited(other) for other in self._waiting.values())

    def _is_awaited(self, weight: Weight) -> bool:
        assert weight.layer is not None
        tickets = (self._tickets.get((weight.tensor.name, expert)) for expert in self._chosen[weight.layer])
        return any(ticket is not None and not ticket.done for ticket in tickets)

    def _wants(self, layer: int) -> bool:
        if layer not in self._numbers:
            return super()._wants(layer)
        complete = self.residency.is_complete(self._numbers[layer], experts=self._experts)
        return not complete or bool(self._unseen) or bool(self._tickets) or super()._wants(layer)

    def _capture(self, node: int, name: bytes) -> None:
        """Have llama.cpp read the weights this node uses from our memory from now on."""
        for source in ggml_tensors.sources(node):
            weight = self._unseen.get(ggml_tensors.tensor_name(source))
            if weight is None or not self._is_mapped(source, weight):
                continue
            ggml_tensors.move_data(source, weight.region.address)
            if weight.layer is not None:
                self._products[name] = weight
            del self._unseen[weight.tensor.name.encode()]

    def _is_mapped(self, tensor: int, weight: Weight) -> bool:
        """Whether it is this one: the output matrix on a device may be the embedding by another name."""
        address = ggml_tensors.data_address(tensor)
        places = (m.address(weight.tensor.offset) for m in self._mappings if m.file == weight.file)
        return address in places and ggml_tensors.size_of(tensor) == weight.tensor.nbytes

    # -- experts -------------------------------------------------------------------------------------------------------

    def _choose(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """Have the chosen experts read that are not there."""
        if layer not in self._numbers:
            return
        if self._waiting:
            raise _not_understood(self._waiting)
        found, counts = (part.tolist() for part in np.unique(ids, return_counts=True))
        chosen: list[int] = found
        self.residency.count(self._numbers[layer], dict(zip(found, counts, strict=True)), tokens=len(ids))
        missing = self._fetch(layer, chosen)
        late = len({*missing, *(self._ahead.pop(layer, set()) & set(chosen))})
        self.stats.hits += len(chosen) - late
        self.stats.misses += late
        self._chosen[layer] = chosen
        self._ready.add(layer)
        self._waiting = {weight.tensor.name: weight for weight in self._layers[layer]}
        if len(chosen) >= self._experts - 1 and (1 - ids.shape[1] / self._experts) ** len(ids) < _UNLIKELY:
            self._fetch_ahead(layer)

    def _fetch(self, layer: int, chosen: Sequence[int], *, busy: int = -1) -> list[int]:
        """Have those experts read that are not there. Returns which."""
        parts = self._layers[layer]
        victims, missing = self.residency.request(self._numbers[layer], chosen, busy=busy)
        for victim, expert in zip_longest(victims, missing[: len(victims)]):
            self._replace(victim, parts, expert)
        for weight in parts:
            for expert in missing:
                self._tickets[weight.tensor.name, expert] = weight.read(self._reader, expert)
                self.stats.bytes_read += weight.stride
        return missing

    def _fetch_ahead(self, layer: int) -> None:
        """So many tokens will choose all the experts of the next layer: the disk need not wait to be told."""
        number = self._numbers[layer]
        if number + 1 < len(self._order):
            following = self._order[number + 1]
            if self.residency.fits_beside(number + 1, experts=self._experts, busy=number):
                missing = self._fetch(following, range(self._experts), busy=number)
                self._ahead[following] = set(missing)

    def _replace(self, victim: Expert, parts: Sequence[Weight], expert: int | None) -> None:
        """A victim's memory goes to an expert that is about to be read, if there is one."""
        old = self._layers[self._order[victim.layer]]
        for number, weight in enumerate(old):
            self._finish(self._tickets.pop((weight.tensor.name, victim.expert), None))
            if expert is not None and number < len(parts):
                parts[number].take_pages(expert, source=weight, victim=victim.expert)
            else:
                weight.release(victim.expert)

    def _finish(self, ticket: Ticket | None) -> None:
        """Whatever happens, memory into which a read is under way stays where it is."""
        while ticket is not None and not ticket.wait(1):
            pass

    def _wait_for(self, weight: Weight) -> None:
        """Until the chosen experts' slices of this tensor are there. Raises ModelError if nobody knows which."""
        if weight.layer is None:
            return
        if weight.layer not in self._ready:
            if self._wants(weight.layer):
                raise _not_understood({weight.tensor.name: weight})
            return
        self._waiting.pop(weight.tensor.name, None)
        for expert in self._chosen[weight.layer]:
            ticket = self._tickets.get((weight.tensor.name, expert))
            if ticket is not None:
                self._wait(ticket)
                del self._tickets[weight.tensor.name, expert]
        self._reader.check()


def _by_layer(weights: Sequence[Weight]) -> dict[int, list[Weight]]:
    """A layer's expert tensors in the order in which they are needed."""
    layers: dict[int, list[Weight]] = {}
    order = ("_gate_up_", "_up_", "_gate_", "_down_")
    for weight in weights:
        if weight.layer is not None:
            layers.setdefault(weight.layer, []).append(weight)
    for parts in layers.values():
        parts.sort(key=lambda w: next(i for i, part in enumerate(order) if part in w.tensor.name))
    return dict(sorted(layers.items()))


def _not_understood(waiting: dict[str, Weight]) -> ModelError:
    return ModelError(
        f"llama.cpp computed without {next(iter(waiting))}, which was to be streamed: load the model with --stream off"
    )
