"""What llama.cpp would allocate for a plan, by its own account, and devices that say they take larger tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from grok_local.ggml.devices import BackendDevice
from grok_local.ggml.libraries import open_library, prototype
from grok_local.placement.plan import Plan
from grok_local.placement.sizes.compute import OFFLOAD_TOKENS
from grok_local.runtime.engine.opening import accounted

__all__ = ["Account", "account_of", "taking"]

Account: TypeAlias = list[tuple[str, int, int]]  # place, bytes planned, bytes held; where there are any

_P = ctypes.c_void_p
_SUPPORTS = ctypes.CFUNCTYPE(ctypes.c_bool, _P, _P)
_SUPPORTS_AT, _POINTERS = 9, 13  # struct ggml_backend_device_i
_SOURCES_AT, _SOURCES = 152, 10  # struct ggml_tensor


def account_of(path: Path, plan: Plan) -> Account:
    """Buffers for what is computed: of a batch, or of a few tokens, which llama.cpp does not give to a device."""
    held = [found.compute for found in accounted(path, plan)]
    if not plan.streamed and any(share.used for share in plan.shares[:-1]):
        held = [max(pair) for pair in zip(held, [found.compute for found in accounted(path, _few(plan))], strict=True)]
    places = zip(plan.shares, held, strict=True)
    return [(share.place, share.compute, compute) for share, compute in places if compute]


def _few(plan: Plan) -> Plan:
    """The same for fewer tokens at once, of one sequence, which has all of the cache."""
    alone = replace(plan.wishes, sequences=1)
    return replace(plan, wishes=alone, context=plan.cells, batch=min(plan.batch, OFFLOAD_TOKENS - 1))


@contextmanager
def taking(devices: Sequence[BackendDevice], largest: int | None) -> Iterator[None]:
    """Meanwhile the devices take tensors of so many bytes, None being any; what is computed then is nonsense."""
    base = open_library("ggml-base")
    prototype(base, "ggml_nbytes", ctypes.c_size_t, _P)

    def supports(_: int, operation: int) -> bool:
        sources = (_P * _SOURCES).from_address(operation + _SOURCES_AT)
        sizes = [base.ggml_nbytes(tensor) for tensor in (operation, *filter(None, sources))]
        return largest is None or max(sizes) <= largest

    callback = _SUPPORTS(supports)
    tables = [(_P * _POINTERS).from_address(device.handle) for device in devices]
    before = [table[_SUPPORTS_AT] for table in tables]
    for table in tables:
        table[_SUPPORTS_AT] = ctypes.cast(callback, _P).value
    try:
        yield
    finally:
        for table, original in zip(tables, before, strict=True):
            table[_SUPPORTS_AT] = original
