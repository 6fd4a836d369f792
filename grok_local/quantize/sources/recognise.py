"""Tells which release a folder holds, and opens it."""

from __future__ import annotations

import json
from pathlib import Path

from grok_local.errors import CheckpointError
from grok_local.quantize.sources.checkpoint import Checkpoint
from grok_local.quantize.sources.grok1 import has_checkpoint, open_grok1
from grok_local.quantize.sources.sentencepiece import find_tokenizer, read_tokenizer
from grok_local.quantize.sources.vocabulary import Vocabulary

__all__ = ["open_checkpoint", "open_vocabulary", "what_is_in"]

_LARGEST_CONFIG = 1 << 20  # bytes; theirs have hundreds


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or in a folder of the hub's cache, by its files' headers alone.

    Raises CheckpointError listing every problem.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; give the one that holds tensor00000_000, or its parent")
    folder = _snapshot_in(path) or path
    if not has_checkpoint(folder):
        raise CheckpointError(f"{path}: no Grok-1 checkpoint here: {what_is_in(path)}")
    return open_grok1(folder)


def open_vocabulary(folder: Path, given: Path | None, *, size: int | None) -> Vocabulary:
    """The vocabulary in the file `given`, or beside a checkpoint's tensors. It must have `size` pieces, None being any
    number. Raises TokenizerError.
    """
    return read_tokenizer(find_tokenizer(folder, given), size)


def what_is_in(folder: Path) -> str:
    """Of a folder that cannot be packed: what it is, and what to do."""
    snapshot = _snapshot_in(folder)
    if snapshot or has_checkpoint(folder):
        return f"it is a checkpoint: grok-local quantize {snapshot or folder} packs it"
    names = _names(folder)
    config = _config(folder)
    architectures = config.get("architectures")
    if "Grok1ForCausalLM" in str(architectures) or any("-TP-" in name for name in names):
        return "it holds Grok-2's release, which cannot be packed yet"
    if config or any(name.endswith(".safetensors") for name in names):
        return (
            f"it is a checkpoint for Hugging Face's Transformers ({_called(config)}): of these none can be packed; "
            "grok-local pull grok-1 fetches the release itself"
        )
    if any(name.startswith("models--") for name in names):
        return "it is the hub's cache: give the folder snapshots/... of one model in it"
    return "neither it nor its ckpt-0 or ckpt holds tensor00000_000"


def _called(config: dict[str, object]) -> str:
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


def _config(folder: Path) -> dict[str, object]:
    try:
        with (folder / "config.json").open("rb") as file:
            config = json.loads(file.read(_LARGEST_CONFIG))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror or error})") from None
