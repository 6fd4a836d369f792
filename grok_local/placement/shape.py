"""What placement has to know of a model: how large each tensor is, where in the graph it stands, and how much of it a
token reads. Comes from a GGUF's header alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from grok_local.errors import GGUFError
from grok_local.formats.gguf_file import Header, Tensor
from grok_local.placement.runnable import why_not_loaded

__all__ = ["EXPERTS", "KV_WIDTHS", "ModelShape", "Role", "Weight", "padded"]

KV_WIDTHS = {"f16": 2, "bf16": 2, "f32": 4}  # bytes an element
EXPERTS = r"ffn_(gate|up|down|gate_up)_exps"
_LAYER = re.compile(r"blk\.(\d{1,6})\.")
_EXPERTS = re.compile(EXPERTS)
_NETWORK = re.compile(r"ffn_(gate|up|down)\.weight")
_MAX_LAYERS = 10_000


class Role(Enum):
    """Where a tensor stands in the graph."""

    INPUT = "input"  # the embedding: one row a token, always in RAM
    DENSE = "dense"  # of a layer, read by every token
    EXPERTS = "experts"  # of a layer, of which a token reads a few
    OUTPUT = "output"  # final norm and output matrix


@dataclass(frozen=True)
class Weight:
    """A tensor. `read` is bytes a token reads of it; `rows` is the length of its second dimension."""

    name: str
    type: str
    nbytes: int
    read: int
    rows: int
    role: Role
    layer: int | None = None
    tied: bool = False  # the embedding a second time, as output matrix: a copy only where that is on a device

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix that tokens are multiplied with."""
        return self.role is not Role.INPUT and self.rows > 1


@dataclass(frozen=True)
class ModelShape:
    """A model, as placement sees it. Sizes in bytes and elements."""

    name: str
    weights: tuple[Weight, ...]
    layers: int
    width: int
    heads: int
    kv_widths: tuple[int, ...]  # by layer: elements of K and V together, for a token
    hidden: int  # the widest a token becomes inside a feed-forward network, all its experts together
    vocabulary: int
    trained_context: int
    experts: int
    experts_used: int

    @classmethod
    def from_headers(cls, headers: Sequence[Header]) -> ModelShape:
        """Of a GGUF, all parts together. Raises GGUFError where its keys make no sense, or it is no text model."""
        if reason := why_not_loaded(headers):
            raise GGUFError(f"{headers[0].path}: {reason}")
        try:
            return _Reader(headers[0].metadata).shape([tensor for header in headers for tensor in header.tensors])
        except _NoModelError as error:
            raise GGUFError(f"{headers[0].path}: its metadata describes no model ({error})") from None

    @cached_property
    def nbytes(self) -> int:
        """Of all weights as they lie in the file."""
        return sum(weight.nbytes for weight in self.weights if not weight.tied)

    @cached_property
    def read_per_token(self) -> int:
        """Bytes of weights a token reads."""
        return sum(weight.read for weight in self.weights)

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The GGML types of what a token multiplies with, those it reads most of first."""
        totals: dict[str, int] = {}
        for weight in self.weights:
            if weight.role is not Role.INPUT and weight.rows > 1:
                totals[weight.type] = totals.get(weight.type, 0) + weight.read
        return tuple(sorted(totals, key=lambda kind: -totals[kind]))

    def kv_bytes(self, layer: int, *, context: int, kv_type: str) -> int:
        """What a layer's KV cache takes."""
        return self.kv_widths[layer] * KV_WIDTHS[kv_type] * padded(context)

    def layer_bytes(self, layer: int, role: Role) -> int:
        """All of a layer's weights of one role."""
        return self._by_layer.get((layer, role), 0)

    @cached_property
    def output_bytes(self) -> int:
        """What the output takes on a device."""
        return sum(weight.nbytes for weight in self.weights if weight.role is Role.OUTPUT)

    @cached_property
    def largest_expert_tensor(self) -> int:
        """Bytes, all its experts together."""
        return max((weight.nbytes for weight in self.weights if weight.role is Role.EXPERTS), default=0)

    @property
    def least_experts(self) -> int:
        """Bytes of the experts that one token needs of a layer."""
        return self.experts_used * self.largest_expert

    @cached_property
    def largest_expert(self) -> int:
        """Bytes of one expert, all its tensors together, in the layer where they are largest."""
        layers = [self.layer_bytes(layer, Role.EXPERTS) for layer in range(self.layers)]
        return max(layers, default=0) // max(self.experts, 1)

    @cached_property
    def has_dense_network(self) -> bool:
        """Whether layers have a feed-forward network that every token goes through."""
        return any(_NETWORK.search(weight.name) for weight in self.weights)

    @cached_property
    def _by_layer(self) -> dict[tuple[int | None, Role], int]:
        totals: dict[tuple[int | None, Role], int] = {}
        for weight in self.weights:
            key = (weight.layer, weight.role)
            totals[key] = totals.get(key, 0) + weight.nbytes
        return totals


