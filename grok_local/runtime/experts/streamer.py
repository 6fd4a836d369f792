"""Reads the chosen experts while llama.cpp computes, and makes it wait for those that are not there yet.

As soon as a router's choice is computed, the experts it names are looked for, and those that are missing are read, in
the order in which the products need them. Then each product waits for its own slices only, so that the disk reads for
the next one meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from grok_local.errors import ModelError
from grok_local.formats.gguf_file import Header
from grok_local.ggml.tensors import read_ints
from grok_local.pages import has_huge_pages
from grok_local.runtime.experts.arena import Arena, Scratch
from grok_local.runtime.experts.capture import Capture, Products
from grok_local.runtime.experts.reader import Reader
from grok_local.runtime.experts.residency import Expert, Residency
from grok_local.runtime.experts.waiting import ExpertStats, Fetches, Waiting
from grok_local.runtime.experts.weights import ExpertTensor, bytes_of_experts, expert_tensors, residents
from grok_local.runtime.graph.router import choices_of, layer_of_choice
from grok_local.runtime.graph.rows import Row
from grok_local.runtime.graph.tap import Ending

__all__ = ["ExpertStreamer"]

_UNLIKELY = 0.05  # chance of an expert to be chosen by no token of a batch
_WIDEST = 1 << 40  # tokens: more than any batch has
_PER_CHOICE = 8  # bytes that llama.cpp sets aside for each of a batch's choices and each expert there might be
_SMALL_PAGES = (
    "huge pages are off, so experts are read in small pieces, which costs up to half of the speed: echo madvise | "
    "sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
)
_PAGED = (
    "the file's system reads through its cache only, which costs up to half of the speed: "
    "a copy on a local disk is read directly"
)


class ExpertStreamer:
    """An observer that holds experts, of which a token has `used` in each layer.

    They take at most the bytes that `room` says there are while so many tokens are evaluated at once. `names` are the
    tensors that RAM holds; dense ones are read at once and stay. `interrupted` is asked while llama.cpp waits.
    Raises ModelError, OSError.
    """

    def __init__(
        self,
        headers: Sequence[Header],
        names: Sequence[str],
        *,
        used: int,
        room: Callable[[int], int],
        interrupted: Callable[[], bool],
    ) -> None:
        self.is_whole = bytes_of_experts(headers, names) <= room(_WIDEST)
        self._layers = _Layers({} if self.is_whole else expert_tensors(headers, names))
        self._room, self._used = room, used
        self._residents = list(residents(headers, names, whole=self.is_whole))
        most = max(self._slots_for(1), self._layers.experts)
        self._arena = Arena(self._layers.spans, slots=most)
        sizes = [self._arena.slot_bytes] * len(self._layers.parts)
        self.residency = Residency(sizes, experts=self._layers.experts, used=used, budget=0)
        self._scratch = Scratch()
        self._reader = Reader([header.path for header in headers])
        self._waiting = Waiting(interrupted)
        self._fetches = Fetches(self._waiting)
        self._capture = Capture(self._residents)
        self._products = Products(weight for parts in self._layers.parts.values() for weight in parts)
        self._evaluation = _Evaluation()
        self._names: frozenset[bytes] | None = None  # once all that is ever used has been seen

    @property
    def stats(self) -> ExpertStats:
        """What was read and waited for since loading."""
        return self._waiting.stats

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes reading slower than it might be."""
        paged = () if self._reader.is_direct else (_PAGED,)
        return paged if self.is_whole or has_huge_pages() else (*paged, _SMALL_PAGES)

    def attach(self) -> None:
        """After llama.cpp has loaded the model: read what stays, and give back what was mapped."""
        self._capture.attach(self._reader.paths)
        self._reader.drop_cache()
        for ticket in [weight.read(self._reader) for weight in self._residents]:
            self._waiting.wait_for(ticket)

    def close(self) -> None:
        """Only when llama.cpp's model is freed."""
        self._reader.close()
        self._arena.close()
        for weight in self._residents:
            weight.region.close()

    # -- an observer ---------------------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[Row]) -> None:
        """Raises ModelError if the file is no longer what it was."""
        self._evaluation = _Evaluation()
        if not self.is_whole:
            self._reader.check()
            self._make_room(len(rows))
        self._waiting.begin()

    def names(self) -> frozenset[bytes] | None:
        """All nodes while some weights may not have been seen, then choices and products."""
        if self._names is None and not self._capture.is_looking:
            self._names = choices_of(self._layers.parts) | self._products.names
        return self._names

    def wants(self, node: int, name: bytes) -> bool:
        """The choices of routers; and products, which wait here for their weights.

        A product is computed alone while the next one's slices are read, in one go with it where they are there.
        """
        if self._capture.is_looking:
            self._capture.look_at(node)
            self._products.look_at(node, name)
        weight = self._products.weight_of(name)
        if weight is not None:
            self._serve(node, name, weight)
            return any(self._is_awaited(other) for other in self._evaluation.needed.values())
        return layer_of_choice(name) in self._layers.numbers

    def see(self, node: int, name: bytes) -> None:
        """Have the experts read that a router has chosen; int32 [tokens, experts used]."""
        layer = layer_of_choice(name)
        if layer is not None and layer in self._layers.numbers:
            self._scratch.look_at(node)
            self.choose(layer, read_ints(node))

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
        self._arena.give_back(self._arena.beyond(0))
        if unfinished:
            raise _not_understood(unfinished.needed)

    # -- room ----------------------------------------------------------------------------------------------------------

    def _slots_for(self, tokens: int) -> int:
        """Experts for which there is room while so many tokens are evaluated at once."""
        if not self._layers.parts:
            return 0
        return self._room(tokens) // (sum(self._layers.spans) + _PER_CHOICE * self._used * min(tokens, 1 << 16))

    def _make_room(self, tokens: int) -> None:
        """While few tokens are evaluated, experts are in the room that more of them would need for other things.

        What a layer took beyond it, because a batch chose more than fit, is given back too.
        """
        slots = self._slots_for(self._scratch.width_for(tokens))
        if self._arena.touched > slots:
            self._give_up(self._arena.beyond(slots))
            self._arena.release(slots)
        if slots * self._arena.slot_bytes != self.residency.budget:
            self.residency.resize(slots * self._arena.slot_bytes)

    def _give_up(self, experts: Sequence[Expert]) -> None:
        for expert in experts:
            self._settle(expert)
            self.residency.drop(expert)
        self._arena.give_back(experts)

    def _settle(self, expert: Expert) -> None:
        for weight in self._layers.parts_by_number(expert.layer):
            self._fetches.settle(weight, expert.expert)

    # -- choose, fetch, wait -------------------------------------------------------------------------------------------

    def choose(self, layer: int, ids: npt.NDArray[np.int32]) -> None:
        """Have the experts read that are not there; int32 [tokens, experts used] is what a layer's router chose.

        Everything else waits until the disk is busy.
        """
        if self._evaluation.needed:
            raise _not_understood(self._evaluation.needed)
        experts, counts = (part.tolist() for part in np.unique(ids, return_counts=True))
        missing = self._fetch(layer, experts)
        self._evaluation.chosen[layer] = experts
        self._evaluation.needed = {weight.name: weight for weight in self._layers.parts[layer]}
        self._evaluation.uncounted = _Choice(layer, ids, dict(zip(experts, counts, strict=True)), missing)
        everything = len(experts) >= self._layers.experts - 1
        if everything and (1 - ids.shape[1] / self._layers.experts) ** len(ids) < _UNLIKELY:
            self._count()
            self._fetch_ahead(layer)

    def _count(self) -> None:
        """Keep the averages and the statistics of the last choice, and find its slots."""
        choice, self._evaluation.uncounted = self._evaluation.uncounted, None
        if choice is None:
            return
        number = self._layers.numbers[choice.layer]
        self.residency.count(number, choice.counts, tokens=len(choice.ids))
        early = self._evaluation.early.pop(choice.layer, set())
        late = len({*choice.missing, *(early & choice.counts.keys())})
        self.stats.hits += len(choice.counts) - late
        self.stats.misses += late
        self._evaluation.slots[choice.layer] = self._arena.slots_of(number, choice.ids)

    def settle(self, layer: int) -> None:
        """Wait for all that a layer has chosen, as its products do one after the other."""
        self._count()
        for weight in self._layers.parts[layer]:
            self._wait_for(weight)

    def _fetch(self, layer: int, chosen: Sequence[int], *, busy: int = -1) -> list[int]:
        """Have those experts read that are not there. Returns which."""
        number = self._layers.numbers[layer]
        victims, missing = self.residency.request(number, chosen, busy=busy)
        for victim in victims:
            self._settle(victim)
        self._arena.give_back(victims)
        slots = {expert: self._arena.take(Expert(number, expert)) for expert in missing}
        for part, weight in enumerate(self._layers.parts[layer]):
            for expert, slot in slots.items():
                at = self._arena.position(slot, part)
                self._fetches.add(weight, expert, weight.read(self._reader, expert, region=self._arena.region, at=at))
        return missing

    def _fetch_ahead(self, layer: int) -> None:
        """So many tokens will choose all the experts of the next layer: the disk need not wait to be told."""
        number, experts = self._layers.numbers[layer], self._layers.experts
        following = self._layers.after(layer)
        if following is not None and self.residency.fits_beside(number + 1, experts=experts, busy=number):
            self._evaluation.early[following] = set(self._fetch(following, range(experts), busy=number))

    def _serve(self, node: int, name: bytes, weight: ExpertTensor) -> None:
        """Have a product use its slots when they are filled. Raises ModelError if nobody knows which."""
        self._count()
        slots = self._evaluation.slots.get(weight.layer)
        part = self._layers.parts[weight.layer].index(weight)
        address = self._arena.region.address + self._arena.position(0, part) + weight.slack
        stride = self._arena.slot_bytes
        if slots is None or not self._products.redirect(node, name, address=address, stride=stride, slots=slots):
            raise _not_understood({weight.name: weight})
        self._wait_for(weight)
        self._reader.check()

    def _wait_for(self, weight: ExpertTensor) -> None:
        self._evaluation.needed.pop(weight.name, None)
        self._fetches.wait_for(weight, self._evaluation.chosen[weight.layer])

    def _is_awaited(self, weight: ExpertTensor) -> bool:
        return self._fetches.is_awaited(weight, self._evaluation.chosen[weight.layer])


