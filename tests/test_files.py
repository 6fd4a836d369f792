"""Direct I/O where there is none, JSON lines that were torn, locks that file systems lack, names."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grok_local import files
from grok_local.files import BLOCK, DirectFile, JsonLines, NoLocks, sync_folder

DATA = os.urandom(5 * BLOCK + 100)
DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture(params=["direct", "not opened", "not read or written"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DirectFile]:
    """On a file system with direct I/O, one that refuses to open files for it, and one that refuses to use it."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    if request.param == "not opened":
        refuse(monkeypatch, "open", when=lambda _, flags, *__: flags & DIRECT)
    opened = DirectFile(path, flags=os.O_RDWR)
    if request.param == "not read or written":
        cached = opened.fileno()
        for name in ("preadv", "pwrite"):
            refuse(monkeypatch, name, when=lambda fd, *_: fd != cached)
    with opened:
        yield opened


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, *, when: Any) -> None:
    real = getattr(os, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, call)


def aligned(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, -(-size // BLOCK) * BLOCK))[:size]


@pytest.mark.parametrize(("offset", "size"), [(0, BLOCK), (BLOCK, 4 * BLOCK), (7, 100), (BLOCK, 99)])
def test_what_is_read_is_what_is_there(file: DirectFile, offset: int, size: int) -> None:
    memory = aligned(size)
    assert file.read(memory, offset) == size
    assert bytes(memory) == DATA[offset : offset + size]


def test_a_system_that_reads_rubbish_directly_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "file", os.preadv
    path.write_bytes(DATA)

    def rubbish(fd: int, buffers: Any, offset: int) -> int:
        count = real(fd, buffers, offset)
        if DIRECT & fcntl.fcntl(fd, fcntl.F_GETFL):
            buffers[0][:2] = b"??"
        return count

    with DirectFile(path) as file:
        assert file.is_direct
    monkeypatch.setattr(os, "preadv", rubbish)
    with DirectFile(path) as file:
        assert not file.is_direct
        memory = aligned(BLOCK)
        file.read(memory, 0)
        assert memory == DATA[:BLOCK]


def test_at_the_end_less_is_read_and_then_nothing(file: DirectFile) -> None:
    memory = aligned(2 * BLOCK)
    assert file.read(memory, 5 * BLOCK) == 100
    assert bytes(memory[:100]) == DATA[-100:]
    assert file.read(memory, 6 * BLOCK) == 0


@pytest.mark.parametrize(("offset", "size"), [(0, BLOCK), (2 * BLOCK, 2 * BLOCK), (BLOCK + 5, 300)])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_what_is_written_is_there_and_nothing_else(file: DirectFile, offset: int, size: int, is_aligned: bool) -> None:
    memory = aligned(size + 1)[0 if is_aligned else 1 :][:size]
    memory[:] = b"\1" * size
    file.write(memory, offset, aligned=is_aligned)
    assert file.path.read_bytes() == DATA[:offset] + b"\1" * size + DATA[offset + size :]


def test_an_error_that_is_not_about_direct_io_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with DirectFile(path) as opened:

        def preadv(*_: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(OSError, match="Input/output error"):
            opened.read(aligned(BLOCK), 0)


# -- JSON lines --------------------------------------------------------------------------------------------------------


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text())), st.integers(0, 200))
def test_a_file_torn_anywhere_loses_its_last_line_alone(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "lines"
    with JsonLines(path) as lines:
        lines.append(*values)
    data = path.read_bytes()
    kept = data[: max(len(data) - cut, 0)]
    path.write_bytes(kept)
    whole = kept.count(b"\n")
    with JsonLines(path) as lines:
        assert lines.read() == values[:whole]
        lines.append("after")
    with JsonLines(path) as lines:
        assert lines.read() == [*values[:whole], "after"]


def test_what_is_no_json_is_no_value(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n\x00\xff\n[1,\n' + b"[" * 100_000 + b"\n2\n")
    with JsonLines(tmp_path / "lines") as lines:
        assert lines.read() == [{"a": 1}, None, None, None, 2]


def test_more_than_one_call_takes_is_written_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux takes at most 0x7ffff000 bytes in a call."""
    write, calls = os.write, list[int]()

    def short(fd: int, data: Any) -> int:
        calls.append(write(fd, data[:10]))
        return calls[-1]

    with JsonLines(tmp_path / "lines") as lines:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", short)
            lines.append({"text": "x" * 50}, {"text": "y"})
        assert lines.read() == [{"text": "x" * 50}, {"text": "y"}]
    assert len(calls) > 5


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "lines") as lines:

        def append(number: int) -> None:
            for _ in range(100):
                lines.append([number, "x" * 50 * number])

        threads = [threading.Thread(target=append, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        values = lines.read()
    assert sorted(number for number, _ in values) == sorted(list(range(8)) * 100)
    assert all(text == "x" * 50 * number for number, text in values)


def test_a_full_disk_is_an_error() -> None:
    code = (
        "import sys, pathlib; from grok_local.files import JsonLines\n"
        "JsonLines(pathlib.Path('/dev/full')).append({'a': 1})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "No space left on device" in done.stderr


# -- locks -------------------------------------------------------------------------------------------------------------


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path) as first, files.locked(path) as second:
        assert (first, second) == (True, False)
    with files.locked(path) as third:
        assert third


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_gone_on_with_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(NoLocks, match="has no locks"), files.locked(tmp_path / "lock") as free:
        assert free


def test_another_error_of_a_lock_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), files.locked(tmp_path / "lock"):
        pass


WITHOUT_LOCKS = """
import errno, fcntl, sys
from grok_local import cli
def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
cli.main()
"""


def test_the_user_is_told_once_that_there_are_no_locks(home: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_LOCKS, "generate", "Hello", "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if "no locks" in line]
    assert [line.partition(f"{home}")[0] for line in notes] == ["note: "]
    assert "Warning" not in done.stderr


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_of_parts() -> None:
    path = Path("models") / "x-00002-of-00003.gguf"
    assert files.is_part(path)
    assert not files.is_part(Path("x-2-of-3.gguf"))
    assert [part.name for part in files.part_names(path)] == [files.part_name("x.gguf", n, 3) for n in (1, 2, 3)]
    assert files.first_part(path) == Path("models") / "x-00001-of-00003.gguf"
    assert files.first_part(Path("x.gguf")) == Path("x.gguf")
    assert files.part_names(Path("x-00001-of-00000.gguf")) == []
    assert files.first_part(Path("x-00001-of-00000.gguf")) == Path("x-00001-of-00000.gguf")


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.json"
    files.write_whole(path, b"before")

    def replace(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, json.dumps({"after": 1}).encode())
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_its_file_system_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [errno.EINVAL]

    def fsync(_: int) -> None:
        raise OSError(code[0], os.strerror(code[0]))

    monkeypatch.setattr(os, "fsync", fsync)
    sync_folder(tmp_path)
    code[0] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)
