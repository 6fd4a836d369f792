"""Names -> files: what `-m` may say, and where grok-local keeps models and checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from grok_local.errors import GGUFError, OptionError
from grok_local.files import linked_part
from grok_local.folders import checkpoints_folder, models_folder
from grok_local.library.built_in import (
    BUILT_IN,
    CHECKPOINT,
    MANNER,
    USUAL,
    Manner,
    built_in_model,
    packed_files,
    unseen,
)

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
    "named_output",
    "pulled",
    "resolve_checkpoint",
    "resolve_model",
    "shown_name",
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
    path = resolve_model(name, packing=packing)
    return load_request(path, wanted, trained_context=manner.context, temperature=manner.temperature)


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
    if not name:
        raise OptionError("-m names no model: its value is empty")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise GGUFError(f"{name}: no regular file")
    if path.is_file():
        return linked_part(path)
    if path.is_dir():
        return _only_model(path)
    named = _named(path.name) if len(path.parts) == 1 else None
    if named is not None:
        return linked_part(named)
    raise GGUFError(_unknown(name))


def _only_model(folder: Path) -> Path:
    """The model in a folder that has no other. Raises GGUFError."""
    inside = _models_in(folder)
    if len(inside) == 1:
        return next(linked_part(path) for path in inside.values())
    if inside:
        names = ", ".join(sorted(str(path) for path in inside.values()))
        raise GGUFError(f"{folder}: a folder with {len(inside)} models: give one of {names}")
    from grok_local.quantize.sources.recognise import what_is_in

    raise GGUFError(f"{folder}: a folder without a GGUF: {what_is_in(folder)}")


def _named(name: str) -> Path | None:
    """The model of that name in the models folder, in capitals or not."""
    stem, inside = re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE), models()
    folded = {known.casefold(): path for known, path in inside.items()}
    return inside.get(stem) or folded.get(stem.casefold())


def _unknown(name: str) -> str:
    """Why no model is called so, and what may be meant."""
    from grok_local.models.catalogue import RELEASES

    known = ", ".join(model_names())
    release = name.casefold() in RELEASES
    advice = f"; grok-local pull {name.casefold()} fetches the release, and quantize packs it" if release else ""
    return f"{name}: no such file, and no model of that name in {models_folder()} (there are: {known}){advice}"


def model_names() -> list[str]:
    """What `-m` may say, beside paths."""
    return [BUILT_IN, *models()]


def models() -> dict[str, Path]:
    """By name, the file to load: the whole one, or the first part."""
    return _models_in(models_folder())


def _models_in(folder: Path) -> dict[str, Path]:
    named: dict[str, Path] = {}
    paths = [
        path for path in folder.glob("*") if path.suffix.lower() == ".gguf" and (path.is_file() or path.is_symlink())
    ]
    for path in sorted(paths, key=lambda path: (_NUMBER.search(path.stem) is not None, path)):
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


def shown_name(path: Path) -> str:
    """What a model is called: as `list` shows it."""
    return BUILT_IN if path in packed_files() else _NUMBER.sub("", path.stem)


def named_output(given: Path | None, type: str, checkpoint: Path) -> Path:
    """Where a packed checkpoint goes: where `given` says, which may be a folder, or into the models folder."""
    default = default_output(type, checkpoint)
    if given is None:
        return default
    return given / default.name if given.is_dir() else given


def default_output(type: str, checkpoint: Path) -> Path:
    """Where a packed checkpoint goes when no output is named: into the models folder, named after its own folder."""
    name = BUILT_IN if checkpoint == CHECKPOINT else _name_of(checkpoint)
    return models_folder() / f"{name}-{type.lower()}.gguf"


def _name_of(checkpoint: Path) -> str:
    """The name people know a checkpoint by: not that of the release's inner folder, nor a commit of the hub's cache."""
    folder = checkpoint.absolute()
    if folder.name in ("ckpt-0", "ckpt"):
        folder = folder.parent
    if folder.parent.name == "snapshots":
        folder = folder.parents[1]
    return folder.name.removeprefix("models--").rpartition("--")[2] or "checkpoint"
