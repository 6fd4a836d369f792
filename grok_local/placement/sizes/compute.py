"""What llama.cpp's buffers for what is computed take: an upper bound, at most 1.3 times as much.

Buffers are reused, so the largest of what follows each other counts: attention, the network, the output. Without flash
attention, which llama.cpp does not have for Grok, the scores of all heads are the largest; of the network it is gate,
up and product of all of a token's experts. benchmarks/compute.py compares it with llama.cpp's own figures for models of
full size.
"""

from __future__ import annotations

from dataclasses import dataclass

from grok_local.placement.shape import ModelShape, padded

__all__ = ["OFFLOAD_TOKENS", "Copies", "compute_bytes", "idle_bytes", "largest_per_token", "scores_per_token"]

OFFLOAD_TOKENS = 32  # llama.cpp gives a GPU a product with weights in RAM from so many tokens on
_FLOAT = 4
# Beside the largest: activations of a token's width, and bytes whatever the batch. Without attention there are fewer.
_ACTIVATIONS, _SMALL = 7.25, 4 << 20
_NETWORK_ACTIVATIONS, _NETWORK_SMALL = 3, 1 << 20
_IDLE_SMALL = 6 << 20
_CACHE = 1.05  # of a copied KV cache: it is cast
_PIPELINE = 4  # batches that are under way where devices take turns
_PIPED_ACTIVATIONS = 9


@dataclass(frozen=True)
class Copies:
    """What a device is given from elsewhere while it works on a batch: bytes of a layer's weights, of the output
    matrix, of a layer's KV cache. With `piped`, devices take turns, and what they pass on is there several times.
    """

    weights: int = 0
    output: int = 0
    kv: int = 0
    piped: bool = False


def compute_bytes(
    model: ModelShape,
    *,
    context: int,
    batch: int,
    attention: bool = True,
    network: bool = True,
    output: bool = True,
    copies: Copies = Copies(),
    piece: int | None = None,
) -> int:
    """Of a place that does what is named, `batch` tokens at once, each compared with `context` cells of its cache.

    Where its memory comes in pieces that are too small for all of it, the largest may lie in two of them in turn.
    """
    token = _FLOAT * batch
    scores = (token * model.heads * padded(context) + int(_CACHE * copies.kv)) * attention
    hidden = token * model.hidden
    inner = max(3 * hidden, 2 * hidden + copies.weights) * network
    logits = (token * model.vocabulary + copies.output) * output
    activations, small = (_ACTIVATIONS, _SMALL) if attention else (_NETWORK_ACTIVATIONS, _NETWORK_SMALL)
    rest = padded(context) + int(activations * model.width)
    piped = (_PIPELINE * padded(context) + _PIPED_ACTIVATIONS * model.width) * copies.piped
    largest, beside = max(scores, inner, logits), token * (rest + piped) + small
    return largest * (2 if piece and largest + beside > piece else 1) + beside


def idle_bytes(model: ModelShape, *, context: int, batch: int, piped: bool) -> int:
    """Of RAM where devices do the work: what they are given."""
    times, activations = (_PIPELINE, 6) if piped else (1, 2)
    inputs = _FLOAT * batch * (times * padded(context) + activations * model.width)
    return inputs + _IDLE_SMALL


def scores_per_token(model: ModelShape, context: int) -> int:
    """Bytes of the attention scores of each token of a batch."""
    return _FLOAT * model.heads * padded(context)


def largest_per_token(model: ModelShape, context: int) -> int:
    """Bytes, for each token of a batch, of the largest tensor that is computed."""
    return _FLOAT * max(model.heads * padded(context), model.hidden, model.vocabulary)
