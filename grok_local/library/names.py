"""Names -> files: what `-m` may say, where grok-local keeps models and checkpoints, and the built-in model."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from grok_local.errors import GGUFError, InUseError, OutputError, VerifyError
from grok_local.folders import cache_folder, checkpoints_folder, models_folder
from grok_local.models import tiny

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from grok_local.placement.load_options import LoadOptions
    from grok_local.quantize.packing.pool import Progress
    from grok_local.runtime.text.model import Model

__all__ = [
    "BUILT_IN",
    "default_output",
    "is_packed",
    "load",
    "model_names",
    "models",
    "packed_tiny_path",
    "pulled",
    "resolve_checkpoint",
    "resolve_model",
]

BUILT_IN = "tiny"
_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")  # of a part
_TINY_CONTEXT = 512  # what it was trained on; beyond, it answers worse
_PATIENCE = 60.0  # seconds for another process that packs the built-in model


def default_output(type: str, checkpoint: Path) -> Path:
    """Where a packed checkpoint goes when no output is named."""
    name = BUILT_IN if checkpoint == tiny.CHECKPOINT else "grok-1"
    return models_folder() / f"{name}-{type.lower()}.gguf"


def resolve_checkpoint(path: Path) -> Path:
    """The folder that `path` means: itself, one of that name among the pulled, or the built-in model's."""
    pulled = checkpoints_folder() / path.name
    if path.exists() or len(path.parts) != 1:
        return path
    return pulled if pulled.is_dir() else tiny.CHECKPOINT if path.name == BUILT_IN else path


def resolve_model(name: str, *, progress: Callable[[Progress], None] | None = None) -> Path:
    """The GGUF that `name` means: a path, a name in the models folder, or `tiny`: the built-in model, packed on first
    use. Raises GGUFError.
    """
    if name == BUILT_IN:
        return _packed_tiny(progress)
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


def load(model: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Model:
    """Load a GGUF (any part of a split one), its weights mapped; or a model by its name, `tiny` being the built-in one.

    Options (`runtime.options.LoadOptions` has them with their types): `context`, tokens, by default the model's own and
    at most 8192; `threads`, by default one per physical core; `kv_type`, f16, bf16 or f32; `memory`, what it may take
    of RAM; `placement`, `gpu_layers`, `experts_on` and `overrides` for GPUs; `repack`; `workers`. Raises GGUFError,
    ModelError, OptionError, PlacementError or WorkerError.
    """
    from grok_local.runtime.text.model import load as load_gguf

    if model == BUILT_IN:
        options["context"] = options.get("context") or _TINY_CONTEXT
        # Its products are so small that threads wait for each other, and beside other programs for milliseconds.
        options["threads"] = options.get("threads") or 1
    return load_gguf(resolve_model(os.fspath(model)), **options)


def is_packed(name: str) -> bool:
    """Whether `name` can be loaded at once; the built-in model is packed on first use."""
    return name != BUILT_IN or _is_intact(packed_tiny_path())


def packed_tiny_path() -> Path:
    """Where the built-in model is once it is packed; the name tells versions of it apart."""
    return cache_folder() / f"tiny-{_tiny_mark()}-q4_k.gguf"


@cache
def _tiny_mark() -> str:
    from grok_local.quantize.sources.checkpoint import fingerprint, open_checkpoint

    return fingerprint(open_checkpoint(tiny.CHECKPOINT))[:8]


def _is_intact(packed: Path) -> bool:
    """Five megabytes are hashed in a moment, and nobody knows how to mend a cache."""
    from grok_local.quantize.verify import verify

    try:
        return packed.exists() and not verify(packed).problems
    except (GGUFError, VerifyError):
        return False


def _packed_tiny(progress: Callable[[Progress], None] | None) -> Path:
    target = packed_tiny_path()
    until = time.monotonic() + _PATIENCE
    while not _is_intact(target):
        from grok_local.quantize.convert import quantize_checkpoint

        try:
            quantize_checkpoint(tiny.CHECKPOINT, target, force=target.exists(), progress=progress)
        except InUseError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        except OutputError as error:
            raise OutputError(
                f"the built-in model cannot be packed into {target.parent}: {error.problems[0].partition(';')[0]}; "
                "GROK_LOCAL_HOME moves it to another place"
            ) from None
        for old in set(cache_folder().glob("tiny-*-q4_k.gguf")) - {target}:  # another version's
            old.unlink(missing_ok=True)
    return target


def model_names() -> list[str]:
    """What `-m` may say, beside paths."""
    return [BUILT_IN, *models()]


def pulled() -> list[Path]:
    """The folders of the checkpoints that were pulled."""
    folder = checkpoints_folder()
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def models() -> dict[str, Path]:
    """By name, the file to load: the whole one, or the first part."""
    found: dict[str, Path] = {}
    for path in sorted(models_folder().glob("*.gguf"), key=lambda path: (_NUMBER.search(path.stem) is not None, path)):
        if not path.is_dir() and path.suffix:
            found.setdefault(_NUMBER.sub("", path.stem), path)
    return found
