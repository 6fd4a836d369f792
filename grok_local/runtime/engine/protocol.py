"""What an engine is to those who use one: the same in this process and in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from grok_local.formats.gguf_file import Header
    from grok_local.placement.plan import Plan
    from grok_local.runtime.engine.sampling import Sampling
    from grok_local.runtime.experts.waiting import ExpertStats

__all__ = ["Engine", "Held", "Placement"]


@dataclass(frozen=True)
class Held:
    """What a place really holds, in bytes, as llama.cpp reports it. RAM's weights may be a mapped file."""

    place: str
    weights: int = 0
    kv: int = 0
    compute: int = 0


@dataclass(frozen=True)
class Placement:
    """The plan that was carried out, what each place holds now, and what had to be changed on the way."""

    plan: Plan
    held: tuple[Held, ...]
    notes: tuple[str, ...]


class Engine(Protocol):
    """A loaded model and its KV cache. Only `interrupt` is thread-safe; once closed, every method raises ModelError."""

    interrupted: bool

    @property
    def bos(self) -> int: ...  # the BOS token's id, or -1
    @property
    def cached(self) -> list[int]: ...  # the tokens of sequence 0 in the KV cache
    @property
    def context_size(self) -> int: ...  # tokens that fit the KV cache
    @property
    def headers(self) -> list[Header]: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def threads(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...  # the number of tokens there are

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]: ...
    def continue_ids(self, text: str, *, special: bool = False) -> list[int]: ...
    def detokenize(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int, *, special: bool = False) -> bytes: ...
    def special_text(self, name: str) -> str: ...
    def control_names(self) -> list[str]: ...
    def is_end(self, token: int) -> bool: ...

    def evaluate(self, ids: Sequence[int]) -> int: ...
    def extend(self, ids: Sequence[int]) -> int: ...
    def evaluate_together(self, pieces: Mapping[int, Sequence[int]]) -> npt.NDArray[np.float32]: ...
    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]: ...
    def tail_logits(self, ids: Sequence[int], start: int) -> npt.NDArray[np.float32]: ...
    def score(self, ids: Sequence[int], start: int) -> list[float]: ...
    def begin_sampling(self, options: Sampling, recent: Sequence[int], grammar: str | None = None) -> int: ...
    def sample(self, chain: int) -> int: ...
    def forced(self, chain: int) -> list[int] | None: ...
    def end_sampling(self, chain: int) -> None: ...
    def expert_stats(self) -> ExpertStats | None: ...

    def interrupt(self) -> None: ...
    def close(self) -> None: ...
