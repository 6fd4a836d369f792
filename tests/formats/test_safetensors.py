"""The safetensors reader: right about headers, and unharmed by any."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok_local.errors import CheckpointError
from grok_local.formats.safetensors import TensorInfo, read_safetensors
from samples.grok2_release import write_safetensors

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ARRAYS: dict[str, Any] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.ones((1, 2, 1), np.float64),
}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: object, data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read(tmp_path: Path, data: bytes) -> dict[str, TensorInfo]:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return read_safetensors(path)


def test_finds_every_tensor(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", ARRAYS)
    found = read_safetensors(path)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c": ("F64", (1, 2, 1)),
    }
    data = path.read_bytes()
    for name, info in found.items():
        assert data[info.offset : info.offset + info.nbytes] == ARRAYS[name].tobytes()


def test_headers_that_are_allowed(tmp_path: Path) -> None:
    entries = {
        "y": {**ENTRY, "data_offsets": [8, 16]},
        "x": ENTRY,
        "none": {**ENTRY, "shape": [0], "data_offsets": [8, 8]},
    }
    for header in (entries, json.dumps(entries).encode() + b"   ", {"__metadata__": {"a": "b"}, **entries}):
        found = read(tmp_path, file_of(header, bytes(16)))
        assert found["y"].offset - found["x"].offset == 8
    assert read(tmp_path, file_of({}, b"")) == {}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no safetensors file"),
        (b"abc", "no safetensors file"),
        (file_of({"x": ENTRY}, length=1 << 60), "no safetensors file"),
        (file_of({"x": ENTRY}, length=0), "no safetensors file"),
        (file_of({"x": ENTRY}, length=4000), "truncated: its header has 4000 bytes"),
        (file_of(b'{"x": '), "not JSON"),
        (file_of(b"\xff\xfe{}"), "not JSON"),
        (file_of(b"[" * 100_000), "not JSON"),
        (file_of(b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"), "not JSON"),
        (file_of(["x"]), "lists no tensors"),
        (file_of(b'{"x": 1, "x": 2}'), "has 'x' twice"),
        (file_of(b'{"x": {"dtype": "F32", "dtype": "F16"}}'), "has 'dtype' twice"),
        (file_of({"x": 5}), "has not exactly"),
        (file_of({"x": {**ENTRY, "more": 1}}), "has not exactly"),
        (file_of({"x": {**ENTRY, "dtype": "F31"}}), "of type 'F31', which is unknown"),
        (file_of({"x": {**ENTRY, "dtype": ["F32"]}}), "which is unknown"),
        (file_of({"x": {**ENTRY, "shape": [-2]}}), "has shape [-2]"),
        (file_of({"x": {**ENTRY, "shape": [2.0]}}), "has shape [2.0]"),
        (file_of({"x": {**ENTRY, "shape": [True, 2]}}), "has shape [True, 2]"),
        (file_of({"x": {**ENTRY, "shape": [1 << 60, 1 << 60]}}), "has shape [1152"),
        (file_of({"x": {**ENTRY, "shape": [1] * 9}}), "has shape [1, 1"),
        (file_of({"x": {**ENTRY, "shape": {"a": 1}}}), "has shape {'a': 1}"),
        (file_of({"x": {**ENTRY, "shape": [3]}}), "has 8 bytes for shape [3] of F32, which takes 12"),
        (file_of({"x": {**ENTRY, "data_offsets": [-8, 0]}}), "has data_offsets [-8, 0]"),
        (file_of({"x": {**ENTRY, "data_offsets": [8, 0]}}), "has -8 bytes"),
        (file_of({"x": {**ENTRY, "data_offsets": [0]}}), "has data_offsets [0]"),
        (file_of({"x": {**ENTRY, "data_offsets": [0, 1e3]}}), "has data_offsets"),
        (file_of({"x": {**ENTRY, "data_offsets": [1 << 40, (1 << 40) + 8]}}), "bytes before 'x' belong to no tensor"),
        (file_of({"x": ENTRY, "y": ENTRY}), "overlaps"),
        (file_of({"x": ENTRY, "y": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "'y' overlaps 'x'"),
        (file_of({"x": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "4 bytes before 'x' belong to no tensor"),
        (file_of({"x": ENTRY}, bytes(5)), "truncated: 3 bytes are missing"),
        (file_of({"x": ENTRY}, bytes(9)), "1 bytes after its last tensor"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, data)
    assert str(caught.value).startswith("x.safetensors: ")
    assert words in str(caught.value)


def test_a_header_as_long_as_may_be_takes_little_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    for header in (b"[" + b"[]," * 1_000_000 + b"[]]", b'{"x": "' + b"y" * 4_000_000 + b'"}', b" " * 5_000_000):
        with pytest.raises(CheckpointError):
            read(tmp_path, file_of(header))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000


def only_known_errors(tmp_path: Path, data: bytes) -> None:
    """What is read lies in the file, and no two tensors share a byte."""
    try:
        found = read(tmp_path, data)
    except CheckpointError as error:
        assert str(error).startswith("x.safetensors: ")  # noqa: PT017
        return
    spans = sorted((info.offset, info.offset + info.nbytes) for info in found.values() if info.nbytes)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start > 8 and end <= len(data) for start, end in spans)


@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.integers(0, 20))
def test_changed_and_missing_bytes(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(write_safetensors(tmp_path / "y.safetensors", ARRAYS).read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    only_known_errors(tmp_path, bytes(data[: len(data) - cut]))


SIZES = st.one_of(st.integers(-2, 12), st.integers(), st.sampled_from([2**31, 2**48 - 1, 2**63, 2**64]))
JSON = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "U64", "F8_E4M3", "x"]) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    }
)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=4), size=st.integers(0, 40))
def test_any_header(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    only_known_errors(tmp_path, file_of(header, bytes(size)))
