"""How a file is read while llama.cpp loads it: each byte once, and none that is streamed.

llama.cpp has a file read whole as it maps it, and copies what goes to devices from the mapping. A file larger than
memory would be read a second time by then, and of one whose experts are streamed most was read for nothing. So where
devices or streams take weights the file is mapped unread; what RAM holds is read when the devices have theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp

from grok_local.formats.gguf_file import Header
from grok_local.ggml.mapping import unread_mappings
from grok_local.placement.plan import Plan
from grok_local.placement.wishes import RAM
from grok_local.runtime.experts.capture import Advice, MappedPiece, mapped_pieces

__all__ = ["read_once"]

_AT_ONCE = 0.25  # of the RAM that is free: what is read before it is copied must still be there by then


@contextmanager
def read_once(plan: Plan, headers: Sequence[Header]) -> Iterator[Any]:
    """Around the loading of a model, with llama.cpp's progress callback. Raises what broke into the loading."""
    with_devices = any(share.used for share in plan.shares[:-1])
    if not (with_devices or plan.streamed):
        yield llama_cpp.llama_progress_callback()
        return
    progress = _Progress(plan, headers)
    with unread_mappings() as are_unread:
        yield progress.callback
    if progress.error:
        raise progress.error
    if are_unread and not plan.streamed:
        _read_rest(plan, headers)


class _Progress:
    """llama.cpp calls back for the first time when the file is mapped and nothing is copied yet."""

    def __init__(self, plan: Plan, headers: Sequence[Header]) -> None:
        self.error: BaseException | None = None
        self._plan, self._headers = plan, headers
        self._is_mapped = False
        self.callback = llama_cpp.llama_progress_callback(self._on_progress)

    def _on_progress(self, _: float, __: Any) -> bool:
        # An exception, as of Ctrl-C, would get lost in C.
        try:
            if not self._is_mapped:
                self._is_mapped = True
                _read_for_devices(self._plan, self._headers)
        except BaseException as error:
            self.error = error
        return self.error is None


def _read_for_devices(plan: Plan, headers: Sequence[Header]) -> None:
    """Have the copies find what they need: an unread mapping is read a page at a time.

    Much of it is read by the copies themselves, and a little beyond each, as the system reads ahead.
    """
    much = sum(share.weights for share in plan.shares[:-1]) > _AT_ONCE * plan.machine.available
    for piece in _pieces(headers):
        if much:
            piece.advise(Advice.SEQUENTIAL)
        else:
            _advise(piece, headers, Advice.WILLNEED, names=_names(plan, in_ram=False))


def _read_rest(plan: Plan, headers: Sequence[Header]) -> None:
    """Have what RAM holds of the file read, unless it is more than fits."""
    for piece in _pieces(headers):
        piece.advise(Advice.NORMAL)
        if not plan.disk:
            _advise(piece, headers, Advice.POPULATE_READ, names=_names(plan, in_ram=True) - plan.repacked)


def _names(plan: Plan, *, in_ram: bool) -> set[str]:
    return {weight.name for weight in plan.model.weights if (plan.place_of(weight) == RAM) is in_ram}


def _pieces(headers: Sequence[Header]) -> list[MappedPiece]:
    return mapped_pieces([header.path for header in headers])


def _advise(piece: MappedPiece, headers: Sequence[Header], advice: Advice, *, names: set[str]) -> None:
    for tensor in headers[piece.file].tensors:
        if tensor.name in names:
            piece.advise(advice, tensor.offset, tensor.offset + tensor.nbytes)