class _Choice(NamedTuple):
    """What a layer's router chose, [tokens, experts used]; by expert how often, and who had to be read."""

    layer: int
    ids: npt.NDArray[np.int32]
    counts: dict[int, int]
    missing: list[int]


class _Evaluation:
    """What is known of the evaluation under way."""

    def __init__(self) -> None:
        self.chosen: dict[int, list[int]] = {}  # by layer
        self.slots: dict[int, npt.NDArray[np.int32]] = {}  # by layer: of the chosen, [tokens, experts used]
        self.needed: dict[str, ExpertTensor] = {}  # by the last layer that has chosen, in the order of the products
        self.uncounted: _Choice | None = None
        self.early: dict[int, set[int]] = {}  # experts that were read before their layer chose


class _Layers:
    """The layers that have experts, numbered in their order, and each one's tensors as they are needed."""

    _ORDER = ("_gate_up_", "_gate_", "_up_", "_down_")  # llama.cpp's

    def __init__(self, tensors: dict[int, list[ExpertTensor]]) -> None:
        self.parts = {layer: sorted(tensors[layer], key=self._turn) for layer in sorted(tensors)}
        self.numbers: dict[int | None, int] = {layer: number for number, layer in enumerate(self.parts)}
        self.experts = max((parts[0].tensor.shape[0] for parts in self.parts.values()), default=0)
        turns = max(map(len, self.parts.values()), default=0)
        self.spans = [max(p[turn].span for p in self.parts.values() if turn < len(p)) for turn in range(turns)]
        self._by_number = list(self.parts)

    def _turn(self, weight: ExpertTensor) -> int:
        return next(turn for turn, part in enumerate(self._ORDER) if part in weight.name)

    def parts_by_number(self, number: int) -> list[ExpertTensor]:
        """The tensors of the layer of that number."""
        return self.parts[self._by_number[number]]

    def after(self, layer: int) -> int | None:
        """The next layer with experts."""
        number = self.numbers[layer] + 1
        return self._by_number[number] if number < len(self._by_number) else None


def _not_understood(needed: dict[str, ExpertTensor]) -> ModelError:
    return ModelError(
        f"llama.cpp computed without {next(iter(needed))}, which was to be streamed: load the model with --stream off"
    )
