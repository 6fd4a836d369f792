"""What is shown of work under way, whatever a file calls its tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

import pytest

from grok_local.quantize.convert import Progress
from grok_local.views.progress import progress_view


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
