"""What goes wrong while experts are streamed is said, and leaves nothing wrong behind."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grok_local
from grok_local.errors import ModelError, OptionError, PlacementError
from grok_local.ggml import tensors
from grok_local.runtime.experts import streamer
from tests.conftest import Run
from tests.runtime.experts.streaming import IDS, OPTIONS, memory_for


@pytest.fixture(scope="module")
def path(golden_q4: Path) -> Path:
    return golden_q4


@pytest.fixture
def streamed(path: Path, tmp_path: Path) -> Iterator[grok_local.Model]:
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    with grok_local.load(copy, memory=memory_for(path, 9), **OPTIONS) as model:
        yield model


def test_a_file_that_changes_is_noticed(streamed: grok_local.Model) -> None:
    reply = streamed.generate("Hello", max_tokens=400, temperature=0)
    next(reply)
    with streamed.path.open("rb+") as file:
        file.seek(20_000_000)
        file.write(b"something else")
    with pytest.raises(ModelError, match="has changed"):
        list(reply)
    with pytest.raises(ModelError, match="has changed"):
        list(streamed.generate("Hello", max_tokens=4))


def test_a_file_whose_time_is_put_back_is_noticed(streamed: grok_local.Model) -> None:
    status = streamed.path.stat()
    with streamed.path.open("rb+") as file:
        file.seek(20_000_000)
        file.write(b"something else")
    os.utime(streamed.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelError, match="has changed"):
        streamed.logits(IDS[:5])


def test_a_file_that_becomes_shorter_is_noticed(streamed: grok_local.Model) -> None:
    reply = streamed.generate("Hello", max_tokens=400, temperature=0)
    next(reply)
    os.truncate(streamed.path, 1_000_000)
    with pytest.raises(ModelError, match=r"changed|shorter"):
        list(reply)


def test_a_file_that_vanishes_is_noticed(streamed: grok_local.Model) -> None:
    reply = streamed.generate("Hello", max_tokens=400, temperature=0)
    next(reply)
    streamed.path.unlink()
    with pytest.raises(ModelError, match="was deleted while it was in use"):
        list(reply)


def test_a_read_that_fails_is_an_error_and_can_be_tried_again(
    streamed: grok_local.Model, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.preadv, [5]

    def preadv(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(ModelError, match=r"copy.gguf: cannot be read \(Input/output error\)"):
            streamed.logits(IDS[:300])
    assert np.array_equal(streamed.logits(IDS[:300]), expected[0])


def test_an_interrupt_ends_waiting_for_a_slow_disk(
    streamed: grok_local.Model, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(*arguments: Any) -> int:
        time.sleep(0.3)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        reply = streamed.generate(streamed.detokenize(IDS[:50]), max_tokens=100)
        threading.Timer(0.5, streamed.interrupt).start()
        started = time.monotonic()
        assert list(reply) == []
        assert time.monotonic() - started < 3
    assert reply.finish_reason == "interrupted"
    streamed.engine.interrupted = False
    assert np.array_equal(streamed.logits(IDS[:300]), expected[0])


def test_ctrl_c_at_any_moment_leaves_nothing_wrong(streamed: grok_local.Model) -> None:
    rng, caught, right = random.Random(4), 0, streamed.logits(IDS[:60])
    for _ in range(25):
        timer = threading.Timer(rng.uniform(0, 0.12), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        try:
            found = streamed.logits(IDS[:60])
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            caught += 1
        else:
            assert np.array_equal(found, right)
        timer.join()
        assert np.array_equal(streamed.logits(IDS[:60]), right)
    assert caught > 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_from_outside_at_any_moment_leaves_nothing_wrong(streamed: grok_local.Model) -> None:
    def ring(*_: object) -> None:
        raise TimeoutError

    before, rng, broken = signal.signal(signal.SIGALRM, ring), random.Random(5), 0
    right = streamed.logits(IDS[:60])
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.08))
                found = streamed.logits(IDS[:60])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (TimeoutError, ModelError):
                broken += 1
            else:
                assert np.array_equal(found, right)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert np.array_equal(streamed.logits(IDS[:60]), right)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert broken > 5


def test_a_graph_without_what_was_read_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "sources", lambda _: iter(()))  # no node uses any weight, as far as can be seen
    with (
        grok_local.load(path, memory=memory_for(path, 9), **OPTIONS) as model,
        pytest.raises(ModelError, match="--stream off"),
    ):
        model.logits(IDS[:5])


def test_an_exception_while_looking_on_comes_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with grok_local.load(path, memory=memory_for(path, 9), **OPTIONS) as model:
        monkeypatch.setattr(streamer, "read_ints", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.logits(IDS[:5])
        monkeypatch.undo()
        assert model.logits(IDS[:5]).shape == (5, 2048)


def test_memory_that_cannot_be_reserved_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def residents(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(streamer, "residents", residents)
    with pytest.raises(ModelError, match="no memory can be reserved"):
        grok_local.load(path, memory=memory_for(path, 9), **OPTIONS)


# -- a record of routing -----------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_written_is_one_error(path: Path, tmp_path: Path, run: Run) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    options = ["--context", 512, "--max-tokens", 200, "--trace-experts", tmp_path / "t"]
    found = run("generate", "-m", path, "hello hello", *options, preexec_fn=small_files)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 't'}: the record of experts cannot be written")
    # What was written of it is of use.
    assert "tokens through 12 layers" in run("routing", tmp_path / "t").stdout


def test_a_record_without_a_token_does_not_stay(path: Path, tmp_path: Path) -> None:
    with grok_local.load(path, trace_experts=tmp_path / "t", **OPTIONS):
        assert (tmp_path / "t").exists()
    assert not (tmp_path / "t").exists()
    with pytest.raises(PlacementError):
        grok_local.load(path, trace_experts=tmp_path / "t", memory=1000, **OPTIONS)
    assert not (tmp_path / "t").exists()
    with pytest.raises(OptionError, match="name a file"):
        grok_local.load(path, trace_experts="", **OPTIONS)
