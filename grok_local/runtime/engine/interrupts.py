"""What ends an evaluation: somebody who asks for it, or Ctrl-C, which is raised afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import llama_cpp

from grok_local.runtime.graph.tap import Tap

__all__ = ["Halt", "ctrl_c_later"]


class Halt:
    """Whether what is under way shall end. llama.cpp asks `callback` for every node of the graph, and Python handles
    signals on the way.
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self.tap: Tap | None = None
        self.callback = llama_cpp.ggml_abort_callback(self._is_time)

    def close(self) -> None:
        """Nobody looks on any more."""
        self.tap = None

    def _is_time(self, _: Any) -> bool:
        return self.is_wanted or (self.tap is not None and self.tap.should_abort())


class _Interruptible(Protocol):
    interrupted: bool


@contextmanager
def ctrl_c_later(engine: _Interruptible) -> Iterator[None]:
    """In a callback from C a KeyboardInterrupt would get lost: Ctrl-C interrupts the engine, then it is raised.

    Handlers that others have installed are left alone.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _in_main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, _: object) -> None:
        came.append(number)
        engine.interrupted = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            engine.interrupted = False
    if came:
        raise KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
