"""The pickle reader: right about the release's pickles, and unharmed by any other."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok_local.errors import CheckpointError, GrokLocalError
from grok_local.formats.pickles import read_pickle
from samples.checkpoints import QuantizedWeight8bit, dump

RNG = np.random.default_rng(0)
QUANTIZED = QuantizedWeight8bit(
    RNG.integers(-127, 128, (2, 6, 4), np.int8), RNG.random((2, 3, 4)).astype(ml_dtypes.bfloat16)
)
PLAIN = RNG.random((5, 7), np.float32)


def _read(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "tensor00000_000"
    path.write_bytes(data)
    return path, read_pickle(path)


@pytest.mark.parametrize("size", [3, 300, 70_000])  # the three ways a pickle holds bytes
def test_finds_the_payload_of_an_array(tmp_path: Path, size: int) -> None:
    array = RNG.random((size, 2), np.float32)
    path, stored = _read(tmp_path, dump(array))
    payload = path.read_bytes()[stored.weight.offset :][: stored.weight.nbytes]
    assert np.array_equal(np.frombuffer(payload, np.float32).reshape(stored.weight.shape), array)
    assert stored.scales is None


def test_finds_both_payloads_of_a_quantized_weight(tmp_path: Path) -> None:
    path, stored = _read(tmp_path, dump(QUANTIZED))
    data = path.read_bytes()
    weight = np.frombuffer(data, np.int8, stored.weight.nbytes, stored.weight.offset)
    scales = np.frombuffer(data, ml_dtypes.bfloat16, 24, stored.scales.offset)
    assert np.array_equal(weight.reshape(2, 6, 4), QUANTIZED.weight)
    assert np.array_equal(scales.reshape(2, 3, 4), QUANTIZED.scales)


def test_reads_what_numpy_2_writes(tmp_path: Path) -> None:
    assert _read(tmp_path, pickle.dumps(PLAIN, protocol=4))[1].weight.shape == (5, 7)


class _Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "system"), (eval, "eval"), (__import__, "__import__"), (open, "open")]
)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_hostile_pickle_is_refused_by_name_and_never_run(
    tmp_path: Path, function: Any, name: str, protocol: int
) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(CheckpointError, match=r"tensor00000_000: .*refused") as caught:
        _read(tmp_path, pickle.dumps(_Evil(function, f"touch {mark}"), protocol=protocol))
    assert name in str(caught.value) or "opcode" in str(caught.value)
    assert not mark.exists()


def test_nested_tuples_take_no_time(tmp_path: Path) -> None:
    bomb = b"\x80\x04N\x94" + b"h\x00h\x00\x86r\x00\x00\x00\x00" * 200  # each level twice the one before
    for use in (b"\x8c\x01x\x93.", b"h\x00\x93.", b"}h\x00Ns.", b"."):
        with pytest.raises(CheckpointError):
            _read(tmp_path, bomb + use)


def test_a_length_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    tracemalloc.start()
    long = b"\xff" * 7 + b"\x00"
    for opcode in (b"B\xff\xff\xff\x7f", b"\x8e" + long, b"X\xff\xff\xff\x7f", b"\x8d" + long):
        with pytest.raises(CheckpointError):
            _read(tmp_path, b"\x80\x04" + opcode + b"abc")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_bytes_after_the_end_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="after the end"):
        _read(tmp_path, dump(PLAIN) + b"x")


FORTRAN = np.asfortranarray(np.ones((3, 2), np.float32))


@pytest.mark.parametrize("value", [np.zeros((2, 2)), np.zeros(3, np.int64), FORTRAN])
def test_arrays_the_release_has_not_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="tensor00000_000"):
        _read(tmp_path, dump(value))


def _only_known_errors(tmp_path: Path, data: bytes) -> None:
    try:
        _read(tmp_path, data)
    except GrokLocalError as error:
        assert "tensor00000_000" in str(error)  # noqa: PT017


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(cut=st.integers(0, 400))
def test_truncations(tmp_path: Path, cut: int) -> None:
    data = dump(QUANTIZED)
    if cut < len(data):
        with pytest.raises(CheckpointError, match="tensor00000_000"):
            _read(tmp_path, data[:cut])


@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(dump(QUANTIZED))
    for at, value in changes:
        data[at % len(data)] = value
    _only_known_errors(tmp_path, bytes(data))


DTYPE = b"\x8c\x05numpy\x8c\x05dtype\x93"
OPCODES = [bytes([i]) for i in range(256)]


@FUZZ
@given(st.lists(st.one_of(st.sampled_from(OPCODES), st.binary(max_size=8), st.just(DTYPE)), max_size=60))
def test_any_opcodes(tmp_path: Path, parts: list[bytes]) -> None:
    _only_known_errors(tmp_path, b"\x80\x04" + b"".join(parts) + b".")


def test_a_pickle_without_end_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    buffer.write(b"\x80\x04" + b"N" * 100_000)
    with pytest.raises(CheckpointError, match="goes on and on"):
        _read(tmp_path, buffer.getvalue())