def padded(context: int) -> int:
    """Cells that llama.cpp makes of so many tokens of context."""
    return -(-context // 256) * 256


def _layer_of(tensor: Tensor) -> int:
    found = _LAYER.match(tensor.name)
    return int(found[1]) if found else -1


class _NoModelError(Exception):
    """Why metadata describes no model; it never leaves this module."""


class _Keys:
    """A GGUF's metadata, of which nothing is believed before its kind is known."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata
        self.architecture = metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or not self.architecture:
            raise _NoModelError("general.architecture is missing")

    def name(self) -> str:
        return str(self._metadata.get("general.name", self.architecture))

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number; a key without a default has to be there."""
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise _NoModelError(f"{self.architecture}.{key} is missing")
        return self._whole(key, value)

    def numbers(self, key: str, count: int) -> list[int]:
        """A key that has one value, or one for each layer; zeros where it is missing."""
        value = self._metadata.get(f"{self.architecture}.{key}", 0)
        if isinstance(value, int):
            return [self._whole(key, value)] * count
        if not hasattr(value, "__len__") or isinstance(value, str):
            raise self._wrong_kind(key)
        items = [self._whole(key, item) for item in value]
        return items[:count] if len(items) >= count else [max(items, default=0)] * count

    def _whole(self, key: str, value: Any) -> int:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 0:
            raise self._wrong_kind(key)
        return int(value)

    def _wrong_kind(self, key: str) -> _NoModelError:
        return _NoModelError(f"{self.architecture}.{key} is no whole number")


class _Reader:
    def __init__(self, metadata: dict[str, Any]) -> None:
        self._keys = _Keys(metadata)

    def shape(self, tensors: Sequence[Tensor]) -> ModelShape:
        keys = self._keys
        blocks = keys.number("block_count")
        if not 0 < blocks <= _MAX_LAYERS or any(_layer_of(tensor) >= blocks for tensor in tensors):
            raise _NoModelError(f"{keys.architecture}.block_count is {blocks}, which its tensors contradict")
        # The last ones predict further tokens; llama.cpp leaves them out of its graph, and so of everything.
        layers = max(blocks - keys.number("nextn_predict_layers", 0), 1)
        tensors = [tensor for tensor in tensors if _layer_of(tensor) < layers]
        width = keys.number("embedding_length")
        experts, used = keys.number("expert_count", 0), keys.number("expert_used_count", 0)
        return ModelShape(
            name=keys.name(),
            weights=tuple(self._weights(tensors, used / experts if experts else 1.0)),
            layers=layers,
            width=width,
            heads=max(keys.numbers("attention.head_count", layers)),
            kv_widths=self._kv_widths(layers, width),
            hidden=self._hidden(used),
            vocabulary=next((t.shape[0] for t in tensors if t.name == "token_embd.weight"), 0),
            trained_context=keys.number("context_length"),
            experts=experts,
            experts_used=used,
        )

    def _weights(self, tensors: Sequence[Tensor], share: float) -> Iterator[Weight]:
        for tensor in tensors:
            layer = _layer_of(tensor)
            role = _role(tensor.name, layered=layer >= 0)
            read = {Role.EXPERTS: int(tensor.nbytes * share), Role.INPUT: tensor.nbytes // max(tensor.shape[0], 1)}
            yield Weight(
                tensor.name,
                tensor.type.name,
                tensor.nbytes,
                read.get(role, tensor.nbytes),
                tensor.shape[-2] if len(tensor.shape) > 1 else 1,
                role,
                layer if layer >= 0 else None,
            )
        embedding = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
        if embedding and all(tensor.name != "output.weight" for tensor in tensors):
            size, rows = embedding.nbytes, embedding.shape[0]
            yield Weight(embedding.name, embedding.type.name, size, size, rows, Role.OUTPUT, tied=True)

    def _kv_widths(self, layers: int, width: int) -> tuple[int, ...]:
        heads = self._keys.numbers("attention.head_count", layers)
        kv_heads = self._keys.numbers("attention.head_count_kv", layers)
        size = width // max(*heads, 1)
        key = self._keys.number("attention.key_length", 0) or size
        value = self._keys.number("attention.value_length", 0) or size
        return tuple(count * (key + value) for count in (kv_heads if any(kv_heads) else heads))

    def _hidden(self, used: int) -> int:
        dense = max(self._keys.numbers("feed_forward_length", 1))
        expert = self._keys.number("expert_feed_forward_length", 0) or dense
        return max(dense, expert * max(used, 1))


def _role(name: str, *, layered: bool) -> Role:
    if layered:
        return Role.EXPERTS if _EXPERTS.search(name) else Role.DENSE
    return Role.INPUT if name.startswith("token_embd") else Role.OUTPUT
