"""What a plan needs to know of a machine: memory, devices, and how fast each of them feeds the matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Device", "Machine", "Speeds"]

Kind = Literal["gpu", "integrated", "worker"]


@dataclass(frozen=True)
class Speeds:
    """Bytes of weights a second that the CPU's matrix products get through, all threads together, by GGML type name.

    `plain` is for weights as they lie in the file, `repacked` for llama.cpp's rearranged copies. A type is in
    `repacked` only if a child process survived it and computed the right numbers. `all_extra`: llama.cpp may choose its rearranged
    buffer types itself (on processors with AMX that is what crashes in some builds).
    """

    plain: Mapping[str, float] = field(default_factory=dict)
    repacked: Mapping[str, float] = field(default_factory=dict)
    all_extra: bool = False
    memory: float = 0.0  # bytes a second, all threads reading; the limit of every speed above


@dataclass(frozen=True)
class Device:
    """A place for weights other than the machine's own RAM. Sizes in bytes."""

    name: str  # llama.cpp's: CUDA0, Metal, RPC0
    description: str
    kind: Kind
    total: int
    free: int
    speed: float = 0.0  # bytes of weights a second; 0: not known
    endpoint: str = ""  # of a worker: HOST:PORT


@dataclass(frozen=True)
class Machine:
    """A machine, this one or a described one. Sizes in bytes, speeds in bytes a second, 0 where unknown."""

    memory: int  # RAM that this process may use at all; a container's limit counts
    available: int  # of it, what is not used by others
    cores: int
    speeds: Speeds
    disk_speed: float = 0.0
    devices: tuple[Device, ...] = ()
    unified: bool = False  # the devices' memory is the RAM
