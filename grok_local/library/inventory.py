"""What is on this machine: the models and checkpoints in grok-local's folders; listing and deleting them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from grok_local import folders
from grok_local.errors import GrokLocalError, InUseError, OptionError, OutputError
from grok_local.files import linked_part, locked
from grok_local.library import built_in, names

__all__ = ["Entry", "entries", "entry_named", "entry_names", "remove"]


@dataclass(frozen=True)
class Entry:
    """A model or checkpoint on this machine. `files` are all its files (a checkpoint's: its folder)."""

    name: str
    kind: str  # "built-in", "model" or "checkpoint"
    type: str
    source: str
    bytes: int
    files: tuple[Path, ...]


def entries() -> list[Entry]:
    """Everything in the models and checkpoints folders, and the built-in model."""
    models = [_model_entry(name, path) for name, path in names.models().items()]
    return [_tiny_entry(), *models, *_piece_entries(), *map(_checkpoint_entry, names.pulled())]


def entry_names() -> list[str]:
    """What `rm` may be given."""
    return [*names.model_names(), *(folder.name for folder in names.pulled())]


def entry_named(name: str) -> Entry:
    """Raises OptionError."""
    found = [entry for entry in entries() if name in (entry.name, f"{entry.name}.gguf")]
    if not found:
        raise OptionError(f"{name}: no model or checkpoint of that name here: see grok-local list")
    if len(found) > 1:
        places = " and ".join(f"{entry.kind} ({entry.files[0] if entry.files else 'not packed'})" for entry in found)
        raise OptionError(f"{name}: is the name of {places}: delete the one you mean there")
    return found[0]


def remove(entry: Entry) -> None:
    """Delete its files. Raises OutputError, InUseError while it is being fetched or packed."""
    if not entry.files:
        raise OutputError(f"{entry.name}: there is nothing to delete")
    if entry.kind == "checkpoint" and not _is_pulled(entry.files[0]):
        raise OutputError(f"{entry.files[0]}: no checkpoint, as far as can be seen: delete it yourself if you mean it")
    with ExitStack() as stack:
        for path in entry.files:
            lock = path / ".pull" / "lock" if path.is_dir() else path
            if lock.suffix == ".journal" or lock.name == "lock":
                stack.enter_context(_not_in_use(lock))
        _delete(entry)


def _is_pulled(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in (".pull", "ckpt-0", "ckpt"))


@contextmanager
def _not_in_use(lock: Path) -> Iterator[None]:
    """Hold what `pull` and `quantize` lock. Raises InUseError."""
    with locked(lock) if lock.exists() else nullcontext(True) as free:
        if not free:
            raise InUseError(f"{lock.parent}: another grok-local is working there: wait for it, or stop it")
        yield


def _delete(entry: Entry) -> None:
    try:
        for path in entry.files:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be deleted ({error.strerror})") from None


def _tiny_entry() -> Entry:
    packed, state = built_in.packed_files(), "packed" if built_in.is_packed() else "packed at first use"
    return Entry(built_in.BUILT_IN, "built-in", "q4_k", f"in the package; {state}", _bytes(packed), packed)


def _model_entry(name: str, path: Path) -> Entry:
    from grok_local.formats import gguf_file
    from grok_local.placement.runnable import why_not

    files = _files_of(name)
    try:
        headers = gguf_file.read_model(linked_part(path))
    except (GrokLocalError, OSError) as error:
        return Entry(name, "model", "?", f"cannot be read: {str(error).splitlines()[0]}", _bytes(files), files)
    if reason := why_not(headers):
        return Entry(name, "model", "?", f"cannot be run: {reason}", _bytes(files), files)
    metadata = headers[0].metadata
    mark = str(metadata.get(gguf_file.KEYS.CHECKPOINT, ""))
    layers = metadata.get(f"{metadata.get('general.architecture')}.block_count")
    title = str(metadata.get("general.name", metadata.get("general.architecture", "?")))
    source = ", ".join(
        [title, *([f"{layers} layers"] if layers else []), *([f"checkpoint {mark[:8]}"] if mark else [])]
    )
    return Entry(name, "model", str(metadata.get(gguf_file.KEYS.TYPE, "?")), source, _bytes(files), files)


def _piece_entries() -> Iterator[Entry]:
    """Files that were cut into pieces, which nobody can run before they are joined."""
    from grok_local.formats.gguf_file import is_piece

    folder = folders.models_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_piece(path):
            advice = "a piece of a file: join all of them in their order with cat"
            yield Entry(path.name, "piece", "?", advice, _bytes((path,)), (path,))


def _checkpoint_entry(folder: Path) -> Entry:
    from grok_local.quantize.sources.recognise import find_tokenizer, open_checkpoint

    try:
        checkpoint = open_checkpoint(folder)
        find_tokenizer(checkpoint.folder)
        source = f"complete, {checkpoint.dimensions.layers} layers"
    except (GrokLocalError, OSError) as error:
        source = f"not complete: {str(error).splitlines()[0]}"
    return Entry(folder.name, "checkpoint", "release", source, _bytes(folder.rglob("*")), (folder,))


def _bytes(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(OSError):  # it may lead nowhere, or be renamed under a pull
            total += path.stat().st_size if path.is_file() else 0
    return total


def _files_of(name: str) -> tuple[Path, ...]:
    """All parts of a model, and what an unfinished run left of it; nothing that only begins like it."""
    files = re.compile(rf"{re.escape(name)}(-\d{{5}}-of-\d{{5}})?\.(?i:gguf)(\.partial|\.journal)?")
    found = sorted(folders.models_folder().iterdir())
    return tuple(path for path in found if files.fullmatch(path.name) and not path.is_dir())
