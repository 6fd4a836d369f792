"""What each place holds where tensors are placed so and so: weights, KV cache, and what is computed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from grok_local.errors import PlacementError
from grok_local.machine.facts import Device, Machine
from grok_local.placement.plan import Places, Share
from grok_local.placement.shape import ModelShape, Role, Weight
from grok_local.placement.sizes.compute import (
    OFFLOAD_TOKENS,
    Copies,
    compute_bytes,
    idle_bytes,
    largest_per_token,
    scores_per_token,
)
from grok_local.placement.sizes.refusals import takes
from grok_local.placement.wishes import RAM, Wishes, attended_by, cells_of, may_use_devices
from grok_local.units import format_bytes

__all__ = ["Setting", "check_devices", "is_shared", "ram_budget", "ram_reserve", "rooms", "shares_of", "widest_batch"]

_ANY_BATCH = 1 << 30
_SEVERAL = 8 << 20
_MARGIN = 512_000_000  # bytes of a device that stay free: its context, fragmentation


def ram_reserve(memory: int) -> int:
    """Bytes of RAM that are left to the system and to this process itself."""
    return int(min(max(0.05 * memory, 2e9), 8e9, 0.25 * memory))


def ram_budget(machine: Machine, wishes: Wishes) -> int:
    """Bytes of RAM that may be used. Raises PlacementError."""
    wished = wishes.memory
    if wished is None:
        return machine.available - ram_reserve(machine.memory)
    if wished > machine.memory:
        raise PlacementError(f"--memory {format_bytes(wished)}: there are {format_bytes(machine.memory)} of RAM")
    return wished


def widest_batch(model: ModelShape, devices: Sequence[Device], wishes: Wishes, context: int) -> int:
    """Tokens at once, at most: a power of two, with which a device computes no tensor that is larger than it takes."""
    sizes = [device.largest for device in devices if device.largest and device.most != 0]
    if not sizes or not may_use_devices(wishes):
        return _ANY_BATCH
    most = max(min(sizes) // largest_per_token(model, attended_by(context, wishes)), 1)
    return max(1 << most.bit_length() - 1, wishes.sequences)


@dataclass(frozen=True)
class Setting:
    """The same wherever tensors are. `context`: tokens of each sequence. `budget`: bytes of RAM that may be used.

    `batch`: tokens evaluated at once. Where experts are `streamed`, devices work on what they hold and nothing else.
    """

    model: ModelShape
    machine: Machine
    wishes: Wishes
    context: int
    budget: int
    batch: int
    streamed: bool

    @property
    def cells(self) -> int:
        """Of the KV cache, of all sequences together."""
        return cells_of(self.context, self.wishes)

    @property
    def attended(self) -> int:
        """Cells that a token is compared with."""
        return attended_by(self.context, self.wishes)

    @cached_property
    def tokens(self) -> int:
        """Evaluated at once, as llama.cpp rounds them up to give each sequence as many."""
        sequences = self.wishes.sequences
        return -(-min(self.batch, self.cells) // sequences) * sequences

    @property
    def several(self) -> int:
        """Bytes that a place takes beside what it computes where there are several sequences."""
        return _SEVERAL if self.wishes.sequences > 1 else 0

    def kv(self, layer: int) -> int:
        """Bytes of a layer's KV cache."""
        return self.model.kv_bytes(layer, context=self.cells, kv_type=self.wishes.kv_type)

    @property
    def offloading(self) -> list[Device]:
        """Devices that take over from RAM: llama.cpp gives it all to the first of them that it uses."""
        return [] if self.streamed else [device for device in self.machine.devices if device.offloads]


def rooms(setting: Setting, *, copies: int = 0, unused: Container[str] = (), reserved: int = 0) -> list[int]:
    """Bytes of each device for weights and KV cache, beside what it computes if everything is there.

    The first that can take over from RAM gets `copies`: 0 none, 1 of experts, 2 also of the output and the KV cache.
    What is `unused` has no room. Devices whose memory is the RAM share what is left there beside `reserved` bytes.
    """
    devices = [device for device in setting.machine.devices if device.name not in unused]
    over = next((device.name for device in devices if device.offloads), "")
    capacities = _shared_capacities(setting, devices, reserved)
    return [
        _room(setting, device, capacities[device.name], copies * (device.name == over)) if device in devices else 0
        for device in setting.machine.devices
    ]


