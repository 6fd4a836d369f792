"""A GGUF's header as placement sees it: what it must have, and what is not believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from grok_local.errors import GGUFError
from grok_local.placement.shape import ModelShape
from grok_local.quantize.outline import outline

HEADER = outline("grok-1")


def shape_with(changes: dict[str, Any]) -> ModelShape:
    """Grok-1's, with other metadata; None leaves a key out."""
    metadata = {**HEADER.metadata, **changes}
    return ModelShape.from_headers([replace(HEADER, metadata={k: v for k, v in metadata.items() if v is not None})])


@pytest.mark.parametrize(
    "key", ["general.architecture", "grok.block_count", "grok.embedding_length", "grok.context_length"]
)
def test_a_key_that_is_missing_is_named(key: str) -> None:
    with pytest.raises(GGUFError, match=rf"grok-1-q4_k.gguf: its metadata describes no model \({key} is missing"):
        shape_with({key: None})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", "64"),
        ("block_count", 64.0),
        ("block_count", True),
        ("block_count", -1),
        ("block_count", 0),
        ("block_count", [64]),
        ("embedding_length", "wide"),
        ("context_length", np.array([8192.0])),
        ("expert_count", "8"),
        ("attention.head_count", np.array([1.5] * 64, np.float32)),
        ("attention.head_count", ["48"] * 64),
        ("attention.head_count_kv", "8"),
        ("attention.head_count_kv", False),
        ("feed_forward_length", 3.5),
        ("general.architecture", 5),
    ],
)
def test_a_value_of_the_wrong_kind_is_no_zero(key: str, value: Any) -> None:
    name = key if key.startswith("general") else f"grok.{key}"
    with pytest.raises(GGUFError, match=name):
        shape_with({name: value})


def test_values_by_layer() -> None:
    """As models have them whose layers differ."""
    heads = np.array([8] * 32 + [4] * 32, np.int32)
    shape = shape_with({"grok.attention.head_count_kv": heads})
    assert shape.kv_widths == tuple(2 * 128 * int(count) for count in heads)
    assert shape_with({"grok.attention.head_count_kv": None}).kv_widths == (2 * 128 * 48,) * 64
