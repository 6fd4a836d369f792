"""Tells which release a folder holds, and opens it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from grok_local.errors import CheckpointError
from grok_local.files import gone_mark
from grok_local.formats.pickles import parse_pickle
from grok_local.formats.safetensors import parse_safetensors
from grok_local.models import grok1, grok2
from grok_local.models.release import Release
from grok_local.quantize.sources.checkpoint import Checkpoint, names_in
from grok_local.quantize.sources.config import CONFIG, read_config
from grok_local.quantize.sources.grok1 import has_checkpoint, open_grok1
from grok_local.quantize.sources.grok2 import has_shards, open_grok2
from grok_local.quantize.sources.ranks import RANKS
from grok_local.quantize.sources.sentencepiece import SENTENCEPIECE
from grok_local.quantize.sources.vocabulary import TokenizerKind, Vocabulary

__all__ = [
    "HeaderReader",
    "find_tokenizer",
    "header_reader",
    "input_files",
    "open_checkpoint",
    "open_vocabulary",
    "what_is_in",
]

HeaderReader = Callable[[BinaryIO, str], object]


@dataclass(frozen=True)
class _Format:
    """How a release's files are told, how they are opened, and which tokenizer comes with them.

    `header` reads of an open file what `open` reads of each; it takes the file's name for its errors.
    """

    release: Release
    is_in: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]
    tokenizer: TokenizerKind
    header: HeaderReader


_GROK_1 = _Format(grok1.RELEASE, has_checkpoint, open_grok1, SENTENCEPIECE, parse_pickle)
_FORMATS = (_GROK_1, _Format(grok2.RELEASE, has_shards, open_grok2, RANKS, parse_safetensors))


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or in a folder of the hub's cache, by its files' headers alone.

    Raises CheckpointError listing every problem.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; give the one that holds the release's files")
    folder = _snapshot_in(path) or path
    kind = _format_in(folder)
    if kind is None:
        raise CheckpointError(f"{path}: no Grok-1 or Grok-2 checkpoint here: {what_is_in(path)}")
    return kind.open(folder)


def open_vocabulary(folder: Path, given: Path | None, *, size: int | None) -> Vocabulary:
    """The vocabulary in the file `given`, or beside a checkpoint's tensors. It must have `size` pieces, None being any
    number. Raises TokenizerError.
    """
    return _tokenizer_of(folder).read(find_tokenizer(folder, given), size)


def header_reader(release: str) -> HeaderReader:
    """What reads the headers of a release's files: as much of them as `open_checkpoint` looks at.

    Raises CheckpointError for what is none.
    """
    return next(kind.header for kind in _FORMATS if kind.release.name == release)


def find_tokenizer(folder: Path, given: Path | None = None) -> Path:
    """The file `given`, or the tokenizer beside a checkpoint's tensors. Raises TokenizerError."""
    return _tokenizer_of(folder).find(folder, given)


def input_files(checkpoint: Checkpoint) -> set[Path]:
    """All that packing a checkpoint may read but a tokenizer that is given."""
    folder = checkpoint.folder
    tokenizers = (place for kind in _FORMATS for place in kind.tokenizer.places(folder))
    return checkpoint.paths | {folder / CONFIG, *tokenizers}


def _tokenizer_of(folder: Path) -> TokenizerKind:
    return (_format_in(folder) or _GROK_1).tokenizer


def _format_in(folder: Path) -> _Format | None:
    return next((kind for kind in _FORMATS if kind.is_in(folder)), None)


def what_is_in(folder: Path) -> str:
    """Of a folder that cannot be packed: what it is, and what to do."""
    snapshot = _snapshot_in(folder)
    kind = _format_in(snapshot or folder)
    if snapshot or kind:
        of = f" in {kind.release.title}'s format" if kind else ""
        return f"it is a checkpoint{of}: grok-local quantize {snapshot or folder} packs it"
    if gone_mark(folder).exists():
        return "its files were deleted as they were packed; grok-local pull fetches them again"
    names = sorted(names_in(folder))
    config = _config(folder)
    architectures = config.get("architectures")
    if "Grok1ForCausalLM" in str(architectures) and not any(name.endswith(".safetensors") for name in names):
        return "it holds Grok-2's config.json, and none of the tensors: files whose names have -TP- in them"
    if config or any(name.endswith(".safetensors") for name in names):
        return (
            f"it is a checkpoint for Hugging Face's Transformers ({_called(config)}): of these none can be packed; "
            "grok-local pull grok-1 fetches the release itself"
        )
    if any(name.startswith("models--") for name in names):
        return "it is the hub's cache: give the folder snapshots/... of one model in it"
    return "neither it nor its ckpt-0 or ckpt holds tensor00000_000, and no file has -TP-common in its name"


def _called(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0])[:60] if isinstance(names, list) and names else "safetensors"


def _snapshot_in(folder: Path) -> Path | None:
    """The snapshot that a model's folder in the hub's cache holds: the one its main branch is at, or the only one."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    try:
        current = snapshots / (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        current = snapshots
    inside = sorted(path for path in snapshots.iterdir() if path.is_dir())
    return current if current in inside else inside[0] if len(inside) == 1 else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_config(folder)
    except CheckpointError:
        return {}
