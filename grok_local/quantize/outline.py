"""The GGUF a release would become, before anything is downloaded: a header without a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gguf.constants import GGML_QUANT_SIZES

from grok_local.errors import OptionError
from grok_local.formats.gguf_file import KEYS, Header, Tensor
from grok_local.models import grok1, grok2
from grok_local.models.grok1 import HEAD_SIZE, Kind
from grok_local.quantize.recipe import Recipe, choose_type, recipe_named

__all__ = ["RELEASES", "outline"]

_SCALED = ("width", "expert_width", "dense_width", "kv_width", "heads", "kv_heads", "vocabulary")

_Dims = TypeVar("_Dims", grok1.Dimensions, grok2.Dimensions)
_Tensors = Iterator[tuple[str, Kind, tuple[int, ...]]]


def outline(release: str, *, type: str = "q4_k", layers: int = 64, narrower: int = 1) -> Header:
    """The header of `release` ("grok-1", "grok-2") packed as `type`: keys that matter for placement, and all tensors.

    For benchmarks `layers` makes it shallower, and `narrower` divides every width. Raises OptionError.
    """
    if release not in RELEASES:
        raise OptionError(f"no release {release!r}: choose one of {', '.join(RELEASES)}")
    recipe = recipe_named(type)
    metadata, tensors = RELEASES[release](layers, narrower)
    path = Path(f"{release}-{recipe.name}.gguf")
    placed = tuple(_placed(tensors, recipe, path))
    end = placed[-1].offset + placed[-1].nbytes
    return Header(path, {**metadata, KEYS.TYPE: recipe.name}, placed, size=end, end=0)


def _placed(tensors: _Tensors, recipe: Recipe, path: Path) -> Iterator[Tensor]:
    offset = 0
    for name, kind, shape in tensors:
        ggml_type = choose_type(recipe, kind, shape[-1])
        block, size = GGML_QUANT_SIZES[ggml_type]
        nbytes = math.prod(shape) // block * size
        yield Tensor(name, shape, ggml_type, offset, nbytes, path)
        offset += nbytes


def _grok1(layers: int, narrower: int) -> tuple[dict[str, Any], _Tensors]:
    dims, facts = _resized(grok1.RELEASE, layers, narrower), grok1.CONSTANTS
    sizes = {"feed_forward_length": dims.expert_width, "expert_used_count": facts.experts_used}
    metadata = _metadata(facts.name, dims, heads=dims.heads, kv_heads=dims.kv_heads, context=facts.context)
    return metadata | {f"grok.{key}": value for key, value in sizes.items()}, _grok1_tensors(dims)


def _grok1_tensors(dims: grok1.Dimensions) -> _Tensors:
    for leaf in grok1.leaves(dims):
        transposed = leaf.kind not in (Kind.EMBEDDING, Kind.NORM)
        shape = (*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-2]) if transposed else leaf.shape
        yield leaf.gguf_name, leaf.kind, shape


def _grok2(layers: int, narrower: int) -> tuple[dict[str, Any], _Tensors]:
    dims = _resized(grok2.RELEASE, layers, narrower)
    sizes = {
        "feed_forward_length": dims.dense_width,
        "expert_feed_forward_length": dims.expert_width,
        "expert_used_count": dims.experts_used,
    }
    metadata = _metadata("Grok-2", dims, heads=dims.heads, kv_heads=dims.kv_heads, context=dims.context)
    return metadata | {f"grok.{key}": value for key, value in sizes.items()}, grok2.tensors(dims)


def _resized(dims: _Dims, layers: int, narrower: int) -> _Dims:
    sizes = {field: getattr(dims, field) // narrower for field in vars(dims) if field in _SCALED}
    return replace(dims, layers=layers, **sizes)


def _metadata(
    name: str, dims: grok1.Dimensions | grok2.Dimensions, *, heads: int, kv_heads: int, context: int
) -> dict[str, Any]:
    sizes = {
        "block_count": dims.layers,
        "context_length": context,
        "embedding_length": dims.width,
        "vocab_size": dims.vocabulary,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": HEAD_SIZE,
        "attention.value_length": HEAD_SIZE,
        "expert_count": dims.experts,
    }
    keys: dict[str, Any] = {f"grok.{key}": value for key, value in sizes.items()}
    return {"general.architecture": "grok", "general.name": name, **keys}


RELEASES: dict[str, Callable[[int, int], tuple[dict[str, Any], _Tensors]]] = {"grok-1": _grok1, "grok-2": _grok2}
