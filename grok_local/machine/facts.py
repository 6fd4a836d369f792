"""What a plan needs to know of a machine: memory, devices, and how fast each of them feeds the matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["REPACK_ROWS", "Device", "DeviceClass", "Machine", "Say", "Speeds"]

REPACK_ROWS = 8  # llama.cpp interleaves so many; trials.py tests with an odd multiple of it

_PROMPT_SHARE = 3  # tokens of prompts for each that is generated: long prompts are what hurts

DeviceClass = Literal["gpu", "integrated", "worker"]
Say: TypeAlias = Callable[[str], None]  # is told what takes long


@dataclass(frozen=True)
class Speeds:
    """Bytes of weights a second that the CPU's matrix products get through, all threads together, by GGML type name.

    `plain` is for weights as they lie in the file, `repacked` for llama.cpp's rearranged copies. A type is in
    `repacked` only if a child process survived it and computed the right numbers. `all_extra`: llama.cpp may choose
    its rearranged buffer types itself (on processors with AMX that is what crashes in some builds). The `prompt_`
    speeds are with many tokens at once, as if each read its weights, for experts of the types that may be repacked.
    """

    plain: Mapping[str, float] = field(default_factory=dict)
    repacked: Mapping[str, float] = field(default_factory=dict)
    all_extra: bool = False
    memory: float = 0.0  # bytes a second, all threads reading; the limit of decoding
    prompt_plain: Mapping[str, float] = field(default_factory=dict)
    prompt_repacked: Mapping[str, float] = field(default_factory=dict)

    def gains(self, type: str, *, experts: bool) -> bool:
        """Whether repacking makes it faster: decoding, and with experts a token decoded and some of a prompt together,
        since llama.cpp takes the tokens of a prompt through repacked experts one by one.
        """
        if self.repacked.get(type, 0.0) <= self.plain.get(type, 0.0):
            return False
        before, after = self.prompt_plain.get(type), self.prompt_repacked.get(type)
        if not (experts and before and after):
            return True
        return 1 / self.repacked[type] + _PROMPT_SHARE / after < 1 / self.plain[type] + _PROMPT_SHARE / before

    def can_repack(self, type: str, rows: int) -> bool:
        """Whether CPU_REPACK may be given a matrix of that many rows (ne[1]); others crash it."""
        return type in self.repacked and rows % REPACK_ROWS == 0


@dataclass(frozen=True)
class Device:
    """A place for weights other than the machine's own RAM. Sizes in bytes."""

    name: str  # llama.cpp's: CUDA0, MTL0, RPC0
    description: str
    kind: DeviceClass
    total: int
    free: int
    speed: float = 0.0  # bytes of weights a second; 0: not known
    endpoint: str = ""  # of a worker: HOST:PORT
    most: int | None = None  # all that it may hold, where more turned out not to fit
    largest: int | None = None  # the largest tensor it works with; None: any
    piece: int | None = None  # bytes of its memory that llama.cpp can have together; None: all
    lacks: frozenset[str] = frozenset()  # GGML types it has no matrix products for
    offloads: bool = True  # long prompts' products with weights in RAM are its work as well, on copies of them

    def takes(self, type: str, nbytes: int) -> bool:
        """Whether a tensor of that GGML type and size can be there."""
        return type not in self.lacks and (self.largest is None or nbytes <= self.largest)


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
