"""Where grok-local keeps what it makes."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from grok_local.errors import OutputError

__all__ = [
    "cache_folder",
    "checkpoints_folder",
    "home",
    "models_folder",
    "scratch_folder",
    "server_folder",
    "sessions_folder",
]


def home() -> Path:
    """The folder of everything grok-local keeps; GROK_LOCAL_HOME moves it."""
    moved = os.environ.get("GROK_LOCAL_HOME")
    return Path(moved) if moved else platformdirs.user_data_path("grok-local")


def cache_folder() -> Path:
    """What can be made again: the packed built-in model, what was measured of the machine."""
    moved = os.environ.get("GROK_LOCAL_HOME")
    return Path(moved) / "cache" if moved else platformdirs.user_cache_path("grok-local")


def scratch_folder() -> Path:
    """Where small files lie for a moment: the system's folder for them, or our own. Raises OutputError."""
    import tempfile

    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"no folder for temporary files ({error.strerror}): set TMPDIR to one") from None
    return folder


def models_folder() -> Path:
    """Where `quantize` puts its files and `-m` looks for names."""
    return home() / "models"


def sessions_folder() -> Path:
    """Where `chat --session` keeps conversations."""
    return home() / "sessions"


def server_folder() -> Path:
    """Where `serve` keeps files and batches."""
    return home() / "server"


def checkpoints_folder() -> Path:
    """Where `pull` puts releases and `quantize` looks for names."""
    return home() / "checkpoints"
