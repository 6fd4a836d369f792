"""A conversation on disk: its messages, and what the model has read of them, so that it goes on without reading anew.

`conversation.json` is there after every answer. `state.bin` is llama.cpp's state of the sequence, which does not say
what it belongs to and is not checked by llama.cpp: that stands in the conversation's file, with a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from grok_local.errors import InUseError, ModelError, OutputError
from grok_local.files import locked, partial_of, write_whole
from grok_local.formats.identity import identity
from grok_local.runtime.graph.deviations import deviations_of

if TYPE_CHECKING:
    from grok_local.runtime.text.chat import Laid
    from grok_local.runtime.text.forms import Message
    from grok_local.runtime.text.model import Model

__all__ = ["Session", "SessionTurn", "read_conversation"]

_CONVERSATION, _STATE, _LOCK = "conversation.json", "state.bin", "lock"
_FORMAT = 1
_PIECE = 1 << 24


class Session:
    """The open session in `folder`, which is made if need be; a second process is kept away. A context manager.

    Raises InUseError, OutputError for a folder or file that cannot be used.
    """

    def __init__(self, folder: Path, model: Model) -> None:
        self.folder, self._model = folder, model
        self._open = ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = self._open.enter_context(locked(folder / _LOCK))
        except OSError as error:
            raise OutputError(f"{folder}: no session can be kept there ({error.strerror or error})") from None
        if not free:
            self.close()
            raise InUseError(f"{folder.name}: another grok-local has this session")
        self._kept = read_conversation(folder)
        self.messages: list[dict[str, str]] = list(self._kept.get("messages", []))
        self.system: str | None = self._kept.get("system")

    def resume(self) -> str | None:
        """Have the model go on where it was. Returns why it has to read the conversation anew, if it has to."""
        state = self._kept.get("state")
        if not self.messages or not state:
            return None
        if state["fits"] != self._fits():
            return "it was kept by another model, llama.cpp or type of KV cache"
        if _digest(self.folder / _STATE) != state["sha256"]:
            return "what was kept of it is damaged"
        if len(state["ids"]) > self._model.context_size:
            return "the context is smaller than it was"
        try:
            with self._model.alone() as engine:
                engine.restore(self.folder / _STATE, state["ids"])
        except ModelError as error:
            return str(error)
        self._model.conversation.recall(self._kept.get("answered"))
        return None

    def lay_out(self, messages: Sequence[Message], *, reserve: int) -> Laid:
        """As the model's conversation does it."""
        return self._model.conversation.lay_out(messages, reserve=reserve)

    def keep(self, messages: Sequence[Message], system: str | None) -> None:
        """Write what was said. Where that is nothing any more, what the model has read is forgotten too; where it never
        was anything, nothing is written. Raises OutputError.
        """
        if not (messages or self._kept):
            return
        self._kept |= {"format": _FORMAT, "model": self._model.path.name, "messages": list(messages), "system": system}
        self._kept["answered"] = self._model.conversation.remembered() if messages else None
        try:
            if not messages:
                self._kept.pop("state", None)
            write_whole(self.folder / _CONVERSATION, json.dumps(self._kept).encode() + b"\n")
            if not messages:
                (self.folder / _STATE).unlink(missing_ok=True)
        except OSError as error:
            raise self._trouble(error) from None

    def keep_state(self) -> None:
        """Write what the model has read, which may take a while: 0.3 MB a token of Grok-1. Raises OutputError."""
        partial = partial_of(self.folder / _STATE)
        try:
            with self._model.alone() as engine:
                ids = engine.cached[0]
                engine.save(partial)
            state = {"fits": self._fits(), "sha256": _digest(partial), "ids": list(ids)}
            partial.replace(self.folder / _STATE)
        except OSError as error:
            raise self._trouble(error) from None
        finally:
            partial.unlink(missing_ok=True)
        self._kept["state"] = state
        self.keep(self._kept.get("messages", []), self._kept.get("system"))

    def close(self) -> None:
        """Let another process have it."""
        self._open.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fits(self) -> list[str]:
        """What a state belongs to."""
        wishes, headers = self._model.placement.plan.wishes, self._model.engine.headers
        arithmetic = [wishes.routing] if deviations_of(headers) else []
        return [identity(headers), llama_cpp.__version__, wishes.kv_type, *arithmetic]

    def _trouble(self, error: OSError) -> OutputError:
        return OutputError(f"{self.folder}: the session cannot be kept ({error.strerror or error})")


class SessionTurn:
    """What comes next in a session that is open: `messages` are those that the model is asked, the session's before
    those that are `given`. A text of the system's takes the place of the one before. Where all of it and `reserve`
    tokens do not fit the context, the `dropped` oldest messages are left out, and kept all the same.

    Raises ContextError, OptionError.
    """

    def __init__(self, session: Session, given: Sequence[Message], *, reserve: int) -> None:
        kept = [{"role": "system", "content": session.system}] if session.system else []
        system = [message for message in given if message.get("role") == "system"] or kept
        self._said = [*session.messages, *(message for message in given if message not in system)]
        laid = session.lay_out([*system, *self._said], reserve=reserve)
        self.messages, self.dropped = laid.messages, laid.dropped
        self._session, self._system = session, "\n\n".join(message["content"] for message in system) or None
        self._is_kept = False

    def keep(self, answer: str) -> None:
        """Write what was said and answered, once. Raises OutputError."""
        if not self._is_kept:
            self._session.keep([*self._said, {"role": "assistant", "content": answer}], self._system)
            self._is_kept = True

    def close(self) -> None:
        """Let the next one have the session; safe to call twice."""
        self._session.close()


def read_conversation(folder: Path) -> dict[str, Any]:
    """What is kept of a session's messages; nothing where there is none. Raises OutputError where it is unreadable."""
    path = folder / _CONVERSATION
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error}): grok-local sessions rm {folder.name}") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise OutputError(f"{path}: is no session of this version: grok-local sessions rm {folder.name}")
    return found


def _digest(path: Path) -> str:
    """Of a file's bytes; empty where there is none."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED) if hasattr(os, "posix_fadvise") else None
    except OSError:
        return ""
    return digest.hexdigest()
