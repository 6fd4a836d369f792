"""Names -> files: what `-m` may say, and where grok-local keeps models and checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from grok_local.errors import GGUFError
from grok_local.folders import checkpoints_folder, models_folder
from grok_local.library.built_in import BUILT_IN, CHECKPOINT, MANNER, USUAL, Manner, built_in_model, unseen

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from grok_local.library.built_in import Packing
    from grok_local.placement.load_options import LoadOptions, LoadRequest
    from grok_local.runtime.text.model import Model

__all__ = [
    "default_output",
    "load",
    "manner_of",
    "model_names",
    "model_request",
    "models",
    "pulled",
    "resolve_checkpoint",
    "resolve_model",
]

_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")  # of a part


def load(model: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Model:
    """Load a GGUF (any part of a split one), its weights mapped; or a model by its name, `tiny` being the built-in one.

    Options (`placement.load_options.LoadOptions` has them with their types): `context`, tokens, by default the model's
    own and at most 8192; `threads`, by default one per physical core; `kv_type`, f16, bf16 or f32; `memory`, what it
    may take of RAM; `placement`, `gpu_layers`, `experts_on` and `overrides` for GPUs; `repack`; `workers`. Raises
    GGUFError, ModelError, OptionError, PlacementError or WorkerError.
    """
    from grok_local.runtime.text.model import load_model

    return load_model(model_request(model, options), say=options.get("say"))


def model_request(model: str | os.PathLike[str], options: LoadOptions, *, packing: Packing = unseen) -> LoadRequest:
    """What `load` and `plan` go by: the file that `model` means, and the options with the model's own manner.

    Raises GGUFError where there is no such model, OptionError, TypeError.
    """
    from grok_local.placement.load_options import load_request

    name = os.fspath(model)
    manner, wanted = manner_of(name), options.copy()
    if wanted.get("context") is None:
        wanted["context"] = manner.context
    if wanted.get("threads") is None:
        wanted["threads"] = manner.threads
    return load_request(resolve_model(name, packing=packing), wanted)


def manner_of(model: str) -> Manner:
    """How a model of that name is best used."""
    return MANNER if model == BUILT_IN else USUAL


def resolve_model(name: str, *, packing: Packing = unseen) -> Path:
    """The GGUF that `name` means: a path, a name in the models folder, or `tiny`: the built-in model, packed on first
    use. Raises GGUFError.
    """
    if name == BUILT_IN:
        return built_in_model(packing)
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise GGUFError(
            f"{name}: a folder; give the GGUF in it, or pack a checkpoint first: grok-local quantize {name}"
        )
    named = models().get(path.name.removesuffix(".gguf")) if len(path.parts) == 1 else None
    if named is not None:
        return named
    known = ", ".join(model_names())
    raise GGUFError(f"{name}: no such file, and no model of that name in {models_folder()} (there are: {known})")


def model_names() -> list[str]:
    """What `-m` may say, beside paths."""
    return [BUILT_IN, *models()]


def models() -> dict[str, Path]:
    """By name, the file to load: the whole one, or the first part."""
    named: dict[str, Path] = {}
    for path in sorted(models_folder().glob("*.gguf"), key=lambda path: (_NUMBER.search(path.stem) is not None, path)):
        if not path.is_dir() and path.suffix:
            named.setdefault(_NUMBER.sub("", path.stem), path)
    return named


def resolve_checkpoint(path: Path) -> Path:
    """The folder that `path` means: itself, one of that name among the pulled, or the built-in model's."""
    if path.exists() or len(path.parts) != 1:
        return path
    named = checkpoints_folder() / path.name
    return named if named.is_dir() else CHECKPOINT if path.name == BUILT_IN else path


def pulled() -> list[Path]:
    """The folders of the checkpoints that were pulled."""
    folder = checkpoints_folder()
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def default_output(type: str, checkpoint: Path) -> Path:
    """Where a packed checkpoint goes when no output is named."""
    name = BUILT_IN if checkpoint == CHECKPOINT else "grok-1"
    return models_folder() / f"{name}-{type.lower()}.gguf"
