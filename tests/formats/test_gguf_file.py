"""The GGUF reader: right, and unharmed by damage."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grok_local
from grok_local.errors import GGUFError
from grok_local.formats import gguf_file

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf(
    tensor_type: int = 0, size: int = 64, keys: bytes = b"", count: int = 0, dims: tuple[int, ...] = (8, 2)
) -> bytes:
    """A GGUF with one tensor, written by hand."""
    info = _string("t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor_type, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, count) + keys + info
    return head + bytes(-len(head) % 32) + bytes(range(size))


@pytest.fixture
def write(tmp_path: Path) -> Path:
    return tmp_path / "x.gguf"


def test_reads_what_is_there(write: Path) -> None:
    array = _string("a") + struct.pack("<IIQ3h", 9, 3, 3, -1, 2, 3)
    strings = _string("s") + struct.pack("<IIQ", 9, 8, 2) + _string("x") + _string("ü")
    write.write_bytes(_gguf(keys=array + strings, count=2))
    header = gguf_file.read_header(write)
    assert header.metadata["a"].tolist() == [-1, 2, 3]
    assert header.metadata["s"] == ["x", "ü"]
    (tensor,) = header.tensors
    assert (tensor.shape, tensor.nbytes) == ((2, 8), 64)
    assert np.fromfile(write, np.uint8, 3, offset=tensor.offset).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (bytes(100), "never finished"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
        (b"MZ\x90" + bytes(100), "not a GGUF"),
        (b"PK\3\4" + bytes(100), "archive"),
        (struct.pack("<Q", 20) + b'{"__metadata__":{}}', "safetensors"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"\x1f\x8b\x08" + bytes(30), "compressed"),
        (b"tjgg" + bytes(30), "older than GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte order"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "damaged"),
        (_gguf(size=63), "truncated"),
        (_gguf(tensor_type=99), "unknown"),
        (_gguf(tensor_type=12), "damaged"),
        (_gguf(dims=(2**40, 2**40)), "truncated"),
        (_gguf(dims=(0, 1)), "damaged"),
        (_gguf(keys=_string("general.alignment") + struct.pack("<II", 4, 3), count=1), "alignment"),
    ],
)
def test_what_is_wrong_is_said(write: Path, data: bytes, words: str) -> None:
    write.write_bytes(data)
    with pytest.raises(GGUFError, match=words) as caught:
        gguf_file.read_header(write)
    assert str(write) in str(caught.value)


def test_hostile_counts_allocate_nothing(write: Path) -> None:
    tracemalloc.start()
    for body in (struct.pack("<IIQ", 9, 8, 2**62), struct.pack("<IIQ", 9, 4, 2**62), struct.pack("<IQ", 8, 2**62)):
        write.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("k") + body + bytes(100))
        with pytest.raises(GGUFError):
            gguf_file.read_header(write)
    nested = struct.pack("<IIQ", 9, 9, 1) * 50
    write.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("k") + nested)
    with pytest.raises(GGUFError):
        gguf_file.read_header(write)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@FUZZ
@given(cut=st.integers(0, 70_000))
def test_truncations(write: Path, packed: Path, cut: int) -> None:
    write.write_bytes(packed.read_bytes()[:cut])
    with pytest.raises(GGUFError):
        gguf_file.read_header(write)


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=3), tail=st.booleans()
)
def test_changed_bytes(write: Path, packed: Path, changes: list[tuple[int, int]], tail: bool) -> None:
    data = bytearray(packed.read_bytes())
    end = gguf_file.read_header(packed).tensors[0].offset
    for at, value in changes:
        data[end - 1 - at if tail else at] = value
    write.write_bytes(data)
    try:
        gguf_file.read_header(write)
    except GGUFError as error:
        assert str(write) in str(error)  # noqa: PT017


def test_parts_that_are_missing(packed: Path, tmp_path: Path) -> None:
    part = tmp_path / "y-00001-of-00002.gguf"
    part.write_bytes(packed.read_bytes())
    with pytest.raises(GGUFError, match=r"y-00002-of-00002\.gguf: this part of the model is missing"):
        gguf_file.read_model(part)


@pytest.mark.parametrize(
    "name",
    [
        "x.gguf.part1of2",
        "x.gguf.part-aa",
        "x.gguf-split-a",
        "x.gguf.split-b",
        "x.gguf.001",
        "x.gguf.part2",
        "x.part2of3",
    ],
)
def test_a_piece_of_a_file_is_to_be_joined(packed: Path, tmp_path: Path, name: str) -> None:
    piece = tmp_path / name
    piece.write_bytes(packed.read_bytes()[:5000])
    with pytest.raises(GGUFError, match="join all pieces in their order with cat"):
        gguf_file.read_model(piece)


@pytest.mark.parametrize("name", ["x.gguf", "partial.gguf", "split-brain.gguf", "x-00001-of-00002.gguf", "apart.gguf"])
def test_names_that_are_no_piece(name: str) -> None:
    assert not gguf_file.is_piece(Path(name))


def test_parts_that_were_glued_together(small: Path, tmp_path: Path) -> None:
    grok_local.quantize_checkpoint(small, tmp_path / "x.gguf", split_size="1M")
    parts = sorted(tmp_path.glob("x-*.gguf"))
    glued = tmp_path / "glued.gguf"
    glued.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(GGUFError, match="parts are not joined"):
        gguf_file.read_model(glued)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(parts[0].read_bytes())
    with pytest.raises(GGUFError, match="give it the name it was made with"):
        gguf_file.read_model(renamed)
