"""Loading reads each byte once, wherever it goes, and of what is streamed only what stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import grok_local
from grok_local.formats import gguf_file
from grok_local.placement.shape import ModelShape, Role
from samples.processes import bytes_read, forget_cached
from tests.runtime.experts.streaming import memory_for

_SLACK = 2_000_000  # bytes: the header, and pages that two tensors share


@pytest.mark.parametrize(
    ("wishes", "experts"),
    [
        ({}, "read"),
        ({"gpu_layers": 2, "experts_on": 1}, "read"),
        ({"experts_on": "cpu"}, "read"),
        ({"gpu_layers": 0, "experts_on": "gpu"}, "read"),
        ({"experts_on": "cpu", "stream": "on"}, "read"),
        ({"experts_on": "cpu", "memory": "little"}, "streamed"),
    ],
)
def test_each_byte_is_read_once(packed_as: Callable[[str], Path], wishes: dict[str, Any], experts: str) -> None:
    path = packed_as("f32")
    shape = ModelShape.from_headers(gguf_file.read_model(path))
    wanted = sum(w.nbytes for w in shape.weights if experts == "read" or w.role is not Role.EXPERTS)
    if wishes.get("memory"):
        wishes = {**wishes, "memory": memory_for(path, 4, context=256)}
    forget_cached(path)
    before = bytes_read()
    with grok_local.load(path, context=256, repack="off", threads=2, **wishes) as model:
        count = bytes_read() - before
        assert model.placement.plan.streamed == ("stream" in wishes or "memory" in wishes)
    # `wanted` counts twice an embedding that is the output matrix on the device, too.
    assert count <= wanted + _SLACK
    if not count:
        pytest.skip("this folder is on no disk")
    assert count > 0.5 * wanted
