"""The output of a batch, or of scores, as it grows, and the manifest beside it, so that a stopped run goes on with what
is missing.

Every line of the output is whole as soon as it is there. The manifest has what the results depend on, the hash of every
line of the input, and is there before the first result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from grok_local.errors import InUseError, OptionError, OutputError
from grok_local.files import JsonLines, lock, write_whole, written_whole

__all__ = ["Ledger", "manifest_of"]

_FORMAT = 1
_ADVICE = "give another -o, or move it away"

Id = str | int
Key = Callable[[Mapping[str, Any]], Id | None]


def manifest_of(output: Path) -> Path:
    """Where the manifest of an output is."""
    return output.with_name(f"{output.name}.manifest.json")


class Ledger:
    """The open output of one batch; holds the lock that keeps a second run away. A context manager.

    `made_with` is what results depend on: a run that was made with something else is refused. `lines` are the hashes of
    the input's lines by id. `done` are the ids that have a result, and whether they failed: of lines that changed, or
    are not there any more, the old ones are moved aside, and with `retry` those that failed are done anew. Other
    programs' files stay as they are.
    """

    def __init__(
        self,
        output: Path,
        made_with: Mapping[str, Any],
        lines: Mapping[Id, str],
        *,
        key: Key,
        retry: bool = False,
    ) -> None:
        self.path, self.set_aside = output.resolve(), 0
        self._manifest, self._key = manifest_of(self.path), key
        self._out = _opened(self.path, output)
        try:
            self.done = self._resumed(made_with, lines, retry=retry)
            described = {"format": _FORMAT, "made_with": made_with, "lines": list(lines.items())}
            write_whole(self._manifest, json.dumps(described).encode() + b"\n")
        except BaseException as error:
            self._out.close()
            raise (self._trouble(error) if isinstance(error, OSError) else error) from None

    def write(self, result: Mapping[str, Any]) -> None:
        """Add a result. Raises OutputError."""
        try:
            self._out.append(result)
        except OSError as error:
            raise self._trouble(error) from None

    def sort(self, order: Mapping[Id, int]) -> None:
        """Put the results in the order of the input. Raises OutputError."""
        try:
            results = [(self._id(value), value) for value in self._out.read()]
            ranked = [(len(order) if id_ is None else order.get(id_, len(order)), value) for id_, value in results]
            self._replace([value for _, value in sorted(ranked, key=lambda pair: pair[0])])
        except OSError as error:
            raise self._trouble(error) from None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def _resumed(self, made_with: Mapping[str, Any], lines: Mapping[Id, str], *, retry: bool) -> dict[Id, bool]:
        """The ids that are done, and whether each of them failed."""
        before = self._read_manifest()
        if not os.fstat(self._out.fileno()).st_size:
            return {}
        if before is None or not self._out.begins_with(b"{"):
            missing = f", and {self._manifest.name} beside it is not" if before is None else ""
            raise OutputError(f"{self.path}: is there{missing}, so it is no output to go on with: {_ADVICE}")
        self._check_same(before.get("made_with", {}), made_with)
        hashes = {_hashable(id_): digest for id_, digest in before.get("lines", [])}
        kept, gone = dict[Id, Any](), []
        for value in self._out.read():
            id_ = self._id(value)
            if id_ is None or id_ in kept or hashes.get(id_, "") != lines.get(id_) or (retry and _failed(value)):
                gone.append(value)
            else:
                kept[id_] = value
        if gone:
            self._move_aside([value for value in gone if isinstance(value, dict) and not _failed(value)])
            self._replace(list(kept.values()))
        return {id_: _failed(value) for id_, value in kept.items()}

    def _read_manifest(self) -> dict[str, Any] | None:
        """What the output was begun with, if there is one. Raises OutputError for what is no manifest of ours."""
        try:
            found = json.loads(self._manifest.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise OutputError(f"{self._manifest}: is there, and is no manifest that can be used: {_ADVICE}")
        return found

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if different:
            told = "; ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in different)
            raise OptionError(
                f"{self.path}: was begun otherwise ({told}): results of both would be mixed; repeat the command as it "
                "was, or give another -o"
            )

    def _id(self, value: Any) -> Id | None:
        """Whose result it is, if it is any line's."""
        return self._key(value) if isinstance(value, dict) else None

    def _move_aside(self, values: list[Any]) -> None:
        """Results of lines that are not in the input any more are kept, but not in the output."""
        self.set_aside = len(values)
        if values:
            with JsonLines(self.path.with_name(f"{self.path.name}.replaced")) as file:
                for value in values:
                    file.append(value)

    def _replace(self, values: list[Any]) -> None:
        with written_whole(self.path) as file:
            for value in values:
                file.write(json.dumps(value, separators=(",", ":")) + "\n")
        self._out.close()
        self._out = _locked(self.path)

    def _trouble(self, error: OSError) -> OutputError:
        text = f"{self.path}: cannot be written ({error.strerror or error})"
        return OutputError(f"{text}; what is done is kept: the same command goes on")


def _opened(path: Path, output: Path) -> JsonLines:
    """Likewise, as it was asked for. Raises OutputError."""
    try:
        if not path.parent.is_dir():
            raise OutputError(f"{output}: there is no folder {output.parent}")
        if path.exists() and not path.is_file():
            raise OutputError(f"{output}: no file: a stopped run goes on from what is in it")
        return _locked(path)
    except OSError as error:  # nothing is done yet that the same command could go on with
        raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from None


def _locked(path: Path) -> JsonLines:
    """The file, opened and locked. Raises InUseError where another run has it, OSError."""
    while True:
        out = JsonLines(path)
        try:
            if not lock(out.fileno(), path):
                raise InUseError(f"{path}: another grok-local is writing it")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(out.fileno()), path.stat()):
                    return out
        except BaseException:
            out.close()
            raise
        out.close()  # it was replaced between opening and locking


def _failed(value: Any) -> bool:
    """Whether a result is an error, in either shape."""
    if not isinstance(value, dict):
        return True
    response = value.get("response")
    return bool(value.get("error")) or (isinstance(response, dict) and response.get("status_code") != 200)


def _hashable(id_: Any) -> Id:
    return id_ if isinstance(id_, str | int) else str(id_)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
