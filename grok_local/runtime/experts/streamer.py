"""Reads the chosen experts while llama.cpp computes, and makes it wait for those that are not there yet.

llama.cpp asks before each node of its graph whether we want to see it. The router's choice (`ffn_moe_topk`) is one we
do: as soon as it is computed, the experts it names are looked for, and those that are missing are read, in the order
in which the products need them. Then each product waits for its own slices only, so that the disk reads for the next
one meanwhile. (What llama.cpp calls a node's name ends in its layer; llama-graph.cpp, build_moe_ffn.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError
from grok_local.ggml import tensors as ggml_tensors
from grok_local.gguf_file import Header
from grok_local.runtime.experts.reader import Reader, Ticket
from grok_local.runtime.experts.residency import Expert, Residency
from grok_local.runtime.experts.weights import Mapping, Weight, mappings, weights_of

__all__ = ["ExpertStats", "ExpertStreamer", "Watcher"]

Watcher = Callable[[int, npt.NDArray[np.int32]], None]  # layer; int32 [tokens, experts used]

_TOPK = b"ffn_moe_topk-"
_LOOK = 0.05  # seconds after which a waiting thread looks whether it is interrupted
_CAPTURES = 4  # evaluations after which every weight that is ever used has been seen


@dataclass
class ExpertStats:
    """Counted since loading. A hit is an expert, chosen in a layer for one or more tokens, that was in memory."""

    bytes_read: int = 0
    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0  # in which nothing was computed, because an expert was being read
    seconds: float = 0.0  # evaluating, waiting included
    budget: int = 0  # bytes that experts may take
    held: int = 0  # bytes they take


class ExpertStreamer:
    """The experts of a model, in at most `budget` bytes of memory.

    `names` are the tensors that RAM holds; dense ones are read at once and stay. `interrupted` is asked while waiting.
    """

    def __init__(
        self, headers: Sequence[Header], names: Sequence[str], *, budget: int, huge: bool, interrupted: Callable[[], bool]
    ) -> None:
        self.stats = ExpertStats(budget=budget)
        self.watcher: Watcher | None = None
        self.error: BaseException | None = None
        self._interrupted = interrupted
        self._reader = Reader([header.path for header in headers])
        found = list(weights_of(headers, names, huge=huge))
        self._weights = {weight.tensor.name.encode(): weight for weight in found}
        self._layers = _by_layer(found)
        self._experts = max((weight.tensor.shape[0] for weight in found if weight.layer is not None), default=0)
        self._order = list(self._layers)
        self._numbers = {layer: number for number, layer in enumerate(self._order)}
        sizes = [sum(weight.stride for weight in parts) for parts in self._layers.values()]
        self._residency = Residency(sizes, experts=self._experts, budget=budget)
        self._tickets: dict[tuple[str, int], Ticket] = {}
        self._mappings: list[Mapping] = []
        self._unseen = dict(self._weights)
        self._captures = 0
        self._products: dict[bytes, Weight] = {}
        self._chosen: dict[int, list[int]] = {}
        self._waiting: dict[str, Weight] = {}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    def attach(self) -> None:
        """After llama.cpp has loaded the model: read the dense tensors, and give back what was mapped."""
        self._mappings = mappings(self._reader.paths)
        for mapping in self._mappings:
            mapping.give_back()
        self._reader.drop_cache()
        dense = [weight.read(self._reader) for weight in self._weights.values() if weight.layer is None]
        for ticket in dense:
            self._wait(ticket)

    def close(self) -> None:
        """Only when llama.cpp's model is freed."""
        self._reader.close()

    def should_abort(self) -> bool:
        """Whether what is being computed is of no use."""
        return self.error is not None

    def begin(self) -> None:
        """Before an evaluation. Raises ModelError if the file is no longer what it was."""
        self.error = None
        self._waiting.clear()
        self._reader.check()
        self._started = time.monotonic()

    def finish(self) -> None:
        """After it. Raises what went wrong meanwhile."""
        self.stats.seconds += time.monotonic() - self._started
        self.stats.held = self._residency.used
        self._captures += 1
        if self._captures == _CAPTURES:
            self._unseen.clear()
        if self.error is None and self._waiting and not self._interrupted():
            self.error = _not_understood(self._waiting)
        if self.error is not None:
            raise self.error

    # -- llama.cpp asks ------------------------------------------------------------------------------------------------

    def _on_node(self, node: int, ask: bool, _: Any) -> bool:
        # An exception would get lost in C, and wrong numbers come out.
        try:
            return self._asked(node) if ask else self._computed(node)
        except BaseException as error:
            self.error = self.error or error
            return ask

    def _asked(self, node: int) -> bool:
        """Whether to stop after this node, before which everything it needs is waited for."""
        if self.error is not None:
            return True
        if self._unseen:
            self._capture(node)
        name = ggml_tensors.tensor_name(node)
        if name.startswith(_TOPK):
            return self._is_of_interest(int(name[len(_TOPK) :]))
        weight = self._products.get(name)
        if weight is None:
            return False
        self._wait_for(weight)
        # Computed alone while the next product's slices are read; in one go with it where they are there.
        return any(not ticket.done for ticket in self._open_tickets())

    def _is_of_interest(self, layer: int) -> bool:
        if layer not in self._numbers:
            return self.watcher is not None
        complete = self._residency.is_complete(self._numbers[layer], experts=self._experts)
        return self.watcher is not None or not complete or bool(self._unseen)

    def _computed(self, node: int) -> bool:
        name = ggml_tensors.tensor_name(node)
        if name.startswith(_TOPK) and self.error is None:
            layer, ids = int(name[len(_TOPK) :]), ggml_tensors.read_ints(node)
            if self.watcher is not None:
                self.watcher(layer, ids)
            if layer in self._numbers:
                self._fetch(layer, ids)
        return self.error is None and not self._interrupted()

    def _capture(self, node: int) -> None:
        """Have llama.cpp read the weights this node uses from our memory from now on."""
        for source in ggml_tensors.sources(node):
            weight = self._unseen.get(ggml_tensors.tensor_name(source))
            if weight is None or not self._is_mapped(source, weight):
                continue
            ggml_tensors.move_data(source, weight.region.address)
            if weight.layer is not None:
                self._products[ggml_tensors.tensor_name(node)] = weight
            del self._unseen[weight.tensor.name.encode()]

    def _is_mapped(self, tensor: int, weight: Weight) -> bool:
        """Whether it is this one: the output matrix on a device may be the embedding by another name."""
        address = ggml_tensors.data_address(tensor)
        places = (m.address(weight.tensor.offset) for m in self._mappings if m.file == weight.file)
        return address in places and ggml_tensors.size_of(tensor) == weight.tensor.nbytes

    # -- experts -------------------------------------------------------------------------------------------------------

    def _fetch(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """Have the chosen experts read that are not there."""
        if self._waiting:
            raise _not_understood(self._waiting)
        number, parts = self._numbers[layer], self._layers[layer]
        found, counts = np.unique(ids, return_counts=True)
        chosen = [int(expert) for expert in found[np.argsort(counts, kind="stable")]]
        victims, missing = self._residency.request(number, chosen)
        for victim, expert in zip_longest(victims, missing[: len(victims)]):
            self._replace(victim, parts, expert)
        self.stats.hits += len(chosen) - len(missing)
        self.stats.misses += len(missing)
        for weight in parts:
            for expert in missing:
                self._tickets[weight.tensor.name, expert] = weight.read(self._reader, expert)
                self.stats.bytes_read += weight.stride
        self._chosen[layer] = chosen
        self._waiting = {weight.tensor.name: weight for weight in parts}

    def _replace(self, victim: Expert, parts: Sequence[Weight], expert: int | None) -> None:
        """A victim's memory goes to an expert that is about to be read, if there is one."""
        old = self._layers[self._order[victim.layer]]
        for number, weight in enumerate(old):
            ticket = self._tickets.pop((weight.tensor.name, victim.expert), None)
            if ticket:
                self._wait(ticket)
            if expert is not None and number < len(parts):
                parts[number].take_pages(expert, source=weight, victim=victim.expert)
            else:
                weight.release(victim.expert)

    def _wait_for(self, weight: Weight) -> None:
        """Until the chosen experts' slices of this tensor are there."""
        if self._waiting.pop(weight.tensor.name, None) is None:
            return
        assert weight.layer is not None
        for expert in self._chosen[weight.layer]:
            ticket = self._tickets.pop((weight.tensor.name, expert), None)
            if ticket is not None:
                self._wait(ticket)
        self._reader.check()

    def _open_tickets(self) -> Iterator[Ticket]:
        yield from self._tickets.values()

    def _wait(self, ticket: Ticket) -> None:
        if not ticket.done:
            started = time.monotonic()
            while not ticket.wait(_LOOK) and not self._interrupted():
                pass
            self.stats.wait_seconds += time.monotonic() - started
        if ticket.error is not None:
            raise ticket.error


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
