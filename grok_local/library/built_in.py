"""The built-in model: Grok-1 in miniature, trained to explain this program. All that is special about it is here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from grok_local.errors import GGUFError, InUseError, OutputError, VerifyError
from grok_local.folders import cache_folder

if TYPE_CHECKING:
    from grok_local.quantize.packing.pool import Progress

    Packing: TypeAlias = Callable[[], AbstractContextManager[Callable[[Progress], None]]]

__all__ = [
    "BUILT_IN",
    "CHECKPOINT",
    "MANNER",
    "USUAL",
    "Manner",
    "built_in_model",
    "is_packed",
    "packed_files",
    "unseen",
]

BUILT_IN = "tiny"
CHECKPOINT = Path(__file__).parents[1] / "models" / "tiny"
_PATIENCE = 60.0  # seconds for another process that packs it


@dataclass(frozen=True)
class Manner:
    """How a model is best used where nobody says otherwise; None leaves it to the plan."""

    context: int | None = None
    temperature: float = 0.7
    greeting: str = ""  # what `chat` says instead of its name


USUAL = Manner()
MANNER = Manner(
    context=512,  # what it was trained on; beyond, it answers worse
    temperature=0.0,  # it knows one answer to each question
    greeting="tiny, a toy of {parameters} parameters that explains grok-local and Grok-1 (-m NAME runs another)",
)


@contextmanager
def unseen() -> Iterator[Callable[[Progress], None]]:
    """Packing that nobody looks at."""
    yield lambda _: None


def built_in_model(packing: Packing = unseen) -> Path:
    """The built-in model's GGUF, packed on first use and again where the cache is damaged; `packing` shows that.

    Five megabytes are hashed in a moment, and nobody knows how to mend a cache. Raises OutputError, InUseError.
    """
    target = _packed_path()
    if not _is_intact(target):
        with packing() as progress:
            _pack(target, progress)
        for old in set(packed_files()) - {target}:  # another version's
            old.unlink(missing_ok=True)
    return target


def packed_files() -> tuple[Path, ...]:
    """What the cache has of it, other versions among them."""
    return tuple(sorted(cache_folder().glob(f"{BUILT_IN}-*.gguf*")))


def is_packed() -> bool:
    """Whether this version of it was packed before."""
    return _packed_path().exists()


def _packed_path() -> Path:
    """The name tells versions of it apart."""
    return cache_folder() / f"{BUILT_IN}-{_mark()}-q4_k.gguf"


@cache
def _mark() -> str:
    from grok_local.quantize.sources.checkpoint import fingerprint
    from grok_local.quantize.sources.recognise import open_checkpoint

    return fingerprint(open_checkpoint(CHECKPOINT))[:8]


def _is_intact(path: Path) -> bool:
    from grok_local.quantize.verify import verify

    try:
        return path.exists() and not verify(path).problems
    except (GGUFError, VerifyError):
        return False


def _pack(target: Path, progress: Callable[[Progress], None]) -> None:
    """Pack it, or wait for another process that does."""
    from grok_local.quantize.convert import quantize_checkpoint

    until, packed = time.monotonic() + _PATIENCE, False
    while not packed:
        try:
            quantize_checkpoint(CHECKPOINT, target, force=target.exists(), progress=progress)
            packed = True
        except InUseError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
            packed = _is_intact(target)
        except OutputError as error:
            raise OutputError(
                f"the built-in model cannot be packed into {target.parent}: {error.problems[0].partition(';')[0]}; "
                "GROK_LOCAL_HOME moves it to another place"
            ) from None
