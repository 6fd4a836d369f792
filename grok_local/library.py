"""Names -> files: what `-m` may say, and where grok-local keeps its models."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from grok_local.errors import GGUFError

__all__ = ["default_output", "home", "models_folder", "resolve_model"]


def home() -> Path:
    """The folder of everything grok-local keeps; GROK_LOCAL_HOME moves it."""
    moved = os.environ.get("GROK_LOCAL_HOME")
    return Path(moved) if moved else platformdirs.user_data_path("grok-local")


def models_folder() -> Path:
    """Where `quantize` puts its files and `-m` looks for names."""
    return home() / "models"


def default_output(type: str) -> Path:
    """Where a packed Grok-1 goes when no output is named."""
    return models_folder() / f"grok-1-{type.lower()}.gguf"


def resolve_model(name: str | None) -> Path:
    """The GGUF that `name` means: a path, a name in the models folder, or (None) the only model there. Raises
    GGUFError.
    """
    if name is None:
        return _only_model()
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise GGUFError(
            f"{name}: a folder; give the GGUF in it, or pack a checkpoint first: grok-local quantize {name}"
        )
    named = _models().get(name.removesuffix(".gguf"))
    if named is not None:
        return named
    raise GGUFError(f"{name}: no such file, and no model of that name in {models_folder()}{_known()}")


def _only_model() -> Path:
    models = _models()
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        raise GGUFError(f"several models are in {models_folder()}: say which with -m{_known()}")
    raise GGUFError(f"no model is in {models_folder()}: give one with -m, or pack one: grok-local quantize CHECKPOINT")


def _models() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(models_folder().glob("*.gguf")):
        found.setdefault(_model_name(path), path)
    return found


def _model_name(path: Path) -> str:
    stem = path.name.removesuffix(".gguf")
    return stem.partition("-00001-of-")[0]


def _known() -> str:
    names = list(_models())
    return f" ({', '.join(names)})" if names else ""
