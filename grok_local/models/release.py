"""What a release is: facts about its tensors and numbers, whatever its files look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

__all__ = ["HEAD_SIZE", "Dimensions", "Kind", "Release", "Target"]

HEAD_SIZE = 128


class Kind(Enum):
    """What a tensor is for; the recipe chooses its type by this."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    EXPERTS = "experts"
    DENSE = "dense"  # a feed-forward network that every token goes through
    ATTENTION = "attention"
    ROUTER = "router"


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a checkpoint in a release's format; `Release.published` has those of the release itself."""

    layers: int
    width: int
    expert_width: int
    experts: int
    kv_width: int
    vocabulary: int
    dense_width: int = 0

    @property
    def heads(self) -> int:
        return self.width // HEAD_SIZE

    @property
    def kv_heads(self) -> int:
        return self.kv_width // HEAD_SIZE


@dataclass(frozen=True)
class Target:
    """A tensor as the GGUF has it; `shape` is outermost first."""

    name: str
    kind: Kind
    layer: int | None
    shape: tuple[int, ...]


class Release(Protocol):
    """One of xAI's releases. `hub` is its repository on the Hugging Face hub."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def license(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def hub(self) -> str: ...
    @property
    def published(self) -> Dimensions: ...

    def targets(self, dims: Dimensions) -> Iterator[Target]:
        """Every tensor of the GGUF that a checkpoint of these sizes becomes."""

    def metadata(self, dims: Dimensions) -> Mapping[str, int | float]:
        """The hyperparameters as the GGUF has them, without the prefix "grok."; floats are float32, others uint32."""
