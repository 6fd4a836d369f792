"""What is shown of work under way, whatever a file calls its tensors."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

import pytest

from grok_local.quantize.convert import Progress
from grok_local.runtime.jobs.batch_job import BatchProgress
from grok_local.views.progress import batch_view, progress_view


class _Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def _stderr(stream: StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        yield


@pytest.mark.parametrize("stream", [_Terminal(), StringIO()], ids=["terminal", "pipe"])
def test_a_name_is_neither_markup_nor_a_command_of_the_terminal(
    stream: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _stderr(stream, monkeypatch), progress_view("verify", as_json=False) as show:
        show(Progress("check", 1, 1, "blk.0.w[/x]\x1b[2J", 0, 0))
    assert "blk.0.w[/x]" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "lines"), [(6.0, 4), (0.1, 0)])
def test_a_batch_that_was_told_of_is_told_to_its_end(
    monkeypatch: pytest.MonkeyPatch, seconds: float, lines: int
) -> None:
    stream, clock = StringIO(), itertools.count(0.0, seconds)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with _stderr(stream, monkeypatch), batch_view() as show:
        for done in range(3):
            show(BatchProgress(done, 3, 1, 7, 0))
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # no line is due
        show(BatchProgress(3, 3, 2, 7, 0))
    told = stream.getvalue().splitlines()
    assert (len(told), told[-1:]) == (lines, ["3 of 3 lines, 2 failed"] if lines else [])
    assert not [line for line in told if line.rstrip().endswith(",")]
