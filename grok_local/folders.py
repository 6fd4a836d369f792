"""Where grok-local keeps what it makes."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_folder", "checkpoints_folder", "home", "models_folder"]


def home() -> Path:
    """The folder of everything grok-local keeps; GROK_LOCAL_HOME moves it."""
    moved = os.environ.get("GROK_LOCAL_HOME")
    return Path(moved) if moved else platformdirs.user_data_path("grok-local")


def cache_folder() -> Path:
    """What can be made again: the packed built-in model, what was measured of the machine."""
    moved = os.environ.get("GROK_LOCAL_HOME")
    return Path(moved) / "cache" if moved else platformdirs.user_cache_path("grok-local")


def models_folder() -> Path:
    """Where `quantize` puts its files and `-m` looks for names."""
    return home() / "models"


def checkpoints_folder() -> Path:
    """Where `pull` puts releases and `quantize` looks for names."""
    return home() / "checkpoints"
