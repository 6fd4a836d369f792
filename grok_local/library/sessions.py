"""The sessions that are kept: names -> folders, and what is in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grok_local.errors import OptionError, OutputError
from grok_local.folders import sessions_folder

__all__ = ["Kept", "kept_session", "kept_sessions", "remove_session", "session_folder", "session_names"]

_LONGEST = 100  # characters of a name
_NAME = re.compile(rf"\w[\w .-]{{0,{_LONGEST - 1}}}")


@dataclass(frozen=True)
class Kept:
    """A session: how many messages it has, which file's model they were said to, and its bytes on disk."""

    name: str
    messages: int
    model: str
    bytes: int


def session_folder(name: str) -> Path:
    """Where the session of that name is, or will be. Raises OptionError for a name that none can have."""
    if not _NAME.fullmatch(name):
        rule = f"1 to {_LONGEST} letters, digits, blanks, dots and dashes make a name, a letter or a digit first"
        raise OptionError(f"session {name!r:.120}: {rule}")
    return sessions_folder() / name


def session_names() -> list[str]:
    """All there are."""
    folder = sessions_folder()
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def kept_sessions() -> Iterator[Kept]:
    """What is in each of them."""
    from grok_local.runtime.text.session import read_conversation

    for name in session_names():
        folder = sessions_folder() / name
        try:
            found = read_conversation(folder)
        except OutputError:
            found = {}
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        yield Kept(name, len(found.get("messages", [])), str(found.get("model", "")), size)


def kept_session(name: str) -> Path:
    """The folder of a session that there is. Raises OptionError."""
    folder = session_folder(name)
    if not folder.is_dir():
        raise OptionError(f"no session {name!r}: grok-local sessions list")
    return folder


def remove_session(folder: Path) -> None:
    """Delete it. Raises OutputError."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be deleted ({error.strerror or error})") from None
