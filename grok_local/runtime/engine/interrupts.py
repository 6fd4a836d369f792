"""Ctrl-C while C code computes: it ends the evaluation first, and is raised afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["ctrl_c_later"]


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
