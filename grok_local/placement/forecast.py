"""How fast a plan decodes: the bytes a token reads from each place, over that place's speed.

Places work one after the other, as layers do, so their times add up. The CPU's speed is that of llama.cpp's own matrix
products on each type, measured on this machine, which is the memory's bandwidth where there are cores enough to use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from grok_local.machine.facts import Device, Machine
from grok_local.placement.plan import Plan
from grok_local.placement.shape import Role, Weight
from grok_local.placement.wishes import RAM

__all__ = ["Forecast", "forecast", "limit"]

ASSUMED_DEVICE_SPEED = 600e9  # bytes a second, of a GPU nobody measured: two thirds of a 24 GB card's nominal 936e9
_UNKNOWN_DISK = 2e9  # bytes a second
_UNKNOWN_RAM = 20e9  # bytes a second
# Of the disk's speed, where pages are read on demand; derived from 0.53 to 0.61 tokens a second of a 3.7 GB model under
# a limit of 1.6 GB on a disk of 1.4 GB/s.
_MAPPED_SHARE = 0.25
_WIDE_GAIN = 4.0  # how many tokens a CPU takes through weights in the time of one, where nobody measured it
_SECONDS_PER_LAYER = 35e-6  # of what is no matrix product: norms, attention of few tokens, waiting for each other
# From one place to the next and back: of a worker measured on the loopback, of GPUs a guess.
_SECONDS_PER_HOP = {"gpu": 30e-6, "integrated": 30e-6, "worker": 300e-6}


@dataclass(frozen=True)
class Reading:
    """What one place does for a token: bytes read there, and seconds."""

    place: str
    nbytes: float
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """`readings` add up to the time of a step with an almost empty context; `full` is with a full one. A step gives a
    token to each of `sequences`.
    """

    readings: tuple[Reading, ...]
    full_seconds: float
    assumptions: tuple[str, ...]
    sequences: int = 1

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(reading.seconds for reading in self.readings)

    @property
    def speed(self) -> float:
        """Tokens a second of all sequences together, context almost empty."""
        return self.sequences / self.seconds if self.seconds else 0.0

    @property
    def full_speed(self) -> float:
        """Tokens a second of all sequences together, contexts full."""
        return self.sequences / self.full_seconds if self.full_seconds else 0.0

    @property
    def from_disk(self) -> float:
        """Bytes that a step reads from the disk."""
        return sum(reading.nbytes for reading in self.readings if reading.place == "disk")


def forecast(plan: Plan, *, together: int = 1) -> Forecast:
    """What the plan predicts for decoding, a token at a time of so many sequences."""
    return _Forecaster(plan, together).forecast()


def limit(plan: Plan) -> float:
    """Tokens a second if nothing but reading took time, each byte at the speed of where it lies; 0 if one is unknown.

    RAM's speed is the highest that was seen there.
    """
    speeds = {device.name: device.speed for device in plan.machine.devices} | {
        RAM: plan.machine.speeds.memory,
        "disk": plan.machine.disk_speed,
    }
    read = {reading.place: reading.nbytes for reading in forecast(plan).readings if reading.nbytes}
    if not all(speeds[place] for place in read):
        return 0.0
    return 1 / sum(nbytes / speeds[place] for place, nbytes in read.items())


class _Forecaster:
    def __init__(self, plan: Plan, together: int) -> None:
        self._plan, self._together = plan, together
        self._machine: Machine = plan.machine
        self._devices = {device.name: device for device in plan.machine.devices}
        self._assumptions: dict[str, None] = {}

    def forecast(self) -> Forecast:
        nbytes = dict.fromkeys((share.place for share in self._plan.shares), 0.0)
        seconds = dict(nbytes)
        for weight in self._plan.model.weights:
            place = self._plan.place_of(weight)
            nbytes[place] += self._read(weight)
            seconds[place] += self._seconds(place, weight)
        readings = [Reading(place, nbytes[place], seconds[place]) for place in nbytes if nbytes[place]]
        readings += [*self._disk(), self._rest()]
        total = sum(reading.seconds for reading in readings)
        full = total + self._cache_seconds() * self._together / self._plan.wishes.sequences
        return Forecast(tuple(readings), full, tuple(self._assumptions), self._together)

    def _read(self, weight: Weight) -> float:
        """Bytes that a step reads of a tensor; of experts, those of any that one of the sequences chooses."""
        if weight.role is not Role.EXPERTS or self._together == 1:
            return weight.read
        model = self._plan.model
        return weight.nbytes * (1 - (1 - model.experts_used / model.experts) ** self._together)

    def _seconds(self, place: str, weight: Weight) -> float:
        """The time of reading, or of computing where that is longer: with several sequences the CPU's is."""
        speed = self._speed(place, weight)
        reading = self._read(weight) / speed
        if self._together == 1 or place != RAM:
            return reading
        return max(reading, self._together * weight.read / self._wide_speed(weight, speed))

    def _wide_speed(self, weight: Weight, speed: float) -> float:
        known = self._machine.speeds.prompt_plain.get(weight.type)
        if not known:
            self._assumptions[f"computing {_WIDE_GAIN:g} sequences together takes as long as reading the weights"] = (
                None
            )
        return known or _WIDE_GAIN * speed

    def _speed(self, place: str, weight: Weight) -> float:
        if place == RAM:
            return self._cpu_speed(weight)
        return self._device_speed(self._devices[place], weight.type)

    def _cpu_speed(self, weight: Weight) -> float:
        speeds = self._machine.speeds
        table = speeds.repacked if weight.name in self._plan.repacked else speeds.plain
        known = table.get(weight.type) or speeds.memory
        if not known:
            self._assumptions[f"RAM's speed for {weight.type} is not known: taken as {_UNKNOWN_RAM / 1e9:.0f} GB/s"] = (
                None
            )
        return known or _UNKNOWN_RAM

    def _device_speed(self, device: Device, kind: str = "") -> float:
        if device.speed:
            return device.speed
        if device.kind == "worker":
            self._assumptions[f"{device.name}: its speed is not known, taken as this machine's"] = None
            return self._machine.speeds.plain.get(kind) or self._machine.speeds.memory or _UNKNOWN_RAM
        speed = ASSUMED_DEVICE_SPEED / 1e9
        self._assumptions[f"speeds of GPUs are not known: taken as {speed:.0f} GB/s"] = None
        return ASSUMED_DEVICE_SPEED

    def _disk(self) -> list[Reading]:
        """What is read of streamed experts hardly hides behind computing, as measured: they share memory and cores."""
        plan = self._plan
        if not plan.disk:
            return []
        experts_in_ram = [w for w in plan.model.weights if w.role is Role.EXPERTS and plan.place_of(w) == RAM]
        routed = sum(map(self._read, experts_in_ram))
        experts = plan.disk + plan.ram.experts
        held = plan.room_for_experts(self._together) if plan.streamed else plan.ram.experts
        nbytes = routed * (experts - held) / experts
        if not self._machine.disk_speed:
            self._assumptions["the disk's speed is not known: taken as 2 GB/s"] = None
        seconds = nbytes / (self._machine.disk_speed or _UNKNOWN_DISK)
        if plan.streamed:
            self._assumptions["tokens choose their experts evenly"] = None
            return [Reading("disk", nbytes, seconds)]
        self._assumptions["mapped weights come from the disk at a quarter of its speed"] = None
        return [Reading("disk", nbytes, seconds / _MAPPED_SHARE)]

    def _rest(self) -> Reading:
        hops = sum(_SECONDS_PER_HOP[self._devices[name].kind] for name in self._hops())
        return Reading("between", 0, self._plan.model.layers * _SECONDS_PER_LAYER + hops)

    def _hops(self) -> list[str]:
        """Each device at every change from one place to another, in the order of the layers."""
        way = [RAM]
        for weight in sorted(
            (w for w in self._plan.model.weights if w.rows > 1 and w.role in (Role.DENSE, Role.EXPERTS)),
            key=lambda w: (w.layer or 0, w.role is Role.EXPERTS),
        ):
            place = self._plan.place_of(weight)
            if place != way[-1]:
                way.append(place)
        return [place for place in way if place != RAM]

    def _cache_seconds(self) -> float:
        """Reading a full KV cache, at each place's speed."""
        total = 0.0
        for share in self._plan.shares:
            speed = self._machine.speeds.memory or _UNKNOWN_RAM
            total += share.kv / (speed if share.place == RAM else self._device_speed(self._devices[share.place]))
        return total
