"""What only a terminal has: lines edited in place, words that are not broken, and grey."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

__all__ = ["dimmed", "edited_lines", "wrapped", "wrapped_words"]

_PROMPT = "> "
_LONGEST_WORD = 40  # columns; what is longer may as well be broken


def edited_lines(greeting: str, commands: Sequence[str]) -> Iterator[str]:
    """The lines that are typed at the terminal, until Ctrl-D; Tab completes `commands`."""
    if greeting:
        _say(wrapped(greeting, sys.stderr))
    read = _plain_line if _is_dumb() else _editor(commands)
    while True:
        try:
            yield read()
        except KeyboardInterrupt:
            _say("(Ctrl-D or /exit to leave)")
        except EOFError:
            return


@contextmanager
def wrapped_words() -> Iterator[Callable[[str], None]]:
    """A function that prints text as it comes; on a terminal, no word is broken at its edge."""
    if not sys.stdout.isatty() or _is_dumb():
        yield lambda text: print(text, end="", flush=True)
        return
    wrap = _WordWrap(_width())
    try:
        yield wrap.write
    finally:
        wrap.flush()


def wrapped(text: str, stream: TextIO) -> str:
    """The text with its lines broken between words, where the stream is a terminal."""
    if not stream.isatty():
        return text
    import textwrap

    return textwrap.fill(text, max(_width(), 20), break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def dimmed(text: str) -> str:
    """The text in grey, where stderr shows colours."""
    colours = sys.stderr.isatty() and not _is_dumb() and not os.environ.get("NO_COLOR")
    return f"\x1b[2m{text}\x1b[0m" if colours else text


class _WordWrap:
    """Holds a word back until its end is known."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._word = ""

    def write(self, text: str) -> None:
        for character in text:
            if character.isspace():
                self.flush()
                self._space(character)
            else:
                self._word += character
                if len(self._word) >= min(_LONGEST_WORD, self._width):
                    self.flush()
        sys.stdout.flush()

    def flush(self) -> None:
        width = self._columns(self._word)
        if self._column and self._column + width > self._width:
            sys.stdout.write("\n")
            self._column = 0
        sys.stdout.write(self._word)
        sys.stdout.flush()
        self._column = (self._column + width) % self._width if width else self._column
        self._word = ""

    def _space(self, character: str) -> None:
        if character == "\n":
            self._column = 0
        elif self._column + 1 >= self._width:
            character, self._column = "\n", 0
        else:
            self._column += 1
        sys.stdout.write(character)

    def _columns(self, word: str) -> int:
        from prompt_toolkit.utils import get_cwidth

        return get_cwidth(word)


def _is_dumb() -> bool:
    return os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")


def _plain_line() -> str:
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _editor(commands: Sequence[str]) -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    from grok_local import folders

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        [("bold", _PROMPT)],
        history=_history(folders.home() / "history"),
        key_bindings=keys,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        output=create_output(sys.stderr),
    )
    return session.prompt


def _history(path: Path) -> Any:
    """What was typed before, for its owner's eyes alone."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
