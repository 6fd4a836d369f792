"""Prompts as scripts give them: as an argument, in a file, on stdin."""

from __future__ import annotations

import codecs
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from grok_local.commands.options import say
from grok_local.errors import OptionError

__all__ = ["decoded", "input_bytes", "input_lines", "lines_of", "prompt_text", "require_apart", "typed", "unescaped"]

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_PACKED = {b"\x1f\x8b": "gunzip", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd", b"PK\3\4": "unzip"}
_TABLES = (".csv", ".tsv")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def prompt_text(argument: str | None, file: Path | None) -> str:
    """The prompt: the file's text, then stdin's, then the argument, a newline between; one at the end is dropped.

    Stdin is read where the argument is "-", and beside one where something is piped in. Raises OptionError.
    """
    parts = [] if file is None else [_without_newline(decoded(input_bytes(file), str(file)))]
    if argument == "-" or (argument is None and file is None):
        parts.append(_asked_stdin())
    else:
        parts += _piped_stdin()
        parts += [] if argument is None else [typed(argument)]
    return "\n".join(parts)


def decoded(data: bytes, name: str) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark, or in the locale's encoding. Raises OptionError."""
    if unpack := next((program for begin, program in _PACKED.items() if data.startswith(begin)), None):
        raise OptionError(f"{name}: is compressed: {unpack} it first")
    if b"\0" in data and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise OptionError(f"{name}: no text: it has NUL bytes (UTF-16 needs its byte order mark)")
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        local = codecs.lookup(sys.stdin.encoding if sys.stdin else "utf-8").name
        if encoding == "utf-8" and not mark and local not in ("utf-8", "ascii"):
            return data.decode(local, "replace")
        raise OptionError(f"{name}: no text in {encoding.upper()}: byte {error.start} makes no sense") from None


def input_bytes(file: Path) -> bytes:
    """What is in a file, or with "-" comes from stdin. Raises OptionError."""
    return sys.stdin.buffer.read() if str(file) == "-" else _contents(file)


def input_lines(file: Path) -> str:
    """The text of an input whose lines are tasks. Raises OptionError for tables, and for JSON laid out over lines."""
    from grok_local.runtime.jobs.lines import require_lines

    if file.suffix.lower() in _TABLES:
        raise OptionError(f"{file}: no table is read: give an object a line (JSON), or a .txt, where each line is text")
    text = decoded(input_bytes(file), str(file))
    if file.suffix != ".txt":
        require_lines(text, str(file))
    return text


def require_apart(file: Path, output: Path | None) -> None:
    """Raises OptionError where an output is the file that its input comes from, under whatever name."""
    if output is None:
        return
    with suppress(OSError, ValueError):  # there is no such output yet, or no file behind stdin
        source = os.fstat(sys.stdin.fileno()) if str(file) == "-" else file.stat()
        if stat.S_ISREG(source.st_mode) and os.path.samestat(source, output.stat()):
            raise OptionError(f"-o {output}: is the input: give another file")


def lines_of(file: BinaryIO) -> Iterator[str]:
    """The lines of stdin, as they come. Raises OptionError for UTF-16 that makes no sense."""
    first = file.readline()
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield from decoded(first + file.read(), "stdin").splitlines()
        return
    for number, line in enumerate(chain([first.removeprefix(codecs.BOM_UTF8)], file), 1):
        try:
            yield decoded(line, "stdin")
        except OptionError:
            say(f"note: line {number}: what is no UTF-8 in it is read as \ufffd")
            yield line.decode("utf-8", "replace")


def typed(text: str) -> str:
    """An argument as it was typed: where the locale is C, Python takes what is not ASCII for halves of characters.

    Raises OptionError.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return decoded(os.fsencode(text), "the command line")
    return text


def unescaped(text: str) -> str:
    r"""What is written \\n, \\t, \\r or \\\\ in an option, as shells hand it on."""
    parts = typed(text).replace("\\\\", "\0").split("\\")
    first, *others = [part.replace("\0", "\\\\") for part in parts]
    whole = first + "".join(_ESCAPES.get(part[:1], "\\" + part[:1]) + part[1:] for part in others)
    return whole.replace("\\\\", "\\")


def _asked_stdin() -> str:
    if sys.stdin.isatty():
        raise OptionError("no prompt: give the text to continue, or - to read it from stdin, or -f FILE")
    return _without_newline(decoded(sys.stdin.buffer.read(), "stdin"))


def _piped_stdin() -> list[str]:
    """What is piped in beside a prompt."""
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError):
        return []
    if stat.S_ISREG(mode) and os.lseek(descriptor, 0, os.SEEK_CUR):
        say("note: stdin is a file that was read in part: it is left to whoever reads it (</dev/null: nothing is said)")
        return []
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        return []
    text = _without_newline(decoded(sys.stdin.buffer.read(), "stdin"), quiet=True)
    if text:
        say(f"note: {len(text)} characters from stdin come before the prompt")
    return [text] if text else []


def _without_newline(text: str, *, quiet: bool = False) -> str:
    if not text.endswith("\n"):
        return text
    if not quiet:
        say("note: the newline at the end of the prompt is left out")
    return text[:-1].removesuffix("\r")


def _contents(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise OptionError(f"{file}: cannot be read ({error.strerror or error})") from None
