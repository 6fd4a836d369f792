"""What was measured is kept in the cache folder, so that it is measured once."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from grok_local.files import write_whole
from grok_local.folders import cache_folder

__all__ = ["keep", "kept", "kept_path"]


def kept_path(name: str) -> Path:
    """The file of that name in the cache folder."""
    return cache_folder() / name


_unsaved: dict[Path, dict[str, Any]] = {}  # what found no place on the disk


def kept(path: Path) -> dict[str, Any]:
    """What was kept there, by its mark; nothing where the file is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads(path.read_bytes())
        return data if isinstance(data, dict) else {}
    return _unsaved.get(path, {})


def keep(path: Path, mark: str, value: Any) -> None:
    """Add a value, which is kept for this process alone where the file cannot be written; others may add theirs
    meanwhile.
    """
    values = {**kept(path), mark: value}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values).encode())
    except OSError:
        _unsaved[path] = values