def _shared_capacities(setting: Setting, devices: Sequence[Device], reserved: int) -> dict[str, int]:
    capacities = {device.name: max(_capacity(device), 0) for device in devices}
    sharing = [device.name for device in devices if is_shared(setting.machine, device)]
    total, common = sum(capacities[name] for name in sharing), max(setting.budget - reserved, 0)
    if total > common:
        capacities |= {name: common * capacities[name] // total for name in sharing}
    return capacities


def is_shared(machine: Machine, device: Device) -> bool:
    """Whether the device's memory is the machine's RAM; a worker's is another machine's."""
    return machine.unified and device.kind == "integrated"


def _room(setting: Setting, device: Device, capacity: int, copies: int) -> int:
    worst = _worst_copies(setting, device, copies)
    compute = compute_bytes(
        setting.model, context=setting.attended, batch=setting.tokens, copies=worst, piece=device.piece
    )
    return max(capacity - compute - setting.several, 0)


def _worst_copies(setting: Setting, device: Device, copies: int) -> Copies:
    several = len(setting.machine.devices) > 1
    taken = [weight for weight in setting.model.weights if weight.multiplies and takes(device, weight)]
    return Copies(
        weights=(2 if several else 1) * _largest(w for w in taken if w.layer is not None) * (copies > 0),
        output=_largest(w for w in taken if w.layer is None) * (copies > 1),
        kv=max(map(setting.kv, range(setting.model.layers))) * (copies > 1),
        piped=several and not copies,
    )


def _capacity(device: Device) -> int:
    return device.free - _MARGIN if device.most is None else device.most


def check_devices(shares: Sequence[Share]) -> None:
    """Raises PlacementError for devices, all but the last of `shares`, that hold more than they have room for."""
    over = [share for share in shares[:-1] if share.used > max(share.capacity, 0)]
    if over:
        raise PlacementError(
            f"{share.place} would hold {format_bytes(share.used)} and has room for "
            f"{format_bytes(max(share.capacity, 0))}: leave an --override out, or name another device"
            for share in over
        )


def shares_of(setting: Setting, places: Places) -> list[Share]:
    """The devices' shares, then RAM's."""
    return _Shares(setting, places).all()


@dataclass(frozen=True)
class _Shares:
    setting: Setting
    places: Places

    def all(self) -> list[Share]:
        machine = self.setting.machine
        rooms = {device.name: _capacity(device) for device in machine.devices} | {RAM: self.setting.budget}
        shares = [self._share(place, room) for place, room in rooms.items()]
        taken = sum(s.used for s, device in zip(shares, machine.devices, strict=False) if is_shared(machine, device))
        return [*shares[:-1], replace(shares[-1], capacity=shares[-1].capacity - taken)]

    def _share(self, place: str, capacity: int) -> Share:
        sizes = dict.fromkeys(Role, 0)
        for weight in self._weights.get(place, ()):
            sizes[weight.role] += weight.nbytes
        dense = sizes[Role.DENSE] + sizes[Role.OUTPUT] + sizes[Role.INPUT]
        compute = self._in_ram() if place == RAM else self._on_device(place) if place in self._used else 0
        return Share(place, capacity, dense, sizes[Role.EXPERTS], sum(self._kv.get(place, [])), compute)

    @cached_property
    def _placed(self) -> list[tuple[Weight, str]]:
        return [(weight, self.places.of(weight)) for weight in self.setting.model.weights]

    @cached_property
    def _weights(self) -> dict[str, list[Weight]]:
        """By place. What is tied to the embedding is no copy in RAM."""
        found: dict[str, list[Weight]] = {}
        for weight, place in self._placed:
            if not (weight.tied and place == RAM):
                found.setdefault(place, []).append(weight)
        return found

    @cached_property
    def _kv(self) -> dict[str, list[int]]:
        """The layers' KV caches, by place."""
        found: dict[str, list[int]] = {}
        for layer in range(self.setting.model.layers):
            found.setdefault(self.places.of_layer(layer), []).append(self.setting.kv(layer))
        return found

    @cached_property
    def _used(self) -> list[str]:
        names = [device.name for device in self.setting.machine.devices]
        return [name for name in names if self._weights.get(name) or self._kv.get(name)]

    # -- what is computed ----------------------------------------------------------------------------------------------

    def _on_device(self, place: str) -> int:
        takes_over = self._target is not None and place == self._target.name
        return self.setting.several + compute_bytes(
            self.setting.model,
            context=self.setting.attended,
            batch=self.setting.tokens,
            attention=place in self._kv or (takes_over and RAM in self._kv),
            network=self._has_network(place) or (takes_over and self._has_network(RAM)),
            output=self._has(place, Role.OUTPUT) or (takes_over and self._outputs_in_ram),
            copies=self._copies if takes_over else Copies(piped=self._piped),
            piece=next(device.piece for device in self.setting.machine.devices if device.name == place),
        )

    def _in_ram(self) -> int:
        return max(self._idle(), *self._works_in_ram()) + self.setting.several

    def _idle(self) -> int:
        setting = self.setting
        return idle_bytes(setting.model, context=setting.attended, batch=setting.tokens, piped=self._piped)

    def _works_in_ram(self) -> list[int]:
        """Without a device that takes over: for a batch. With one: for a few tokens, and for a batch what is left."""
        works = RAM in self._kv, self._has_network(RAM), self._outputs_in_ram
        tokens = self.setting.tokens
        if not self._target:
            return [self._busy(tokens, *works)]
        left = [weight for weight in self._multiplied_in_ram if not takes(self._target, weight)]
        network, output = (any((w.layer is None) == outside for w in left) for outside in (False, True))
        few = min(tokens, OFFLOAD_TOKENS - 1)
        return [self._busy(few, *works) + self._scores_in_ram(few), self._busy(tokens, False, network, output)]

    def _scores_in_ram(self, few: int) -> int:
        """Bytes of a batch's scores beyond a few tokens': where each sequence has a part of the KV cache, its share of
        the batch is too few tokens for a device.
        """
        setting = self.setting
        if RAM not in self._kv or not setting.wishes.separate:
            return 0
        return (setting.tokens - few) * scores_per_token(setting.model, setting.attended)

    def _busy(self, batch: int, attention: bool, network: bool, output: bool) -> int:
        if not (attention or network or output):
            return 0
        return compute_bytes(
            self.setting.model,
            context=self.setting.attended,
            batch=batch,
            attention=attention,
            network=network,
            output=output,
        )

    @cached_property
    def _target(self) -> Device | None:
        """The device that takes over what would be done in RAM for a batch."""
        return next((device for device in self.setting.offloading if device.name in self._used), None)

    @cached_property
    def _copies(self) -> Copies:
        copied = [weight for weight in self._multiplied_in_ram if self._target and takes(self._target, weight)]
        layered = [weight for weight in copied if weight.layer is not None]
        # Beside another device's layers llama.cpp finds no place for the next copy before the last is done with.
        elsewhere = {self.places.of_layer(w.layer) for w in layered if w.layer is not None} - {
            RAM,
            self._name_of_target,
        }
        return Copies(
            weights=(2 if elsewhere else 1) * _largest(layered),
            output=_largest(weight for weight in copied if weight.layer is None),
            kv=max(self._kv.get(RAM, [0])),
            piped=self._piped,
        )

    @property
    def _name_of_target(self) -> str:
        return self._target.name if self._target else ""

    @cached_property
    def _piped(self) -> bool:
        """Whether llama.cpp has devices work on several batches, each a batch further: all is on them, and no tensor is
        elsewhere than its layer.
        """
        workers = {device.name for device in self.setting.machine.devices if device.kind == "worker"}
        if len(self._used) < 2 or self._multiplied_in_ram or workers & set(self._used):
            return False
        return all(w.layer is None or place == self.places.of_layer(w.layer) for w, place in self._placed)

    @cached_property
    def _multiplied_in_ram(self) -> list[Weight]:
        return [weight for weight, place in self._placed if place == RAM and weight.multiplies]

    def _has(self, place: str, role: Role) -> bool:
        return any(weight.role is role for weight in self._weights.get(place, ()))

    def _has_network(self, place: str) -> bool:
        dense = self.setting.model.has_dense_network and place in self._kv
        return dense or self._has(place, Role.EXPERTS)

    @property
    def _outputs_in_ram(self) -> bool:
        return any(weight.role is Role.OUTPUT for weight in self._multiplied_in_ram)


def _largest(weights: Iterable[Weight]) -> int:
    return max((weight.nbytes for weight in weights), default=0)
