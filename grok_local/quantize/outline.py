"""The GGUF a release would become, before anything is downloaded: a header without a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from grok_local.formats.gguf_file import KEYS, Header, Tensor
from grok_local.models.catalogue import release_named
from grok_local.models.release import Dimensions, Target
from grok_local.quantize.recipe import Recipe, choose_type, recipe_named

__all__ = ["outline"]

_WIDTHS = ("width", "expert_width", "dense_width", "kv_width", "vocabulary")


def outline(name: str, *, type: str = "q4_k", layers: int = 64, narrower: int = 1) -> Header:
    """The header of the release `name` packed as `type`: its hyperparameters, and all tensors.

    For benchmarks `layers` makes it shallower, and `narrower` divides every width. Raises OptionError.
    """
    release, recipe = release_named(name), recipe_named(type)
    dims = _resized(release.published, layers, narrower)
    hyperparameters = {f"grok.{key}": value for key, value in release.metadata(dims).items()}
    metadata = {"general.architecture": "grok", "general.name": release.title, **hyperparameters}
    path = Path(f"{name}-{recipe.name}.gguf")
    placed = tuple(_placed(release.targets(dims), recipe, path))
    end = placed[-1].offset + placed[-1].nbytes
    return Header(path, {**metadata, KEYS.TYPE: recipe.name}, placed, size=end, end=0)


def _placed(targets: Iterable[Target], recipe: Recipe, path: Path) -> Iterator[Tensor]:
    offset = 0
    for target in targets:
        ggml_type = choose_type(recipe, target.kind, target.shape[-1])
        block, size = GGML_QUANT_SIZES[ggml_type]
        nbytes = math.prod(target.shape) // block * size
        yield Tensor(target.name, target.shape, ggml_type, offset, nbytes, path)
        offset += nbytes


def _resized(dims: Dimensions, layers: int, narrower: int) -> Dimensions:
    return replace(dims, layers=layers, **{name: getattr(dims, name) // narrower for name in _WIDTHS})
