"""What an engine is to those who use one: the same in this process and in another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from grok_local.placement.wishes import RAM
from grok_local.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from grok_local.errors import GrokLocalError
    from grok_local.formats.gguf_file import Header
    from grok_local.placement.plan import Plan
    from grok_local.runtime.engine.sampling import Sampling
    from grok_local.runtime.experts.waiting import ExpertStats
    from grok_local.runtime.graph.rows import Draw, Drawn, Row

__all__ = ["Decoder", "Engine", "Held", "Lexicon", "Placement", "differences", "tolerance"]

_TOLERANCE = 0.01


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


class Decoder(Protocol):
    """The part of an engine that evaluates sequences and chooses what follows."""

    interrupted: bool

    @property
    def batch_size(self) -> int: ...  # rows that one step may have
    @property
    def cached(self) -> list[list[int]]: ...  # the tokens in the KV cache, of each sequence

    def step(self, rows: Sequence[Row], draws: Sequence[Draw] = ()) -> list[Drawn] | None: ...
    def copy(self, source: int, target: int, *, length: int) -> int: ...
    def forget(self, sequence: int, *, start: int = 0) -> int: ...
    def begin_sampling(self, options: Sampling, recent: Sequence[int], grammar: str | None = None) -> int: ...
    def end_sampling(self, chain: int) -> None: ...
    def expert_stats(self) -> ExpertStats | None: ...


class Lexicon(Protocol):
    """The part of an engine that knows the vocabulary."""

    @property
    def bos(self) -> int: ...  # the BOS token's id, or -1
    @property
    def context_size(self) -> int: ...  # tokens that each sequence may have
    @property
    def metadata(self) -> dict[str, Any]: ...

    def tokenize(self, text: str, *, add_bos: bool = True, special: bool = False) -> list[int]: ...
    def continue_ids(self, text: str, *, special: bool = False) -> list[int]: ...
    def detokenize(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int, *, special: bool = False) -> bytes: ...
    def special_text(self, name: str) -> str: ...
    def control_names(self) -> list[str]: ...
    def is_end(self, token: int) -> bool: ...


class Engine(Decoder, Lexicon, Protocol):
    """A loaded model and its KV cache, with places for several sequences.

    Only `interrupt` is thread-safe; once closed, every method raises ModelError. `failure` is what it died of, though
    nobody closed it: it will never compute again.
    """

    @property
    def failure(self) -> GrokLocalError | None: ...
    @property
    def headers(self) -> list[Header]: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def threads(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...  # the number of tokens there are

    def routing_counts(self) -> list[list[int]] | None: ...
    def save(self, path: Path) -> None: ...
    def restore(self, path: Path, ids: Sequence[int]) -> None: ...
    def evaluate(self, ids: Sequence[int]) -> int: ...
    def extend(self, ids: Sequence[int]) -> int: ...
    def evaluate_together(self, pieces: Mapping[int, Sequence[int]]) -> npt.NDArray[np.float32]: ...
    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]: ...
    def tail_logits(self, ids: Sequence[int], start: int) -> npt.NDArray[np.float32]: ...
    def score(self, ids: Sequence[int], start: int) -> list[float]: ...

    def interrupt(self) -> None: ...
    def close(self) -> None: ...


def differences(plan: Plan, held: Sequence[Held]) -> Iterator[str]:
    """What a place holds otherwise than planned. RAM's weights are mapped; buffers may be smaller than planned."""
    for share, found in zip(plan.shares, held, strict=True):
        compute = max(found.compute, share.compute)
        pairs = [("KV cache", share.kv, found.kv), ("compute buffers", share.compute, compute)]
        if share.place != RAM:
            pairs.append(("weights", share.weights, found.weights))
        for what, planned, actual in pairs:
            if abs(planned - actual) > tolerance(planned):
                yield (
                    f"{share.place} holds {format_bytes(actual)} of {what} where {format_bytes(planned)} were planned"
                )


def tolerance(planned: int) -> float:
    """Bytes by which what is held may differ: llama.cpp's log rounds."""
    return _TOLERANCE * planned + (1 << 20)
